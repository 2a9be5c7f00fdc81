//! Frames between machines, made fit for one that takes less: large segments split, checksums
//! completed.

use std::borrow::Cow;

use ringfence_netstack::Offloads;

use crate::wire::ETHERNET_BYTES;
use crate::wire::Ethernet;
use crate::wire::IpPacket;
use crate::wire::Sum;
use crate::wire::TCP;
use crate::wire::TcpFlags;
use crate::wire::VNET_BYTES;
use crate::wire::VnetHeader;
use crate::wire::be32;
use crate::wire::pseudo_header;

/// `message`, in pieces that a machine with these offloads takes. A header that lies gives none.
pub(crate) fn fitting(message: &[u8], offloads: Offloads) -> Vec<Cow<'_, [u8]>> {
    let Some(vnet) = VnetHeader::parse(message) else {
        return Vec::new();
    };
    let large = vnet.gso_type & !VnetHeader::GSO_ECN;
    let ecn = vnet.gso_type & VnetHeader::GSO_ECN == 0 || offloads.ecn;
    let takes = match large {
        VnetHeader::GSO_NONE => true,
        VnetHeader::GSO_TCPV4 => offloads.tso4 && ecn,
        VnetHeader::GSO_TCPV6 => offloads.tso6 && ecn,
        // Nothing else was offered.
        _ => return Vec::new(),
    };
    let needs_checksum = vnet.flags & VnetHeader::NEEDS_CSUM != 0;
    if takes && (offloads.checksum || !needs_checksum) {
        return vec![Cow::Borrowed(message)];
    }
    if large == VnetHeader::GSO_NONE {
        return complete(message, vnet)
            .map(Cow::Owned)
            .into_iter()
            .collect();
    }
    split(message, vnet).into_iter().map(Cow::Owned).collect()
}

/// Completes the checksum that the header asks for.
fn complete(message: &[u8], vnet: VnetHeader) -> Option<Vec<u8>> {
    let start = VNET_BYTES + usize::from(vnet.csum_start);
    let field = start + usize::from(vnet.csum_offset);
    let mut done = message.to_vec();
    let mut sum = Sum::default();
    sum.add(message.get(start..)?);
    let value = match sum.finish() {
        0 => 0xffff,
        value => value,
    };
    done.get_mut(field..field + 2)?
        .copy_from_slice(&value.to_be_bytes());
    done[..VNET_BYTES].fill(0);
    Some(done)
}

