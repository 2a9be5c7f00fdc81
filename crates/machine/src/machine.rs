//! A board whose threads run.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::mpsc;
use std::thread::JoinHandle;

use ringfence_engine::Vcpu;
use ringfence_x86::msr;
use ringfence_x86::state::VcpuState;

use crate::Board;
use crate::MachineEnd;
use crate::MachineError;
use crate::MachineState;
use crate::cpuid;
use crate::cpuid::Place;
use crate::vcpu;

/// What a thread is for: a jail gives each kind just what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs the vCPU of this number.
    Vcpu(u32),
    /// Serves the timers.
    Timers,
    /// Serves devices.
    Devices,
}

impl ThreadKind {
    fn name(self) -> String {
        match self {
            Self::Vcpu(index) => format!("vcpu{index}"),
            Self::Timers => "timers".to_owned(),
            Self::Devices => "devices".to_owned(),
        }
    }
}

/// Called by each thread before it does anything else; an error keeps the machine from starting.
pub type ThreadHook = Arc<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

/// MTRR default type (SDM 3A §12.11.2.1): on, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
/// LVT registers in the local APIC's page, and what firmware leaves there for the bootstrap
/// processor: the PIC by LINT0, NMIs by LINT1 (MP specification 1.4 §3.6.2.2).
const LINT0: (usize, u32) = (0x350, 0x700);
const LINT1: (usize, u32) = (0x360, 0x400);

/// A running machine. Dropping it ends it and waits for its threads.
pub struct Machine {
    board: Arc<Board>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Machine").field(&self.board).finish()
    }
}

/// Starts threads and hears whether they could begin.
struct Spawner {
    hook: ThreadHook,
    ready: mpsc::Sender<io::Result<()>>,
    begun: mpsc::Receiver<io::Result<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Spawner {
    fn new(hook: ThreadHook) -> Self {
        let (ready, begun) = mpsc::channel();
        Self {
            hook,
            ready,
            begun,
            threads: Vec::new(),
        }
    }

    fn spawn(
        &mut self,
        kind: ThreadKind,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), MachineError> {
        let (hook, ready) = (Arc::clone(&self.hook), self.ready.clone());
        let thread = std::thread::Builder::new()
            .name(kind.name())
            .spawn(move || {
                let begun = hook(kind);
                let goes_on = begun.is_ok();
                // The receiver is gone only when the start was given up.
                let _ = ready.send(begun);
                if goes_on {
                    body();
                }
            })
            .map_err(MachineError::host("start a thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until every thread has begun.
    fn finish(&mut self) -> Result<(), MachineError> {
        for _ in 0..self.threads.len() {
            let begun = self
                .begun
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("a thread ended before it began")));
            begun.map_err(MachineError::host("prepare a thread"))?;
        }
        Ok(())
    }
}

impl Machine {
    /// Makes the vCPUs, the first with `state`, and lets them run.
    ///
    /// # Errors
    /// [`MachineError`] when the engine or the host refuses something; no thread is left then.
    pub fn start(board: Board, state: &VcpuState, hook: ThreadHook) -> Result<Self, MachineError> {
        let machine = Self {
            board: Arc::new(board),
            threads: Mutex::default(),
        };
        let mut spawner = Spawner::new(hook);
        let result = machine.start_threads(state, &mut spawner);
        // From here on, dropping the machine ends and joins them.
        *machine
            .threads
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut spawner.threads);
        result?;
        Ok(machine)
    }

    fn start_threads(&self, state: &VcpuState, spawner: &mut Spawner) -> Result<(), MachineError> {
        let board = &self.board;
        let fail = {
            let lifecycle = Arc::clone(&board.lifecycle);
            move |what: &str, result: io::Result<()>| {
                if let Err(error) = result {
                    lifecycle.end(MachineEnd::Failed {
                        why: format!("{what}: {error}"),
                        report: None,
                    });
                }
            }
        };
        let (timers, failed) = (Arc::clone(&board.timers), fail.clone());
        spawner.spawn(ThreadKind::Timers, move || {
            failed("the timer thread failed", timers.run());
        })?;
        let events = Arc::clone(&board.events);
        spawner.spawn(ThreadKind::Devices, move || {
            fail("the device thread failed", events.run());
        })?;
        for index in 0..board.vcpus {
            let vcpu = make_vcpu(board, index, state)?;
            let member = board.lifecycle.join(vcpu.waker());
            let lifecycle = Arc::clone(&board.lifecycle);
            let ram = board.ram().clone();
            spawner.spawn(ThreadKind::Vcpu(index), move || {
                let _member = member;
                vcpu::run(index, vcpu, &lifecycle, &ram);
            })?;
        }
        spawner.finish()?;
        board.lifecycle.start()
    }

    /// The hardware.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// What the machine is doing.
    #[must_use]
    pub fn state(&self) -> MachineState {
        self.board.lifecycle.state()
    }

    /// Holds the vCPUs; returns when all are outside the guest. Devices go on serving what was
    /// asked of them.
    ///
    /// # Errors
    /// [`MachineError::State`] when it has ended.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.board.lifecycle.pause()
    }

