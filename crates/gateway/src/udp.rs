//! UDP: each pair of a guest's and a remote address is a connected socket of the host.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use crate::events::Source;
use crate::policy::Reason;
use crate::policy::Transport;
use crate::policy::Verdict;
use crate::shares::Shares;
use crate::slab::Id;
use crate::slab::Slab;
use crate::tcp::behind;
use crate::wire::IpPacket;
use crate::wire::UdpDatagram;
use crate::world::Unreachable;
use crate::world::World;

/// A flow with traffic both ways is kept so long without any (RFC 4787 §4.3 wants 2 minutes).
const KEPT: Duration = Duration::from_secs(180);
/// One that was never answered.
const KEPT_UNANSWERED: Duration = Duration::from_secs(30);
/// Between looks at which flows are over.
const SWEEP: Duration = Duration::from_secs(5);
/// Datagrams of one flow in one turn.
const TURN: usize = 64;
const MAX_DATAGRAM: usize = 65_536;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    port: Id,
    guest: SocketAddr,
    remote: SocketAddr,
}

#[derive(Debug)]
enum Via {
    Socket(OwnedFd),
    /// By a published port, to this peer.
    Published {
        publish: Id,
        peer: SocketAddr,
    },
}

#[derive(Debug)]
struct Flow {
    key: Key,
    via: Via,
    last: Instant,
    answered: bool,
}

/// A published port.
#[derive(Debug)]
struct Publish {
    socket: OwnedFd,
    port: Id,
    to: u16,
}

/// All flows.
#[derive(Debug)]
pub(crate) struct Udp {
    flows: Slab<Flow>,
    by_key: HashMap<Key, Id>,
    shares: Shares<Id>,
    published: Slab<Publish>,
    swept: Instant,
    buffer: Vec<u8>,
}

