//! The whole: links, services, the way outside, and one loop that serves them.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::sockopt;

use crate::config::Config;
use crate::config::PortConfig;
use crate::config::PublishConfig;
use crate::control::Control;
use crate::dns::Dns;
use crate::events::Event;
use crate::events::Source;
use crate::fds::Fds;
use crate::neighbours;
use crate::ping::Ping;
use crate::policy::Policy;
use crate::port::Port;
use crate::relay::Relay;
use crate::slab::Id;
use crate::slab::Slab;
use crate::tcp::Tcp;
use crate::udp::Udp;
use crate::world::World;

/// Frames of one link in one turn.
const FRAMES: usize = 128;
/// The largest frame with its headers.
const MAX_FRAME: usize = 65_535 + 14 + 12 + 4;

type AnyError = Box<dyn Error + Send + Sync>;

/// A published TCP port.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    port: Id,
    to: u16,
}

/// What publishes a port.
#[derive(Clone, Copy, Debug)]
enum Published {
    Tcp(Id),
    Udp(Id),
}

/// A network's gateway.
#[derive(Debug)]
pub struct Gateway {
    pub(crate) world: World,
    pub(crate) tcp: Tcp,
    pub(crate) udp: Udp,
    pub(crate) ping: Ping,
    pub(crate) dns: Dns,
    pub(crate) relay: Relay,
    control: Control,
    listeners: Slab<Listener>,
    published: HashMap<u64, Published>,
    next_publish: u64,
    readable: Vec<Id>,
    frame: Vec<u8>,
    exit_when_empty: bool,
    had_ports: bool,
    pub(crate) stopping: bool,
}

impl Gateway {
    /// The gateway of `config`, whose descriptors are in `fds`.
    ///
    /// # Errors
    /// When a rule or a descriptor is no good, or the host refuses.
    pub(crate) fn new(config: &Config, fds: &mut Fds) -> Result<Self, AnyError> {
        let policy = Policy::new(&config.policy)?;
        let mut world = World::new(config, policy)?;
        let mut control = Control::default();
        if let Some(fd) = config.control_fd {
            control.add_owner(&world, fds.take(fd)?)?;
        }
        if let Some(fd) = config.listen_fd {
            control.listen(&world, fds.take(fd)?)?;
        }
        world.now = Instant::now();
        let mut new = Self {
            udp: Udp::new(world.now),
            world,
            tcp: Tcp::default(),
            ping: Ping::default(),
            dns: Dns::default(),
            relay: Relay::default(),
            control,
            listeners: Slab::default(),
            published: HashMap::new(),
            next_publish: 1,
            readable: Vec::new(),
            frame: vec![0; MAX_FRAME],
            exit_when_empty: config.exit_when_empty,
            had_ports: false,
            stopping: false,
        };
        for port in &config.ports {
            let fd = fds.take(port.fd)?;
            new.add_port(port, fd)?;
        }
        for publish in &config.publish {
            let fd = fds.take(publish.fd)?;
            new.publish(publish, fd)?;
        }
        Ok(new)
    }

    /// Adds a machine's link.
    pub(crate) fn add_port(&mut self, config: &PortConfig, fd: OwnedFd) -> Result<(), AnyError> {
        let taken = |text: String| -> AnyError { text.into() };
        if self.port_named(&config.name).is_some() {
            return Err(taken(format!(
                "there is a link named {:?} already",
                config.name
            )));
        }
        let near = |world: &World, mac| mac == world.net.mac || world.by_mac.contains_key(&mac);
        if near(&self.world, config.mac) {
            return Err(taken("another link has that MAC address".to_owned()));
        }
        for address in &config.addresses {
            let other = self
                .world
                .ports
                .iter()
                .any(|(_, port)| port.addresses.contains(address));
            if other || self.world.net.is_own(*address) {
                return Err(taken(format!("{address} is taken")));
            }
            if !self.world.net.is_near(*address) {
                return Err(taken(format!("{address} is not of this network")));
            }
        }
        // What was told counts more than what was taken.
        for id in self.world.ports.ids() {
            if let Some(port) = self.world.ports.get_mut(id) {
                for address in &config.addresses {
                    port.give_up(*address);
                }
            }
        }
        let mut port = Port::new(config.name.clone(), config.mac, config.link, fd)?;
        port.addresses.clone_from(&config.addresses);
        port.hostname.clone_from(&config.hostname);
        port.limit(&config.rate, self.world.now);
        port.policy = config.policy.as_ref().map(Policy::new).transpose()?;
        let id = self.world.ports.insert(port);
        if let Some(port) = self.world.ports.get(id) {
            let watched = self
                .world
                .events
                .watch_edges(port.descriptor(), Source::Link, id);
            if let Err(error) = watched {
                self.world.ports.remove(id);
                return Err(error.into());
            }
        }
        self.world.by_mac.insert(config.mac, id);
        self.readable.push(id);
        self.had_ports = true;
        Ok(())
    }

