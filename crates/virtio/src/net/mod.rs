//! The network device (virtio 1.2 §5.1) in front of a [`ringfence_netstack::NetBackend`].
//!
//! Frames go straight between guest memory and the back end, with the virtio header that both
//! understand, so that checksums and segmentation are left to whoever does them best. Received
//! frames may be spread over several of the guest's buffers (MRG_RXBUF).

mod control;
mod device;
mod lend;
mod receive;
mod send;

pub use device::{Net, NetConfig};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Largest frame with its header: a segment of 64 KiB that is yet to be split.
const MAX_FRAME: usize = 65_535 + 14 + ringfence_netstack::HEADER_BYTES;
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;

/// Feature bits (§5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const CTRL_RX: u64 = 1 << 18;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const CTRL_MAC_ADDR: u64 = 1 << 23;
}

#[cfg(test)]
mod tests;
