//! Rate limits: token buckets for bytes and for operations.
//!
//! A request is admitted while there are tokens, whatever its size, and may leave the bucket in
//! debt; the next one waits until the debt is paid. So requests larger than the bucket work, and
//! the long-run rate still holds.

use std::io;
use std::time::Duration;
use std::time::Instant;

use rustix::fd::OwnedFd;
use rustix::time::Itimerspec;
use rustix::time::TimerfdClockId;
use rustix::time::TimerfdFlags;
use rustix::time::TimerfdTimerFlags;
use rustix::time::Timespec;
use rustix::time::timerfd_create;
use rustix::time::timerfd_settime;

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Tokens a second: bytes or operations. Zero is no limit.
    pub per_second: u64,
    /// Tokens that may be spent at once after a rest.
    pub burst: u64,
}

/// The limits of a device or of one direction of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateConfig {
    /// For the sum of request sizes.
    pub bytes: Option<Limit>,
    /// For the number of requests.
    pub operations: Option<Limit>,
}

#[derive(Clone, Debug)]
struct Bucket {
    limit: Limit,
    /// Negative: debt.
    tokens: i64,
    filled: Instant,
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Bucket {
    fn new(limit: Limit, now: Instant) -> Option<Self> {
        let burst = limit.burst.max(1);
        (limit.per_second > 0).then_some(Self {
            limit: Limit { burst, ..limit },
            tokens: signed(burst),
            filled: now,
        })
    }

    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let earned = elapsed.as_nanos() * u128::from(self.limit.per_second) / 1_000_000_000;
        let earned = u64::try_from(earned).unwrap_or(u64::MAX);
        if earned == 0 {
            // Too little time for one token: keep it for the next look.
            return;
        }
        self.filled = now;
        let full = signed(self.limit.burst);
        self.tokens = self.tokens.saturating_add(signed(earned)).min(full);
    }

    fn spend(&mut self, amount: u64) {
        self.tokens = self.tokens.saturating_sub(signed(amount));
    }

    /// How long until there is a token.
    fn wait(&self) -> Duration {
        let missing = u128::from(1_u64.saturating_add_signed(self.tokens.saturating_neg()));
        let nanoseconds = missing * 1_000_000_000 / u128::from(self.limit.per_second);
        // At least a tick: a timer of zero is disarmed.
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX).max(1000))
    }
}

/// Holds a device to its limits.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: [Option<Bucket>; 2],
    timer: OwnedFd,
}

impl RateLimiter {
    /// With full buckets; `None` when nothing is limited.
    ///
    /// # Errors
    /// When the host gives no timer.
    pub fn new(config: RateConfig) -> io::Result<Option<Self>> {
        let now = Instant::now();
        let bucket = |limit: Option<Limit>| limit.and_then(|limit| Bucket::new(limit, now));
        let buckets = [bucket(config.bytes), bucket(config.operations)];
        if buckets.iter().all(Option::is_none) {
            return Ok(None);
        }
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Some(Self { buckets, timer }))
    }

    /// The timer that rings when a refused request may try again.
    #[must_use]
    pub fn timer(&self) -> &OwnedFd {
        &self.timer
    }

    /// Whether a request of `bytes` may go now; if not, the timer is set.
    pub fn admit(&mut self, bytes: u64) -> bool {
        let ready = self.is_ready();
        if ready {
            self.spend(bytes);
        }
        ready
    }

    /// Whether any request may go now; if not, the timer is set. For those whose size shows only
    /// when they're done: follow with [`Self::spend`].
    pub fn is_ready(&mut self) -> bool {
        match self.wait_at(Instant::now()) {
            None => true,
            Some(wait) => {
                self.arm(wait);
                false
            }
        }
    }

    /// Counts a request of `bytes`.
    pub fn spend(&mut self, bytes: u64) {
        for (bucket, amount) in self.buckets.iter_mut().zip([bytes, 1]) {
            if let Some(bucket) = bucket {
                bucket.spend(amount);
            }
        }
    }

    fn wait_at(&mut self, now: Instant) -> Option<Duration> {
        let mut longest = None;
        for bucket in self.buckets.iter_mut().flatten() {
            bucket.refill(now);
            if bucket.tokens <= 0 {
                longest = longest.max(Some(bucket.wait()));
            }
        }
        longest
    }

    fn arm(&self, wait: Duration) {
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let once = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        // Fails only for times that don't exist.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }

    /// Takes the ring, so that the timer is silent until it's set again.
    pub fn heard(&self) {
        let mut count = [0; 8];
        // Nothing to read when it was set anew meanwhile.
        let _ = rustix::io::read(&self.timer, &mut count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl RateLimiter {
        fn admit_at(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
            match self.wait_at(now) {
                Some(wait) => Err(wait),
                None => {
                    self.spend(bytes);
                    Ok(())
                }
            }
        }
    }

    fn limiter(bytes: Option<(u64, u64)>, operations: Option<(u64, u64)>) -> RateLimiter {
        let limit = |(per_second, burst)| Limit { per_second, burst };
        RateLimiter::new(RateConfig {
            bytes: bytes.map(limit),
            operations: operations.map(limit),
        })
        .expect("a timer")
        .expect("a limit")
    }

    #[test]
    fn no_limits_need_no_limiter() {
        let none = RateConfig {
            bytes: Some(Limit {
                per_second: 0,
                burst: 5,
            }),
            operations: None,
        };
        assert!(RateLimiter::new(none).expect("no timer").is_none());
    }

    #[test]
    fn the_long_run_rate_holds_for_requests_larger_than_the_bucket() {
        let mut limiter = limiter(Some((1000, 100)), None);
        let start = Instant::now();
        let mut spent = 0;
        for ms in 0..10_000 {
            if limiter
                .admit_at(450, start + Duration::from_millis(ms))
                .is_ok()
            {
                spent += 450;
            }
        }
        assert!((10_000..=10_900).contains(&spent), "{spent} in 10 s");
    }

    #[test]
    fn a_refused_request_is_told_how_long_to_wait() {
        let mut limiter = limiter(None, Some((10, 2)));
        let now = Instant::now();
        for _ in 0..2 {
            limiter.admit_at(0, now).expect("the burst");
        }
        let wait = limiter.admit_at(0, now).expect_err("spent");
        assert_eq!(wait, Duration::from_millis(100));
        limiter.admit_at(0, now + wait).expect("earned");
    }

    #[test]
    fn both_limits_hold() {
        let mut limiter = limiter(Some((1_000_000, 1_000_000)), Some((1, 1)));
        let now = Instant::now();
        limiter.admit_at(1, now).expect("the first");
        limiter.admit_at(1, now).expect_err("one a second");
    }

    #[test]
    fn the_timer_rings_when_the_wait_is_over() {
        let mut limiter = limiter(None, Some((1000, 1)));
        assert!(limiter.admit(0));
        assert!(!limiter.admit(0));
        let mut fds = [rustix::event::PollFd::new(
            limiter.timer(),
            rustix::event::PollFlags::IN,
        )];
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        assert_eq!(rustix::event::poll(&mut fds, Some(&second)), Ok(1));
        limiter.heard();
        assert!(limiter.admit(0));
    }
}
