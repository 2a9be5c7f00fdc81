//! One connection: TCP towards the guest, a socket towards the host.
//!
//! ```text
//!              guest's SYN                   guest's ACK
//!   (none) ──▶ Connecting ──▶ SynReceived ──────────────▶ Open ──▶ (gone)
//!              host connects; SYN-ACK                      ▲
//!   (none) ──▶ SynSent ────────────────────────────────────┘
//!    published port accepted; SYN to the guest   guest's SYN-ACK
//! ```
//! A link loses nothing but by the guest's own doing, so there is no congestion control; a timer
//! sends again from the first byte that wasn't acknowledged.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use super::ring::Ring;
use crate::policy::Inspect;
use crate::slab::Id;
use crate::wire::TcpFlags;
use crate::wire::TcpSegment;
use crate::world::World;

/// Bytes kept for a guest that hasn't acknowledged them.
pub(super) const OUT_BYTES: usize = 4 << 20;
/// Bytes taken from the guest that the host side hasn't.
pub(super) const IN_BYTES: usize = 1 << 20;
/// Likewise while memory is tight.
const TIGHT_BYTES: usize = 32 << 10;
/// Our window scale (RFC 7323 §2.2).
pub(super) const SHIFT: u8 = 7;
/// First wait before sending again; doubles up to [`MOST_RTO`].
const RTO: Duration = Duration::from_millis(300);
const MOST_RTO: Duration = Duration::from_secs(8);
/// Tries of an opening handshake.
const MAX_OPENING_TRIES: u32 = 7;
/// Tries of data. A machine may be paused for minutes.
const MAX_TRIES: u32 = 120;

/// Who a connection is between, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) port: Id,
    pub(crate) guest: SocketAddr,
    pub(crate) remote: SocketAddr,
}

/// Where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Connecting,
    SynReceived,
    SynSent,
    Open,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on when something happens.
    Wait,
    /// There is more to do at once.
    Again,
    /// It is over; both sides know.
    Gone,
    /// It is over, and the guest has to be told.
    Reset,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) socket: OwnedFd,
    pub(super) state: State,
    /// To the guest: bytes from `una` on.
    pub(super) out: Ring,
    pub(super) una: u32,
    pub(super) next: u32,
    /// The furthest that was ever sent.
    pub(super) max: u32,
    pub(super) guest_window: u32,
    pub(super) guest_shift: u8,
    pub(super) mss: u16,
    /// The host side has said all.
    pub(super) host_eof: bool,
    pub(super) fin_acknowledged: bool,
    duplicate_acks: u8,
    /// A byte beyond the window is due, to hear about it.
    pub(super) probe: bool,
    /// From the guest.
    pub(super) inbox: Ring,
    pub(super) received: u32,
    /// The end of the window that the guest was told.
    pub(super) edge: u32,
    pub(super) guest_fin: bool,
    pub(super) host_shut: bool,
    pub(super) inspect: Option<Inspect>,
    /// Of the socket.
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) hung_up: bool,
    pub(super) need_ack: bool,
    pub(super) queued: bool,
    pub(super) deadline: Option<Instant>,
    /// When the timers were last asked to look.
    pub(super) armed: Option<Instant>,
    pub(super) tries: u32,
}

/// Whether `a` comes before `b` (RFC 9293 §3.4).
pub(super) fn before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > u32::MAX / 2
}

