//! The engine seam: what runs a machine's vCPUs, and why a vCPU came back.
//!
//! An engine is given RAM, the two buses and, where it has no interrupt chips of its own, the
//! board's local APICs. It runs guest code until something needs the monitor. Port and memory
//! accesses go to the buses from within [`Vcpu::run`], so an exit that a device serves costs no
//! return. The machine model, devices, boot and snapshot don't know which engine is running.
//!
//! Every engine passes one conformance suite (`ringfence-conformance`), with the same bodies.

#![forbid(unsafe_code)]

mod apic;
mod caps;
mod error;
mod exit;

use std::sync::Arc;

use ringfence_bus::InterruptController;
use ringfence_bus::MmioBus;
use ringfence_bus::MsiMessage;
use ringfence_bus::PioBus;
use ringfence_memory::GuestRam;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::VcpuState;
use vmm_sys_util::eventfd::EventFd;

pub use apic::{ApicEvent, ApicFault, LocalApic};
pub use caps::{EngineCaps, InterruptChips};
pub use error::{EngineError, ErrorKind, panic_message};
pub use exit::{DebugStop, IoAccess, IoDirection, IoSpace, VcpuExit};

/// A way to run vCPUs. One value a process; it makes machines.
pub trait Engine: Send + Sync {
    /// The name users choose it by.
    fn name(&self) -> &'static str;
    /// What it can do on this host. Asking for more is refused, never ignored.
    fn caps(&self) -> &EngineCaps;
    /// The CPUID leaves that a guest of this engine may be shown: what the engine runs, less what
    /// the project hides, with the paravirtual leaves (0x4000_0000 and 0x4000_0001) that the
    /// engine implements. The machine adds what depends on the board: topology and APIC ids.
    ///
    /// # Errors
    /// When the host can't be asked.
    fn supported_cpuid(&self) -> Result<CpuidTable, EngineError>;
    /// Makes an empty machine.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] or [`ErrorKind::Unsupported`] for a setup that this engine can't run;
    /// [`ErrorKind::Host`] when the host refuses.
    fn create_vm(&self, setup: VmSetup) -> Result<Box<dyn Vm>, EngineError>;
}

/// What a machine is made of, as the engine needs it.
#[derive(Debug)]
pub struct VmSetup {
    /// The RAM.
    pub ram: GuestRam,
    /// Port space.
    pub pio: Arc<PioBus>,
    /// Memory space outside RAM.
    pub mmio: Arc<MmioBus>,
    /// Number of vCPUs, 1 to [`EngineCaps::max_vcpus`].
    pub vcpus: u32,
    /// Where interrupts come from.
    pub interrupts: Interrupts,
    /// What happens at an address that no device claims.
    pub unclaimed: Unclaimed,
}

/// Where a machine's interrupts come from.
pub enum Interrupts {
    /// None: HLT returns [`VcpuExit::Halt`]. For bare guests driven by the caller.
    None,
    /// The engine's own chips ([`InterruptChips::Engine`]): see [`Vm::interrupts`].
    Engine,
    /// The board's chips ([`InterruptChips::Board`]): one local APIC a vCPU.
    Board(Vec<Arc<dyn LocalApic>>),
}

impl std::fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Engine => "Engine",
            Self::Board(_) => "Board",
        })
    }
}

/// What an access that no device claims does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unclaimed {
    /// A PC's floating bus: reads as ones, writes are lost.
    #[default]
    Float,
    /// [`Vcpu::run`] returns [`VcpuExit::Io`].
    Exit,
}

/// A write that wakes a device worker without a bus access (KVM's ioeventfd).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Port or memory.
    pub space: IoSpace,
    /// First address of the register.
    pub address: u64,
    /// Width in bytes: 1, 2, 4 or 8; 0 for any.
    pub width: u8,
    /// Only this value rings, when given.
    pub value: Option<u64>,
}

/// One machine in an engine.
pub trait Vm: Send + Sync {
    /// Makes vCPU `index` (its APIC id too) that answers CPUID from `cpuid`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for an index past [`VmSetup::vcpus`] or made already.
    fn create_vcpu(&self, index: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError>;

    /// The engine's interrupt chips; `None` unless set up with [`Interrupts::Engine`].
    fn interrupts(&self) -> Option<Arc<dyn InterruptController>>;

    /// Rings `event` at guest writes to `doorbell`, without a bus access.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`EngineCaps::doorbells`]: the bus write reaches the
    /// device then, which does the same itself.
    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<(), EngineError> {
        let _ = (doorbell, event);
        Err(EngineError::unsupported("doorbells"))
    }

    /// Ends [`Self::add_doorbell`].
    ///
    /// # Errors
    /// As for adding, or when there is no such doorbell.
    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<(), EngineError> {
        let _ = (doorbell, event);
        Err(EngineError::unsupported("doorbells"))
    }

    /// Delivers `message` whenever `event` is signalled (KVM's irqfd), for back ends outside the
    /// process. A second call with the same descriptor replaces the message (the guest rewrote
    /// its MSI-X table); `None` ends the delivery and may be repeated.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`EngineCaps::irq_events`]; [`ErrorKind::State`] in a
    /// machine without the engine's interrupt chips; [`ErrorKind::Host`] when the host refuses.
    fn set_irq_event(
        &self,
        event: &EventFd,
        message: Option<MsiMessage>,
    ) -> Result<(), EngineError> {
        let _ = (event, message);
        Err(EngineError::unsupported("interrupt events"))
    }

    /// Starts (empty) or stops the log that [`Self::take_dirty`] reads.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`EngineCaps::dirty_log`].
    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        let _ = on;
        Err(EngineError::unsupported("a dirty page log"))
    }

