//! How fast the host's time-stamp counter counts.

use core::arch::x86_64::__cpuid;
use std::time::Duration;

use rustix::time::ClockId;

use crate::NS_PER_S;
use crate::host_tsc;
use crate::read_clock;

/// Long enough that the error of both ends (under 100 ns) stays below 20 parts per million.
const WINDOW_NS: u64 = 5_000_000;
/// Readings at each end; the fastest one is the most exact.
const READINGS: usize = 16;

/// Leaf 0x15: counter to crystal ratio and the crystal's frequency.
const LEAF_CRYSTAL: u32 = 0x15;
/// Leaf 0x4000_0010: EAX is the counter's frequency in kHz.
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;

/// Who said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrequencySource {
    /// The processor or the hypervisor under the host, exactly.
    Cpuid,
    /// Measured against the host's raw clock.
    Measured,
}

/// A counter's frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    /// Counts a second.
    pub hz: u64,
    /// Where it is from.
    pub source: FrequencySource,
}

/// A measurement under way: taken at the start of the process, it is over by the time it is needed.
#[derive(Clone, Copy, Debug)]
pub struct TscCalibration {
    start: Reading,
}

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Reading {
    tsc: u64,
    raw_ns: u64,
}

impl Reading {
    fn take() -> Self {
        let once = || {
            let before = host_tsc();
            let raw_ns = read_clock(ClockId::MonotonicRaw);
            let took = host_tsc().wrapping_sub(before);
            (
                took,
                Self {
                    tsc: before.wrapping_add(took / 2),
                    raw_ns,
                },
            )
        };
        let first = once();
        (1..READINGS)
            .map(|_| once())
            .fold(
                first,
                |best, next| if next.0 < best.0 { next } else { best },
            )
            .1
    }
}

impl TscCalibration {
    /// Takes the first reading.
    #[must_use]
    pub fn start() -> Self {
        Self {
            start: Reading::take(),
        }
    }

    /// The frequency: as CPUID says it, or measured since the start. Waits when that was less
    /// than 5 ms ago.
    #[must_use]
    pub fn finish(self) -> TscFrequency {
        if let Some(hz) = known_hz() {
            return TscFrequency {
                hz,
                source: FrequencySource::Cpuid,
            };
        }
        loop {
            let end = Reading::take();
            let elapsed_ns = end.raw_ns.saturating_sub(self.start.raw_ns);
            if let Some(left) = WINDOW_NS.checked_sub(elapsed_ns).filter(|&left| left > 0) {
                std::thread::park_timeout(Duration::from_nanos(left));
                continue;
            }
            let counts = end.tsc.wrapping_sub(self.start.tsc);
            let hz = u128::from(counts) * u128::from(NS_PER_S) / u128::from(elapsed_ns);
            return TscFrequency {
                hz: u64::try_from(hz).unwrap_or(u64::MAX),
                source: FrequencySource::Measured,
            };
        }
    }
}

fn known_hz() -> Option<u64> {
    let crystal = (__cpuid(0).eax >= LEAF_CRYSTAL).then(|| __cpuid(LEAF_CRYSTAL));
    if let Some(leaf) = crystal
        && leaf.eax != 0
        && leaf.ebx != 0
        && leaf.ecx != 0
    {
        return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
    }
    let highest = __cpuid(LEAF_HYPERVISOR).eax;
    let has_timing = (LEAF_HYPERVISOR_TIMING..LEAF_HYPERVISOR + 0x1000).contains(&highest);
    let khz = has_timing.then(|| __cpuid(LEAF_HYPERVISOR_TIMING).eax)?;
    (khz != 0).then(|| u64::from(khz) * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let one = TscCalibration::start().finish();
        let two = TscCalibration::start().finish();
        let ppm = one.hz.abs_diff(two.hz) * 1_000_000 / one.hz;
        // Generous: other work on the machine disturbs the readings.
        assert!(ppm < 2_000, "{one:?} {two:?}");
        assert!(one.hz > 100_000_000, "{one:?}");
    }
}
