//! The guest's side of a connection: segments.

use std::io::IoSlice;

use super::connection::Connection;
use super::connection::Fate;
use super::connection::SHIFT;
use super::connection::State;
use super::connection::before;
use super::connection::number;
use crate::port::Sent;
use crate::wire::Builder;
use crate::wire::Large;
use crate::wire::TcpFlags;
use crate::world::World;

/// The largest IP packet, and so the largest segment with its headers.
const MAX_PACKET: usize = 65_535;
const TCP_BYTES: usize = 20;

/// A TCP header without options.
fn header(
    from: u16,
    to: u16,
    (sequence, ack): (u32, u32),
    flags: TcpFlags,
    window: u16,
) -> [u8; 20] {
    let mut data = [0; TCP_BYTES];
    data[..2].copy_from_slice(&from.to_be_bytes());
    data[2..4].copy_from_slice(&to.to_be_bytes());
    data[4..8].copy_from_slice(&sequence.to_be_bytes());
    data[8..12].copy_from_slice(&ack.to_be_bytes());
    data[12] = 5 << 4;
    data[13] = flags.0;
    data[14..16].copy_from_slice(&window.to_be_bytes());
    data
}

/// The largest payload of one segment on a link of `mtu`.
pub(super) fn segment_bytes(mtu: u16, v4: bool) -> u16 {
    mtu - if v4 { 40 } else { 60 }
}

impl Connection {
    /// Sends the SYN or SYN-ACK.
    fn send_syn(&mut self, world: &mut World) -> Sent {
        let mut flags = TcpFlags::SYN;
        if self.state == State::SynReceived {
            flags = flags.with(TcpFlags::ACK);
        }
        let window = self.tell_window(world, false);
        let ends = (self.key.remote.port(), self.key.guest.port());
        let ack = if self.state == State::SynReceived {
            self.received
        } else {
            0
        };
        let base = header(ends.0, ends.1, (self.una, ack), flags, window);
        let [high, low] = segment_bytes(world.net.mtu, self.key.guest.is_ipv4()).to_be_bytes();
        let mut data = base.to_vec();
        data.extend([2, 4, high, low]);
        if self.guest_shift != u8::MAX {
            data.extend([1, 3, 3, SHIFT]);
        }
        let words = u8::try_from(data.len() / 4).unwrap_or(5);
        data[12] = words << 4;
        let sent = self.send(world, &data, &[], None);
        if sent != Sent::Full {
            self.next = self.una.wrapping_add(1);
            self.max = self.next;
        }
        sent
    }

