//! One vCPU: everything the monitor knows about it.
//!
//! A [`Core`] belongs to the thread that runs it. Other threads reach its [`Remote`] only.

// UNSAFETY: reaches the state that generated code shares.
#![expect(
    unsafe_code,
    reason = "Hot is a raw mapping shared with generated code"
)]

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;

use iced_x86::InstructionInfoFactory;
use ringfence_engine::EngineError;
use ringfence_engine::LocalApic;
use ringfence_engine::VcpuExit;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::ACCESS_DB;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::Activity;
use ringfence_x86::state::CS;
use ringfence_x86::state::SS;
use ringfence_x86::state::SystemRegisters;

use crate::gate::ARITHMETIC_FLAGS;
use crate::hot::Hot;
use crate::hot::Transition;
use crate::mode::Mode;
use crate::msr::Msrs;
use crate::remote::Remote;
use crate::shared::Shared;
use crate::walk::Paging;
use crate::window::Windows;

/// RFLAGS bits beyond the arithmetic ones.
pub(crate) mod flag {
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
    /// Always one.
    pub(crate) const ONE: u64 = 1 << 1;
}

/// One vCPU.
pub(crate) struct Core {
    hot: NonNull<Hot>,
    pub windows: Windows,
    pub shared: Arc<Shared>,
    pub remote: Arc<Remote>,
    pub apic: Option<Arc<dyn LocalApic>>,
    pub cpuid: CpuidTable,

    /// Instruction pointer; valid while Rust runs.
    pub rip: u64,
    /// Current privilege level.
    pub cpl: u8,
    pub sys: SystemRegisters,
    pub msrs: Msrs,
    /// What the translation of an instruction depends on besides its bytes.
    pub mode: Mode,
    pub activity: Activity,
    /// Another vCPU ended this one's next HLT.
    pub unhalted: bool,
    /// Interrupts are held off for one instruction.
    pub shadow: bool,
    pub nmi_pending: bool,
    pub nmi_masked: bool,
    /// An event that was being delivered when the state was saved.
    pub injected: Option<Injected>,
    /// An interrupt may wait in the APIC: set by the waker, cleared when it turns out not to.
    pub maybe_interrupt: bool,
    /// The guest told its APIC something that may concern this vCPU at once.
    pub apic_touched: bool,

    /// Guest x87 and vector state while the vCPU isn't entered, as XSAVE wrote it.
    pub xsave: Box<crate::fpu::XsaveArea>,
    /// Answers to reads that no device claims, and what is still to be read.
    pub replay: Replay,
    /// Exits that completed instructions left for the monitor.
    pub exits: VecDeque<VcpuExit>,
    /// Why the run loop must return, found during a dispatch.
    pub leaving: Option<Result<VcpuExit, EngineError>>,
    /// [`Self::refresh_fast_paths`] is due.
    pub fast_stale: bool,
    /// What a scratch instruction raised.
    pub scratch_fault: Option<crate::fault::Stop>,
    /// The next instruction isn't translated: it lies where code can't be.
    pub step_once: bool,
    /// This vCPU is emptying the code cache.
    pub clearing: bool,
    /// Direct execution, as far as it isn't its window's.
    pub direct: crate::direct::Visits,
    /// GS base that this thread has.
    pub gs_base: u64,
    /// Debugger's single step, and its breakpoints.
    pub single_step: bool,
    pub breakpoints: Vec<u64>,

    /// Where the debugger stopped: the breakpoint there is passed on resuming.
    pub resumed_at: Option<u64>,
    /// Data accesses of the current instruction, while the guest watches some.
    pub touched: Vec<crate::debug::Touched>,
    pub info: InstructionInfoFactory,
}

/// An event to deliver before the first instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Injected {
    Exception(crate::fault::Fault),
    Interrupt(u8),
}

/// Reads that the caller of `run` answers: the instruction starts over and takes these first.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    pub answers: Vec<Vec<u8>>,
    /// The next answer to take.
    pub next: usize,
    /// Length of the read that waits for an answer.
    pub waiting: Option<usize>,
}

// SAFETY: the pointer leads to a mapping that `windows` owns and only the owning thread uses it.
unsafe impl Send for Core {}

