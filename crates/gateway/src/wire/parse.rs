//! Taking frames apart. Whatever a guest sends, nothing here fails but by saying no.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use super::ETHERNET_BYTES;
use super::ETHERTYPE_IPV4;
use super::ETHERTYPE_IPV6;
use super::Mac;
use super::VNET_BYTES;
use super::be16;
use super::be32;

/// `struct virtio_net_hdr_v1` (virtio 1.2 §5.1.6), little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub(crate) flags: u8,
    pub(crate) gso_type: u8,
    pub(crate) hdr_len: u16,
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl VnetHeader {
    pub(crate) const NEEDS_CSUM: u8 = 1;
    pub(crate) const GSO_NONE: u8 = 0;
    pub(crate) const GSO_TCPV4: u8 = 1;
    pub(crate) const GSO_TCPV6: u8 = 4;
    pub(crate) const GSO_ECN: u8 = 0x80;

    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let data: &[u8; VNET_BYTES] = data.first_chunk()?;
        let le16 = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
        Some(Self {
            flags: data[0],
            gso_type: data[1],
            hdr_len: le16(2),
            gso_size: le16(4),
            csum_start: le16(6),
            csum_offset: le16(8),
        })
    }

    pub(crate) fn encode(self) -> [u8; VNET_BYTES] {
        let mut data = [0; VNET_BYTES];
        data[0] = self.flags;
        data[1] = self.gso_type;
        data[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        data[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        data[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        data[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        data
    }
}

/// An Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ethernet<'a> {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) ethertype: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    pub(crate) fn parse(frame: &'a [u8]) -> Option<Self> {
        let (header, payload) = frame.split_at_checked(ETHERNET_BYTES)?;
        Some(Self {
            destination: *header.first_chunk()?,
            source: *header.get(6..)?.first_chunk()?,
            ethertype: be16(header, 12),
            payload,
        })
    }

    /// For one station alone.
    pub(crate) fn is_unicast(&self) -> bool {
        self.destination[0] & 1 == 0
    }
}

/// Why a packet isn't looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotIp {
    Malformed,
    Fragment,
}

/// An IP packet of either version, with what follows its extension headers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IpPacket<'a> {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    pub(crate) payload: &'a [u8],
    /// All of it, for errors that quote it.
    pub(crate) whole: &'a [u8],
}

/// IPv6 extension headers that are stepped over (RFC 8200 §4.1).
const MAX_EXTENSIONS: usize = 4;

impl<'a> IpPacket<'a> {
    pub(crate) fn parse(frame: &Ethernet<'a>) -> Result<Self, NotIp> {
        match frame.ethertype {
            ETHERTYPE_IPV4 => Self::parse_v4(frame.payload),
            ETHERTYPE_IPV6 => Self::parse_v6(frame.payload),
            _ => Err(NotIp::Malformed),
        }
    }

    fn parse_v4(data: &'a [u8]) -> Result<Self, NotIp> {
        let header: &[u8; 20] = data.first_chunk().ok_or(NotIp::Malformed)?;
        let header_bytes = usize::from(header[0] & 0xf) * 4;
        let total = usize::from(be16(header, 2));
        if header[0] >> 4 != 4 || header_bytes < 20 || total < header_bytes {
            return Err(NotIp::Malformed);
        }
        let whole = data.get(..total).ok_or(NotIp::Malformed)?;
        if be16(header, 6) & 0x3fff != 0 {
            return Err(NotIp::Fragment);
        }
        Ok(Self {
            source: Ipv4Addr::from(be32(header, 12)).into(),
            destination: Ipv4Addr::from(be32(header, 16)).into(),
            protocol: header[9],
            hop_limit: header[8],
            payload: whole.get(header_bytes..).unwrap_or_default(),
            whole,
        })
    }

    fn parse_v6(data: &'a [u8]) -> Result<Self, NotIp> {
        let header: &[u8; 40] = data.first_chunk().ok_or(NotIp::Malformed)?;
        let len = usize::from(be16(header, 4));
        if header[0] >> 4 != 6 {
            return Err(NotIp::Malformed);
        }
        let whole = data.get(..40 + len).ok_or(NotIp::Malformed)?;
        let address = |at: usize| {
            let bytes: [u8; 16] = header[at..at + 16].try_into().unwrap_or_default();
            IpAddr::V6(Ipv6Addr::from(bytes))
        };
        let mut protocol = header[6];
        let mut payload = whole.get(40..).unwrap_or_default();
        for _ in 0..MAX_EXTENSIONS {
            match protocol {
                0 | 43 | 60 => {
                    let &[next, units, ..] = payload else {
                        return Err(NotIp::Malformed);
                    };
                    let bytes = (usize::from(units) + 1) * 8;
                    payload = payload.get(bytes..).ok_or(NotIp::Malformed)?;
                    protocol = next;
                }
                44 => return Err(NotIp::Fragment),
                _ => break,
            }
        }
        Ok(Self {
            source: address(8),
            destination: address(24),
            protocol,
            hop_limit: header[7],
            payload,
            whole,
        })
    }
}

/// A UDP datagram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UdpDatagram<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) payload: &'a [u8],
}

impl<'a> UdpDatagram<'a> {
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let len = usize::from(be16(data, 4));
        let payload = data.get(8..len)?;
        Some(Self {
            source: be16(data, 0),
            destination: be16(data, 2),
            payload,
        })
    }
}

/// TCP's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TcpFlags(pub(crate) u8);

impl TcpFlags {
    pub(crate) const FIN: Self = Self(0x01);
    pub(crate) const SYN: Self = Self(0x02);
    pub(crate) const RST: Self = Self(0x04);
    pub(crate) const PSH: Self = Self(0x08);
    pub(crate) const ACK: Self = Self(0x10);

    pub(crate) fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub(crate) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The options of a SYN that matter here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TcpOptions {
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
}

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpSegment<'a> {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) flags: TcpFlags,
    pub(crate) window: u16,
    options: &'a [u8],
    pub(crate) payload: &'a [u8],
}

impl<'a> TcpSegment<'a> {
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let header: &[u8; 20] = data.first_chunk()?;
        let header_bytes = usize::from(header[12] >> 4) * 4;
        let options = data.get(20..header_bytes)?;
        Some(Self {
            source: be16(header, 0),
            destination: be16(header, 2),
            sequence: be32(header, 4),
            acknowledgment: be32(header, 8),
            flags: TcpFlags(header[13] & 0x3f),
            window: be16(header, 14),
            options,
            payload: data.get(header_bytes..)?,
        })
    }

    /// RFC 9293 §3.2, RFC 7323 §2.2.
    pub(crate) fn options(&self) -> TcpOptions {
        let mut found = TcpOptions::default();
        let mut rest = self.options;
        while let &[kind, ref tail @ ..] = rest {
            if kind == 0 {
                break;
            }
            if kind == 1 {
                rest = tail;
                continue;
            }
            let Some(&len) = tail.first() else { break };
            let len = usize::from(len);
            let Some(value) = rest.get(2..len) else { break };
            match (kind, value) {
                (2, &[high, low]) => found.mss = Some(u16::from_be_bytes([high, low])),
                (3, &[shift]) => found.window_scale = Some(shift.min(14)),
                _ => {}
            }
            rest = rest.get(len..).unwrap_or_default();
        }
        found
    }
}
