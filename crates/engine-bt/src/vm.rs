//! A machine of this engine, and the engine traits.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;

use ringfence_bus::InterruptController;
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
use ringfence_memory::GuestRam;
use ringfence_memory::WriteWatcher;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::VcpuState;

use crate::clock::Clock;
use crate::code::CodeCache;
use crate::core::Core;
use crate::direct::Patches;
use crate::direct::Spawner;
use crate::features::guest_cpuid;
use crate::gate::Gates;
use crate::host::Host;
use crate::notes::Notes;
use crate::pages::Pages;
use crate::ram::Ram;
use crate::remote::Remote;
use crate::shared::DeviceWrites;
use crate::shared::Shared;
use crate::signal::Registration;
use crate::walk::Access;
use crate::window::Windows;

/// Most vCPUs a machine may have.
const MAX_VCPUS: u32 = 32;
/// Bytes of translated code that a machine keeps at most.
const CODE_BYTES: u32 = 64 << 20;
/// Host address space for windows, all vCPUs together: most of what a process has.
const WINDOW_SPACE: u64 = 80 << 40;
/// Address space of one window with its code table.
const WINDOW_BYTES: u64 = 5 << 38;
/// Windows that a vCPU has at most: Linux keeps six address spaces tagged.
const MAX_WINDOWS: u64 = 8;

/// Full virtualization by same-ISA binary translation.
#[derive(Debug)]
pub struct BtEngine {
    caps: EngineCaps,
    host: Host,
    cpuid: CpuidTable,
    perf_map: Option<File>,
    trace: Option<File>,
    code_bytes: u32,
    direct: Direct,
}

/// When user code runs directly on the processor, in a process of its own: see
/// [`BtEngine::with_direct`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direct {
    /// All code is translated.
    #[default]
    Never,
    /// Code that has used its vCPU for some time, as long as that pays.
    Earned,
    /// Wherever it is possible: for tests.
    Always,
}

impl BtEngine {
    /// The engine on this host.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] on a processor that lacks what the translator needs.
    pub fn new() -> Result<Self, EngineError> {
        let host = Host::detect();
        let cpuid = guest_cpuid(&host);
        Ok(Self {
            caps: EngineCaps {
                max_vcpus: MAX_VCPUS,
                interrupt_chips: InterruptChips::Board,
                doorbells: false,
                irq_events: false,
                dirty_log: true,
                unheard_writers: false,
                debug: true,
            },
            host,
            cpuid,
            perf_map: None,
            trace: None,
            code_bytes: CODE_BYTES,
            direct: Direct::default(),
        })
    }

    /// Keeps at most `bytes` of translated code; what more there is takes the place of the rest.
    #[must_use]
    pub fn with_code_limit(mut self, bytes: u32) -> Self {
        self.code_bytes = bytes;
        self
    }

    /// Has user code run directly. It takes whole programs from five to ten times the host's time to one
    /// or two.
    #[must_use]
    pub fn with_direct(mut self, direct: Direct) -> Self {
        self.direct = direct;
        self
    }

    /// Has `perf` told what translated code is where: `file` is `/tmp/perf-PID.map` of this
    /// process.
    #[must_use]
    pub fn with_perf_map(mut self, file: File) -> Self {
        self.perf_map = Some(file);
        self
    }

    /// Has every translation written to `file`, beside the guest's code that it stands for.
    #[must_use]
    pub fn with_trace(mut self, file: File) -> Self {
        self.trace = Some(file);
        self
    }
}

impl BtEngine {
    /// What direct execution needs; nothing where the host lacks it, and all code is translated.
    fn direct_parts(&self, ram: &GuestRam) -> Option<(Spawner, Patches)> {
        if self.direct == Direct::Never || !self.host.fsgsbase || !self.host.avx {
            return None;
        }
        let patches = Patches::new().ok()?;
        let spawner = Spawner::start(ram.file().as_raw_fd(), patches.file()).ok()?;
        Some((spawner, patches))
    }
}