    fn send(
        &self,
        world: &mut World,
        header: &[u8],
        payload: &[IoSlice<'_>],
        large: Option<Large>,
    ) -> Sent {
        let key = self.key;
        let Some(macs) = world.macs(key.port) else {
            return Sent::Lost;
        };
        let offload = world
            .ports
            .get(key.port)
            .is_some_and(|port| port.offloads.checksum);
        let how = (offload, large);
        let mut frame = Builder::tcp(macs, key.remote, key.guest, header, payload, how);
        world.send(key.port, &mut frame, payload)
    }

    /// Sends `len` bytes of what waits from `offset` on, and the FIN after them if `fin`.
    fn send_segment(
        &mut self,
        world: &mut World,
        (offset, len): (usize, usize),
        fin: bool,
    ) -> Sent {
        let mut flags = TcpFlags::ACK;
        if len > 0 && offset + len == self.out.len() {
            flags = flags.with(TcpFlags::PSH);
        }
        if fin {
            flags = flags.with(TcpFlags::FIN);
        }
        let window = self.tell_window(world, true);
        let ends = (self.key.remote.port(), self.key.guest.port());
        let header = header(ends.0, ends.1, (self.next, self.received), flags, window);
        let slices = self.out.io_slices(offset, len);
        let used = if slices[1].is_empty() { 1 } else { 2 };
        let large = Large {
            segment_bytes: self.mss,
        };
        let sent = self.send(world, &header, &slices[..used], Some(large));
        if sent != Sent::Full {
            self.need_ack = false;
            self.next = self.next.wrapping_add(number(len) + u32::from(fin));
            if before(self.max, self.next) {
                self.max = self.next;
            }
        }
        sent
    }

    /// The largest payload that one frame may carry to the guest.
    fn frame_payload(&self, world: &World) -> usize {
        let offloads = world.ports.get(self.key.port).map(|port| port.offloads);
        let offloads = offloads.unwrap_or_default();
        let v4 = self.key.guest.is_ipv4();
        let splits = offloads.checksum && if v4 { offloads.tso4 } else { offloads.tso6 };
        let mss = usize::from(self.mss);
        if !splits {
            return mss;
        }
        let headers = TCP_BYTES + if v4 { 20 } else { 0 };
        (MAX_PACKET - headers) / mss * mss
    }

    /// Sends what the guest has room for.
    fn send_data(&mut self, world: &mut World) -> Sent {
        let most = self.frame_payload(world);
        loop {
            let flying = self.in_flight();
            let offset = (flying as usize).min(self.out.len());
            let unsent = self.out.len() - offset;
            let fin_sent = flying as usize > self.out.len();
            let mut room = self.guest_window.saturating_sub(flying) as usize;
            if std::mem::take(&mut self.probe) {
                room = room.max(1);
            }
            let len = unsent.min(room).min(most);
            let fin = self.host_eof && !fin_sent && len == unsent && !self.fin_acknowledged;
            if len == 0 && !fin {
                return Sent::Done;
            }
            // No small segments while larger ones are under way (RFC 1122 §4.2.3.4).
            let silly = len < usize::from(self.mss).min(unsent) && flying > 0;
            if silly {
                return Sent::Done;
            }
            match self.send_segment(world, (offset, len), fin) {
                Sent::Done => {}
                other => return other,
            }
        }
    }

    /// Moves bytes both ways as far as both sides let it.
    pub(super) fn pump(&mut self, world: &mut World) -> Fate {
        match self.try_pump(world) {
            Ok(fate) | Err(fate) => fate,
        }
    }

    fn try_pump(&mut self, world: &mut World) -> Result<Fate, Fate> {
        if matches!(self.state, State::SynReceived | State::SynSent) {
            let sent = if self.next == self.una {
                self.send_syn(world)
            } else {
                Sent::Done
            };
            return self.settle(world, sent, false);
        }
        self.drain_inbox(world)?;
        let more = self.fill_out(world)?;
        let mut sent = self.send_data(world);
        if sent == Sent::Done && self.need_ack {
            sent = self.send_ack(world);
        }
        if self.is_over() {
            return Err(Fate::Gone);
        }
        if self.out.is_empty() && self.out.capacity() > 0 && !self.readable {
            self.out.release(&mut world.budget);
        }
        self.settle(world, sent, more)
    }

    fn send_ack(&mut self, world: &mut World) -> Sent {
        let window = self.tell_window(world, true);
        let ends = (self.key.remote.port(), self.key.guest.port());
        // From the furthest byte: one from before would be taken for an old segment.
        let sequence = self.max;
        let header = header(
            ends.0,
            ends.1,
            (sequence, self.received),
            TcpFlags::ACK,
            window,
        );
        let sent = self.send(world, &header, &[], None);
        self.need_ack = sent == Sent::Full;
        sent
    }

    fn settle(&mut self, world: &mut World, sent: Sent, more: bool) -> Result<Fate, Fate> {
        self.set_timer(world);
        match sent {
            Sent::Full => Ok(Fate::Wait),
            _ if more && !world.budget.is_tight() => Ok(Fate::Again),
            _ => Ok(Fate::Wait),
        }
    }

    /// Tells the guest that the connection is no more.
    pub(super) fn send_reset(&mut self, world: &mut World) {
        let flags = TcpFlags::RST.with(TcpFlags::ACK);
        let ends = (self.key.remote.port(), self.key.guest.port());
        let sequence = if self.state == State::Connecting {
            0
        } else {
            self.next
        };
        let header = header(ends.0, ends.1, (sequence, self.received), flags, 0);
        self.send(world, &header, &[], None);
    }
}

/// Answers a segment that belongs to no connection (RFC 9293 §3.10.7.1).
pub(super) fn refuse(world: &mut World, key: super::Key, segment: &crate::wire::TcpSegment<'_>) {
    if segment.flags.has(TcpFlags::RST) {
        return;
    }
    let Some(macs) = world.macs(key.port) else {
        return;
    };
    let ends = (key.remote.port(), key.guest.port());
    let header = if segment.flags.has(TcpFlags::ACK) {
        header(
            ends.0,
            ends.1,
            (segment.acknowledgment, 0),
            TcpFlags::RST,
            0,
        )
    } else {
        let flags = segment.flags;
        let len = number(segment.payload.len())
            + u32::from(flags.has(TcpFlags::SYN))
            + u32::from(flags.has(TcpFlags::FIN));
        let ack = segment.sequence.wrapping_add(len);
        let flags = TcpFlags::RST.with(TcpFlags::ACK);
        header(ends.0, ends.1, (0, ack), flags, 0)
    };
    let offload = world
        .ports
        .get(key.port)
        .is_some_and(|port| port.offloads.checksum);
    let mut frame = Builder::tcp(macs, key.remote, key.guest, &header, &[], (offload, None));
    world.send(key.port, &mut frame, &[]);
}