impl Core {
    pub(crate) fn new(
        shared: Arc<Shared>,
        remote: Arc<Remote>,
        windows: Windows,
        apic: Option<Arc<dyn LocalApic>>,
        cpuid: CpuidTable,
        index: u32,
    ) -> Box<Self> {
        let hot = windows.hot();
        let mut core = Box::new(Self {
            hot,
            windows,
            apic,
            cpuid,
            rip: 0,
            cpl: 0,
            sys: SystemRegisters::default(),
            msrs: Msrs::default(),
            mode: Mode::default(),
            activity: Activity::Running,
            unhalted: false,
            shadow: false,
            nmi_pending: false,
            nmi_masked: false,
            injected: None,
            maybe_interrupt: false,
            apic_touched: false,
            xsave: crate::fpu::XsaveArea::initial(),
            replay: Replay::default(),
            exits: VecDeque::new(),
            leaving: None,
            fast_stale: true,
            scratch_fault: None,
            step_once: false,
            clearing: false,
            direct: crate::direct::Visits::default(),
            gs_base: 0,
            single_step: false,
            breakpoints: Vec::new(),
            info: InstructionInfoFactory::new(),
            resumed_at: None,
            touched: Vec::new(),
            shared,
            remote,
        });
        core.init_hot();
        core.sys.xcr0 = 1;
        if let Some(apic) = &core.apic {
            let base = apic.read_msr(ringfence_x86::msr::IA32_APIC_BASE);
            core.sys.apic_base = base.unwrap_or(0);
        }
        core.reset_by_init();
        core.activity = if index == 0 {
            Activity::Running
        } else {
            Activity::Uninitialized
        };
        core
    }

    fn init_hot(&mut self) {
        let core = std::ptr::from_mut(self) as u64;
        let gates = self.shared.gates;
        let kernel = self.windows.code_kernel();
        let miss_map = self.shared.code.miss_map();
        let hot = self.hot_mut();
        hot.core = core;
        hot.miss_map = miss_map;
        hot.gates = gates.entry_points;
        hot.mask_user = crate::window::MASK_USER;
        hot.mask_kernel = crate::window::MASK_KERNEL;
        hot.code_kernel = kernel;
        hot.mxcsr = crate::fpu::MXCSR_DEFAULT;
        hot.host_mxcsr = crate::fpu::MXCSR_DEFAULT;
        hot.cross_address = std::ptr::from_ref(&hot.cross) as u64;
        self.remote.arm();
        self.set_if_poll();
    }

    /// Opens or closes the word that is touched where IF is set: an interrupt that waits must
    /// not wait longer than IF is clear.
    pub(crate) fn set_if_poll(&mut self) {
        let word = self.remote.if_poll(self.maybe_interrupt);
        self.hot_mut().if_poll = word;
    }

    /// The state shared with generated code.
    pub(crate) fn hot(&self) -> &Hot {
        // SAFETY: mapped as long as `windows`; generated code doesn't run while Rust does, and
        // the one field that other threads write is atomic.
        unsafe { self.hot.as_ref() }
    }

    /// As [`Self::hot`], to change it.
    pub(crate) fn hot_mut(&mut self) -> &mut Hot {
        // SAFETY: as in `hot`, and `self` is borrowed mutably.
        unsafe { self.hot.as_mut() }
    }

    /// Points the window-dependent fields at the current window.
    pub(crate) fn window_changed(&mut self) {
        let code = self.windows.code_user();
        self.hot_mut().code_user = code;
        self.fast_stale = true;
    }

    /// General register `index`.
    pub(crate) fn gpr(&self, index: usize) -> u64 {
        self.hot().gpr[index & 15]
    }

    pub(crate) fn set_gpr(&mut self, index: usize, value: u64) {
        self.hot_mut().gpr[index & 15] = value;
    }

    /// The whole of RFLAGS.
    pub(crate) fn rflags(&self) -> u64 {
        let hot = self.hot();
        (hot.flags & ARITHMETIC_FLAGS)
            | hot.interrupt_flag
            | hot.direction_flag
            | hot.other_flags
            | flag::ONE
    }

    /// Replaces RFLAGS (the caller has masked what may change).
    pub(crate) fn set_rflags(&mut self, value: u64) {
        const OTHER: u64 = flag::TF
            | flag::IOPL
            | flag::NT
            | flag::RF
            | flag::VM
            | flag::AC
            | flag::VIF
            | flag::VIP
            | flag::ID;
        let hot = self.hot_mut();
        hot.flags = value & ARITHMETIC_FLAGS;
        hot.interrupt_flag = value & flag::IF;
        hot.direction_flag = value & flag::DF;
        hot.other_flags = value & OTHER;
        self.mode_changed();
    }

    /// Whether a flag beyond the arithmetic ones is set.
    pub(crate) fn has(&self, flag: u64) -> bool {
        let hot = self.hot();
        (hot.interrupt_flag | hot.direction_flag | hot.other_flags) & flag != 0
    }

