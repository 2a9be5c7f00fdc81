//! Who has which address: ARP (RFC 826) and neighbour discovery (RFC 4861), for the gateway's own
//! addresses and for what lies outside.

use std::io::IoSlice;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use crate::ping;
use crate::slab::Id;
use crate::wire::Builder;
use crate::wire::ETHERTYPE_ARP;
use crate::wire::Ethernet;
use crate::wire::IpPacket;
use crate::wire::be16;
use crate::wire::be32;
use crate::world::World;

const ARP_BYTES: usize = 28;

/// What an ARP packet says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arp {
    pub(crate) is_request: bool,
    pub(crate) sender_mac: [u8; 6],
    pub(crate) sender: Ipv4Addr,
    pub(crate) target: Ipv4Addr,
}

impl Arp {
    /// Ethernet and IPv4 alone.
    pub(crate) fn parse(data: &[u8]) -> Option<Self> {
        let data = data.get(..ARP_BYTES)?;
        let operation = be16(data, 6);
        if data[..6] != [0, 1, 8, 0, 6, 4] || !(1..=2).contains(&operation) {
            return None;
        }
        Some(Self {
            is_request: operation == 1,
            sender_mac: *data[8..].first_chunk()?,
            sender: be32(data, 14).into(),
            target: be32(data, 24).into(),
        })
    }
}

/// Answers who asks for the gateway.
pub(crate) fn arp(world: &mut World, port: Id, frame: &Ethernet<'_>) {
    let Some(asked) = Arp::parse(frame.payload) else {
        return;
    };
    if !asked.is_request || !world.net.is_own(asked.target.into()) {
        return;
    }
    let mut answer = [0; ARP_BYTES];
    answer[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    answer[8..14].copy_from_slice(&world.net.mac);
    answer[14..18].copy_from_slice(&asked.target.octets());
    answer[18..24].copy_from_slice(&asked.sender_mac);
    answer[24..].copy_from_slice(&asked.sender.octets());
    let mut builder = Builder::ethernet(world.net.mac, asked.sender_mac, ETHERTYPE_ARP);
    world.send(port, &mut builder, &[IoSlice::new(&answer)]);
}

pub(crate) const ROUTER_SOLICITATION: u8 = 133;
pub(crate) const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(crate) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
pub(crate) const REDIRECT: u8 = 137;

/// The address that a solicitation or advertisement is about.
pub(crate) fn subject(message: &[u8]) -> Option<Ipv6Addr> {
    let bytes: [u8; 16] = message.get(8..24)?.try_into().ok()?;
    Some(bytes.into())
}

/// Answers a neighbour or router solicitation.
pub(crate) fn solicited(world: &mut World, port: Id, packet: &IpPacket<'_>) {
    let IpAddr::V6(source) = packet.source else {
        return;
    };
    // RFC 4861 §6.1.1, §7.1.1: from this link alone.
    if packet.hop_limit != 255 {
        return;
    }
    match packet.payload.first() {
        Some(&NEIGHBOUR_SOLICITATION) => {
            let Some(target) = subject(packet.payload) else {
                return;
            };
            if world.net.is_own(target.into()) && !source.is_unspecified() {
                advertise_neighbour(world, port, target, source);
            }
        }
        Some(&ROUTER_SOLICITATION) => advertise_router(world, port),
        _ => {}
    }
}

fn advertise_neighbour(world: &mut World, port: Id, target: Ipv6Addr, to: Ipv6Addr) {
    // Router, solicited, override.
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0xe0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(world.net.mac);
    ping::send(world, port, (target.into(), to.into()), message);
}

/// Seconds that an advertisement holds.
const LIFETIME_S: u16 = 9000;
const PREFIX_LIFETIME_S: u32 = 86_400;

/// Tells a machine its prefix, its router and its name server (RFC 4861 §4.2, RFC 8106 §5.1).
pub(crate) fn advertise_router(world: &mut World, port: Id) {
    let Some(net) = world.net.ipv6 else { return };
    let lifetime = if world.net.uplink { LIFETIME_S } else { 0 };
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(world.net.mac);
    message.extend([5, 1, 0, 0]);
    message.extend(u32::from(world.net.mtu).to_be_bytes());
    // On this link; addresses are made from it only where its length lets them.
    let flags = if net.bits == 64 { 0xc0 } else { 0x80 };
    message.extend([3, 4, net.bits, flags]);
    message.extend(PREFIX_LIFETIME_S.to_be_bytes());
    message.extend(PREFIX_LIFETIME_S.to_be_bytes());
    message.extend([0; 4]);
    let mask = u128::MAX
        .checked_shl(128 - u32::from(net.bits))
        .unwrap_or(0);
    message.extend((u128::from(net.address) & mask).to_be_bytes());
    message.extend([25, 3, 0, 0]);
    message.extend(u32::from(LIFETIME_S).to_be_bytes());
    message.extend(net.address.octets());
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let ends = (world.net.link_local.into(), all_nodes.into());
    ping::send(world, port, ends, message);
}
