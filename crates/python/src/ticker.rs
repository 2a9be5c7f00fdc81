//! Kicks a running vCPU now and then, so that the thread that runs it can look at Python's
//! signals: a guest in an endless loop must not keep Ctrl-C away.

use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;

use ringfence_engine::VcpuWaker;

/// How long a signal may wait.
const PERIOD: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Running,
    Over,
}

struct Shared {
    phase: Mutex<Phase>,
    changed: Condvar,
}

/// One vCPU's ticker thread; it sleeps while the vCPU doesn't run.
pub(crate) struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Ticker {
    pub(crate) fn new(waker: Arc<dyn VcpuWaker>) -> Self {
        let shared = Arc::new(Shared {
            phase: Mutex::new(Phase::Idle),
            changed: Condvar::new(),
        });
        let seen = Arc::clone(&shared);
        Self {
            shared,
            thread: Some(std::thread::spawn(move || tick(&seen, waker.as_ref()))),
        }
    }

    /// Ticks while the guard lives.
    pub(crate) fn running(&self) -> Running<'_> {
        self.set(Phase::Running);
        Running(self)
    }

    fn set(&self, phase: Phase) {
        *self
            .shared
            .phase
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = phase;
        self.shared.changed.notify_all();
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.set(Phase::Over);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// See [`Ticker::running`].
pub(crate) struct Running<'a>(&'a Ticker);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(Phase::Idle);
    }
}

fn tick(shared: &Shared, waker: &dyn VcpuWaker) {
    let mut phase = shared.phase.lock().unwrap_or_else(PoisonError::into_inner);
    while *phase != Phase::Over {
        if *phase == Phase::Idle {
            phase = shared
                .changed
                .wait(phase)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let (next, waited) = shared
            .changed
            .wait_timeout(phase, PERIOD)
            .unwrap_or_else(PoisonError::into_inner);
        phase = next;
        if waited.timed_out() && *phase == Phase::Running {
            waker.kick();
        }
    }
}
