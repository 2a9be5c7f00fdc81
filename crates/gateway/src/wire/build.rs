//! Putting headers together, for a payload that lies elsewhere.

use std::io::IoSlice;
use std::net::IpAddr;
use std::net::SocketAddr;

use super::ETHERNET_BYTES;
use super::ETHERTYPE_IPV4;
use super::ETHERTYPE_IPV6;
use super::ICMP;
use super::ICMPV6;
use super::IpPacket;
use super::Mac;
use super::Sum;
use super::TCP;
use super::UDP;
use super::VNET_BYTES;
use super::VnetHeader;
use super::pseudo_header;

/// The longest headers: virtio, Ethernet, IPv6, TCP with options.
const MAX_HEADERS: usize = VNET_BYTES + ETHERNET_BYTES + 40 + 60;
const HOP_LIMIT: u8 = 64;

/// A segment that the other side splits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Large {
    pub(crate) segment_bytes: u16,
}

/// Headers of one frame.
#[derive(Debug)]
pub(crate) struct Builder {
    data: [u8; MAX_HEADERS],
    len: usize,
    /// Where the IP header begins.
    ip: usize,
    vnet: VnetHeader,
}

impl Builder {
    /// Begins a frame.
    pub(crate) fn ethernet(source: Mac, destination: Mac, ethertype: u16) -> Self {
        let mut data = [0; MAX_HEADERS];
        let ethernet = &mut data[VNET_BYTES..];
        ethernet[..6].copy_from_slice(&destination);
        ethernet[6..12].copy_from_slice(&source);
        ethernet[12..14].copy_from_slice(&ethertype.to_be_bytes());
        Self {
            data,
            len: VNET_BYTES + ETHERNET_BYTES,
            ip: VNET_BYTES + ETHERNET_BYTES,
            vnet: VnetHeader::default(),
        }
    }

    /// Begins an IP packet; both addresses are of one version, else it is IPv4 of zeros.
    pub(crate) fn ip(
        macs: (Mac, Mac),
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        payload_bytes: usize,
    ) -> Self {
        let payload = u16::try_from(payload_bytes).unwrap_or(u16::MAX);
        match (source, destination) {
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut new = Self::ethernet(macs.0, macs.1, ETHERTYPE_IPV6);
                let [high, low] = payload.to_be_bytes();
                new.push(&[0x60, 0, 0, 0, high, low, protocol, Self::hops(protocol)]);
                new.push(&source.octets());
                new.push(&destination.octets());
                new
            }
            (source, destination) => {
                let mut new = Self::ethernet(macs.0, macs.1, ETHERTYPE_IPV4);
                let total = payload.saturating_add(20).to_be_bytes();
                // Don't fragment, no options: the identification may be zero (RFC 6864 §4.1).
                new.push(&[0x45, 0, total[0], total[1], 0, 0, 0x40, 0]);
                new.push(&[HOP_LIMIT, protocol, 0, 0]);
                for address in [source, destination] {
                    match address {
                        IpAddr::V4(address) => new.push(&address.octets()),
                        IpAddr::V6(_) => new.push(&[0; 4]),
                    }
                }
                let mut sum = Sum::default();
                sum.add(&new.data[new.ip..new.len]);
                let at = new.ip + 10;
                new.data[at..at + 2].copy_from_slice(&sum.finish().to_be_bytes());
                new
            }
        }
    }

    /// Neighbour discovery takes packets of 255 hops alone (RFC 4861 §6.1.1).
    fn hops(protocol: u8) -> u8 {
        if protocol == ICMPV6 { 255 } else { HOP_LIMIT }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.data[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Adds a TCP header and completes the frame for `payload`.
    pub(crate) fn tcp(
        macs: (Mac, Mac),
        from: SocketAddr,
        to: SocketAddr,
        header: &[u8],
        payload: &[IoSlice<'_>],
        how: (bool, Option<Large>),
    ) -> Self {
        let payload_bytes: usize = payload.iter().map(|part| part.len()).sum();
        let len = header.len() + payload_bytes;
        let mut new = Self::ip(macs, from.ip(), to.ip(), TCP, len);
        let start = new.len;
        new.push(header);
        new.transport_checksum(start, 16, (from.ip(), to.ip(), TCP), payload, how.0);
        if let Some(large) = how
            .1
            .filter(|large| payload_bytes > usize::from(large.segment_bytes))
        {
            new.vnet.gso_type = if from.is_ipv4() {
                VnetHeader::GSO_TCPV4
            } else {
                VnetHeader::GSO_TCPV6
            };
            new.vnet.gso_size = large.segment_bytes;
            new.vnet.hdr_len = u16::try_from(new.len - VNET_BYTES).unwrap_or(0);
        }
        new
    }

    /// A UDP datagram's headers.
    pub(crate) fn udp(
        macs: (Mac, Mac),
        from: SocketAddr,
        to: SocketAddr,
        payload: &[u8],
        offload: bool,
    ) -> Self {
        let len = 8 + payload.len();
        let mut new = Self::ip(macs, from.ip(), to.ip(), UDP, len);
        let start = new.len;
        new.push(&from.port().to_be_bytes());
        new.push(&to.port().to_be_bytes());
        new.push(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
        new.push(&[0, 0]);
        let ends = (from.ip(), to.ip(), UDP);
        new.transport_checksum(start, 6, ends, &[IoSlice::new(payload)], offload);
        // No checksum is written as all ones (RFC 768).
        let field = start + 6;
        if !offload && new.data[field..field + 2] == [0, 0] {
            new.data[field..field + 2].copy_from_slice(&[0xff, 0xff]);
        }
        new
    }

    /// Writes the checksum at `offset` of the header at `start`, or leaves it to the other side.
    fn transport_checksum(
        &mut self,
        start: usize,
        offset: usize,
        (source, destination, protocol): (IpAddr, IpAddr, u8),
        payload: &[IoSlice<'_>],
        offload: bool,
    ) {
        let payload_bytes: usize = payload.iter().map(|part| part.len()).sum();
        let len = self.len - start + payload_bytes;
        let mut sum = pseudo_header(source, destination, protocol, len);
        let field = start + offset;
        let value = if offload {
            self.vnet.flags = VnetHeader::NEEDS_CSUM;
            self.vnet.csum_start = u16::try_from(start - VNET_BYTES).unwrap_or(0);
            self.vnet.csum_offset = u16::try_from(offset).unwrap_or(0);
            sum.folded()
        } else {
            sum.add(&self.data[start..self.len]);
            for part in payload {
                sum.add(part);
            }
            sum.finish()
        };
        self.data[field..field + 2].copy_from_slice(&value.to_be_bytes());
    }

    /// The headers, the virtio header first.
    pub(crate) fn headers(&mut self) -> &[u8] {
        self.data[..VNET_BYTES].copy_from_slice(&self.vnet.encode());
        &self.data[..self.len]
    }
}

/// The ICMP message of `kind` and `code` about `packet`, for its sender (RFC 792, RFC 4443).
pub(crate) fn icmp_error(packet: &IpPacket<'_>, kind: u8, code: u8, from: IpAddr) -> Vec<u8> {
    let (protocol, room) = match from {
        // As much as is sure to pass (RFC 1812 §4.3.2.3).
        IpAddr::V4(_) => (ICMP, 548),
        IpAddr::V6(_) => (ICMPV6, 1232),
    };
    let quoted = &packet.whole[..packet.whole.len().min(room)];
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(quoted);
    let mut sum = match protocol {
        ICMPV6 => pseudo_header(from, packet.source, ICMPV6, message.len()),
        _ => Sum::default(),
    };
    sum.add(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    message
}