    /// Sets or clears IF, DF or RF, on which no mode depends.
    pub(crate) fn set(&mut self, flag: u64, on: bool) {
        let hot = self.hot_mut();
        let field = match flag {
            flag::IF => &mut hot.interrupt_flag,
            flag::DF => &mut hot.direction_flag,
            _ => &mut hot.other_flags,
        };
        *field = if on { *field | flag } else { *field & !flag };
    }

    /// Privilege field of RFLAGS.
    pub(crate) fn iopl(&self) -> u8 {
        ((self.hot().other_flags & flag::IOPL) >> 12) as u8
    }

    /// The registers that paging depends on.
    pub(crate) fn paging(&self) -> Paging {
        Paging {
            cr0: self.sys.cr0,
            cr3: self.sys.cr3,
            cr4: self.sys.cr4,
            efer: self.sys.efer,
        }
    }

    /// Data accesses of the current code are user accesses.
    pub(crate) fn is_user(&self) -> bool {
        self.cpl == 3
    }

    /// In 64-bit code.
    pub(crate) fn is_64bit(&self) -> bool {
        self.mode.bits() == 64
    }

    /// Applies what SYSCALL or SYSRET did in translated code.
    pub(crate) fn apply_transition(&mut self) {
        let transition = self.hot().transition;
        if transition == 0 {
            return;
        }
        self.hot_mut().transition = 0;
        if transition == Transition::Syscall as u64 {
            self.enter_syscall_segments();
        } else {
            self.enter_sysret_segments(true);
        }
    }

    /// Whether SYSCALL and SYSRET may be executed in translated code: they do what the monitor
    /// would, and both modes' code tables hold maps of the modes that they lead to.
    pub(crate) fn refresh_fast_paths(&mut self) {
        /// SYSCALL must clear all that translated code keeps apart.
        const CLEARED: u64 =
            ARITHMETIC_FLAGS | flag::TF | flag::IF | flag::DF | flag::RF | flag::NT;
        self.fast_stale = false;
        let enabled = self.is_long() && self.sys.efer & ringfence_x86::paging::EFER_SCE != 0;
        let kernel = Mode::of_level(self, 64, false);
        let user = Mode::of_level(self, 64, true);
        let syscall = enabled
            && self.msrs.sfmask & CLEARED == CLEARED
            && is_canonical(self.msrs.lstar)
            && !kernel.is_stepped()
            && self.windows.code_mode(false) == Some(kernel);
        let sysret = enabled
            && !user.is_stepped()
            && !self.windows.is_polluted()
            // The monitor takes such code to its space.
            && !self.earns_direct()
            && self.windows.code_mode(true) == Some(user);
        let (lstar, keep) = (self.msrs.lstar, !self.msrs.sfmask);
        let hot = self.hot_mut();
        hot.fast_syscall = u64::from(syscall);
        hot.fast_sysret = u64::from(sysret);
        hot.lstar = lstar;
        hot.syscall_keep = keep;
    }

    /// Recomputes [`Self::mode`] after a change of CS, CR0, CR4, EFER or RFLAGS.
    pub(crate) fn mode_changed(&mut self) {
        self.mode = Mode::of(self);
        self.fast_stale = true;
    }

    /// Width of stack operations: 2, 4 or 8 bytes of RSP are used.
    pub(crate) fn stack_bits(&self) -> u32 {
        if self.mode.bits() == 64 {
            64
        } else if self.sys.segments[SS].access & ACCESS_DB != 0 {
            32
        } else {
            16
        }
    }

    /// Address size of the code segment: 16, 32 or 64.
    pub(crate) fn code_bits(&self) -> u32 {
        let long = self.sys.efer & ringfence_x86::paging::EFER_LMA != 0;
        let access = self.sys.segments[CS].access;
        if long && access & ACCESS_L != 0 {
            64
        } else if access & ACCESS_DB != 0 {
            32
        } else {
            16
        }
    }

    /// Cuts an instruction pointer to the code size.
    pub(crate) fn wrap_rip(&self, rip: u64) -> u64 {
        match self.mode.bits() {
            64 => rip,
            32 => rip & 0xffff_ffff,
            _ => rip & 0xffff,
        }
    }

    /// Linear address of an instruction pointer.
    pub(crate) fn linear_rip(&self, rip: u64) -> u64 {
        if self.is_64bit() {
            rip
        } else {
            self.sys.segments[CS].base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// In real mode (protection off) or virtual-8086 mode.
    pub(crate) fn is_real(&self) -> bool {
        self.sys.cr0 & ringfence_x86::paging::CR0_PE == 0
    }
}

/// A 64-bit address is canonical when bits 63:47 are equal.
pub(crate) fn is_canonical(address: u64) -> bool {
    let sign = address.cast_signed() >> 47;
    sign == 0 || sign == -1
}
