//! Fuzz bodies: plain functions from bytes to "nothing bad happened".
//!
//! Bytes are read as a script of what a guest does ([`script`]), so that any input is a valid one
//! and a fuzzer's changes stay meaningful. Each body panics when an oracle fails; the least oracle
//! is that the device neither panics nor spins and can be started again afterwards.
//!
//! The same bodies run in two places: under a fuzzer (`fuzz/fuzz_targets`, one line each), and with
//! seeded input as ordinary tests (`tests/seeded.rs`). A crash that a fuzzer finds becomes a test of
//! its own there.

#![forbid(unsafe_code)]

pub mod agent;
pub mod devices;
pub mod fs;
pub mod gateway;
pub mod loader;
pub mod net;
pub mod pci;
pub mod qcow2;
pub mod script;
pub mod vsock;

/// A body.
pub type Body = fn(&[u8]);

/// All bodies by name.
pub const BODIES: &[(&str, Body)] = &[
    ("virtio_rng", devices::rng),
    ("virtio_console", devices::console),
    ("virtio_balloon", devices::balloon),
    ("virtio_block", devices::block),
    ("virtio_net", net::net),
    ("gateway", gateway::gateway),
    ("virtio_vsock", vsock::vsock),
    ("virtio_fs", fs::fs),
    ("pci_root", pci::root),
    ("qcow2_image", qcow2::image),
    ("loader_kernel", loader::kernel),
    ("agent_protocol", agent::protocol),
];

/// Bytes that are always the same for a seed.
#[must_use]
pub fn seeded_bytes(seed: u64, len: usize) -> Vec<u8> {
    // xorshift64*: the state must not be zero.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let words = len.div_ceil(8);
    let mut bytes: Vec<u8> = (0..words).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}
