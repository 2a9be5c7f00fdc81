//! DHCP for IPv4 (RFC 2131): each link has its address already; this only tells it.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::SocketAddr;

use smoltcp::wire::DhcpMessageType;
use smoltcp::wire::DhcpOption;
use smoltcp::wire::DhcpPacket;
use smoltcp::wire::DhcpRepr;
use smoltcp::wire::EthernetAddress;

use crate::slab::Id;
use crate::world::World;

pub(crate) const SERVER_PORT: u16 = 67;
pub(crate) const CLIENT_PORT: u16 = 68;
const LEASE_S: u32 = 86_400;
const OPTION_HOSTNAME: u8 = 12;
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;

/// Answers a client's message.
pub(crate) fn answer(world: &mut World, port: Id, message: &[u8]) {
    let Some((reply, broadcast)) = reply(world, port, message) else {
        return;
    };
    let Some(net) = world.net.ipv4 else { return };
    let address = world.ports.get(port).and_then(|port| port.address(true));
    let to = match address {
        Some(address) if !broadcast => address,
        _ => Ipv4Addr::BROADCAST.into(),
    };
    world.counters.dhcp_answers += 1;
    let from = SocketAddr::new(net.address.into(), SERVER_PORT);
    world.send_udp(port, from, SocketAddr::new(to, CLIENT_PORT), &reply);
}

fn reply(world: &World, port: Id, message: &[u8]) -> Option<(Vec<u8>, bool)> {
    let net = world.net.ipv4?;
    let port = world.ports.get(port)?;
    let Some(IpAddr::V4(own)) = port.address(true) else {
        return None;
    };
    let packet = DhcpPacket::new_checked(message).ok()?;
    let asked = DhcpRepr::parse(&packet).ok()?;
    if asked.client_hardware_address != EthernetAddress(port.mac) {
        return None;
    }
    // An offer of ours was taken, or another server's.
    if asked
        .server_identifier
        .is_some_and(|server| server != net.address)
    {
        return None;
    }
    let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
    let kind = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if wanted == own => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let mtu = world.net.mtu.to_be_bytes();
    let domain = world.net.search.first();
    let mut options = vec![DhcpOption {
        kind: OPTION_MTU,
        data: &mtu,
    }];
    if !port.hostname.is_empty() {
        options.push(DhcpOption {
            kind: OPTION_HOSTNAME,
            data: port.hostname.as_bytes(),
        });
    }
    if let Some(domain) = domain {
        options.push(DhcpOption {
            kind: OPTION_DOMAIN,
            data: domain.as_bytes(),
        });
    }
    let nak = kind == DhcpMessageType::Nak;
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: if nak { Ipv4Addr::UNSPECIFIED } else { own },
        server_ip: net.address,
        router: (!nak && world.net.uplink).then_some(net.address),
        subnet_mask: (!nak).then(|| Ipv4Addr::from(net.mask())),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(net.address),
        parameter_request_list: None,
        dns_servers: (!nak).then(|| [net.address].into_iter().collect()),
        max_size: None,
        lease_duration: (!nak).then_some(LEASE_S),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if nak { &[] } else { &options },
    };
    let mut data = vec![0; repr.buffer_len()];
    let mut packet = DhcpPacket::new_unchecked(&mut data);
    repr.emit(&mut packet).ok()?;
    // BOOTP's least (RFC 1542 §2.1).
    data.resize(data.len().max(300), 0);
    Some((data, nak || asked.broadcast))
}