    /// The link of a name.
    pub(crate) fn port_named(&self, name: &str) -> Option<Id> {
        self.world
            .ports
            .iter()
            .find(|(_, port)| port.name == name)
            .map(|(id, _)| id)
    }

    /// Takes a link away, with all that goes through it.
    pub(crate) fn remove_port(&mut self, id: Id) {
        self.tcp.drop_port(&mut self.world, id);
        self.udp.drop_port(id);
        self.ping.drop_port(id);
        for listener in self.listeners.ids() {
            if self
                .listeners
                .get(listener)
                .is_some_and(|one| one.port == id)
            {
                self.listeners.remove(listener);
            }
        }
        if let Some(port) = self.world.ports.remove(id) {
            self.world.by_mac.remove(&port.mac);
            self.world.events.forget(port.descriptor());
        }
        let (listeners, udp) = (&self.listeners, &self.udp);
        self.published.retain(|_, one| match *one {
            Published::Tcp(id) => listeners.get(id).is_some(),
            Published::Udp(id) => udp.has_published(id),
        });
    }

    /// Publishes a machine's port by a socket of the host; returns its number.
    pub(crate) fn publish(&mut self, config: &PublishConfig, fd: OwnedFd) -> Result<u64, AnyError> {
        let Some(port) = self.port_named(&config.port) else {
            return Err(format!("there is no link named {:?}", config.port).into());
        };
        rustix::io::ioctl_fionbio(&fd, true)?;
        let published = match sockopt::socket_type(&fd)? {
            SocketType::STREAM => {
                let id = self.listeners.insert(Listener {
                    socket: fd,
                    port,
                    to: config.to,
                });
                if let Some(listener) = self.listeners.get(id) {
                    let events = &self.world.events;
                    events.watch_readable(&listener.socket, Source::TcpPublish, id)?;
                }
                Published::Tcp(id)
            }
            SocketType::DGRAM => {
                Published::Udp(self.udp.publish(&self.world, fd, port, config.to)?)
            }
            _ => return Err("only TCP and UDP ports can be published".into()),
        };
        let number = self.next_publish;
        self.next_publish += 1;
        self.published.insert(number, published);
        Ok(number)
    }

    /// Takes a published port back.
    pub(crate) fn unpublish(&mut self, number: u64) -> bool {
        match self.published.remove(&number) {
            Some(Published::Tcp(id)) => drop(self.listeners.remove(id)),
            Some(Published::Udp(id)) => self.udp.unpublish(id),
            None => return false,
        }
        true
    }

    fn accept(&mut self, id: Id) {
        for _ in 0..64 {
            let Some(listener) = self.listeners.get(id) else {
                return;
            };
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (socket, peer) = match rustix::net::acceptfrom_with(&listener.socket, flags) {
                Ok((socket, Some(peer))) => (socket, peer),
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return,
            };
            let Ok(peer) = SocketAddr::try_from(peer) else {
                continue;
            };
            let v4 = crate::policy::unwrapped(peer.ip()).is_ipv4();
            let (port, to) = (listener.port, listener.to);
            let own = |v4| self.world.ports.get(port).and_then(|port| port.address(v4));
            let Some(guest) = own(v4).or_else(|| own(!v4)) else {
                continue;
            };
            let guest = SocketAddr::new(guest, to);
            self.tcp
                .accept(&mut self.world, socket, (port, guest), peer);
        }
    }

    fn dispatch(&mut self, event: Event) {
        let (id, world) = (event.id, &mut self.world);
        match event.source {
            Source::Link => self.link_event(id, event),
            Source::Tcp => self.tcp.event(id, event.flags),
            Source::Udp => self.udp.event(world, id),
            Source::Ping => self.ping.event(world, id),
            Source::Resolver => self.dns.upstream_event(world, id),
            Source::NameStream => self.dns.stream_event(world, id),
            Source::TcpPublish => self.accept(id),
            Source::UdpPublish => self.udp.publish_event(world, id),
            Source::ControlListener => self.control.accept(world),
            Source::Control => crate::control::serve(self, id),
            Source::RelayListener => self.relay.accept(world, id),
            Source::RelayNear | Source::RelayFar => {
                self.relay.event(id, event.source, event.flags);
            }
        }
    }

    pub(crate) fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    fn link_event(&mut self, id: Id, event: Event) {
        use rustix::event::epoll::EventFlags;
        let Some(port) = self.world.ports.get_mut(id) else {
            return;
        };
        if event.flags.contains(EventFlags::OUT) && port.full {
            port.full = false;
            let waiting = std::mem::take(&mut port.waiting);
            self.tcp.resume(waiting);
        }
        let came = EventFlags::IN | EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR;
        if event.flags.intersects(came) {
            port.readable = true;
            if !self.readable.contains(&id) {
                self.readable.push(id);
            }
        }
    }

