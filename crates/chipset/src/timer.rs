//! One thread that calls back when timers are due.
//!
//! Each [`Timer`] is a timer file, so that arming one from a vCPU thread is a single call to the
//! host and never a hand-over to the timer thread. An earlier expiry that was replaced by a later
//! one is left in the file: it wakes the thread once for nothing, which is cheaper than a call to
//! the host each time a guest moves its deadline.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::RwLock;

use ringfence_clock::NS_PER_S;
use ringfence_clock::monotonic_ns;
use rustix::buffer::spare_capacity;
use rustix::event::EventfdFlags;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::Itimerspec;
use rustix::time::TimerfdClockId;
use rustix::time::TimerfdFlags;
use rustix::time::TimerfdTimerFlags;
use rustix::time::Timespec;

/// No expiry.
const NEVER: u64 = u64::MAX;
/// Epoll data of the event that ends [`Timers::run`].
const STOP: u64 = u64::MAX;
const EVENTS_AT_ONCE: usize = 16;

type Callback = Box<dyn Fn() + Send + Sync>;

/// The timers of one machine.
pub struct Timers {
    epoll: OwnedFd,
    stop: OwnedFd,
    timers: RwLock<Vec<(Arc<Timer>, Callback)>>,
}

impl std::fmt::Debug for Timers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Timers").finish_non_exhaustive()
    }
}

impl Timers {
    /// An empty set. Nothing is called until a thread is in [`Self::run`].
    ///
    /// # Errors
    /// What the host said when it refused the descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(STOP);
        epoll::add(&epoll, &stop, data, epoll::EventFlags::IN)?;
        Ok(Arc::new(Self {
            epoll,
            stop,
            timers: RwLock::new(Vec::new()),
        }))
    }

    /// Adds a timer that isn't armed. `callback` is called by the thread in [`Self::run`], once for
    /// each time that the timer becomes due; it may arm the timer again, but not add timers. It may
    /// find that the timer was armed anew between expiry and call.
    ///
    /// # Errors
    /// What the host said when it refused the timer file.
    pub fn add(&self, callback: impl Fn() + Send + Sync + 'static) -> io::Result<Arc<Timer>> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let file = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let timer = Arc::new(Timer {
            file,
            due: Mutex::new(Due {
                at_ns: NEVER,
                file_ns: NEVER,
            }),
        });
        let mut timers = self.timers.write().unwrap_or_else(PoisonError::into_inner);
        let data = epoll::EventData::new_u64(timers.len() as u64);
        epoll::add(&self.epoll, timer.file.as_fd(), data, epoll::EventFlags::IN)?;
        timers.push((Arc::clone(&timer), Box::new(callback)));
        Ok(timer)
    }

    /// Serves the timers until [`Self::stop`].
    ///
    /// # Errors
    /// What the host said when it refused to wait.
    pub fn run(&self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let timers = self.timers.read().unwrap_or_else(PoisonError::into_inner);
            for event in &events {
                let index = event.data.u64();
                if index == STOP {
                    return Ok(());
                }
                let found = usize::try_from(index).ok().and_then(|i| timers.get(i));
                if let Some((timer, callback)) = found
                    && timer.expired()
                {
                    callback();
                }
            }
        }
    }

    /// Ends [`Self::run`].
    pub fn stop(&self) {
        // Fails only when the counter is full: then the event is signalled already.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }
}

#[derive(Debug)]
struct Due {
    /// When the callback is due.
    at_ns: u64,
    /// When the timer file expires: never later than `at_ns`.
    file_ns: u64,
}

/// One timer, in nanoseconds of [`monotonic_ns`].
#[derive(Debug)]
pub struct Timer {
    file: OwnedFd,
    due: Mutex<Due>,
}

