//! The socket device (virtio 1.2 §5.10): streams between guest and host with no network.
//!
//! ```text
//!   guest                     device                      host
//!   listen(port)  ◄─REQUEST─  listener  ◄─ "CONNECT port\n" ─ connect()
//!                 ─RESPONSE─►           ── "OK port\n" ─────►
//!   connect(port) ─REQUEST─►  handout   ── port + descriptor (SCM_RIGHTS) ─►
//!                 ◄─RESPONSE─
//! ```
//!
//! Host programs reach a guest port through an inherited listening UNIX socket. A connection that
//! the guest makes is handed out over an inherited SOCK_SEQPACKET socket, one message each
//! ([`handout`]). In both directions flow control holds (§5.10.6.3): bytes that a slow host program
//! doesn't take are kept up to the advertised window, and no further.
//!
//! Bounds: [`MAX_CONNECTIONS`], a window each, a fixed number of answers to packets that belong to
//! no connection.

mod connection;
mod device;
mod handout;
mod handshake;
mod mux;
mod packet;

pub use device::{Vsock, VsockConfig};
pub use handout::{HANDOUT_BYTES, Handout};
pub use packet::{HEADER_BYTES, HOST_CID, Header};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 4096;
/// Receive window of the first connections: what one round trip can carry.
const WINDOW_BYTES: u32 = 256 << 10;
/// How many have it.
const LARGE_WINDOWS: usize = 128;
/// Receive window of the others. All windows together stay below 160 MiB.
const SMALL_WINDOW_BYTES: u32 = 32 << 10;

#[cfg(test)]
mod tests;
