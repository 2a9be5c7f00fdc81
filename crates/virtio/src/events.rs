//! The event loop that device workers run in: one thread, many descriptors (epoll).
//!
//! Handlers register and unregister from any thread. A handler that is gone hears nothing more,
//! even of events that were already fetched. [`EventLoop::pause`] holds the loop between two
//! events, so that a snapshot sees devices at rest.

use std::collections::HashMap;
use std::collections::HashSet;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use vmm_sys_util::epoll::ControlOperation;
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

/// Events fetched in one call.
const BATCH: usize = 64;
/// How long to look for the next event before sleeping: somewhat more than two wake-ups take.
const LINGER: Duration = Duration::from_micros(60);
/// The handler number of the loop itself.
const OWN: u32 = 0;

/// Hears of its descriptors.
pub trait EventHandler: Send + Sync {
    /// The descriptor registered as `token` is ready, or its other end is gone.
    fn ready(&self, token: u32);
}

/// What to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something can be read.
    Read,
    /// Something can be written.
    Write,
    /// Either.
    Both,
    /// Only that the other end is gone.
    Hangup,
}

impl Interest {
    fn events(self) -> EventSet {
        match self {
            Self::Read => EventSet::IN,
            Self::Write => EventSet::OUT,
            Self::Both => EventSet::IN | EventSet::OUT,
            Self::Hangup => EventSet::empty(),
        }
    }
}

/// The loop. One thread runs it; the others hold it to register.
pub struct EventLoop {
    epoll: Epoll,
    handlers: Mutex<HashMap<u32, Arc<dyn EventHandler>>>,
    next_handler: AtomicU32,
    /// Held while a handler runs.
    turn: Mutex<()>,
    wake: EventFd,
    stopping: AtomicBool,
    /// How long to look for more events before sleeping.
    linger: Duration,
}

impl std::fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

/// Holds a loop between two events.
#[derive(Debug)]
pub struct Paused<'a> {
    _turn: MutexGuard<'a, ()>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        // Asked here, since it reads files: the thread of a jailed process can't.
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        let new = Self {
            epoll: Epoll::new()?,
            handlers: Mutex::default(),
            next_handler: AtomicU32::new(OWN + 1),
            turn: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
            linger: if alone { Duration::ZERO } else { LINGER },
        };
        new.control(
            ControlOperation::Add,
            new.wake.as_raw_fd(),
            Interest::Read,
            (OWN, 0),
        )?;
        Ok(Arc::new(new))
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        interest: Interest,
        (handler, token): (u32, u32),
    ) -> io::Result<()> {
        let data = u64::from(handler) << 32 | u64::from(token);
        let event = EpollEvent::new(interest.events(), data);
        self.epoll.ctl(operation, fd, event)
    }

    /// Adds a handler, which has no descriptors yet.
    pub fn register(self: &Arc<Self>, handler: Arc<dyn EventHandler>) -> Registration {
        let id = self.next_handler.fetch_add(1, Ordering::Relaxed);
        self.lock_handlers().insert(id, handler);
        Registration {
            events: Arc::clone(self),
            id,
            fds: Mutex::default(),
            first_token: 0,
        }
    }

    fn lock_handlers(&self) -> MutexGuard<'_, HashMap<u32, Arc<dyn EventHandler>>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves events until [`Self::stop`].
    ///
    /// # Errors
    /// When waiting fails: the host is broken.
    pub fn run(&self) -> io::Result<()> {
        let mut pace = Pace::new(self.linger);
        while !self.stopping.load(Ordering::SeqCst) {
            if pace.lingers(Instant::now()) {
                if self.run_once(0)? > 0 {
                    pace.served(Instant::now());
                } else {
                    // Whoever else wants this processor, a vCPU first of all, has it.
                    std::thread::yield_now();
                }
            } else {
                self.run_once(-1)?;
                pace.served(Instant::now());
            }
        }
        Ok(())
    }

    /// Waits at most `timeout_ms` (forever when negative) and serves what is ready. Returns the
    /// number of events.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_once(&self, timeout_ms: i32) -> io::Result<usize> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            let [handler, token] = split(event.data());
            self.dispatch(handler, token);
        }
        Ok(count)
    }

    fn dispatch(&self, id: u32, token: u32) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if id == OWN {
            // Empty already when another wake-up came first.
            let _ = self.wake.read();
            return;
        }
        let handler = self.lock_handlers().get(&id).cloned();
        if let Some(handler) = handler {
            handler.ready(token);
        }
    }

    /// Waits until the handler that is running returns, and holds the loop there.
    #[must_use]
    pub fn pause(&self) -> Paused<'_> {
        Paused {
            _turn: self.turn.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Makes [`Self::run`] return.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Fails only when the counter is full: the loop wakes then anyway.
        let _ = self.wake.write(1);
    }
}

/// Whether to look for the next event awhile before sleeping.
///
/// A guest that waits for each answer before it asks again pays for two wake-ups a request. When
/// events come in quick succession, the loop lingers after each, so that the next finds it awake;
/// one slow gap ends that, so that a quiet guest costs nothing.
#[derive(Debug)]
struct Pace {
    linger: Duration,
    last: Option<Instant>,
    quick: bool,
}

impl Pace {
    fn new(linger: Duration) -> Self {
        Self {
            linger,
            last: None,
            quick: false,
        }
    }