    /// Takes frames from links that have some; returns how long until a throttled one may go on.
    fn read_links(&mut self) -> Option<Duration> {
        let mut wait: Option<Duration> = None;
        for id in std::mem::take(&mut self.readable) {
            let (again, pause) = self.read_link(id);
            if let Some(pause) = pause {
                wait = Some(wait.map_or(pause, |other| other.min(pause)));
            }
            if again {
                self.readable.push(id);
            }
        }
        wait
    }

    fn read_link(&mut self, id: Id) -> (bool, Option<Duration>) {
        let mut frame = std::mem::take(&mut self.frame);
        let mut result = (true, Some(Duration::ZERO));
        for _ in 0..FRAMES {
            let Some(port) = self.world.ports.get_mut(id) else {
                result = (false, None);
                break;
            };
            if let Some(bucket) = &mut port.send_bucket {
                let pause = bucket.wait(self.world.now);
                if !pause.is_zero() {
                    result = (true, Some(pause));
                    break;
                }
            }
            match port.receive(&mut frame) {
                Ok(len) => self.on_message(id, &frame[..len]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    result = (false, None);
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // The machine or its namespace is gone.
                    port.gone = true;
                    result = (false, None);
                    break;
                }
            }
        }
        self.frame = frame;
        result
    }

    fn on_message(&mut self, id: Id, message: &[u8]) {
        if message.len() < crate::wire::VNET_BYTES {
            if let Some(port) = self.world.ports.get_mut(id) {
                let before = port.offloads;
                port.notice(message);
                // A guest's driver has just started: it needn't wait for its own question.
                if before != port.offloads {
                    neighbours::advertise_router(&mut self.world, id);
                }
            }
            return;
        }
        crate::switch::frame(self, id, message);
    }

    /// Lets links go on whose bound held them back; returns how long until the next one may.
    fn unthrottle(&mut self) -> Option<Duration> {
        let mut wait: Option<Duration> = None;
        for id in self.world.ports.ids() {
            let Some(port) = self.world.ports.get_mut(id) else {
                continue;
            };
            let Some(until) = port.throttled else {
                continue;
            };
            let pause = until.saturating_duration_since(Instant::now());
            if pause.is_zero() {
                port.throttled = None;
                port.full = false;
                let waiting = std::mem::take(&mut port.waiting);
                self.tcp.resume(waiting);
            } else {
                wait = Some(wait.map_or(pause, |other| other.min(pause)));
            }
        }
        wait
    }

    /// One turn of the loop; waits at most `most`.
    ///
    /// # Errors
    /// When the host's event queue fails.
    pub fn turn(&mut self, most: Option<Duration>) -> io::Result<()> {
        self.unthrottle();
        let pause = self.read_links();
        self.tcp.run(&mut self.world);
        self.relay.run(&mut self.world);
        self.serve_name_streams();
        self.world.capture.flush();
        let mut wait = most;
        let mut at_most = |limit: Duration| {
            wait = Some(wait.map_or(limit, |wait| wait.min(limit)));
        };
        for pause in [pause, self.unthrottle()].into_iter().flatten() {
            at_most(pause);
        }
        if self.tcp.has_ready() || self.relay.has_ready() {
            at_most(Duration::ZERO);
        }
        let now = Instant::now();
        let timers = [
            self.tcp.next_timer(),
            self.udp.next_timer(),
            self.dns.next_timer(),
        ];
        for timer in timers.into_iter().flatten() {
            // A tenth of a millisecond early would be a turn for nothing.
            at_most(timer.saturating_duration_since(now) + Duration::from_micros(100));
        }
        let events = self.world.events.wait(wait)?;
        self.world.now = Instant::now();
        for event in events {
            self.dispatch(event);
        }
        self.tcp.run_timers(&mut self.world);
        self.dns.run_timers(&mut self.world);
        self.udp.sweep(self.world.now);
        self.bury();
        Ok(())
    }

    fn serve_name_streams(&mut self) {
        for (port, socket) in std::mem::take(&mut self.world.name_streams) {
            self.dns.serve(&mut self.world, port, socket);
        }
    }

    /// Takes links away whose machines are gone.
    fn bury(&mut self) {
        for id in self.world.ports.ids() {
            if self.world.ports.get(id).is_some_and(|port| port.gone) {
                self.remove_port(id);
            }
        }
        let empty = self.had_ports && self.world.ports.len() == 0;
        if (empty && self.exit_when_empty) || self.control.owner_is_gone() {
            self.stopping = true;
        }
    }

    /// Serves until it is told to stop, or has nobody left to serve.
    ///
    /// # Errors
    /// When the host's event queue fails.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.stopping {
            self.turn(None)?;
        }
        self.world.capture.stop();
        Ok(())
    }
}
