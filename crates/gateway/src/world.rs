//! What all parts of the gateway share.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::capture::Capture;
use crate::config::Config;
use crate::config::Limits;
use crate::config::Subnet;
use crate::events::Events;
use crate::log::Log;
use crate::policy::Inspect;
use crate::policy::Pins;
use crate::policy::Policy;
use crate::policy::Reason;
use crate::policy::RuleError;
use crate::policy::Transport;
use crate::policy::Verdict;
use crate::port::Port;
use crate::port::Sent;
use crate::slab::Id;
use crate::slab::Slab;
use crate::wire::Builder;
use crate::wire::IpPacket;
use crate::wire::Mac;
use crate::wire::icmp_error;

/// The gateway's own place in the network.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) mac: Mac,
    pub(crate) ipv4: Option<Subnet<Ipv4Addr>>,
    pub(crate) ipv6: Option<Subnet<Ipv6Addr>>,
    pub(crate) link_local: Ipv6Addr,
    pub(crate) mtu: u16,
    pub(crate) uplink: bool,
    pub(crate) search: Vec<String>,
}

impl Net {
    fn new(config: &Config) -> Self {
        let [a, b, c, d, e, f] = config.mac;
        let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        let mut link_local = [0; 16];
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        link_local[8..].copy_from_slice(&id);
        Self {
            mac: config.mac,
            ipv4: config.ipv4,
            ipv6: config.ipv6,
            link_local: link_local.into(),
            mtu: config.mtu,
            uplink: config.uplink,
            search: config.search.clone(),
        }
    }

    /// Whether `address` is the gateway's own.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(four) => self.ipv4.is_some_and(|net| net.address == four),
            IpAddr::V6(six) => {
                self.ipv6.is_some_and(|net| net.address == six) || six == self.link_local
            }
        }
    }

    /// Whether `address` is on this network.
    pub(crate) fn is_near(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(four) => self.ipv4.is_some_and(|net| net.has(four)),
            IpAddr::V6(six) => {
                self.ipv6.is_some_and(|net| net.has(six)) || six.segments()[0] & 0xffc0 == 0xfe80
            }
        }
    }

    /// The gateway's address of a version.
    pub(crate) fn own(&self, v4: bool) -> Option<IpAddr> {
        if v4 {
            self.ipv4.map(|net| net.address.into())
        } else {
            self.ipv6.map(|net| net.address.into())
        }
    }
}

/// One refusal.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Refusal {
    /// Seconds since the epoch.
    pub(crate) time: u64,
    pub(crate) port: String,
    pub(crate) transport: &'static str,
    pub(crate) destination: String,
    pub(crate) reason: String,
}

/// Refusals kept for who asks.
const MAX_REFUSALS: usize = 256;

/// What was refused.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) recent: VecDeque<Refusal>,
}

/// Bytes that connections keep.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) used: usize,
    pub(crate) limit: usize,
}

impl Budget {
    /// Takes `bytes` if they are there.
    pub(crate) fn take(&mut self, bytes: usize) -> bool {
        let fits = self.used + bytes <= self.limit;
        if fits {
            self.used += bytes;
        }
        fits
    }

    /// Takes `bytes` that must be.
    pub(crate) fn force(&mut self, bytes: usize) {
        self.used += bytes;
    }

    pub(crate) fn give(&mut self, bytes: usize) {
        self.used = self.used.saturating_sub(bytes);
    }

    pub(crate) fn is_tight(&self) -> bool {
        self.used > self.limit / 4 * 3
    }
}

/// Counts of what happened.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct Counters {
    pub(crate) tcp_opened: u64,
    pub(crate) tcp_failed: u64,
    pub(crate) tcp_reset: u64,
    pub(crate) tcp_retransmits: u64,
    pub(crate) udp_flows: u64,
    pub(crate) pings: u64,
    pub(crate) dns_queries: u64,
    pub(crate) dns_failed: u64,
    pub(crate) dhcp_answers: u64,
    pub(crate) fragments_dropped: u64,
    pub(crate) limit_reached: u64,
}

/// What all parts share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) now: Instant,
    pub(crate) events: Events,
    pub(crate) net: Net,
    pub(crate) ports: Slab<Port>,
    pub(crate) by_mac: HashMap<Mac, Id>,
    pub(crate) policy: Policy,
    /// The same as it was written.
    pub(crate) written_policy: crate::config::PolicyConfig,
    pub(crate) pins: Pins,
    names: BTreeMap<String, Vec<IpAddr>>,
    /// Of other networks that the machines are on.
    shared_names: BTreeMap<String, Vec<IpAddr>>,
    pub(crate) nameservers: Vec<IpAddr>,
    pub(crate) refusals: Refusals,
    pub(crate) counters: Counters,
    pub(crate) budget: Budget,
    pub(crate) limits: Limits,
    pub(crate) capture: Capture,
    pub(crate) log: Log,
    /// Our ends of guests' connections to the name server, not yet served.
    pub(crate) name_streams: Vec<(Id, OwnedFd)>,
}