    /// Pages the vCPUs wrote since the last call for these pages, one bit a page from guest
    /// address `start` on (bit `n % 64` of word `n / 64` is page `n`). Pages outside RAM are
    /// clean; pages that were only read may count as written. The devices' own writes are in the
    /// RAM's page trackers.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`EngineCaps::dirty_log`]; [`ErrorKind::State`] while
    /// the log is off; [`ErrorKind::Config`] for a `start` inside a page.
    fn take_dirty(&self, start: u64, pages: usize) -> Result<Vec<u64>, EngineError> {
        let _ = (start, pages);
        Err(EngineError::unsupported("a dirty page log"))
    }

    /// The machine clock in nanoseconds since boot (KVM's paravirtual clock).
    ///
    /// # Errors
    /// [`ErrorKind::Host`] when the host refuses.
    fn clock_ns(&self) -> Result<u64, EngineError>;

    /// Sets [`Self::clock_ns`], on restore.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] when the host refuses.
    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError>;

    /// Live counters for `ringfence stats --engine-counters`: name and value, in display order.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Wakes a vCPU from any thread: [`Vcpu::run`] looks at its events, or returns
/// [`VcpuExit::Kicked`] when a stop was asked for.
pub trait VcpuWaker: Send + Sync {
    /// An interrupt or APIC event waits; cheap, never blocks, may be called at any time.
    fn wake(&self);
    /// The current or next [`Vcpu::run`] returns [`VcpuExit::Kicked`] as soon as it can.
    fn kick(&self);
}

/// One virtual CPU, driven by the thread that holds it.
pub trait Vcpu: Send {
    /// Runs until something needs the monitor. HLT blocks inside when the machine has interrupts.
    ///
    /// After [`VcpuExit::Io`] with a write, the instruction is complete; with a read, it completes
    /// in [`Self::complete_read`]. One instruction may exit more than once (string I/O, wide
    /// accesses). After [`VcpuExit::Shutdown`] the state is undefined until it is set.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while a read waits for [`Self::complete_read`]; else
    /// [`ErrorKind::Host`], [`ErrorKind::Internal`], or [`ErrorKind::Guest`] for code that this
    /// engine can't run where a processor would (it names the place). What a processor defines
    /// is never an error.
    fn run(&mut self) -> Result<VcpuExit, EngineError>;

    /// Gives the value for the read that the last [`VcpuExit::Io`] asked for.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when no read is pending or the length differs.
    fn complete_read(&mut self, data: &[u8]) -> Result<(), EngineError>;

    /// Reads the state. The vCPU isn't running (the caller holds it).
    ///
    /// # Errors
    /// [`ErrorKind::Host`] when the host refuses.
    fn state(&self) -> Result<VcpuState, EngineError>;

    /// Replaces the state. An empty `xsave`, `msrs` or `lapic` leaves what is there; an MSR that
    /// isn't listed keeps its value. A read that waits for [`Self::complete_read`] is given up.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a state that this vCPU can't have.
    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError>;

    /// Its waker.
    fn waker(&self) -> Arc<dyn VcpuWaker>;

    /// Stops after each instruction ([`VcpuExit::Debug`]) while `on`, and at the given guest
    /// virtual addresses in any case.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] unless [`EngineCaps::debug`]; [`ErrorKind::Config`] for more
    /// breakpoints than the engine has.
    fn set_debug(&mut self, single_step: bool, breakpoints: &[u64]) -> Result<(), EngineError>;

    /// Translates a guest virtual address as the vCPU would now, permissions aside. Accessed bits
    /// may be set, as a processor's own speculation may at any time; nothing else changes.
    ///
    /// # Errors
    /// [`ErrorKind::Host`] when the host refuses.
    fn translate(&self, address: u64) -> Result<Option<u64>, EngineError>;

    /// What the engine knows beyond [`Self::state`], for the report of a bug in it.
    fn diagnosis(&self) -> String {
        String::new()
    }
}
