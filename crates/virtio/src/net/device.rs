//! The device: features, configuration, and who serves which queue.

use std::io;

use ringfence_device::Counter;
use ringfence_device::RestoreError;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Offloads;
use serde::Deserialize;
use serde::Serialize;

use super::Mac;
use super::feature;
use super::lend;
use super::lend::Server;
use super::receive::Receiver;
use crate::Active;
use crate::DeviceKind;
use crate::Interest;
use crate::Session;
use crate::StartError;
use crate::VirtioDevice;
use crate::rate::RateConfig;
use crate::rate::RateLimiter;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;
/// Tokens from here on are the limiters' timers; below, a queue pair's back end.
const TIMERS: u32 = 0x100;
pub(super) const RX_TIMER: u32 = TIMERS;
pub(super) const TX_TIMER: u32 = TIMERS + 1;
/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// What a network device is made of.
pub struct NetConfig {
    /// The other end.
    pub backend: Box<dyn NetBackend>,
    /// The guest's address.
    pub mac: Mac,
    /// The largest packet without Ethernet header, told to the guest when given.
    pub mtu: Option<u16>,
    /// Frames with another source address are dropped, and the guest can't change its own.
    pub lock_mac: bool,
    /// Limits of frames to the guest.
    pub receive_rate: RateConfig,
    /// Limits of frames from the guest.
    pub send_rate: RateConfig,
}

impl std::fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetConfig")
            .field("mac", &self.mac)
            .field("mtu", &self.mtu)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) rx_frames: Counter,
    pub(super) rx_bytes: Counter,
    pub(super) rx_dropped: Counter,
    pub(super) tx_frames: Counter,
    pub(super) tx_bytes: Counter,
    pub(super) tx_dropped: Counter,
    pub(super) tx_errors: Counter,
    pub(super) throttled: Counter,
}

/// One pair of queues.
#[derive(Debug, Default)]
pub(super) struct Pair {
    pub(super) receiver: Receiver,
    /// A frame waits for the back end or the limiter.
    pub(super) send_waits: bool,
    pub(super) watch: Watch,
    /// The back end's descriptor failed: the link is gone, and isn't looked at any more.
    pub(super) gone: bool,
    pub(super) server: Server,
}

/// What the back end's descriptor is watched for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Watch {
    pub(super) read: bool,
    pub(super) write: bool,
    registered: bool,
}

/// The network device.
pub struct Net {
    pub(super) backend: Box<dyn NetBackend>,
    pub(super) mac: Mac,
    mtu: Option<u16>,
    pub(super) lock_mac: bool,
    pub(super) link_up: bool,
    pub(super) receive_limiter: Option<RateLimiter>,
    pub(super) send_limiter: Option<RateLimiter>,
    pub(super) pairs: Vec<Pair>,
    pub(super) counters: Counters,
    /// Pairs that the guest uses.
    pub(super) used_pairs: u16,
    /// The control queue's number, once negotiated.
    control_queue: Option<u16>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net")
            .field("mac", &self.mac)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

#[derive(Serialize, Deserialize)]
struct NetState {
    version: u32,
    mac: Mac,
}

impl Net {
    /// The device of `config`.
    ///
    /// # Errors
    /// When the host gives no timers.
    pub fn new(config: NetConfig) -> io::Result<Self> {
        let pairs = usize::from(config.backend.queues().clamp(1, 32));
        Ok(Self {
            backend: config.backend,
            mac: config.mac,
            mtu: config.mtu,
            lock_mac: config.lock_mac,
            link_up: true,
            receive_limiter: RateLimiter::new(config.receive_rate)?,
            send_limiter: RateLimiter::new(config.send_rate)?,
            pairs: (0..pairs).map(|_| Pair::default()).collect(),
            counters: Counters::default(),
            used_pairs: 1,
            control_queue: None,
        })
    }

    pub(super) fn pair_count(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(1)
    }

