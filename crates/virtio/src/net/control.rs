//! The control queue (virtio 1.2 §5.1.6.5).

use ringfence_memory::GuestMemory;

use super::device::Net;
use crate::Active;
use crate::ChainReader;
use crate::Outcome;
use crate::Session;
use crate::chain::Chain;

const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// Command classes.
const RX: u8 = 0;
const MAC: u8 = 1;
const MAC_ADDR_SET: u8 = 1;
const MQ: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

impl Net {
    pub(super) fn serve_control(&mut self, active: &mut Active, queue: u16) {
        active.serve(queue, |session, chain| self.command(session, chain));
        // A command may have changed how many pairs are used, and a broken queue breaks them all.
        self.lend_used(active);
    }

    fn command(&mut self, session: &Session, chain: &Chain) -> Outcome {
        let memory: &GuestMemory = &session.memory;
        let mut request = chain.reader(memory);
        let ack = match self.execute(session, &mut request) {
            Some(()) => ACK_OK,
            None => ACK_ERROR,
        };
        let mut reply = chain.writer(memory);
        // A command without room for its answer was carried out all the same.
        let _ = reply.write_all(&[ack]);
        Outcome::Done(reply.written())
    }

    /// `None` for a command that is malformed, unknown or refused.
    fn execute(&mut self, session: &Session, request: &mut ChainReader<'_>) -> Option<()> {
        let class: u8 = request.read_value().ok()?;
        let command: u8 = request.read_value().ok()?;
        match (class, command) {
            // Every frame that reaches the back end is for the guest: there is nothing to filter.
            (RX, _) => Some(()),
            (MAC, MAC_ADDR_SET) if !self.lock_mac => {
                let mut mac = [0; 6];
                request.read_exact(&mut mac).ok()?;
                self.mac = mac;
                Some(())
            }
            (MAC, MAC_ADDR_SET) => None,
            (MAC, _) => Some(()),
            (MQ, VQ_PAIRS_SET) => {
                let pairs: u16 = request.read_value().ok()?;
                let possible = 1..=self.pair_count();
                if !possible.contains(&pairs) {
                    return None;
                }
                self.backend.set_active_queues(pairs).ok()?;
                self.used_pairs = pairs;
                Some(())
            }
            (GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => {
                let offloads: u64 = request.read_value().ok()?;
                // §5.1.6.5.6.2: only what was negotiated.
                (offloads & !session.features == 0).then(|| self.set_guest_offloads(offloads))
            }
            _ => None,
        }
    }
}
