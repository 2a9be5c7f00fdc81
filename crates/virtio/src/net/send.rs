//! Frames from the guest.

use std::io;

use ringfence_netstack::HEADER_BYTES;

use super::ETHERNET_BYTES;
use super::MAX_FRAME;
use super::device::Net;
use crate::Active;
use crate::Outcome;
use crate::Session;
use crate::chain::Chain;

impl Net {
    /// Sends what waited for the back end or the limiter.
    pub(super) fn send_waiting(&mut self, active: &mut Active, pair: u16) {
        let waits = self
            .pairs
            .get(usize::from(pair))
            .is_some_and(|pair| pair.send_waits);
        if waits {
            self.send(active, pair);
        }
    }

    pub(super) fn send(&mut self, active: &mut Active, pair: u16) {
        let index = usize::from(pair);
        if index >= self.pairs.len() {
            return;
        }
        self.pairs[index].send_waits = false;
        let mut full = false;
        active.serve(2 * pair + 1, |session, chain| {
            self.send_one(session, chain, pair, &mut full)
        });
        if full || self.pairs[index].watch.write {
            self.rewatch(&active.session, pair, |wanted| wanted.write = full);
        }
    }

    fn send_one(
        &mut self,
        session: &Session,
        chain: &Chain,
        pair: u16,
        full: &mut bool,
    ) -> Outcome {
        let len = chain.readable_len();
        let possible = HEADER_BYTES + ETHERNET_BYTES..=MAX_FRAME;
        if !possible.contains(&len) || (self.lock_mac && !self.is_own(session, chain)) {
            self.counters.tx_dropped.increment();
            return Outcome::Done(0);
        }
        if let Some(limiter) = &mut self.send_limiter
            && !limiter.admit(len as u64)
        {
            self.counters.throttled.increment();
            self.pairs[usize::from(pair)].send_waits = true;
            return Outcome::Blocked;
        }
        let reader = chain.reader(&session.memory);
        match self.backend.send(pair, &reader.slices(len)) {
            Ok(()) => {
                self.counters.tx_frames.increment();
                self.counters.tx_bytes.add((len - HEADER_BYTES) as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.pairs[usize::from(pair)].send_waits = true;
                *full = true;
                return Outcome::Blocked;
            }
            // A header that the host's stack refuses, or a link that is down: frames get lost.
            Err(_) => self.counters.tx_errors.increment(),
        }
        Outcome::Done(0)
    }

    fn is_own(&self, session: &Session, chain: &Chain) -> bool {
        let mut reader = chain.reader(&session.memory);
        reader.skip(HEADER_BYTES + self.mac.len());
        let mut source = [0; 6];
        reader.read_exact(&mut source).is_ok() && source == self.mac
    }
}