    /// What the guest takes, by its features or by command.
    pub(super) fn set_guest_offloads(&mut self, features: u64) {
        let has = |bit| features & bit != 0;
        let offloads = Offloads {
            checksum: has(feature::GUEST_CSUM),
            tso4: has(feature::GUEST_TSO4),
            tso6: has(feature::GUEST_TSO6),
            ecn: has(feature::GUEST_ECN),
            ufo: has(feature::GUEST_UFO),
        };
        let large = offloads.tso4 || offloads.tso6 || offloads.ufo;
        for pair in &mut self.pairs {
            pair.receiver.set_large(large, self.mtu);
        }
        let wanted = offloads.and(self.backend.offloads());
        if let Err(error) = self.backend.set_guest_offloads(wanted) {
            ringfence_device::warn_limited!(%error, "the network back end refuses offloads");
        }
    }

    /// Watches pair `index`'s descriptor for what is wanted.
    pub(super) fn rewatch(
        &mut self,
        session: &Session,
        index: u16,
        change: impl FnOnce(&mut Watch),
    ) {
        let Some(pair) = self.pairs.get_mut(usize::from(index)) else {
            return;
        };
        let before = pair.watch;
        change(&mut pair.watch);
        if pair.gone || (pair.watch == before && before.registered) {
            return;
        }
        let interest = match (pair.watch.read, pair.watch.write) {
            (true, true) => Interest::Both,
            (true, false) => Interest::Read,
            (false, true) => Interest::Write,
            (false, false) => Interest::Hangup,
        };
        let fd = self.backend.descriptor(index);
        let token = u32::from(index);
        let result = if before.registered {
            session.events.modify(&fd, token, interest)
        } else {
            session.events.add(&fd, token, interest)
        };
        pair.watch.registered = result.is_ok();
    }

    /// The link of pair `index` is gone. Its descriptor would be ready without end.
    pub(super) fn lose_link(&mut self, session: &Session, index: u16) {
        session.events.remove(&self.backend.descriptor(index));
        if let Some(pair) = self.pairs.get_mut(usize::from(index)) {
            pair.gone = true;
        }
    }

    /// Looks at the link of pair `index` no longer.
    pub(super) fn forget_link(&mut self, session: &Session, index: u16) {
        session.events.remove(&self.backend.descriptor(index));
        if let Some(pair) = self.pairs.get_mut(usize::from(index)) {
            pair.watch = Watch::default();
        }
    }

    /// Whether the device itself serves the pair.
    fn serves(&self, index: u16) -> bool {
        let pair = self.pairs.get(usize::from(index));
        pair.is_some_and(|pair| matches!(pair.server, Server::Own))
    }

    fn queue_of(index: u16) -> (u16, bool) {
        (index / 2, index.is_multiple_of(2))
    }

    pub(super) fn all_pairs(&self) -> std::ops::Range<u16> {
        0..self.pair_count()
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; self.pairs.len() * 2];
        sizes.push(64);
        sizes
    }