/// Splits a large TCP segment, with whole checksums.
fn split(message: &[u8], vnet: VnetHeader) -> Vec<Vec<u8>> {
    let parsed = message.get(VNET_BYTES..).and_then(Ethernet::parse);
    let Some(ethernet) = parsed else {
        return Vec::new();
    };
    let Ok(packet) = IpPacket::parse(&ethernet) else {
        return Vec::new();
    };
    let tcp = packet.payload;
    let ip_bytes = packet.whole.len() - tcp.len();
    let tcp_bytes = tcp.get(12).map_or(0, |offset| usize::from(offset >> 4) * 4);
    let size = usize::from(vnet.gso_size);
    if packet.protocol != TCP || tcp_bytes < 20 || size < 64 {
        return Vec::new();
    }
    let Some(data) = tcp.get(tcp_bytes..) else {
        return Vec::new();
    };
    let headers = VNET_BYTES + ETHERNET_BYTES + ip_bytes + tcp_bytes;
    let count = data.len().div_ceil(size);
    let mut pieces = Vec::with_capacity(count);
    for (index, part) in data.chunks(size).enumerate() {
        let mut piece = message[..headers].to_vec();
        piece[..VNET_BYTES].fill(0);
        let at = VNET_BYTES + ETHERNET_BYTES;
        finish_ip(
            &mut piece[at..],
            &packet,
            ip_bytes,
            tcp_bytes + part.len(),
            index,
        );
        let at = at + ip_bytes;
        let offset = u32::try_from(index * size).unwrap_or(0);
        let sequence = be32(tcp, 4).wrapping_add(offset);
        piece[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
        if index + 1 < count {
            piece[at + 13] &= !(TcpFlags::FIN.0 | TcpFlags::PSH.0);
        }
        if index > 0 {
            // The congestion window was reduced once (RFC 3168 §6.1.2).
            piece[at + 13] &= !0x80;
        }
        piece[at + 16..at + 18].fill(0);
        let ends = (packet.source, packet.destination);
        let mut sum = pseudo_header(ends.0, ends.1, TCP, tcp_bytes + part.len());
        sum.add(&piece[at..]);
        sum.add(part);
        piece[at + 16..at + 18].copy_from_slice(&sum.finish().to_be_bytes());
        piece.extend_from_slice(part);
        pieces.push(piece);
    }
    pieces
}

fn finish_ip(
    header: &mut [u8],
    packet: &IpPacket<'_>,
    ip_bytes: usize,
    payload: usize,
    index: usize,
) {
    if packet.source.is_ipv4() {
        let total = u16::try_from(ip_bytes + payload).unwrap_or(u16::MAX);
        header[2..4].copy_from_slice(&total.to_be_bytes());
        let number = u16::from_be_bytes([header[4], header[5]]);
        let number = number.wrapping_add(u16::try_from(index).unwrap_or(0));
        header[4..6].copy_from_slice(&number.to_be_bytes());
        header[10..12].fill(0);
        let mut sum = Sum::default();
        sum.add(&header[..ip_bytes]);
        header[10..12].copy_from_slice(&sum.finish().to_be_bytes());
    } else {
        let len = u16::try_from(ip_bytes - 40 + payload).unwrap_or(u16::MAX);
        header[4..6].copy_from_slice(&len.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::net::SocketAddr;

    use smoltcp::wire::TcpPacket;

    use super::*;
    use crate::wire::Builder;
    use crate::wire::Large;

    fn large(from: &str, to: &str, data: &[u8]) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) =
            (from.parse().expect("one"), to.parse().expect("one"));
        let mut header = [0; 20];
        header[12] = 5 << 4;
        header[13] = 0x19;
        let how = (
            true,
            Some(Large {
                segment_bytes: 1000,
            }),
        );
        let macs = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let mut builder = Builder::tcp(macs, from, to, &header, &[IoSlice::new(data)], how);
        let mut message = builder.headers().to_vec();
        message.extend(data);
        message
    }

    #[test]
    fn a_large_segment_is_split_into_good_ones() {
        let data: Vec<u8> = (0..2500_u32).map(|n| n.to_le_bytes()[0]).collect();
        for (from, to) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let message = large(from, to, &data);
            let all = Offloads {
                checksum: true,
                tso4: true,
                tso6: true,
                ..Offloads::default()
            };
            assert_eq!(fitting(&message, all).len(), 1);
            let pieces = fitting(&message, Offloads::default());
            assert_eq!(pieces.len(), 3);
            let mut whole = Vec::new();
            for (index, piece) in pieces.iter().enumerate() {
                let ethernet = Ethernet::parse(&piece[VNET_BYTES..]).expect("a frame");
                let packet = IpPacket::parse(&ethernet).expect("a packet");
                let segment = TcpPacket::new_checked(packet.payload).expect("a segment");
                let ends = (packet.source.into(), packet.destination.into());
                assert!(segment.verify_checksum(&ends.0, &ends.1));
                assert_eq!(segment.fin(), index == 2);
                whole.extend_from_slice(segment.payload());
            }
            assert_eq!(whole, data);
        }
    }

    #[test]
    fn headers_that_lie_give_nothing_or_something_harmless() {
        let message = large("10.0.0.1:1", "10.0.0.2:2", &[7; 3000]);
        for at in 0..80 {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = message.clone();
                damaged[at] = value;
                let bytes: usize = fitting(&damaged, Offloads::default())
                    .iter()
                    .map(|piece| piece.len())
                    .sum();
                assert!(bytes < 20_000, "{at} {value}");
            }
        }
    }
}
