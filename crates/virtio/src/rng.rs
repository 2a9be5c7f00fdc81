//! The entropy device (virtio 1.2 §5.4): fills the driver's buffers from the host's generator.
//!
//! Bounded: one request gets at most [`REQUEST_BYTES`], so that a huge buffer can't hold the
//! worker. The host's generator can't be exhausted, so there is no other limit.

use ringfence_device::Counter;
use ringfence_memory::GuestMemory;
use rustix::rand::GetRandomFlags;
use rustix::rand::getrandom;

use crate::Active;
use crate::DeviceKind;
use crate::Outcome;
use crate::VirtioDevice;
use crate::chain::Chain;

/// Most bytes for one request; the driver asks again for more.
pub const REQUEST_BYTES: usize = 64 << 10;
/// Bytes fetched at once.
const PIECE: usize = 256;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    requests: Counter,
    bytes: Counter,
}

impl Rng {
    fn fill(&self, memory: &GuestMemory, chain: &Chain) -> u32 {
        let mut writer = chain.writer(memory);
        writer.limit(REQUEST_BYTES);
        let mut piece = [0; PIECE];
        while writer.remaining() > 0 {
            let wanted = writer.remaining().min(PIECE);
            // After boot the generator never fails; if it did, the driver gets what came so far.
            let Ok(len) = getrandom(&mut piece[..wanted], GetRandomFlags::empty()) else {
                break;
            };
            if writer.write_all(&piece[..len]).is_err() {
                break;
            }
        }
        self.requests.increment();
        self.bytes.add(u64::from(writer.written()));
        writer.written()
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        active.serve(index, |session, chain| {
            Outcome::Done(self.fill(&session.memory, chain))
        });
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.requests.get()),
            ("bytes", self.bytes.get()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDriver;

    #[test]
    fn each_byte_of_a_request_is_filled_and_two_requests_differ() {
        let mut driver = TestDriver::start(Box::new(Rng::default()));
        let one = driver.request(0, &[], &[100, 200]);
        let two = driver.request(0, &[], &[300]);
        assert_eq!((one.len(), two.len()), (300, 300));
        assert_ne!(one, two);
        assert!(one[200..].iter().any(|&byte| byte != 0));
    }

    #[test]
    fn a_huge_request_is_answered_in_part() {
        let mut driver = TestDriver::start(Box::new(Rng::default()));
        let got = driver.request(0, &[], &[1 << 20]);
        assert_eq!(got.len(), REQUEST_BYTES);
    }

    #[test]
    fn a_request_with_nothing_to_write_gets_nothing() {
        let mut driver = TestDriver::start(Box::new(Rng::default()));
        assert!(driver.request(0, &[b"no"], &[]).is_empty());
    }
}