impl Udp {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            flows: Slab::default(),
            by_key: HashMap::new(),
            shares: Shares::default(),
            published: Slab::default(),
            swept: now,
            buffer: vec![0; MAX_DATAGRAM],
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.flows.len()
    }

    /// A datagram of a guest for outside.
    pub(crate) fn input(
        &mut self,
        world: &mut World,
        port: Id,
        packet: &IpPacket<'_>,
        datagram: &UdpDatagram<'_>,
    ) {
        let key = Key {
            port,
            guest: SocketAddr::new(packet.source, datagram.source),
            remote: SocketAddr::new(packet.destination, datagram.destination),
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
        let Some(flow) = self.flows.get_mut(id) else {
            return;
        };
        flow.last = world.now;
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = match &flow.via {
            Via::Socket(socket) => rustix::net::send(socket, datagram.payload, flags),
            Via::Published { publish, peer } => match self.published.get(*publish) {
                Some(publish) => {
                    rustix::net::sendto(&publish.socket, datagram.payload, flags, peer)
                }
                None => Err(Errno::NOTCONN),
            },
        };
        // What the network can't carry is lost; only a refusal is worth telling.
        if sent == Err(Errno::CONNREFUSED) {
            world.send_icmp_error(port, packet, Unreachable::Port);
        }
    }

    /// Whether a link may have one more flow.
    fn has_room(&self, world: &mut World, port: Id) -> bool {
        let several = world.ports.len() > 1;
        let admitted = self.shares.admits(&port, world.limits.flows, several);
        world.counters.limit_reached += u64::from(!admitted);
        admitted
    }

    fn open(&mut self, world: &mut World, key: Key) -> Result<Id, Unreachable> {
        if !self.has_room(world, key.port) {
            return Err(Unreachable::Host);
        }
        let mut to = key.remote;
        let refused = |world: &mut World, reason: &Reason| {
            world.refuse(key.port, Transport::Udp, key.remote, reason);
            Unreachable::Prohibited
        };
        if world.net.is_own(to.ip()) {
            to.set_ip(behind(to.ip()));
        } else if !world.net.uplink {
            return Err(refused(world, &Reason::NoUplink));
        }
        let about = (to.ip(), to.port());
        let verdict = world.check(key.port, Transport::Udp, about);
        if let Verdict::Refuse(reason) = verdict {
            return Err(refused(world, &reason));
        }
        let family = if to.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)
            .and_then(|socket| rustix::net::connect(&socket, &to).map(|()| socket))
            .map_err(|_| Unreachable::Host)?;
        self.add(world, key, Via::Socket(socket))
            .ok_or(Unreachable::Host)
    }

    fn add(&mut self, world: &mut World, key: Key, via: Via) -> Option<Id> {
        let id = self.flows.insert(Flow {
            key,
            via,
            last: world.now,
            answered: false,
        });
        if let Some(Via::Socket(socket)) = self.flows.get(id).map(|flow| &flow.via)
            && world
                .events
                .watch_readable(socket, Source::Udp, id)
                .is_err()
        {
            self.flows.remove(id);
            return None;
        }
        world.counters.udp_flows += 1;
        self.by_key.insert(key, id);
        self.shares.add(&key.port);
        Some(id)
    }

    /// Answers came for a flow.
    pub(crate) fn event(&mut self, world: &mut World, id: Id) {
        for _ in 0..TURN {
            let Some(flow) = self.flows.get_mut(id) else {
                return;
            };
            let Via::Socket(socket) = &flow.via else {
                return;
            };
            let received = rustix::net::recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT);
            let key = flow.key;
            match received {
                Ok((_, len)) => {
                    flow.last = world.now;
                    flow.answered = true;
                    let payload = &self.buffer[..len.min(MAX_DATAGRAM)];
                    world.send_udp(key.port, key.remote, key.guest, payload);
                }
                Err(Errno::CONNREFUSED) => Self::tell_refused(world, key),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// The remote has no such port: the guest is told about a datagram like its own.
    fn tell_refused(world: &mut World, key: Key) {
        let Some(macs) = world.macs(key.port) else {
            return;
        };
        let mut frame = crate::wire::Builder::udp(macs, key.guest, key.remote, &[], false);
        let headers = frame.headers().to_vec();
        let start = crate::wire::VNET_BYTES;
        let Some(ethernet) = headers.get(start..).and_then(crate::wire::Ethernet::parse) else {
            return;
        };
        if let Ok(packet) = IpPacket::parse(&ethernet) {
            world.send_icmp_error(key.port, &packet, Unreachable::Port);
        }
    }

    /// Publishes `socket` to port `to` of a machine.
    pub(crate) fn publish(
        &mut self,
        world: &World,
        socket: OwnedFd,
        port: Id,
        to: u16,
    ) -> std::io::Result<Id> {
        let id = self.published.insert(Publish { socket, port, to });
        if let Some(publish) = self.published.get(id) {
            let watched = world
                .events
                .watch_readable(&publish.socket, Source::UdpPublish, id);
            if let Err(error) = watched {
                self.published.remove(id);
                return Err(error);
            }
        }
        Ok(id)
    }

    pub(crate) fn has_published(&self, id: Id) -> bool {
        self.published.get(id).is_some()
    }

    pub(crate) fn unpublish(&mut self, id: Id) {
        self.published.remove(id);
    }

    /// Datagrams came to a published port.
    pub(crate) fn publish_event(&mut self, world: &mut World, id: Id) {
        for _ in 0..TURN {
            let Some(publish) = self.published.get(id) else {
                return;
            };
            let (port, to) = (publish.port, publish.to);
            let flags = RecvFlags::DONTWAIT;
            let received = rustix::net::recvfrom(&publish.socket, &mut self.buffer[..], flags);
            let (len, peer) = match received {
                Ok((_, len, Some(peer))) => (len, peer),
                Ok(_) | Err(Errno::INTR) => continue,
                Err(_) => return,
            };
            let Ok(peer) = SocketAddr::try_from(peer) else {
                continue;
            };
            self.forward(world, (id, port, to), peer, len.min(MAX_DATAGRAM));
        }
    }

    fn forward(
        &mut self,
        world: &mut World,
        (publish, port, to): (Id, Id, u16),
        peer: SocketAddr,
        len: usize,
    ) {
        let ip = crate::policy::unwrapped(peer.ip());
        let own = |v4| world.ports.get(port).and_then(|port| port.address(v4));
        let Some(guest_ip) = own(ip.is_ipv4()).or_else(|| own(!ip.is_ipv4())) else {
            return;
        };
        let guest = SocketAddr::new(guest_ip, to);
        let usable = ip.is_ipv4() == guest.is_ipv4()
            && !ip.is_loopback()
            && !world.net.is_near(ip)
            && world.net.uplink;
        let Some(ip) = (if usable {
            Some(ip)
        } else {
            world.net.own(guest.is_ipv4())
        }) else {
            return;
        };
        let key = Key {
            port,
            guest,
            remote: SocketAddr::new(ip, peer.port()),
        };
        let id = match self.by_key.get(&key) {
            Some(&id) => id,
            None if !self.has_room(world, port) => return,
            None => match self.add(world, key, Via::Published { publish, peer }) {
                Some(id) => id,
                None => return,
            },
        };
        if let Some(flow) = self.flows.get_mut(id) {
            flow.last = world.now;
            flow.answered = true;
        }
        world.send_udp(port, key.remote, guest, &self.buffer[..len]);
    }

    /// Forgets a link that is gone.
    pub(crate) fn drop_port(&mut self, port: Id) {
        for id in self.flows.ids() {
            if self.flows.get(id).is_some_and(|flow| flow.key.port == port) {
                self.remove(id);
            }
        }
        for id in self.published.ids() {
            if self.published.get(id).is_some_and(|one| one.port == port) {
                self.published.remove(id);
            }
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(flow) = self.flows.remove(id)
            && self.by_key.remove(&flow.key).is_some()
        {
            self.shares.remove(&flow.key.port);
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        (self.flows.len() > 0).then(|| self.swept + SWEEP)
    }

    /// Ends flows without traffic.
    pub(crate) fn sweep(&mut self, now: Instant) {
        if now < self.swept + SWEEP {
            return;
        }
        self.swept = now;
        for id in self.flows.ids() {
            let over = self.flows.get(id).is_some_and(|flow| {
                let kept = if flow.answered { KEPT } else { KEPT_UNANSWERED };
                now.saturating_duration_since(flow.last) > kept
            });
            if over {
                self.remove(id);
            }
        }
    }
}
