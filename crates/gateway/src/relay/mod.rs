//! Connections that the host's kernel hands over, to be looked at: it knows which addresses were
//! answered for a name, not which name a connection is for.
//!
//! The kernel's rules admit a connection first, and then lead it to a socket here instead of to
//! its destination. What it says first is held back until it shows a name that may be reached
//! ([`first_name`]); from then on bytes are passed on both ways, by one socket each.

mod pair;

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::net::sockopt;
use serde::Deserialize;

use crate::config::Fd;
use crate::config::PolicyConfig;
use crate::events::Source;
use crate::policy::FirstName;
use crate::policy::Inspect;
use crate::policy::Policy;
use crate::policy::Reason;
use crate::policy::Transport;
use crate::policy::unwrapped;
use crate::shares::Shares;
use crate::slab::Id;
use crate::slab::Slab;
use crate::tcp::open_socket;
use crate::world::World;
use pair::Flow;
use pair::Pair;
use pair::reset_at_close;

/// Pairs that have their turn before events are looked at again.
const TURN: usize = 256;
/// Connections taken from a listener at once.
const ACCEPTS: usize = 64;

/// Whose connections are looked at.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RelayConfig {
    /// Listening sockets, besides those that are there already.
    #[serde(default)]
    pub(crate) listen: Vec<Fd>,
    /// The machines.
    pub(crate) machines: Vec<MachineConfig>,
}

/// A machine whose connections are looked at.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MachineConfig {
    /// Its name, for refusals.
    pub(crate) name: String,
    /// Its addresses; none where the kernel's rules tell it by its link, and lead it to its doors.
    #[serde(default)]
    pub(crate) addresses: Vec<IpAddr>,
    /// Listening sockets by which it comes alone, besides those that are there already.
    #[serde(default)]
    pub(crate) listen: Vec<Fd>,
    /// Its own egress rules, besides the network's.
    #[serde(default)]
    pub(crate) policy: Option<PolicyConfig>,
    /// Marks packets of connections that are passed on for it, as their DSCP (RFC 2474): the
    /// kernel's rules give them the machine's address by it, and take it off.
    #[serde(default)]
    pub(crate) tag: Option<u8>,
}

/// A listening socket.
#[derive(Debug)]
struct Door {
    at: SocketAddr,
    socket: OwnedFd,
    /// The machine that comes by it, whatever its address; any when `None`.
    of: Option<String>,
}

#[derive(Debug)]
struct Machine {
    policy: Option<Policy>,
    tag: Option<u8>,
}

impl Machine {
    /// Readies the socket of a connection that goes on for it.
    fn prepare(&self, world: &World, socket: &OwnedFd, v4: bool) -> Result<(), Errno> {
        let (Some(tag), Some(own)) = (self.tag, world.net.own(v4)) else {
            return Ok(());
        };
        rustix::net::bind(socket, &SocketAddr::new(own, 0))?;
        if v4 {
            sockopt::set_ip_tos(socket, tag << 2)
        } else {
            sockopt::set_ipv6_tclass(socket, u32::from(tag) << 2)
        }
    }
}

/// All that are passed on.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    doors: Slab<Door>,
    machines: HashMap<String, Machine>,
    by_address: HashMap<IpAddr, String>,
    pairs: Slab<Pair>,
    shares: Shares<String>,
    ready: VecDeque<Id>,
    scratch: Vec<u8>,
}

impl Relay {
    /// Where connections of all machines are taken.
    pub(crate) fn listening(&self) -> Vec<String> {
        let all = self.doors.iter().filter(|(_, door)| door.of.is_none());
        all.map(|(_, door)| door.at.to_string()).collect()
    }

    /// Where those of one machine alone are, by its name.
    pub(crate) fn doors(&self) -> BTreeMap<&str, Vec<String>> {
        let mut found = BTreeMap::<_, Vec<_>>::new();
        for (_, door) in self.doors.iter() {
            if let Some(of) = &door.of {
                found.entry(&**of).or_default().push(door.at.to_string());
            }
        }
        found
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Takes connections from one more socket: those of one machine, or of all.
    pub(crate) fn listen(
        &mut self,
        world: &World,
        socket: OwnedFd,
        of: Option<&str>,
    ) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let at = SocketAddr::try_from(rustix::net::getsockname(&socket)?)?;
        let of = of.map(str::to_owned);
        let id = self.doors.insert(Door { at, socket, of });
        if let Some(door) = self.doors.get(id) {
            let events = &world.events;
            events.watch_readable(&door.socket, Source::RelayListener, id)?;
        }
        Ok(())
    }

