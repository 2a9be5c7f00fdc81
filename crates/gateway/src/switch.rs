//! Where a frame goes: to the gateway, to another machine, or nowhere because it lies.
//!
//! A machine speaks for itself alone: its frames carry its own Ethernet and IP addresses, it is no
//! router and no DHCP server. So nobody can take another's place, whatever tables others keep.

use std::io::IoSlice;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;

use crate::config::Subnet;
use crate::dhcp;
use crate::dns::Client;
use crate::gateway::Gateway;
use crate::neighbours;
use crate::neighbours::Arp;
use crate::ping;
use crate::port::Port;
use crate::port::Sent;
use crate::segment;
use crate::slab::Id;
use crate::tcp::Key;
use crate::wire::ETHERTYPE_ARP;
use crate::wire::ETHERTYPE_IPV4;
use crate::wire::ETHERTYPE_IPV6;
use crate::wire::Ethernet;
use crate::wire::ICMP;
use crate::wire::ICMPV6;
use crate::wire::IpPacket;
use crate::wire::NotIp;
use crate::wire::TCP;
use crate::wire::TcpSegment;
use crate::wire::UDP;
use crate::wire::UdpDatagram;
use crate::wire::VNET_BYTES;
use crate::world::Unreachable;
use crate::world::World;

const DNS: u16 = 53;

/// What is to become of a frame.
enum Judged<'a> {
    Ip(IpPacket<'a>),
    Arp,
    Malformed,
    Fragment,
    Spoofed,
}

/// A frame of a machine, its virtio header first.
pub(crate) fn frame(gateway: &mut Gateway, id: Id, message: &[u8]) {
    let world = &mut gateway.world;
    let alone = world.ports.len() == 1;
    if world.capture.is_on()
        && let Some(port) = world.ports.get(id)
    {
        world.capture.frame(&port.name, &[IoSlice::new(message)]);
    }
    let Some(port) = world.ports.get_mut(id) else {
        return;
    };
    let Some(ethernet) = message.get(VNET_BYTES..).and_then(Ethernet::parse) else {
        port.counters.malformed_frames += 1;
        return;
    };
    let judged = judge(port, &ethernet, (alone, world.net.ipv6));
    match judged {
        Judged::Malformed => port.counters.malformed_frames += 1,
        Judged::Spoofed => port.counters.spoofed_frames += 1,
        Judged::Fragment => world.counters.fragments_dropped += 1,
        _ => {}
    }
    if matches!(judged, Judged::Malformed | Judged::Spoofed) {
        return;
    }
    // Claimed by another already?
    if let Judged::Ip(packet) = &judged
        && !alone
        && (is_anothers(world, id, packet.source)
            || advertised(packet).is_some_and(|about| is_anothers(world, id, about)))
    {
        if let Some(port) = world.ports.get_mut(id) {
            port.counters.spoofed_frames += 1;
        }
        return;
    }
    if !ethernet.is_unicast() {
        flood(world, id, message);
    } else if ethernet.destination != world.net.mac {
        let to = world.by_mac.get(&ethernet.destination).copied();
        if let Some(to) = to.filter(|&to| to != id) {
            hand_over(world, to, message);
        }
        return;
    }
    match judged {
        Judged::Arp => neighbours::arp(world, id, &ethernet),
        Judged::Ip(packet) => ip(gateway, id, &packet, ethernet.is_unicast()),
        _ => {}
    }
}

/// Whether a machine has the network for itself, and the network's IPv6 addresses.
type Ground = (bool, Option<Subnet<Ipv6Addr>>);

fn judge<'a>(port: &mut Port, frame: &Ethernet<'a>, ground: Ground) -> Judged<'a> {
    if frame.source != port.mac {
        return Judged::Spoofed;
    }
    match frame.ethertype {
        ETHERTYPE_ARP => match Arp::parse(frame.payload) {
            None => Judged::Malformed,
            Some(arp) => {
                let own =
                    arp.sender.is_unspecified() || port.addresses.contains(&arp.sender.into());
                if own && arp.sender_mac == port.mac {
                    Judged::Arp
                } else {
                    Judged::Spoofed
                }
            }
        },
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => match IpPacket::parse(frame) {
            Err(NotIp::Malformed) => Judged::Malformed,
            Err(NotIp::Fragment) => Judged::Fragment,
            Ok(packet) => judge_ip(port, packet, ground),
        },
        _ => Judged::Malformed,
    }
}

