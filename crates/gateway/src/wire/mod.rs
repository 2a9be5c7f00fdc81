//! Frames: taken apart without copying, and put together before a payload.

mod build;
mod checksum;
mod parse;

pub(crate) use build::{Builder, Large, icmp_error};
pub(crate) use checksum::{Sum, pseudo_header};
pub(crate) use parse::{Ethernet, IpPacket, NotIp, TcpFlags, TcpSegment, UdpDatagram, VnetHeader};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

pub(crate) const ETHERNET_BYTES: usize = 14;
pub(crate) const VNET_BYTES: usize = ringfence_netstack::HEADER_BYTES;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

/// Two bytes, big end first, at `at`; zero past the end.
pub(crate) fn be16(data: &[u8], at: usize) -> u16 {
    match data.get(at..at + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

/// Four bytes, big end first, at `at`; zero past the end.
pub(crate) fn be32(data: &[u8], at: usize) -> u32 {
    match data.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_be_bytes([a, b, c, d]),
        _ => 0,
    }
}

#[cfg(test)]
use parse::TcpOptions;
#[cfg(test)]
mod tests;
