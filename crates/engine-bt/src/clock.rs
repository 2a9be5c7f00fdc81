//! Time as the guest sees it: the host's TSC, and the machine clock in nanoseconds.

use std::sync::OnceLock;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use core::arch::x86_64::_rdtsc;

use crate::host::cpuid;

/// The machine clock.
pub(crate) struct Clock {
    start: Instant,
    /// Added to the time since `start`.
    offset_ns: AtomicI64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            offset_ns: AtomicI64::new(0),
        }
    }

    /// Nanoseconds since the machine was made, or as set.
    pub(crate) fn now_ns(&self) -> u64 {
        let elapsed = i64::try_from(self.start.elapsed().as_nanos()).unwrap_or(i64::MAX);
        u64::try_from(elapsed.saturating_add(self.offset_ns.load(Ordering::SeqCst))).unwrap_or(0)
    }

    /// Sets the clock.
    pub(crate) fn set_ns(&self, clock_ns: u64) {
        let elapsed = i64::try_from(self.start.elapsed().as_nanos()).unwrap_or(i64::MAX);
        let wanted = i64::try_from(clock_ns).unwrap_or(i64::MAX);
        self.offset_ns
            .store(wanted.saturating_sub(elapsed), Ordering::SeqCst);
    }

    /// Wall-clock time at which the machine clock was zero.
    pub(crate) fn wall_at_zero(&self) -> Duration {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        now.saturating_sub(Duration::from_nanos(self.now_ns()))
    }
}

/// The processor's time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor; Linux leaves it enabled for user mode.
    #[expect(unsafe_code, reason = "an intrinsic without memory effects")]
    unsafe {
        _rdtsc()
    }
}

/// Frequency of the host's TSC in kHz, found once.
pub(crate) fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        from_cpuid()
            .or_else(from_bogomips)
            .unwrap_or_else(from_clock)
    })
}

/// Learns how fast the host's counter counts while the files that say so are within reach: a process
/// that has given them up would have to measure it, which takes ten milliseconds.
pub fn learn_frequency() {
    tsc_khz();
}

/// A hypervisor's leaf, or the crystal's ratio (SDM 2A, CPUID leaf 15H).
fn from_cpuid() -> Option<u64> {
    if cpuid(1, 0).ecx >> 31 != 0 && cpuid(0x4000_0000, 0).eax >= 0x4000_0010 {
        let khz = u64::from(cpuid(0x4000_0010, 0).eax);
        if khz != 0 {
            return Some(khz);
        }
    }
    if cpuid(0, 0).eax < 0x15 {
        return None;
    }
    let ratio = cpuid(0x15, 0);
    if ratio.eax == 0 || ratio.ebx == 0 || ratio.ecx == 0 {
        return None;
    }
    Some(u64::from(ratio.ecx) * u64::from(ratio.ebx) / u64::from(ratio.eax) / 1000)
}

/// The kernel prints twice the TSC's MHz as BogoMIPS, to 2 parts in a million, when the TSC is its
/// clock.
fn from_bogomips() -> Option<u64> {
    let clock =
        std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            .ok()?;
    if clock.trim() != "tsc" && clock.trim() != "kvm-clock" {
        return None;
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("bogomips"))?;
    let mips: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    let khz = (mips * 500.0).round();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a plausible frequency"
    )]
    (100_000.0..100_000_000.0)
        .contains(&khz)
        .then_some(khz as u64)
}

/// Counts ticks over ten milliseconds of the host's clock.
fn from_clock() -> u64 {
    let start = Instant::now();
    let first = tsc();
    while start.elapsed() < Duration::from_millis(10) {
        std::hint::spin_loop();
    }
    let ticks = u128::from(tsc().wrapping_sub(first));
    let khz = ticks * 1_000_000 / start.elapsed().as_nanos().max(1);
    u64::try_from(khz).unwrap_or(1_000_000).max(1)
}
