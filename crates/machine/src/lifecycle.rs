//! What a machine is doing, and how its vCPU threads are held, let go and ended.

use std::fmt;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_chipset::PowerEvent;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuWaker;

use crate::MachineError;

/// What a machine is doing.
///
/// ```text
///              start                pause
///   Created ──────────► Running ◄──────────► Paused
///                          │        resume      │
///                          ▼                    ▼
///                        Ended ◄────────────────┘
/// ```
/// A machine ends by itself (power-off, reset, crash) or by [`Machine::stop`](crate::Machine::stop),
/// once; it doesn't start again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Its vCPUs have not run yet.
    Created,
    /// They run.
    Running,
    /// They are held outside the guest.
    Paused,
    /// They have ended or are about to.
    Ended,
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended => "ended",
        })
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The guest turned it off.
    PowerOff,
    /// The guest reset it.
    Reset,
    /// The guest's kernel panicked, and said so.
    Panic,
    /// A processor shut down (triple fault), which resets a PC.
    Crash {
        /// Which one.
        vcpu: u32,
    },
    /// It was stopped from outside.
    Stopped,
    /// It could not go on: the engine or the host failed it.
    Failed {
        /// Why.
        why: String,
        /// The guest's state, for whoever mends the engine.
        report: Option<String>,
    },
}

/// What a machine's owner is told while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest's kernel panicked and goes on in a crash kernel.
    CrashKernel,
    /// It ended: the last event.
    Ended(MachineEnd),
}

/// What is wanted of the vCPU threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Hold,
    End,
}

type Request = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;
type Observer = Box<dyn Fn(MachineEvent) + Send + Sync>;

struct Threads {
    wanted: Wanted,
    started: bool,
    /// vCPU threads that are outside the guest, waiting here.
    held: u32,
    /// vCPU threads there are.
    alive: u32,
    /// Work for held vCPUs, by index.
    requests: Vec<Option<Request>>,
    wakers: Vec<Arc<dyn VcpuWaker>>,
    end: Option<MachineEnd>,
}

/// A vCPU thread's place in the count, from before the thread begins until it is gone.
#[derive(Debug)]
pub(crate) struct Membership(Arc<Lifecycle>);

impl Drop for Membership {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // So that nobody waits for a machine that can't go on.
            self.0.end(MachineEnd::Failed {
                why: "a vCPU thread panicked".to_owned(),
                report: None,
            });
        }
        self.0.threads().alive -= 1;
        self.0.changed.notify_all();
    }
}

/// The meeting point of the vCPU threads and of whoever drives the machine.
pub(crate) struct Lifecycle {
    threads: Mutex<Threads>,
    changed: Condvar,
    observer: Observer,
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lifecycle").field(&self.state()).finish()
    }
}

impl Lifecycle {
    pub(crate) fn new(observer: Observer) -> Arc<Self> {
        Arc::new(Self {
            threads: Mutex::new(Threads {
                wanted: Wanted::Hold,
                started: false,
                held: 0,
                alive: 0,
                requests: Vec::new(),
                wakers: Vec::new(),
                end: None,
            }),
            changed: Condvar::new(),
            observer,
        })
    }

    fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, threads: MutexGuard<'a, Threads>) -> MutexGuard<'a, Threads> {
        self.changed
            .wait(threads)
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> MachineState {
        let threads = self.threads();
        match threads.wanted {
            Wanted::End => MachineState::Ended,
            _ if !threads.started => MachineState::Created,
            Wanted::Run => MachineState::Running,
            Wanted::Hold => MachineState::Paused,
        }
    }

    fn refuse(&self, action: &'static str) -> MachineError {
        MachineError::State {
            action,
            state: self.state(),
        }
    }

    /// Counts a vCPU thread in, until the membership is dropped. It is held until the machine
    /// starts.
    pub(crate) fn join(self: &Arc<Self>, waker: Arc<dyn VcpuWaker>) -> Membership {
        let mut threads = self.threads();
        threads.wakers.push(waker);
        threads.requests.push(None);
        threads.alive += 1;
        Membership(Arc::clone(self))
    }

    /// Holds the calling vCPU thread until its vCPU may run (`true`) or the machine ends. Serves
    /// what is asked of the vCPU meanwhile.
    pub(crate) fn wait_to_run(&self, index: usize, vcpu: &mut dyn Vcpu) -> bool {
        let mut threads = self.threads();
        if threads.wanted == Wanted::Run {
            return true;
        }
        threads.held += 1;
        self.changed.notify_all();
        loop {
            let request = threads.requests.get_mut(index).and_then(Option::take);
            if let Some(request) = request {
                self.changed.notify_all();
                drop(threads);
                request(vcpu);
                threads = self.threads();
            } else if threads.wanted == Wanted::Hold {
                threads = self.wait(threads);
            } else {
                threads.held -= 1;
                return threads.wanted == Wanted::Run;
            }
        }
    }

    pub(crate) fn start(&self) -> Result<(), MachineError> {
        let mut threads = self.threads();
        if threads.started || threads.wanted == Wanted::End {
            drop(threads);
            return Err(self.refuse("start"));
        }
        threads.started = true;
        threads.wanted = Wanted::Run;
        self.changed.notify_all();
        Ok(())
    }

    /// Holds every vCPU; returns when all are outside the guest.
    pub(crate) fn pause(&self) -> Result<(), MachineError> {
        let mut threads = self.threads();
        if !threads.started || threads.wanted == Wanted::End {
            drop(threads);
            return Err(self.refuse("pause"));
        }
        threads.wanted = Wanted::Hold;
        if threads.held < threads.alive {
            threads.wakers.iter().for_each(|waker| waker.kick());
        }
        while threads.wanted == Wanted::Hold && threads.held < threads.alive {
            threads = self.wait(threads);
        }
        if threads.wanted == Wanted::Hold {
            return Ok(());
        }
        drop(threads);
        Err(self.refuse("pause"))
    }

    pub(crate) fn resume(&self) -> Result<(), MachineError> {
        let mut threads = self.threads();
        if !threads.started || threads.wanted == Wanted::End {
            drop(threads);
            return Err(self.refuse("resume"));
        }
        threads.wanted = Wanted::Run;
        self.changed.notify_all();
        Ok(())
    }

    /// Lets the thread of a held vCPU do `work` on it and returns the result.
    pub(crate) fn with_vcpu<T: Send + 'static>(
        &self,
        index: u32,
        work: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Result<T, MachineError> {
        let (send, receive) = std::sync::mpsc::sync_channel(1);
        let mut threads = self.threads();
        if threads.wanted != Wanted::Hold {
            drop(threads);
            return Err(self.refuse("look into the vCPUs of"));
        }
        let vcpus = u32::try_from(threads.requests.len()).unwrap_or(u32::MAX);
        let slot = usize::try_from(index).unwrap_or(usize::MAX);
        if slot >= threads.requests.len() {
            return Err(MachineError::NoVcpu { index, vcpus });
        }
        // Another caller's work on the same vCPU comes first.
        while threads.requests[slot].is_some() && threads.wanted == Wanted::Hold {
            threads = self.wait(threads);
        }
        if threads.wanted != Wanted::Hold {
            drop(threads);
            return Err(self.refuse("look into the vCPUs of"));
        }
        // The receiver is gone only when this call gave up, which it doesn't before the answer.
        threads.requests[slot] = Some(Box::new(move |vcpu| drop(send.send(work(vcpu)))));
        self.changed.notify_all();
        drop(threads);
        // The channel closes without an answer when the machine ends before the thread's turn.
        receive
            .recv()
            .map_err(|_| self.refuse("look into the vCPUs of"))
    }

    /// Ends the machine, if nothing has yet. From any thread, vCPUs' too.
    pub(crate) fn end(&self, end: MachineEnd) {
        let mut threads = self.threads();
        if threads.end.is_some() {
            return;
        }
        threads.end = Some(end.clone());
        threads.wanted = Wanted::End;
        threads.wakers.iter().for_each(|waker| waker.kick());
        for request in &mut threads.requests {
            request.take();
        }
        self.changed.notify_all();
        drop(threads);
        (self.observer)(MachineEvent::Ended(end));
    }

    /// What the guest does to the machine as a whole.
    pub(crate) fn power_event(&self, event: PowerEvent) {
        match event {
            PowerEvent::PowerOff => self.end(MachineEnd::PowerOff),
            PowerEvent::Reset => self.end(MachineEnd::Reset),
            PowerEvent::Panic => self.end(MachineEnd::Panic),
            PowerEvent::CrashKernel => (self.observer)(MachineEvent::CrashKernel),
        }
    }

    /// Waits until the machine has ended and every vCPU thread is done with the guest.
    pub(crate) fn wait_for_end(&self) -> MachineEnd {
        let mut threads = self.threads();
        loop {
            if let Some(end) = &threads.end
                && threads.alive == 0
            {
                return end.clone();
            }
            threads = self.wait(threads);
        }
    }
}