    fn served(&mut self, now: Instant) {
        let gap = self.last.map(|last| now.saturating_duration_since(last));
        self.quick = gap.is_some_and(|gap| gap < self.linger);
        self.last = Some(now);
    }

    fn lingers(&self, now: Instant) -> bool {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        self.quick && since.is_some_and(|since| since < self.linger)
    }
}

fn split(data: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = data.to_be_bytes();
    [
        u32::from_be_bytes([a, b, c, d]),
        u32::from_be_bytes([e, f, g, h]),
    ]
}

/// A handler's place in a loop. Dropping it takes the handler and its descriptors out.
///
/// A descriptor must be removed before it is closed.
#[derive(Debug)]
pub struct Registration {
    events: Arc<EventLoop>,
    id: u32,
    fds: Mutex<HashSet<RawFd>>,
    /// Added to every token: lets a transport keep the low ones for itself.
    first_token: u32,
}

impl Registration {
    /// The same registration with `first` added to all tokens from now on.
    #[must_use]
    pub(crate) fn with_first_token(mut self, first: u32) -> Self {
        self.first_token = first;
        self
    }

    fn lock_fds(&self) -> MutexGuard<'_, HashSet<RawFd>> {
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts hearing of `fd` as `token`.
    ///
    /// # Errors
    /// When it is there already or can't be polled (regular files).
    pub fn add(&self, fd: &impl AsRawFd, token: u32, interest: Interest) -> io::Result<()> {
        let fd = fd.as_raw_fd();
        let token = self.first_token.wrapping_add(token);
        self.events
            .control(ControlOperation::Add, fd, interest, (self.id, token))?;
        self.lock_fds().insert(fd);
        Ok(())
    }

    /// Changes what to hear of.
    ///
    /// # Errors
    /// When `fd` isn't there.
    pub fn modify(&self, fd: &impl AsRawFd, token: u32, interest: Interest) -> io::Result<()> {
        let token = self.first_token.wrapping_add(token);
        self.events.control(
            ControlOperation::Modify,
            fd.as_raw_fd(),
            interest,
            (self.id, token),
        )
    }

    /// Stops hearing of `fd`; harmless when it isn't there.
    pub fn remove(&self, fd: &impl AsRawFd) {
        self.forget(fd.as_raw_fd());
        self.lock_fds().remove(&fd.as_raw_fd());
    }

    /// Stops hearing of all its descriptors.
    pub fn clear(&self) {
        for fd in std::mem::take(&mut *self.lock_fds()) {
            self.forget(fd);
        }
    }

    fn forget(&self, fd: RawFd) {
        // Fails only when it isn't there.
        let _ = self
            .events
            .control(ControlOperation::Delete, fd, Interest::Hangup, (self.id, 0));
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.events.lock_handlers().remove(&self.id);
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<u32>>);

    impl EventHandler for Heard {
        fn ready(&self, token: u32) {
            self.0.lock().expect("test").push(token);
        }
    }

    fn bell() -> EventFd {
        EventFd::new(EFD_NONBLOCK).expect("eventfd")
    }

    #[test]
    fn a_handler_hears_of_its_descriptors_until_it_is_dropped() {
        let events = EventLoop::new().expect("loop");
        let heard = Arc::new(Heard::default());
        let registration = events.register(heard.clone());
        let bell = bell();
        registration.add(&bell, 7, Interest::Read).expect("add");
        assert_eq!(events.run_once(0).expect("wait"), 0);
        bell.write(1).expect("ring");
        events.run_once(0).expect("wait");
        drop(registration);
        events.run_once(0).expect("wait");
        assert_eq!(*heard.0.lock().expect("test"), [7]);
    }

    #[test]
    fn stop_ends_a_running_loop() {
        let events = EventLoop::new().expect("loop");
        let thread = std::thread::spawn({
            let events = events.clone();
            move || events.run()
        });
        events.stop();
        thread.join().expect("no panic").expect("clean end");
    }

    #[test]
    fn the_loop_lingers_only_while_events_come_quickly() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut pace = Pace::new(Duration::from_micros(60));
        pace.served(at(0));
        assert!(!pace.lingers(at(1)), "one event says nothing");
        pace.served(at(50));
        assert!(pace.lingers(at(100)));
        assert!(!pace.lingers(at(110)), "the time is over");
        pace.served(at(200));
        assert!(!pace.lingers(at(201)), "the gap was long");
        let mut never = Pace::new(Duration::ZERO);
        never.served(at(0));
        never.served(at(0));
        assert!(!never.lingers(at(0)));
    }

    #[test]
    fn a_paused_loop_serves_nothing() {
        let events = EventLoop::new().expect("loop");
        let heard = Arc::new(Heard::default());
        let registration = events.register(heard.clone());
        let bell = bell();
        registration.add(&bell, 1, Interest::Read).expect("add");
        let paused = events.pause();
        bell.write(1).expect("ring");
        let thread = std::thread::spawn({
            let events = events.clone();
            move || events.run_once(1000)
        });
        assert!(heard.0.lock().expect("test").is_empty());
        drop(paused);
        thread.join().expect("no panic").expect("wait");
        assert_eq!(*heard.0.lock().expect("test"), [1]);
    }
}