pub(super) fn number(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Connection {
    pub(super) fn new(key: Key, socket: OwnedFd, state: State, first: u32) -> Self {
        Self {
            key,
            socket,
            state,
            out: Ring::default(),
            una: first,
            next: first,
            max: first,
            guest_window: 0,
            guest_shift: 0,
            mss: 536,
            host_eof: false,
            fin_acknowledged: false,
            duplicate_acks: 0,
            probe: false,
            inbox: Ring::default(),
            received: 0,
            edge: 0,
            guest_fin: false,
            host_shut: false,
            inspect: None,
            readable: false,
            writable: false,
            hung_up: false,
            need_ack: false,
            queued: false,
            deadline: None,
            armed: None,
            tries: 0,
        }
    }

    /// Takes the options of the guest's SYN; `most` is what fits the link.
    pub(super) fn take_options(&mut self, segment: &TcpSegment<'_>, most: u16) {
        let options = segment.options();
        self.mss = options.mss.unwrap_or(536).clamp(64, most);
        // Without the option neither side scales: 255 stands for that.
        self.guest_shift = options.window_scale.unwrap_or(u8::MAX);
        self.guest_window = u32::from(segment.window);
        self.received = segment.sequence.wrapping_add(1);
        self.edge = self.received;
    }

    pub(super) fn own_shift(&self) -> u8 {
        if self.guest_shift == u8::MAX {
            0
        } else {
            SHIFT
        }
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.next.wrapping_sub(self.una)
    }

    /// The window to tell, as the field's value; moves the edge.
    pub(super) fn tell_window(&mut self, world: &World, scaled: bool) -> u16 {
        let edge = self.possible_edge(world);
        if before(self.edge, edge) {
            self.edge = edge;
        }
        let shift = if scaled { self.own_shift() } else { 0 };
        let window = self.edge.wrapping_sub(self.received) >> shift;
        u16::try_from(window).unwrap_or(u16::MAX)
    }

    fn possible_edge(&self, world: &World) -> u32 {
        let room = if world.budget.is_tight() {
            TIGHT_BYTES
        } else if self.own_shift() == 0 {
            65_535
        } else {
            IN_BYTES
        };
        self.received
            .wrapping_add(number(room.saturating_sub(self.inbox.len())))
    }

    /// Whether the guest should hear that there is room again.
    pub(super) fn window_opened(&self, world: &World) -> bool {
        let told = self.edge.wrapping_sub(self.received);
        let possible = self.possible_edge(world).wrapping_sub(self.received);
        told < possible / 2 && possible > 0
    }

    /// Takes a segment of an open connection.
    pub(super) fn input(&mut self, world: &mut World, segment: &TcpSegment<'_>) -> Fate {
        if segment.flags.has(TcpFlags::RST) {
            // Only within the window (RFC 5961 §3.2).
            let within = segment.sequence == self.received
                || (!before(segment.sequence, self.received)
                    && before(segment.sequence, self.edge));
            return if within { Fate::Gone } else { Fate::Wait };
        }
        if segment.flags.has(TcpFlags::SYN) {
            self.need_ack = true;
            return Fate::Again;
        }
        if !segment.flags.has(TcpFlags::ACK) {
            return Fate::Wait;
        }
        self.acknowledge(world, segment);
        let fate = self.take_payload(world, segment);
        if fate != Fate::Wait {
            return fate;
        }
        Fate::Again
    }

    fn acknowledge(&mut self, world: &mut World, segment: &TcpSegment<'_>) {
        let ack = segment.acknowledgment;
        if before(self.max, ack) {
            self.need_ack = true;
            return;
        }
        let shift = if self.guest_shift == u8::MAX {
            0
        } else {
            self.guest_shift
        };
        let window = u32::from(segment.window) << shift;
        let progress = ack.wrapping_sub(self.una);
        if before(ack, self.una) {
            return;
        }
        if progress == 0 {
            let duplicate = segment.payload.is_empty()
                && window == self.guest_window
                && self.una != self.max
                && !segment.flags.has(TcpFlags::FIN);
            if duplicate {
                self.duplicate_acks = self.duplicate_acks.saturating_add(1);
                if self.duplicate_acks == 3 {
                    self.send_again(world);
                }
            }
            self.guest_window = window;
            return;
        }
        let bytes = (progress as usize).min(self.out.len());
        self.fin_acknowledged |= progress as usize > self.out.len();
        self.out.consume(bytes);
        self.una = ack;
        if before(self.next, ack) {
            self.next = ack;
        }
        self.guest_window = window;
        self.duplicate_acks = 0;
        self.tries = 0;
        self.deadline = (self.una != self.max).then(|| world.now + RTO);
    }

    /// Goes back to the first byte that wasn't acknowledged.
    fn send_again(&mut self, world: &mut World) {
        if self.next != self.una {
            world.counters.tcp_retransmits += 1;
        }
        self.next = self.una;
    }

    fn take_payload(&mut self, world: &mut World, segment: &TcpSegment<'_>) -> Fate {
        let fin = segment.flags.has(TcpFlags::FIN);
        let mut payload = segment.payload;
        if payload.is_empty() && !fin {
            // A probe of a guest that wants an answer lies before the window (RFC 9293 §3.8.4).
            self.need_ack |= before(segment.sequence, self.received);
            return Fate::Wait;
        }
        self.need_ack = true;
        if self.guest_fin || before(self.received, segment.sequence) {
            return Fate::Wait;
        }
        let old = self.received.wrapping_sub(segment.sequence) as usize;
        let Some(new) = payload.get(old..) else {
            return Fate::Wait;
        };
        payload = new;
        let room = self.edge.wrapping_sub(self.received) as usize;
        let whole = payload.len() <= room;
        payload = &payload[..payload.len().min(room)];
        let taken = match self.deliver(world, payload) {
            Ok(taken) => taken,
            Err(fate) => return fate,
        };
        self.received = self.received.wrapping_add(number(taken));
        if fin && whole && taken == payload.len() {
            self.received = self.received.wrapping_add(1);
            self.edge = self.edge.wrapping_add(1);
            self.guest_fin = true;
        }
        Fate::Wait
    }

    /// The time of [`Self::deadline`] came.
    pub(super) fn timeout(&mut self, world: &mut World) -> Fate {
        self.deadline = None;
        self.tries += 1;
        match self.state {
            State::Connecting => Fate::Wait,
            State::SynReceived | State::SynSent if self.tries > MAX_OPENING_TRIES => Fate::Reset,
            State::SynReceived | State::SynSent => {
                self.next = self.una;
                Fate::Again
            }
            State::Open if self.tries > MAX_TRIES => Fate::Reset,
            State::Open => {
                self.probe = self.guest_window == 0;
                self.send_again(world);
                Fate::Again
            }
        }
    }

    /// Sets the timer while something waits for the guest.
    pub(super) fn set_timer(&mut self, world: &World) {
        let outstanding = self.una != self.max || (self.guest_window == 0 && !self.out.is_empty());
        if !outstanding {
            self.deadline = None;
        } else if self.deadline.is_none() {
            let wait = RTO.saturating_mul(1 << self.tries.min(8)).min(MOST_RTO);
            self.deadline = Some(world.now + wait);
        }
    }

    /// Whether both sides have said all, and know.
    pub(super) fn is_over(&self) -> bool {
        self.host_shut && self.host_eof && self.fin_acknowledged
    }
}