fn judge_ip<'a>(port: &mut Port, packet: IpPacket<'a>, ground: Ground) -> Judged<'a> {
    let udp = || UdpDatagram::parse(packet.payload);
    let is_dhcp = || udp().is_some_and(|one| one.destination == dhcp::SERVER_PORT);
    let own = match packet.source {
        IpAddr::V4(four) if four.is_unspecified() => packet.protocol == UDP && is_dhcp(),
        source => port.may_use(source, ground),
    };
    if !own {
        return Judged::Spoofed;
    }
    let lies = match packet.protocol {
        // A DHCP server, of either version.
        UDP => udp().is_some_and(|one| matches!(one.source, dhcp::SERVER_PORT | 547)),
        ICMPV6 => match packet.payload.first() {
            Some(&neighbours::ROUTER_ADVERTISEMENT | &neighbours::REDIRECT) => true,
            Some(&neighbours::NEIGHBOUR_ADVERTISEMENT) => neighbours::subject(packet.payload)
                .is_none_or(|about| !port.may_use(about.into(), ground)),
            _ => false,
        },
        _ => false,
    };
    if lies {
        Judged::Spoofed
    } else {
        Judged::Ip(packet)
    }
}

/// The address that a packet advertises as its sender's.
fn advertised(packet: &IpPacket<'_>) -> Option<IpAddr> {
    let is_advertisement = packet.protocol == ICMPV6
        && packet.payload.first() == Some(&neighbours::NEIGHBOUR_ADVERTISEMENT);
    is_advertisement
        .then(|| neighbours::subject(packet.payload))
        .flatten()
        .map(IpAddr::from)
}

/// Whether another machine has `address`: the first to take one keeps it.
fn is_anothers(world: &mut World, id: Id, address: IpAddr) -> bool {
    if address.is_unspecified() {
        return false;
    }
    let has = |port: &Port| {
        let claimed = matches!(address, IpAddr::V6(six) if port.claims().contains(&six));
        claimed || port.addresses.contains(&address)
    };
    let taken = world.net.is_own(address)
        || world
            .ports
            .iter()
            .any(|(other, port)| other != id && has(port));
    if taken && let Some(port) = world.ports.get_mut(id) {
        port.give_up(address);
    }
    taken
}

fn flood(world: &mut World, from: Id, message: &[u8]) {
    for to in world.ports.ids() {
        if to != from {
            hand_over(world, to, message);
        }
    }
}

/// Hands a machine's frame to another.
fn hand_over(world: &mut World, to: Id, message: &[u8]) {
    let Some(port) = world.ports.get_mut(to) else {
        return;
    };
    let offloads = port.offloads;
    for piece in segment::fitting(message, offloads) {
        let parts = [IoSlice::new(&piece)];
        if port.send(&parts) != Sent::Done {
            return;
        }
        if world.capture.is_on() {
            world.capture.frame(&port.name, &parts);
        }
    }
}

fn ip(gateway: &mut Gateway, id: Id, packet: &IpPacket<'_>, unicast: bool) {
    let own = gateway.world.net.is_own(packet.destination);
    if own || !unicast {
        local(gateway, id, packet, own);
        return;
    }
    let world = &mut gateway.world;
    if packet.hop_limit <= 1 {
        world.send_icmp_error(id, packet, Unreachable::TimeExceeded);
        return;
    }
    if world.net.is_near(packet.destination) {
        world.send_icmp_error(id, packet, Unreachable::Host);
        return;
    }
    match packet.protocol {
        TCP => tcp(gateway, id, packet),
        UDP => {
            if let Some(datagram) = UdpDatagram::parse(packet.payload) {
                gateway.udp.input(world, id, packet, &datagram);
            }
        }
        ICMP | ICMPV6 if ping::is_request(packet) => gateway.ping.input(world, id, packet),
        ICMP | ICMPV6 => {}
        _ => world.send_icmp_error(id, packet, Unreachable::Protocol),
    }
}

fn tcp(gateway: &mut Gateway, id: Id, packet: &IpPacket<'_>) {
    let Some(segment) = TcpSegment::parse(packet.payload) else {
        if let Some(port) = gateway.world.ports.get_mut(id) {
            port.counters.malformed_frames += 1;
        }
        return;
    };
    let key = Key {
        port: id,
        guest: SocketAddr::new(packet.source, segment.source),
        remote: SocketAddr::new(packet.destination, segment.destination),
    };
    gateway.tcp.input(&mut gateway.world, key, &segment);
}

/// A packet to the gateway itself, or to all.
fn local(gateway: &mut Gateway, id: Id, packet: &IpPacket<'_>, own: bool) {
    let world = &mut gateway.world;
    match packet.protocol {
        ICMPV6 if !ping::is_request(packet) => neighbours::solicited(world, id, packet),
        ICMP | ICMPV6 if own && ping::is_request(packet) => ping::answer(world, id, packet),
        TCP if own => tcp(gateway, id, packet),
        UDP => {
            let Some(datagram) = UdpDatagram::parse(packet.payload) else {
                return;
            };
            match datagram.destination {
                dhcp::SERVER_PORT if packet.source.is_ipv4() => {
                    dhcp::answer(world, id, datagram.payload);
                }
                DNS if own => {
                    let client = Client::Udp {
                        port: id,
                        guest: SocketAddr::new(packet.source, datagram.source),
                        local: SocketAddr::new(packet.destination, DNS),
                    };
                    gateway.dns.ask(world, client, datagram.payload);
                }
                _ if own => gateway.udp.input(world, id, packet, &datagram),
                _ => {}
            }
        }
        _ => {}
    }
}