impl World {
    pub(crate) fn new(config: &Config, policy: Policy) -> std::io::Result<Self> {
        Ok(Self {
            now: Instant::now(),
            events: Events::new()?,
            net: Net::new(config),
            ports: Slab::default(),
            by_mac: HashMap::new(),
            policy,
            written_policy: config.policy.clone(),
            pins: Pins::default(),
            names: lower(&config.names),
            shared_names: BTreeMap::new(),
            nameservers: config.nameservers.clone(),
            refusals: Refusals::default(),
            counters: Counters::default(),
            budget: Budget {
                used: 0,
                limit: config.limits.buffer_bytes,
            },
            limits: config.limits,
            capture: Capture::default(),
            log: Log::new(&config.name),
            name_streams: Vec::new(),
        })
    }

    /// The rules that hold for a link's machine: the network's, and its own.
    fn policies(&self, port: Id) -> impl Iterator<Item = &Policy> {
        let own = self.ports.get(port).and_then(|port| port.policy.as_ref());
        std::iter::once(&self.policy).chain(own)
    }

    /// Whether a link's machine may reach an address: all rules that hold for it must agree.
    pub(crate) fn check(&self, port: Id, transport: Transport, about: (IpAddr, u16)) -> Verdict {
        let opened = self.policies(port).any(|one| one.opens(transport, about));
        let mut whole = Verdict::Allow;
        for policy in self.policies(port) {
            match policy.check(transport, about, &self.pins, self.now) {
                Verdict::Refuse(Reason::Closed(_)) if opened => {}
                Verdict::Refuse(reason) => return Verdict::Refuse(reason),
                Verdict::AllowIf(Inspect::MustBeAllowed) => {
                    whole = Verdict::AllowIf(Inspect::MustBeAllowed);
                }
                Verdict::AllowIf(inspect) if whole == Verdict::Allow => {
                    whole = Verdict::AllowIf(inspect);
                }
                Verdict::AllowIf(_) | Verdict::Allow => {}
            }
        }
        whole
    }

    /// Whether a connection whose first bytes ask for `name` may go on.
    pub(crate) fn check_name(&self, port: Id, to: SocketAddr, name: &str) -> Result<(), Reason> {
        for policy in self.policies(port) {
            let about = (to.ip(), to.port());
            match policy.check(Transport::Tcp, about, &self.pins, self.now) {
                Verdict::AllowIf(inspect) => policy.check_name(inspect, name, to.port())?,
                // A closed address that was opened shows no names.
                Verdict::Allow | Verdict::Refuse(Reason::Closed(_)) => {}
                Verdict::Refuse(reason) => return Err(reason),
            }
        }
        Ok(())
    }

    /// Whether a link's machine may have a name resolved.
    pub(crate) fn check_resolve(&self, port: Id, name: &str) -> Result<(), Reason> {
        self.policies(port)
            .try_for_each(|policy| policy.check_resolve(name))
    }

    pub(crate) fn set_policy(
        &mut self,
        config: &crate::config::PolicyConfig,
    ) -> Result<(), RuleError> {
        self.policy = Policy::new(config)?;
        self.written_policy = config.clone();
        Ok(())
    }

    /// The rules of one link's machine, besides the network's.
    pub(crate) fn set_port_policy(
        &mut self,
        port: Id,
        config: Option<&crate::config::PolicyConfig>,
    ) -> Result<(), RuleError> {
        let policy = config.map(Policy::new).transpose()?;
        if let Some(port) = self.ports.get_mut(port) {
            port.policy = policy;
        }
        Ok(())
    }

    pub(crate) fn set_names(&mut self, names: &BTreeMap<String, Vec<IpAddr>>) {
        self.names = lower(names);
    }

    pub(crate) fn set_shared_names(&mut self, names: &BTreeMap<String, Vec<IpAddr>>) {
        self.shared_names = lower(names);
    }

    /// The addresses of a name that is answered here.
    pub(crate) fn addresses_of(&self, name: &str) -> Option<&Vec<IpAddr>> {
        self.names.get(name).or_else(|| self.shared_names.get(name))
    }

