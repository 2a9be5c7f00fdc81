//! The block device (virtio 1.2 §5.2) in front of a [`ringfence_block::Disk`].
//!
//! ```text
//!   queue ─► parse ─► rate limit ─┬─ cached reads, writes, discards: at once, on the event loop
//!                                 └─ other reads, flushes: a few threads ─► completion ─► used ring
//! ```
//!
//! A board may give it an event loop of its own, so that a write that waits for the disk delays no
//! other device. Threads rather than io_uring: see `docs/adr/0033-block-io.md`.

mod device;
mod pool;
mod request;

pub use device::{Block, BlockConfig};
pub use pool::ThreadStart;

#[cfg(test)]
mod tests;
