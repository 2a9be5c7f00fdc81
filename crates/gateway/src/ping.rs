//! ICMP echo to outside, by the host's unprivileged ping sockets (`icmp(7)`).

use std::collections::HashMap;
use std::io::IoSlice;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::net::AddressFamily;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::ipproto;

use crate::events::Source;
use crate::policy::Reason;
use crate::policy::Transport;
use crate::policy::Verdict;
use crate::slab::Id;
use crate::slab::Slab;
use crate::wire::Builder;
use crate::wire::ICMP;
use crate::wire::ICMPV6;
use crate::wire::IpPacket;
use crate::wire::Sum;
use crate::wire::be16;
use crate::wire::pseudo_header;
use crate::world::Unreachable;
use crate::world::World;

const KEPT: Duration = Duration::from_secs(30);
const MAX_FLOWS: usize = 256;
const MAX_MESSAGE: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    port: Id,
    guest: IpAddr,
    remote: IpAddr,
    identifier: u16,
}

#[derive(Debug)]
struct Flow {
    key: Key,
    socket: OwnedFd,
    last: Instant,
}

/// Echo requests under way.
#[derive(Debug, Default)]
pub(crate) struct Ping {
    flows: Slab<Flow>,
    by_key: HashMap<Key, Id>,
}

/// Request and reply (RFC 792, RFC 4443 §4).
fn kinds(v4: bool) -> (u8, u8) {
    if v4 { (8, 0) } else { (128, 129) }
}

/// Answers an echo request to the gateway itself.
pub(crate) fn answer(world: &mut World, port: Id, packet: &IpPacket<'_>) {
    let mut message = packet.payload.to_vec();
    message[0] = kinds(packet.source.is_ipv4()).1;
    send(world, port, (packet.destination, packet.source), message);
}

/// Whether `packet` is an echo request.
pub(crate) fn is_request(packet: &IpPacket<'_>) -> bool {
    let kind = kinds(packet.source.is_ipv4()).0;
    packet.payload.len() >= 8 && packet.payload[..2] == [kind, 0]
}

/// Sends an ICMP message with a new checksum.
pub(crate) fn send(
    world: &mut World,
    port: Id,
    (from, to): (IpAddr, IpAddr),
    mut message: Vec<u8>,
) {
    let Some(macs) = world.macs(port) else { return };
    let (protocol, mut sum) = if from.is_ipv4() {
        (ICMP, Sum::default())
    } else {
        (ICMPV6, pseudo_header(from, to, ICMPV6, message.len()))
    };
    message[2..4].fill(0);
    sum.add(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    let mut frame = Builder::ip(macs, from, to, protocol, message.len());
    world.send(port, &mut frame, &[IoSlice::new(&message)]);
}

impl Ping {
    /// An echo request for outside.
    pub(crate) fn input(&mut self, world: &mut World, port: Id, packet: &IpPacket<'_>) {
        let key = Key {
            port,
            guest: packet.source,
            remote: packet.destination,
            identifier: be16(packet.payload, 4),
        };
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None => match self.open(world, key) {
                Ok(id) => id,
                Err(what) => {
                    world.send_icmp_error(port, packet, what);
                    return;
                }
            },
        };
        if let Some(flow) = self.flows.get_mut(id) {
            flow.last = world.now;
            world.counters.pings += 1;
            // Lost, as any packet may be.
            let _ = rustix::net::send(&flow.socket, packet.payload, SendFlags::DONTWAIT);
        }
    }

    fn open(&mut self, world: &mut World, key: Key) -> Result<Id, Unreachable> {
        self.sweep(world.now);
        if self.flows.len() >= MAX_FLOWS {
            world.counters.limit_reached += 1;
            return Err(Unreachable::Host);
        }
        let to = SocketAddr::new(key.remote, 0);
        let refused = |world: &mut World, reason: &Reason| {
            world.refuse(key.port, Transport::Icmp, to, reason);
            Unreachable::Prohibited
        };
        if !world.net.uplink {
            return Err(refused(world, &Reason::NoUplink));
        }
        let about = (key.remote, 0);
        let verdict = world.check(key.port, Transport::Icmp, about);
        if let Verdict::Refuse(reason) = verdict {
            return Err(refused(world, &reason));
        }
        let (family, protocol) = if key.remote.is_ipv4() {
            (AddressFamily::INET, ipproto::ICMP)
        } else {
            (AddressFamily::INET6, ipproto::ICMPV6)
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // Needs net.ipv4.ping_group_range to name one of our groups.
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol))
            .and_then(|socket| rustix::net::connect(&socket, &to).map(|()| socket))
            .map_err(|_| Unreachable::Host)?;
        let id = self.flows.insert(Flow {
            key,
            socket,
            last: world.now,
        });
        if let Some(flow) = self.flows.get(id)
            && world
                .events
                .watch_readable(&flow.socket, Source::Ping, id)
                .is_err()
        {
            self.flows.remove(id);
            return Err(Unreachable::Host);
        }
        self.by_key.insert(key, id);
        Ok(id)
    }

    /// Answers came.
    pub(crate) fn event(&mut self, world: &mut World, id: Id) {
        let mut buffer = vec![0; MAX_MESSAGE];
        while let Some(flow) = self.flows.get(id) {
            let received = rustix::net::recv(&flow.socket, &mut buffer[..], RecvFlags::DONTWAIT);
            let Ok((_, len)) = received else { return };
            let mut message = buffer[..len.min(MAX_MESSAGE)].to_vec();
            if message.len() < 8 {
                continue;
            }
            // The host's kernel has put its own number there.
            message[4..6].copy_from_slice(&flow.key.identifier.to_be_bytes());
            let ends = (flow.key.remote, flow.key.guest);
            let port = flow.key.port;
            send(world, port, ends, message);
        }
    }

    fn sweep(&mut self, now: Instant) {
        for id in self.flows.ids() {
            let old = |flow: &Flow| now.saturating_duration_since(flow.last) > KEPT;
            if self.flows.get(id).is_some_and(old)
                && let Some(flow) = self.flows.remove(id)
            {
                self.by_key.remove(&flow.key);
            }
        }
    }

    /// Forgets a link that is gone.
    pub(crate) fn drop_port(&mut self, port: Id) {
        for id in self.flows.ids() {
            if self.flows.get(id).is_some_and(|flow| flow.key.port == port)
                && let Some(flow) = self.flows.remove(id)
            {
                self.by_key.remove(&flow.key);
            }
        }
    }
}
