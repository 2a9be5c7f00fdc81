//! Counters that a worker bumps and anyone reads.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

/// A monotonic count. Cheap enough for every request.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts `n`. Wraps, which at one event a nanosecond takes 584 years.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A live view of a device for `ringfence inspect` and `stats`.
pub trait Inspect {
    /// Name and value, in display order.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}
