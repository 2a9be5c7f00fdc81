//! TCP: each connection of a guest ends here and goes on as a socket of the host.

mod connection;
mod host;
mod output;
mod ring;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::sockopt;

use connection::Connection;
use connection::Fate;
pub(crate) use connection::Key;
use connection::State;
use output::refuse;
use output::segment_bytes;

use crate::events::Source;
use crate::policy::Reason;
use crate::policy::Transport;
use crate::policy::Verdict;
use crate::shares::Shares;
use crate::slab::Id;
use crate::slab::Slab;
use crate::wire::TcpFlags;
use crate::wire::TcpSegment;
use crate::world::World;

/// Domain name service.
const DNS: u16 = 53;
/// Connections that have their turn before links are looked at again.
const TURN: usize = 256;

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Tcp {
    connections: Slab<Connection>,
    shares: Shares<Id>,
    by_key: HashMap<Key, Id>,
    ready: VecDeque<Id>,
    timers: BinaryHeap<Reverse<(Instant, Id)>>,
}

/// Where a connection of a guest goes.
enum Target {
    Names,
    Host(SocketAddr),
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // Waits for nothing once the system is up; zeros would still be a valid number.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}

/// The host's own address that stands behind the gateway's.
pub(crate) fn behind(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// A socket of the host that is about to be connected, after `prepare` had it.
pub(crate) fn open_socket(
    to: SocketAddr,
    prepare: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
) -> Result<OwnedFd, Errno> {
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    prepare(&socket)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

impl Tcp {
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    fn touch(&mut self, id: Id) {
        if let Some(connection) = self.connections.get_mut(id)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    /// A segment of the guest at `key.guest`.
    pub(crate) fn input(&mut self, world: &mut World, key: Key, segment: &TcpSegment<'_>) {
        let syn = segment.flags.has(TcpFlags::SYN) && !segment.flags.has(TcpFlags::ACK);
        if let Some(&id) = self.by_key.get(&key) {
            if !syn || !self.is_replaced(world, id, segment) {
                self.input_known(world, id, segment);
                return;
            }
            // The guest has forgotten the old one: it was restarted.
            self.finish(world, id, Fate::Gone, true);
        }
        if !syn || segment.flags.has(TcpFlags::RST) {
            refuse(world, key, segment);
            return;
        }
        match self.open(world, key, segment) {
            Ok(()) => {}
            Err(()) => refuse(world, key, segment),
        }
    }

    fn is_replaced(&self, _world: &World, id: Id, segment: &TcpSegment<'_>) -> bool {
        self.connections
            .get(id)
            .is_some_and(|connection| connection.received != segment.sequence.wrapping_add(1))
    }

    fn input_known(&mut self, world: &mut World, id: Id, segment: &TcpSegment<'_>) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        let fate = match connection.state {
            State::Connecting if segment.flags.has(TcpFlags::RST) => Fate::Gone,
            State::Connecting => Fate::Wait,
            State::SynReceived => Self::input_opening(connection, segment),
            State::SynSent => Self::input_answer(world, connection, segment),
            State::Open => Fate::Again,
        };
        let fate = match (fate, connection.state) {
            (Fate::Again, State::Open) => connection.input(world, segment),
            (other, _) => other,
        };
        match fate {
            Fate::Wait => {}
            Fate::Again => self.touch(id),
            over => self.finish(world, id, over, over == Fate::Gone),
        }
    }

    /// The last step of a handshake that the guest began.
    fn input_opening(connection: &mut Connection, segment: &TcpSegment<'_>) -> Fate {
        if segment.flags.has(TcpFlags::RST) {
            return Fate::Gone;
        }
        if segment.flags.has(TcpFlags::SYN) {
            // Our answer got lost.
            connection.next = connection.una;
            return Fate::Again;
        }
        let first = connection.una.wrapping_add(1);
        if !segment.flags.has(TcpFlags::ACK) || segment.acknowledgment != first {
            return Fate::Wait;
        }
        Self::open_up(connection, first);
        Fate::Again
    }

    fn open_up(connection: &mut Connection, first: u32) {
        connection.state = State::Open;
        connection.una = first;
        connection.next = first;
        connection.max = first;
        connection.tries = 0;
        connection.deadline = None;
    }

    /// The guest's answer to our SYN.
    fn input_answer(world: &World, connection: &mut Connection, segment: &TcpSegment<'_>) -> Fate {
        let first = connection.una.wrapping_add(1);
        let answers = segment.flags.has(TcpFlags::ACK) && segment.acknowledgment == first;
        if segment.flags.has(TcpFlags::RST) {
            return if answers { Fate::Gone } else { Fate::Wait };
        }
        if !answers || !segment.flags.has(TcpFlags::SYN) {
            return Fate::Wait;
        }
        let most = segment_bytes(world.net.mtu, connection.key.guest.is_ipv4());
        connection.take_options(segment, most);
        Self::open_up(connection, first);
        Fate::Again
    }

    fn target(
        world: &mut World,
        key: Key,
    ) -> Result<(Target, Option<crate::policy::Inspect>), Reason> {
        let mut to = key.remote;
        if world.net.is_own(to.ip()) {
            if to.port() == DNS {
                return Ok((Target::Names, None));
            }
            to.set_ip(behind(to.ip()));
        } else if !world.net.uplink {
            return Err(Reason::NoUplink);
        }
        let about = (to.ip(), to.port());
        match world.check(key.port, Transport::Tcp, about) {
            Verdict::Allow => Ok((Target::Host(to), None)),
            Verdict::AllowIf(inspect) => Ok((Target::Host(to), Some(inspect))),
            Verdict::Refuse(reason) => Err(reason),
        }
    }

    /// Whether a link may have one more connection.
    fn has_room(&self, world: &mut World, port: Id) -> bool {
        let several = world.ports.len() > 1;
        let limit = world.limits.connections;
        let admitted = self.shares.admits(&port, limit, several);
        world.counters.limit_reached += u64::from(!admitted);
        admitted
    }

    /// Opens what a guest's SYN asks for.
    fn open(&mut self, world: &mut World, key: Key, segment: &TcpSegment<'_>) -> Result<(), ()> {
        if !self.has_room(world, key.port) {
            return Err(());
        }
        let (target, inspect) = Self::target(world, key).map_err(|reason| {
            world.refuse(key.port, Transport::Tcp, key.remote, &reason);
        })?;
        let socket = match target {
            Target::Host(to) => {
                open_socket(to, |_| Ok(())).map_err(|_| world.counters.tcp_failed += 1)?
            }
            Target::Names => {
                let (own, theirs) = rustix::net::socketpair(
                    AddressFamily::UNIX,
                    SocketType::STREAM,
                    SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                    None,
                )
                .map_err(|_| world.counters.tcp_failed += 1)?;
                world.name_streams.push((key.port, theirs));
                own
            }
        };
        let most = segment_bytes(world.net.mtu, key.guest.is_ipv4());
        let mut connection = Connection::new(key, socket, State::Connecting, random());
        connection.take_options(segment, most);
        connection.inspect = inspect;
        self.add(world, connection)
    }

    fn add(&mut self, world: &mut World, connection: Connection) -> Result<(), ()> {
        let key = connection.key;
        let id = self.connections.insert(connection);
        let Some(connection) = self.connections.get(id) else {
            return Err(());
        };
        let watched = world
            .events
            .watch_edges(&connection.socket, Source::Tcp, id);
        if watched.is_err() {
            self.connections.remove(id);
            world.counters.tcp_failed += 1;
            return Err(());
        }
        self.by_key.insert(key, id);
        self.shares.add(&key.port);
        world.counters.tcp_opened += 1;
        self.touch(id);
        Ok(())
    }

    /// A connection that came in by a published port, on its way to `guest`.
    pub(crate) fn accept(
        &mut self,
        world: &mut World,
        socket: OwnedFd,
        (port, guest): (Id, SocketAddr),
        peer: SocketAddr,
    ) {
        if !self.has_room(world, port) {
            return;
        }
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let Some(remote) = self.seen_as(world, port, guest, peer) else {
            return;
        };
        let key = Key {
            port,
            guest,
            remote,
        };
        let connection = Connection::new(key, socket, State::SynSent, random());
        // Its end is closed when it can't be added: the peer sees that.
        let _ = self.add(world, connection);
    }

    /// The address that a guest sees a peer at: the peer's own, or the gateway's for what the
    /// guest has no way to.
    fn seen_as(
        &self,
        world: &World,
        port: Id,
        guest: SocketAddr,
        peer: SocketAddr,
    ) -> Option<SocketAddr> {
        let ip = crate::policy::unwrapped(peer.ip());
        let usable = ip.is_ipv4() == guest.is_ipv4()
            && !ip.is_loopback()
            && !world.net.is_near(ip)
            && world.net.uplink;
        let ip = if usable {
            ip
        } else {
            world.net.own(guest.is_ipv4())?
        };
        (0..32).find_map(|attempt| {
            let number = match attempt {
                0 => peer.port(),
                _ => 32_768 + u16::try_from(random() & 0x7fff).unwrap_or(0),
            };
            let remote = SocketAddr::new(ip, number);
            let key = Key {
                port,
                guest,
                remote,
            };
            (!self.by_key.contains_key(&key)).then_some(remote)
        })
    }

    /// Something happened on a connection's socket.
    pub(crate) fn event(&mut self, id: Id, flags: EventFlags) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        let ended = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        connection.readable |= flags.contains(EventFlags::IN);
        connection.writable |= flags.contains(EventFlags::OUT);
        connection.hung_up |= flags.intersects(ended);
        self.touch(id);
    }

    /// The link of these has room again.
    pub(crate) fn resume(&mut self, waiting: Vec<Id>) {
        // They are marked as queued already.
        self.ready.extend(waiting);
    }

    /// Ends all connections of a link that is gone.
    pub(crate) fn drop_port(&mut self, world: &mut World, port: Id) {
        for id in self.connections.ids() {
            let own = self
                .connections
                .get(id)
                .is_some_and(|one| one.key.port == port);
            if own {
                self.finish(world, id, Fate::Gone, true);
            }
        }
    }

    fn finish(&mut self, world: &mut World, id: Id, fate: Fate, abort: bool) {
        let Some(mut connection) = self.connections.remove(id) else {
            return;
        };
        if self.by_key.remove(&connection.key).is_some() {
            self.shares.remove(&connection.key.port);
        }
        if fate == Fate::Reset {
            connection.send_reset(world);
            world.counters.tcp_reset += 1;
        }
        if (abort || fate == Fate::Reset) && !connection.is_over() {
            connection.abort_host();
        }
        connection.out.release(&mut world.budget);
        connection.inbox.release(&mut world.budget);
    }

    /// Gives ready connections their turn.
    pub(crate) fn run(&mut self, world: &mut World) {
        for _ in 0..TURN {
            let Some(id) = self.ready.pop_front() else {
                return;
            };
            self.run_one(world, id);
        }
    }

    /// Whether some connections wait for their turn.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    fn run_one(&mut self, world: &mut World, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        connection.queued = false;
        let mut fate = Fate::Wait;
        if connection.state == State::Connecting {
            match connection.finish_connect() {
                Ok(false) => {}
                Ok(true) => fate = connection.pump(world),
                Err(_) => {
                    world.counters.tcp_failed += 1;
                    fate = Fate::Reset;
                }
            }
        } else {
            fate = connection.pump(world);
        }
        match fate {
            Fate::Wait | Fate::Again => {}
            over => {
                self.finish(world, id, over, false);
                return;
            }
        }
        let port = connection.key.port;
        if let Some(port) = world.ports.get_mut(port).filter(|port| port.full) {
            connection.queued = true;
            port.waiting.push(id);
        } else if fate == Fate::Again {
            self.touch(id);
        }
        self.arm(id);
    }

    fn arm(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(id) else {
            return;
        };
        let Some(deadline) = connection.deadline else {
            return;
        };
        if connection.armed.is_none_or(|armed| armed > deadline) {
            connection.armed = Some(deadline);
            self.timers.push(Reverse((deadline, id)));
        }
    }

    /// When a timer is due.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((when, _))| *when)
    }

    /// Looks at timers that are due.
    pub(crate) fn run_timers(&mut self, world: &mut World) {
        while let Some(&Reverse((when, id))) = self.timers.peek() {
            if when > world.now {
                return;
            }
            self.timers.pop();
            let Some(connection) = self.connections.get_mut(id) else {
                continue;
            };
            if connection.armed != Some(when) {
                continue;
            }
            connection.armed = None;
            if connection
                .deadline
                .is_none_or(|deadline| deadline > world.now)
            {
                self.arm(id);
                continue;
            }
            match connection.timeout(world) {
                Fate::Reset => self.finish(world, id, Fate::Reset, true),
                _ => self.touch(id),
            }
        }
    }
}