    /// Ends [`Self::pause`]; harmless when it runs.
    ///
    /// # Errors
    /// [`MachineError::State`] when it has ended.
    pub fn resume(&self) -> Result<(), MachineError> {
        self.board.lifecycle.resume()
    }

    /// Does `work` on a vCPU of a paused machine, on that vCPU's own thread.
    ///
    /// # Errors
    /// [`MachineError::State`] unless it is paused, [`MachineError::NoVcpu`].
    pub fn with_vcpu<T: Send + 'static>(
        &self,
        index: u32,
        work: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Result<T, MachineError> {
        self.board.lifecycle.with_vcpu(index, work)
    }

    /// Ends the machine at once, as pulling the plug does.
    pub fn stop(&self) {
        self.board.lifecycle.end(MachineEnd::Stopped);
    }

    /// Waits until the machine has ended by itself or by [`Self::stop`].
    #[must_use]
    pub fn wait(&self) -> MachineEnd {
        self.board.lifecycle.wait_for_end()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        self.board.timers.stop();
        self.board.events.stop();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // One that panicked has ended the machine and said so.
            let _ = thread.join();
        }
        if let Some(output) = self.board.serial_output() {
            output.flush();
        }
    }
}

fn make_vcpu(board: &Board, index: u32, start: &VcpuState) -> Result<Box<dyn Vcpu>, MachineError> {
    let place = Place {
        index,
        vcpus: board.vcpus,
        tsc_hz: board.clock.frequency().hz,
    };
    let table = cpuid::complete(board.cpuid.clone(), place);
    let mut vcpu = board.vm.create_vcpu(index, table)?;
    if index == 0 {
        let reset = vcpu.state()?;
        vcpu.set_state(&first_state(reset, start))?;
    }
    Ok(vcpu)
}

/// The bootstrap processor as firmware would leave it: its reset state with `start` on top.
fn first_state(mut state: VcpuState, start: &VcpuState) -> VcpuState {
    let (apic_base, xcr0) = (state.sregs.apic_base, state.sregs.xcr0);
    state.regs = start.regs;
    state.sregs = start.sregs;
    state.sregs.apic_base = apic_base;
    state.sregs.xcr0 = xcr0;
    state.activity = start.activity;
    for (number, value) in &mut state.msrs {
        if *number == msr::IA32_MTRR_DEF_TYPE {
            *value = MTRR_WRITE_BACK;
        }
    }
    for (offset, value) in [LINT0, LINT1] {
        if let Some(register) = state.lapic.get_mut(offset..offset + 4) {
            register.copy_from_slice(&value.to_le_bytes());
        }
    }
    state
}
