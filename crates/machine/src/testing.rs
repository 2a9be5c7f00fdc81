//! An engine without a processor, for tests of what stands on the engine seam: a vCPU "runs" a
//! function of the test's.

use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::InterruptController;
use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_engine::Engine;
use ringfence_engine::EngineCaps;
use ringfence_engine::EngineError;
use ringfence_engine::InterruptChips;
use ringfence_engine::Interrupts;
use ringfence_engine::LocalApic;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::VcpuWaker;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::VcpuState;

/// What a vCPU does each time that it is entered.
pub type Script = Arc<dyn Fn(&Processor) -> Result<VcpuExit, EngineError> + Send + Sync>;

/// An engine whose vCPUs follow a script. It takes the board's interrupt chips.
pub struct ScriptEngine {
    caps: EngineCaps,
    script: Script,
}

impl ScriptEngine {
    /// Runs `script` on every vCPU.
    #[must_use]
    pub fn new(script: Script) -> Self {
        Self {
            caps: EngineCaps {
                max_vcpus: 32,
                interrupt_chips: InterruptChips::Board,
                doorbells: false,
                irq_events: false,
                dirty_log: false,
                unheard_writers: false,
                debug: false,
            },
            script,
        }
    }

    /// vCPUs that wait, as in HLT, until they are kicked.
    #[must_use]
    pub fn idle() -> Self {
        Self::new(Arc::new(|processor| Ok(processor.wait_for_kick())))
    }
}

impl Engine for ScriptEngine {
    fn name(&self) -> &'static str {
        "script"
    }

    fn caps(&self) -> &EngineCaps {
        &self.caps
    }

    fn supported_cpuid(&self) -> Result<CpuidTable, EngineError> {
        Ok(CpuidTable::default())
    }

    fn create_vm(&self, setup: VmSetup) -> Result<Box<dyn Vm>, EngineError> {
        let Interrupts::Board(apics) = setup.interrupts else {
            return Err(EngineError::unsupported("interrupt chips of its own"));
        };
        Ok(Box::new(ScriptVm {
            pio: setup.pio,
            mmio: setup.mmio,
            apics,
            script: Arc::clone(&self.script),
        }))
    }
}

struct ScriptVm {
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    apics: Vec<Arc<dyn LocalApic>>,
    script: Script,
}

impl Vm for ScriptVm {
    fn create_vcpu(&self, index: u32, _: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let apic = usize::try_from(index)
            .ok()
            .and_then(|index| self.apics.get(index))
            .ok_or_else(|| EngineError::Config(format!("there is no vCPU {index}")))?;
        let signals = Arc::new(Signals::default());
        apic.connect(signals.clone());
        Ok(Box::new(ScriptVcpu {
            processor: Processor {
                index,
                pio: Arc::clone(&self.pio),
                mmio: Arc::clone(&self.mmio),
                apic: Arc::clone(apic),
                signals,
            },
            script: Arc::clone(&self.script),
            state: VcpuState::default(),
        }))
    }

    fn interrupts(&self) -> Option<Arc<dyn InterruptController>> {
        None
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        Ok(0)
    }

    fn set_clock_ns(&self, _: u64) -> Result<(), EngineError> {
        Ok(())
    }
}

/// Kicks and wakes on their way to a vCPU's thread.
#[derive(Debug, Default)]
struct Signals {
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    kicked: bool,
    woken: bool,
}

impl Signals {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, until: impl Fn(&mut Pending) -> bool) {
        let mut pending = self.pending();
        while !until(&mut pending) {
            pending = self
                .changed
                .wait(pending)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl VcpuWaker for Signals {
    fn wake(&self) {
        self.pending().woken = true;
        self.changed.notify_all();
    }

    fn kick(&self) {
        self.pending().kicked = true;
        self.changed.notify_all();
    }
}

/// A scripted vCPU's view of its machine.
pub struct Processor {
    /// Its number.
    pub index: u32,
    /// Port space.
    pub pio: Arc<PioBus>,
    /// Memory outside RAM.
    pub mmio: Arc<MmioBus>,
    /// Its local APIC.
    pub apic: Arc<dyn LocalApic>,
    signals: Arc<Signals>,
}

impl Processor {
    /// Waits until it is kicked, and takes the kick.
    #[must_use]
    pub fn wait_for_kick(&self) -> VcpuExit {
        self.signals
            .wait(|pending| std::mem::take(&mut pending.kicked));
        VcpuExit::Kicked
    }

    /// Waits as HLT does, until something wakes it or it is kicked (which isn't taken).
    pub fn halt(&self) {
        self.signals
            .wait(|pending| std::mem::take(&mut pending.woken) || pending.kicked);
    }
}

struct ScriptVcpu {
    processor: Processor,
    script: Script,
    state: VcpuState,
}

impl Vcpu for ScriptVcpu {
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        (self.script)(&self.processor)
    }

    fn complete_read(&mut self, _: &[u8]) -> Result<(), EngineError> {
        Err(EngineError::State("no read waits for data"))
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        Ok(self.state.clone())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }

    fn waker(&self) -> Arc<dyn VcpuWaker> {
        self.processor.signals.clone()
    }

    fn set_debug(&mut self, _: bool, _: &[u64]) -> Result<(), EngineError> {
        Err(EngineError::unsupported("single step and breakpoints"))
    }

    fn translate(&self, address: u64) -> Result<Option<u64>, EngineError> {
        Ok(Some(address))
    }
}
