//! The machine's time.
//!
//! Everything that ticks in a machine derives from one [`Clock`]: the guest's time-stamp counter
//! is the host's plus an offset, and emulated timers count nanoseconds of the host's monotonic
//! clock. With the offset at zero (a fresh machine) guest code may read the host's counter
//! natively.
//!
//! Sources: SDM 3B §18.7 (time-stamp counter), SDM 2A CPUID leaf 0x15; the hypervisor timing leaf
//! 0x4000_0010 as VMware and KVM define it.

// UNSAFETY: reads the time-stamp counter, which Rust only offers as an unsafe intrinsic.
#![expect(unsafe_code, reason = "RDTSC has no safe wrapper")]

mod frequency;

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use rustix::time::ClockId;
use rustix::time::clock_gettime;

pub use frequency::{FrequencySource, TscCalibration, TscFrequency};

/// Nanoseconds in a second.
pub const NS_PER_S: u64 = 1_000_000_000;

/// The host's time-stamp counter.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is part of every x86-64 processor and reads one register. Linux leaves it
    // enabled in user space unless a process asks otherwise by prctl, which nobody here does.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The host's monotonic clock in nanoseconds (CLOCK_MONOTONIC, the one that timer files use).
#[must_use]
pub fn monotonic_ns() -> u64 {
    read_clock(ClockId::Monotonic)
}

/// The host's wall clock: whole seconds since 1970-01-01 and nanoseconds.
#[must_use]
pub fn wall_clock() -> (u64, u32) {
    let time = clock_gettime(ClockId::Realtime);
    (
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

fn read_clock(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.wrapping_mul(NS_PER_S).wrapping_add(nanoseconds)
}

/// One machine's view of time.
#[derive(Debug)]
pub struct Clock {
    rate: OnceLock<Rate>,
    /// Where the rate comes from when it is first asked for.
    calibration: Option<TscCalibration>,
    /// Guest counter minus host counter, wrapping.
    offset: AtomicU64,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    frequency: TscFrequency,
    /// Nanoseconds for a count, times 2^32.
    ns_per_count_q32: u64,
}

impl From<TscFrequency> for Rate {
    fn from(frequency: TscFrequency) -> Self {
        let q32 = (u128::from(NS_PER_S) << 32) / u128::from(frequency.hz.max(1));
        Self {
            frequency,
            ns_per_count_q32: u64::try_from(q32).unwrap_or(u64::MAX),
        }
    }
}

impl Clock {
    /// A clock whose guest counter is the host's.
    #[must_use]
    pub fn new(frequency: TscFrequency) -> Self {
        Self {
            rate: OnceLock::from(Rate::from(frequency)),
            calibration: None,
            offset: AtomicU64::new(0),
        }
    }

    /// The same, of a frequency that is still being measured: the measurement ends when the
    /// frequency is first needed, and goes on beside whatever is done until then.
    #[must_use]
    pub fn calibrating(calibration: TscCalibration) -> Self {
        Self {
            rate: OnceLock::new(),
            calibration: Some(calibration),
            offset: AtomicU64::new(0),
        }
    }

    fn rate(&self) -> Rate {
        *self.rate.get_or_init(|| {
            let calibration = self.calibration.unwrap_or_else(TscCalibration::start);
            Rate::from(calibration.finish())
        })
    }

    /// How fast the counter counts.
    #[must_use]
    pub fn frequency(&self) -> TscFrequency {
        self.rate().frequency
    }

    /// The guest's time-stamp counter now.
    #[must_use]
    pub fn guest_tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.tsc_offset())
    }

    /// Guest counter minus host counter, wrapping.
    #[must_use]
    pub fn tsc_offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    /// Makes the guest's counter read `guest_tsc` now, on restore. No vCPU runs meanwhile.
    pub fn set_guest_tsc(&self, guest_tsc: u64) {
        self.offset
            .store(guest_tsc.wrapping_sub(host_tsc()), Ordering::Relaxed);
    }

    /// Nanoseconds that `counts` of the counter take; saturates.
    #[must_use]
    pub fn counts_to_ns(&self, counts: u64) -> u64 {
        let ns = (u128::from(counts) * u128::from(self.rate().ns_per_count_q32)) >> 32;
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// When the guest's counter reaches `guest_tsc`, on the scale of [`monotonic_ns`]; now when it
    /// has passed.
    #[must_use]
    pub fn monotonic_ns_at(&self, guest_tsc: u64) -> u64 {
        let ahead = guest_tsc.saturating_sub(self.guest_tsc());
        monotonic_ns().saturating_add(self.counts_to_ns(ahead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> Clock {
        Clock::new(TscFrequency {
            hz: 2_500_000_000,
            source: FrequencySource::Cpuid,
        })
    }

    #[test]
    fn counts_become_nanoseconds() {
        let clock = clock();
        for (counts, ns) in [(0, 0), (5, 2), (2_500_000_000, NS_PER_S)] {
            assert!(clock.counts_to_ns(counts).abs_diff(ns) <= 1, "{counts}");
        }
        let day = clock.counts_to_ns(86_400 * 2_500_000_000);
        assert!(day.abs_diff(86_400 * NS_PER_S) < 50_000, "{day}");
        assert_eq!(clock.counts_to_ns(u64::MAX).leading_zeros(), 1);
    }

    #[test]
    fn a_frequency_under_measurement_is_there_when_asked_for() {
        let clock = Clock::calibrating(TscCalibration::start());
        let ppm = clock.counts_to_ns(clock.frequency().hz).abs_diff(NS_PER_S) / 1000;
        assert!(ppm < 10);
    }

    #[test]
    fn the_guest_counter_continues_from_where_it_is_set() {
        let clock = clock();
        clock.set_guest_tsc(1_000);
        let later = clock.guest_tsc();
        assert!((1_000..1_000_000_000).contains(&later), "{later}");
    }

    #[test]
    fn a_passed_counter_value_is_due_now() {
        let clock = clock();
        clock.set_guest_tsc(1_000);
        let before = monotonic_ns();
        let due = clock.monotonic_ns_at(999);
        assert!((before..=monotonic_ns()).contains(&due));
        let due = clock.monotonic_ns_at(clock.guest_tsc() + 2_500_000_000);
        assert!(due >= before + NS_PER_S * 99 / 100);
    }
}