    /// Sends a frame to `port`.
    pub(crate) fn send(&mut self, port: Id, frame: &mut Builder, payload: &[IoSlice<'_>]) -> Sent {
        let Some(to) = self.ports.get_mut(port) else {
            return Sent::Lost;
        };
        let headers = frame.headers();
        let mut parts = [IoSlice::new(headers), IoSlice::new(&[]), IoSlice::new(&[])];
        for (part, payload) in parts[1..].iter_mut().zip(payload) {
            *part = *payload;
        }
        let parts = &parts[..1 + payload.len().min(2)];
        let sent = to.send(parts);
        if sent == Sent::Done && self.capture.is_on() {
            self.capture.frame(&to.name, parts);
        }
        sent
    }

    /// The gateway's and the machine's Ethernet addresses.
    pub(crate) fn macs(&self, port: Id) -> Option<(Mac, Mac)> {
        Some((self.net.mac, self.ports.get(port)?.mac))
    }

    /// Sends a UDP datagram to a machine.
    pub(crate) fn send_udp(&mut self, port: Id, from: SocketAddr, to: SocketAddr, payload: &[u8]) {
        let Some(macs) = self.macs(port) else { return };
        let header = if from.is_ipv4() { 28 } else { 48 };
        if payload.len() + header > usize::from(self.net.mtu) {
            self.counters.fragments_dropped += 1;
            return;
        }
        let offload = self
            .ports
            .get(port)
            .is_some_and(|port| port.offloads.checksum);
        let mut frame = Builder::udp(macs, from, to, payload, offload);
        self.send(port, &mut frame, &[IoSlice::new(payload)]);
    }

    /// Tells the sender of `packet` that it can't pass.
    pub(crate) fn send_icmp_error(&mut self, port: Id, packet: &IpPacket<'_>, what: Unreachable) {
        let is_group = match packet.destination {
            IpAddr::V4(four) => four.is_multicast() || four.is_broadcast(),
            IpAddr::V6(six) => six.is_multicast(),
        };
        let v4 = packet.source.is_ipv4();
        let (Some(macs), Some(own), false) = (self.macs(port), self.net.own(v4), is_group) else {
            return;
        };
        let (kind, code) = what.code(v4);
        let message = icmp_error(packet, kind, code, own);
        let protocol = if v4 {
            crate::wire::ICMP
        } else {
            crate::wire::ICMPV6
        };
        let mut frame = Builder::ip(macs, own, packet.source, protocol, message.len());
        self.send(port, &mut frame, &[IoSlice::new(&message)]);
    }

    /// Keeps, counts and logs a refusal.
    pub(crate) fn refuse(
        &mut self,
        port: Id,
        transport: Transport,
        destination: SocketAddr,
        reason: &Reason,
    ) {
        let name = self.ports.get(port).map(|port| port.name.clone());
        self.refuse_of(name.unwrap_or_default(), transport, destination, reason);
    }

    /// [`Self::refuse`] by the machine's name.
    pub(crate) fn refuse_of(
        &mut self,
        name: String,
        transport: Transport,
        destination: SocketAddr,
        reason: &Reason,
    ) {
        let refusal = Refusal {
            time: crate::log::seconds(),
            port: name,
            transport: match transport {
                Transport::Tcp => "tcp",
                Transport::Udp => "udp",
                Transport::Icmp => "icmp",
            },
            destination: destination.to_string(),
            reason: reason.to_string(),
        };
        self.keep_refusal(refusal, reason.kind());
    }

    /// [`Self::refuse`] for a name.
    pub(crate) fn refuse_name(&mut self, port: Id, name: &str, reason: &Reason) {
        let refusal = Refusal {
            time: crate::log::seconds(),
            port: self
                .ports
                .get(port)
                .map_or_else(String::new, |port| port.name.clone()),
            transport: "dns",
            destination: name.to_owned(),
            reason: reason.to_string(),
        };
        self.keep_refusal(refusal, "resolve");
    }

    fn keep_refusal(&mut self, refusal: Refusal, kind: &'static str) {
        *self.refusals.counts.entry(kind).or_default() += 1;
        self.log.line(&format!(
            "refused {} {} from {:?}: {}",
            refusal.transport, refusal.destination, refusal.port, refusal.reason
        ));
        if self.refusals.recent.len() >= MAX_REFUSALS {
            self.refusals.recent.pop_front();
        }
        self.refusals.recent.push_back(refusal);
    }
}

fn lower(names: &BTreeMap<String, Vec<IpAddr>>) -> BTreeMap<String, Vec<IpAddr>> {
    names
        .iter()
        .map(|(name, addresses)| (name.to_ascii_lowercase(), addresses.clone()))
        .collect()
}

/// Why a packet can't pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    Host,
    Protocol,
    Port,
    Prohibited,
    TimeExceeded,
}

impl Unreachable {
    /// Type and code (RFC 792, RFC 1812 §5.2.7.1, RFC 4443 §3).
    fn code(self, v4: bool) -> (u8, u8) {
        match (self, v4) {
            (Self::Host, true) => (3, 1),
            (Self::Protocol, true) => (3, 2),
            (Self::Port, true) => (3, 3),
            (Self::Prohibited, true) => (3, 13),
            (Self::TimeExceeded, true) => (11, 0),
            (Self::Host, false) => (1, 3),
            (Self::Protocol, false) => (4, 1),
            (Self::Port, false) => (1, 4),
            (Self::Prohibited, false) => (1, 1),
            (Self::TimeExceeded, false) => (3, 0),
        }
    }
}