impl Timer {
    fn due(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it due at `at_ns`, in place of any earlier call.
    pub fn arm(&self, at_ns: u64) {
        let mut due = self.due();
        due.at_ns = at_ns;
        if at_ns < due.file_ns {
            self.set_file(&mut due, at_ns);
        }
    }

    /// Makes it not due at all.
    pub fn disarm(&self) {
        self.due().at_ns = NEVER;
    }

    /// When it is due.
    #[must_use]
    pub fn due_ns(&self) -> Option<u64> {
        Some(self.due().at_ns).filter(|&at_ns| at_ns != NEVER)
    }

    /// The file expired: whether the callback is due now.
    fn expired(&self) -> bool {
        let mut due = self.due();
        let mut count = [0; 8];
        if rustix::io::read(&self.file, &mut count).is_err() {
            // Armed anew since: it will expire again.
            return false;
        }
        due.file_ns = NEVER;
        if due.at_ns == NEVER {
            return false;
        }
        if due.at_ns <= monotonic_ns() {
            due.at_ns = NEVER;
            return true;
        }
        let at_ns = due.at_ns;
        self.set_file(&mut due, at_ns);
        false
    }

    fn set_file(&self, due: &mut Due, at_ns: u64) {
        // An expiry of zero would disarm the file.
        let at = at_ns.max(1);
        let spec = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(at / NS_PER_S).unwrap_or(i64::MAX),
                tv_nsec: i64::try_from(at % NS_PER_S).unwrap_or(0),
            },
        };
        if rustix::time::timerfd_settime(&self.file, TimerfdTimerFlags::ABSTIME, &spec).is_ok() {
            due.file_ns = at_ns;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);
    const MS: u64 = 1_000_000;

    struct Running {
        timers: Arc<Timers>,
        thread: Option<std::thread::JoinHandle<io::Result<()>>>,
    }

    impl Running {
        fn new() -> Self {
            let timers = Timers::new().expect("timers");
            let served = Arc::clone(&timers);
            let thread = Some(std::thread::spawn(move || served.run()));
            Self { timers, thread }
        }

        fn timer(&self) -> (Arc<Timer>, mpsc::Receiver<u64>) {
            let (send, receive) = mpsc::channel();
            let timer = self
                .timers
                .add(move || send.send(monotonic_ns()).expect("the test listens"))
                .expect("a timer");
            (timer, receive)
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.timers.stop();
            let ended = self.thread.take().expect("running").join();
            ended.expect("no panic").expect("no error");
        }
    }

    #[test]
    fn a_timer_fires_once_and_not_early() {
        let running = Running::new();
        let (timer, fired) = running.timer();
        let at = monotonic_ns() + 3 * MS;
        timer.arm(at);
        assert!(fired.recv_timeout(LONG).expect("fires") >= at);
        assert_eq!(timer.due_ns(), None);
        assert_eq!(fired.try_recv(), Err(mpsc::TryRecvError::Empty));
    }

    #[test]
    fn a_later_deadline_replaces_an_earlier_one() {
        let running = Running::new();
        let (timer, fired) = running.timer();
        let now = monotonic_ns();
        timer.arm(now + MS);
        timer.arm(now + 15 * MS);
        assert!(fired.recv_timeout(LONG).expect("fires") >= now + 15 * MS);
    }

    #[test]
    fn an_earlier_deadline_replaces_a_later_one() {
        let running = Running::new();
        let (timer, fired) = running.timer();
        let now = monotonic_ns();
        timer.arm(now + 3_600_000 * MS);
        timer.arm(now + MS);
        fired.recv_timeout(LONG).expect("fires");
    }

    #[test]
    fn a_disarmed_timer_does_not_call() {
        let running = Running::new();
        let (disarmed, silent) = running.timer();
        let (last, done) = running.timer();
        let now = monotonic_ns();
        disarmed.arm(now + MS);
        disarmed.disarm();
        last.arm(now + 5 * MS);
        done.recv_timeout(LONG).expect("fires");
        assert_eq!(silent.try_recv(), Err(mpsc::TryRecvError::Empty));
    }

    #[test]
    fn the_past_is_due_at_once() {
        let running = Running::new();
        let (timer, fired) = running.timer();
        timer.arm(0);
        fired.recv_timeout(LONG).expect("fires");
    }
}