impl Engine for BtEngine {
    fn name(&self) -> &'static str {
        "bt"
    }

    fn caps(&self) -> &EngineCaps {
        &self.caps
    }

    fn supported_cpuid(&self) -> Result<CpuidTable, EngineError> {
        Ok(self.cpuid.clone())
    }

    fn create_vm(&self, setup: VmSetup) -> Result<Box<dyn Vm>, EngineError> {
        if setup.vcpus == 0 || setup.vcpus > MAX_VCPUS {
            return Err(EngineError::Config(format!(
                "a machine has 1 to {MAX_VCPUS} vCPUs, not {}",
                setup.vcpus
            )));
        }
        let apics = match setup.interrupts {
            Interrupts::None => Vec::new(),
            Interrupts::Engine => return Err(EngineError::unsupported("interrupt chips")),
            Interrupts::Board(ref apics) if apics.len() == setup.vcpus as usize => apics.clone(),
            Interrupts::Board(apics) => {
                return Err(EngineError::Config(format!(
                    "{} local APICs for {} vCPUs",
                    apics.len(),
                    setup.vcpus
                )));
            }
        };
        let ram = Ram::new(&setup.ram);
        let notes = Arc::new(Notes::new(self.perf_map.as_ref(), self.trace.as_ref())?);
        let (spawner, patches) = self.direct_parts(&setup.ram).unzip();
        let code = CodeCache::new(self.code_bytes, self.host, Arc::clone(&notes))
            .map_err(EngineError::host("reserve the code cache"))?;
        let registration = Registration::new(code.range())
            .map_err(EngineError::host("handle the signals of translated code"))?;
        let shared = Arc::new(Shared {
            pages: Pages::new(&ram),
            ram,
            pio: setup.pio,
            mmio: setup.mmio,
            unclaimed: setup.unclaimed,
            host: self.host,
            gates: Gates::new(self.host.avx),
            code,
            clock: Clock::new(),
            remotes: (0..setup.vcpus).map(|_| OnceLock::new()).collect(),
            slow_writes: Mutex::new(()),
            dirty: crate::shared::DirtyLog::default(),
            spawner: spawner.map(Mutex::new),
            patches,
            notes,
            always_direct: self.direct == Direct::Always,
        });
        let watcher: Arc<dyn WriteWatcher> = Arc::new(DeviceWrites(Arc::downgrade(&shared)));
        setup.ram.set_watcher(&watcher);
        Ok(Box::new(BtVm {
            shared,
            apics,
            registration: Arc::new(registration),
        }))
    }
}

/// A machine.
struct BtVm {
    shared: Arc<Shared>,
    apics: Vec<Arc<dyn LocalApic>>,
    registration: Arc<Registration>,
}

impl BtVm {
    fn windows(&self) -> Result<Windows, EngineError> {
        let vcpus = self.shared.remotes.len() as u64;
        let slots = (WINDOW_SPACE / WINDOW_BYTES / vcpus).clamp(1, MAX_WINDOWS);
        let slots = usize::try_from(slots).unwrap_or(1);
        let code = &self.shared.code;
        Windows::new(slots, code.blocks_file(), code.miss_map()).map_err(EngineError::host(
            "reserve address space for the vCPU's windows",
        ))
    }
}

impl Vm for BtVm {
    fn create_vcpu(&self, index: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        let slot = self.shared.remotes.get(index as usize).ok_or_else(|| {
            EngineError::Config(format!(
                "vCPU {index} of a machine with {}",
                self.shared.remotes.len()
            ))
        })?;
        if slot.get().is_some() {
            return Err(EngineError::Config(format!(
                "vCPU {index} was made already"
            )));
        }
        let windows = self.windows()?;
        let remote = Arc::new(
            Remote::new(&windows).map_err(EngineError::host("map the vCPU's shared state"))?,
        );
        let apic = self.apics.get(index as usize).map(Arc::clone);
        if let Some(apic) = &apic {
            apic.connect(Arc::clone(&remote) as Arc<dyn VcpuWaker>);
        }
        let core = Core::new(
            Arc::clone(&self.shared),
            Arc::clone(&remote),
            windows,
            apic,
            cpuid,
            index,
        );
        if slot.set(remote).is_err() {
            return Err(EngineError::Config(format!(
                "vCPU {index} was made already"
            )));
        }
        Ok(Box::new(BtVcpu {
            core: Mutex::new(core),
            _registration: Arc::clone(&self.registration),
        }))
    }

    fn interrupts(&self) -> Option<Arc<dyn InterruptController>> {
        None
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        self.shared.set_dirty_log(on);
        Ok(())
    }

    fn take_dirty(&self, start: u64, pages: usize) -> Result<Vec<u64>, EngineError> {
        self.shared.take_dirty(start, pages)
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        Ok(self.shared.clock.now_ns())
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError> {
        self.shared.clock.set_ns(clock_ns);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters()
    }
}

/// A vCPU. The lock lets [`Vcpu::state`] take `&self`; nobody contends for it.
struct BtVcpu {
    core: Mutex<Box<Core>>,
    _registration: Arc<Registration>,
}

impl BtVcpu {
    fn core(&mut self) -> &mut Core {
        self.core
            .get_mut()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        self.core().run()
    }

    fn complete_read(&mut self, data: &[u8]) -> Result<(), EngineError> {
        self.core().complete_read(data)
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        let mut core = self
            .core
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(core.save())
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.core().load(state)
    }

    fn waker(&self) -> Arc<dyn VcpuWaker> {
        let core = self
            .core
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        core.waker()
    }

    fn set_debug(&mut self, single_step: bool, breakpoints: &[u64]) -> Result<(), EngineError> {
        let core = self.core();
        core.single_step = single_step;
        core.breakpoints = breakpoints.to_vec();
        core.mode_changed();
        Ok(())
    }

    fn translate(&self, address: u64) -> Result<Option<u64>, EngineError> {
        let core = self
            .core
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let found = core
            .paging()
            .translate(&core.shared.ram, address, Access::Read, false, false);
        Ok(found.ok().map(|found| found.gpa))
    }

    fn diagnosis(&self) -> String {
        self.core
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .diagnosis()
    }
}
