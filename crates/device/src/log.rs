//! Log lines about what a guest does, bounded in number.
//!
//! A guest can repeat a mistake millions of times a second. Each place in the code that logs one
//! therefore has a [`LogLimit`]: the first lines of each period come out, the rest are counted.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use std::sync::OnceLock;

/// Lines that one place may write in a period.
const BURST: u64 = 5;
/// The period.
const PERIOD: Duration = Duration::from_secs(60);

/// How much one place in the code has logged lately.
#[derive(Debug, Default)]
pub struct LogLimit {
    /// Start of the current period in ms since the process's first log line, shifted left by 8,
    /// with the number of lines in it below.
    window: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// A place that hasn't logged yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            window: AtomicU64::new(0),
            suppressed: AtomicU64::new(0),
        }
    }

    /// `Some(lines suppressed since the last one)` when a line may be written now.
    pub fn allow(&self) -> Option<u64> {
        static START: OnceLock<Instant> = OnceLock::new();
        let now = START.get_or_init(Instant::now).elapsed();
        self.allow_at(now)
    }

    fn allow_at(&self, now: Duration) -> Option<u64> {
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX >> 8);
        let period_ms = u64::try_from(PERIOD.as_millis()).unwrap_or(u64::MAX);
        let step = |window: u64| {
            let (start, lines) = (window >> 8, window & 0xff);
            if lines == 0 || now_ms.saturating_sub(start) >= period_ms {
                Some(now_ms << 8 | 1)
            } else if lines < BURST {
                Some(start << 8 | (lines + 1))
            } else {
                None
            }
        };
        let moved = self
            .window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, step);
        if moved.is_ok() {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

/// `tracing::warn!` with a [`LogLimit`] of its own: for what a guest can cause.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMIT: $crate::LogLimit = $crate::LogLimit::new();
        if let Some(suppressed) = LIMIT.allow() {
            $crate::tracing::warn!(suppressed, $($arg)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_logged_and_the_rest_counted() {
        let limit = LogLimit::new();
        let at = Duration::from_secs(1);
        let allowed = (0..100).filter(|_| limit.allow_at(at).is_some()).count();
        assert_eq!(allowed, 5);
        let later = at + PERIOD;
        assert_eq!(limit.allow_at(later), Some(95));
    }
}