    fn features(&self) -> u64 {
        let offloads = self.backend.offloads();
        let mut features = feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | feature::CTRL_VQ
            | feature::CTRL_RX
            | feature::CTRL_GUEST_OFFLOADS;
        for (on, bits) in [
            (offloads.checksum, feature::CSUM | feature::GUEST_CSUM),
            (offloads.tso4, feature::HOST_TSO4 | feature::GUEST_TSO4),
            (offloads.tso6, feature::HOST_TSO6 | feature::GUEST_TSO6),
            (offloads.ecn, feature::HOST_ECN | feature::GUEST_ECN),
            (offloads.ufo, feature::HOST_UFO | feature::GUEST_UFO),
            (self.mtu.is_some(), feature::MTU),
            (self.pairs.len() > 1, feature::MQ),
            (!self.lock_mac, feature::CTRL_MAC_ADDR),
        ] {
            features |= if on { bits } else { 0 };
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6] = u8::from(self.link_up);
        config[8..10].copy_from_slice(&self.pair_count().to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        let session = &active.session;
        // §5.1.2: the control queue follows all pairs, or the first when there is no MQ.
        let pairs = if session.has(feature::MQ) {
            self.pair_count()
        } else {
            1
        };
        self.control_queue = session.has(feature::CTRL_VQ).then_some(2 * pairs);
        let mergeable = session.has(feature::MRG_RXBUF);
        for pair in &mut self.pairs {
            *pair = Pair::default();
            pair.receiver.set_mergeable(mergeable);
        }
        self.set_guest_offloads(session.features);
        let host = |source| StartError::Host {
            action: "set up the network queues",
            source,
        };
        self.backend.set_active_queues(1).map_err(host)?;
        for (limiter, token) in [
            (&self.receive_limiter, RX_TIMER),
            (&self.send_limiter, TX_TIMER),
        ] {
            if let Some(limiter) = limiter {
                let added = session.events.add(limiter.timer(), token, Interest::Read);
                added.map_err(host)?;
            }
        }
        self.used_pairs = 1;
        if self.lends() {
            for pair in &mut self.pairs {
                pair.server = Server::Idle;
            }
            self.lend_used(active);
        }
        Ok(())
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        if Some(index) == self.control_queue {
            self.serve_control(active, index);
            return;
        }
        match Self::queue_of(index) {
            (pair, _) if !self.serves(pair) => {}
            (pair, true) => self.receive(active, pair),
            (pair, false) => self.send(active, pair),
        }
    }

    fn event_ready(&mut self, active: &mut Active, token: u32) {
        match token {
            RX_TIMER => {
                if let Some(limiter) = &self.receive_limiter {
                    limiter.heard();
                }
                for pair in self.all_pairs() {
                    self.receive(active, pair);
                }
            }
            TX_TIMER => {
                if let Some(limiter) = &self.send_limiter {
                    limiter.heard();
                }
                for pair in self.all_pairs() {
                    self.send_waiting(active, pair);
                }
            }
            lend::CALLS..lend::END => self.lent_event(active, token),
            _ => {
                let Ok(pair) = u16::try_from(token) else {
                    return;
                };
                if !self.unpark(active, pair) && self.serves(pair) {
                    self.send_waiting(active, pair);
                    self.receive(active, pair);
                }
            }
        }
    }

    fn stop(&mut self, active: &mut Active) {
        self.take_all_back(active);
        for index in self.all_pairs() {
            active
                .session
                .events
                .remove(&self.backend.descriptor(index));
        }
        for pair in &mut self.pairs {
            *pair = Pair::default();
        }
        // Nothing may be segmented for a guest that is gone.
        let _ = self.backend.set_guest_offloads(Offloads::default());
    }

    fn quiesce(&mut self, active: &mut Active) {
        for index in self.all_pairs() {
            self.park(active, index);
            let held = self.pairs[usize::from(index)].receiver.take_back();
            if let Some(queue) = active.queue(2 * index) {
                for _ in 0..held {
                    queue.unpop();
                }
            }
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.counters;
        vec![
            ("rx_frames", counters.rx_frames.get()),
            ("rx_bytes", counters.rx_bytes.get()),
            ("rx_dropped", counters.rx_dropped.get()),
            ("tx_frames", counters.tx_frames.get()),
            ("tx_bytes", counters.tx_bytes.get()),
            ("tx_dropped", counters.tx_dropped.get()),
            ("tx_errors", counters.tx_errors.get()),
            ("throttled", counters.throttled.get()),
            ("vhost_pairs", self.lent_pairs()),
        ]
    }

    fn save(&self) -> serde_json::Value {
        serde_json::json!({ "version": STATE_VERSION, "mac": self.mac })
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        const WHAT: &str = "net";
        let state: NetState = RestoreError::parse(WHAT, state)?;
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        self.mac = state.mac;
        Ok(())
    }
}