    /// Replaces the machines, and with them the rules that hold for connections not looked at yet;
    /// ends those of machines that are gone.
    pub(crate) fn set_machines(
        &mut self,
        world: &mut World,
        configs: &[MachineConfig],
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut machines = HashMap::new();
        let mut by_address = HashMap::new();
        for config in configs {
            let name = || config.name.clone();
            by_address.extend(config.addresses.iter().map(|&address| (address, name())));
            let machine = Machine {
                policy: config.policy.as_ref().map(Policy::new).transpose()?,
                tag: config.tag.filter(|tag| (1..64).contains(tag)),
            };
            machines.insert(name(), machine);
        }
        (self.machines, self.by_address) = (machines, by_address);
        for id in self.doors.ids() {
            let of = self.doors.get(id).and_then(|door| door.of.as_ref());
            if of.is_some_and(|name| !self.machines.contains_key(name)) {
                self.doors.remove(id);
            }
        }
        for id in self.pairs.ids() {
            let name = self.pairs.get(id).map(|pair| &pair.machine);
            if name.is_none_or(|name| !self.machines.contains_key(name)) {
                self.finish(world, id, true);
            }
        }
        Ok(())
    }

    /// The rules that a connection must hold to, with what it must show for each.
    fn rules<'a>(
        &'a self,
        world: &'a World,
        machine: &str,
        to: SocketAddr,
    ) -> impl Iterator<Item = (&'a Policy, Inspect)> {
        let own = self.machines.get(machine);
        let own = own.and_then(|one| one.policy.as_ref());
        std::iter::once(&world.policy)
            .chain(own)
            .filter_map(move |one| Some((one, one.inspects((to.ip(), to.port()))?)))
    }

    /// What a connection must show.
    fn inspect(&self, world: &World, machine: &str, to: SocketAddr) -> Option<Inspect> {
        let mut whole = None;
        for (_, inspect) in self.rules(world, machine, to) {
            if whole != Some(Inspect::MustBeAllowed) {
                whole = Some(inspect);
            }
        }
        whole
    }

    /// A listener has connections.
    pub(crate) fn accept(&mut self, world: &mut World, id: Id) {
        for _ in 0..ACCEPTS {
            let Some(door) = self.doors.get(id) else {
                return;
            };
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (socket, peer) = match rustix::net::acceptfrom_with(&door.socket, flags) {
                Ok((socket, Some(peer))) => (socket, peer),
                Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return,
            };
            let Ok(guest) = SocketAddr::try_from(peer) else {
                continue;
            };
            // One that was meant for this socket was not led here by the kernel's rules.
            let to = meant_for(&socket, door.at.is_ipv4()).filter(|to| *to != door.at);
            let machine = door
                .of
                .as_ref()
                .or_else(|| self.by_address.get(&guest.ip()));
            if let (Some(to), Some(machine)) = (to, machine.cloned()) {
                self.join(world, socket, machine, to);
            }
        }
    }

    /// Passes a guest's connection on to where it was meant for.
    fn join(&mut self, world: &mut World, near: OwnedFd, name: String, to: SocketAddr) {
        // Until there is somebody behind it.
        reset_at_close(&near);
        let limit = world.limits.connections / 2;
        if !self.shares.admits(&name, limit, self.machines.len() > 1) {
            world.counters.limit_reached += 1;
            return;
        }
        let Some(machine) = self.machines.get(&name) else {
            return;
        };
        let _ = sockopt::set_tcp_nodelay(&near, true);
        let _ = sockopt::set_socket_keepalive(&near, true);
        let inspect = self.inspect(world, &name, to);
        let prepare = |socket: &OwnedFd| machine.prepare(world, socket, to.is_ipv4());
        let Ok(far) = open_socket(to, prepare) else {
            world.counters.tcp_failed += 1;
            return;
        };
        let _ = sockopt::set_socket_linger(&near, None);
        let pair = Pair::new(near, far, (name, to), inspect);
        self.shares.add(&pair.machine);
        let id = self.pairs.insert(pair);
        let Some(pair) = self.pairs.get(id) else {
            return;
        };
        let near = world
            .events
            .watch_edges(pair.near.fd(), Source::RelayNear, id);
        let far = world
            .events
            .watch_edges(pair.far.fd(), Source::RelayFar, id);
        if near.is_err() || far.is_err() {
            self.finish(world, id, true);
            world.counters.tcp_failed += 1;
            return;
        }
        world.counters.tcp_opened += 1;
    }

    /// Something happened on one of a pair's sockets.
    pub(crate) fn event(&mut self, id: Id, source: Source, flags: EventFlags) {
        let Some(pair) = self.pairs.get_mut(id) else {
            return;
        };
        let end = match source {
            Source::RelayNear => &mut pair.near,
            _ => &mut pair.far,
        };
        end.notice(flags);
        self.touch(id);
    }

    fn touch(&mut self, id: Id) {
        if let Some(pair) = self.pairs.get_mut(id)
            && !std::mem::replace(&mut pair.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    /// Whether some wait for their turn.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Gives pairs their turn.
    pub(crate) fn run(&mut self, world: &mut World) {
        for _ in 0..TURN {
            let Some(id) = self.ready.pop_front() else {
                return;
            };
            self.run_one(world, id);
        }
    }

    fn run_one(&mut self, world: &mut World, id: Id) {
        let Some(pair) = self.pairs.get_mut(id) else {
            return;
        };
        pair.queued = false;
        let mut flow = Flow::new(world, &mut self.scratch);
        let looked = pair.look_at_first(&mut flow);
        let verdict = match looked {
            Ok(Some(found)) => self.judge(world, id, found),
            Ok(None) => Ok(()),
            Err(_) => Err(None),
        };
        if let Err(reason) = verdict {
            self.refuse(world, id, reason);
            return;
        }
        let Some(pair) = self.pairs.get_mut(id) else {
            return;
        };
        let mut flow = Flow::new(world, &mut self.scratch);
        match pair.pump(&mut flow) {
            Ok(true) => self.touch(id),
            Ok(false) if pair.is_over() => self.finish(world, id, false),
            Ok(false) => {}
            Err(_) => self.finish(world, id, true),
        }
    }

    /// Whether what came first lets a connection go on.
    fn judge(&mut self, world: &World, id: Id, found: FirstName) -> Result<(), Option<Reason>> {
        let Some(pair) = self.pairs.get(id) else {
            return Ok(());
        };
        let must = pair.inspect == Some(Inspect::MustBeAllowed);
        let verdict = match found {
            FirstName::Incomplete => return Ok(()),
            FirstName::Missing if must => Err(Reason::NoName),
            FirstName::Missing | FirstName::Other => Ok(()),
            FirstName::Name(name) => self
                .rules(world, &pair.machine, pair.to)
                .try_for_each(|(one, inspect)| one.check_name(inspect, &name, pair.to.port())),
        };
        if let Some(pair) = self.pairs.get_mut(id) {
            pair.inspect = None;
        }
        verdict.map_err(Some)
    }

    /// Ends a connection that may not go on, or can't.
    fn refuse(&mut self, world: &mut World, id: Id, reason: Option<Reason>) {
        if let (Some(pair), Some(reason)) = (self.pairs.get(id), reason) {
            world.refuse_of(pair.machine.clone(), Transport::Tcp, pair.to, &reason);
        }
        self.finish(world, id, true);
    }

    fn finish(&mut self, world: &mut World, id: Id, reset: bool) {
        if let Some(pair) = self.pairs.remove(id) {
            self.shares.remove(&pair.machine);
            pair.close(&mut world.budget, reset);
            world.counters.tcp_reset += u64::from(reset);
        }
    }
}

/// Where a connection went before the kernel's rules led it here.
fn meant_for(socket: impl AsFd, v4: bool) -> Option<SocketAddr> {
    let to: SocketAddr = if v4 {
        sockopt::ip_original_dst(socket).ok()?.into()
    } else {
        sockopt::ipv6_original_dst(socket).ok()?.into()
    };
    Some(SocketAddr::new(unwrapped(to.ip()), to.port()))
}

#[cfg(test)]
mod tests;
