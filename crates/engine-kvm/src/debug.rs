//! Single step and breakpoints (§4.87, KVM_SET_GUEST_DEBUG).
//!
//! Breakpoints are the processor's four. Three rules keep them exact:
//! - While stepping no breakpoint is armed; the address that a step reached is compared instead.
//! - A run that starts where the last one stopped first steps over that instruction, so that it
//!   isn't stopped at the same breakpoint again. Interrupts wait during that step.
//! - An ordinary run arms the breakpoints and nothing else.
//!
//! There are hosts (emulated ones) whose processors never raise a guest's breakpoints. There,
//! found out by a throw-away guest, a run with breakpoints steps through everything: slow, and
//! right.

use kvm_bindings::KVM_GUESTDBG_BLOCKIRQ;
use kvm_bindings::KVM_GUESTDBG_ENABLE;
use kvm_bindings::KVM_GUESTDBG_SINGLESTEP;
use kvm_bindings::KVM_GUESTDBG_USE_HW_BP;
use kvm_bindings::kvm_guest_debug;
use kvm_ioctls::VcpuFd;
use ringfence_engine::DebugStop;
use ringfence_engine::EngineError;

/// DR0 to DR3.
const MAX_BREAKPOINTS: usize = 4;
/// DR7 bit 10, which reads as one, and bit 9, exact matching (SDM 3B §17.2.4).
const DR7_FIXED: u64 = 0x600;

/// How KVM is set up at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Off,
    Breakpoints,
    /// By the caller's wish.
    Step,
    /// To get past a breakpoint.
    StepOver,
    /// In place of [`Self::Breakpoints`] where these don't fire.
    Watch,
}

/// A vCPU's debugger.
#[derive(Debug, Default)]
pub(crate) struct Debugger {
    step: bool,
    breakpoints: Vec<u64>,
    /// Where the last stop was, as a linear address.
    stopped_at: Option<u64>,
    mode: Mode,
    /// The processor's breakpoints don't fire here.
    must_watch: bool,
}

impl Debugger {
    /// See [`ringfence_engine::Vcpu::set_debug`].
    ///
    /// `must_watch` says that the processor's breakpoints don't fire on this host.
    pub(crate) fn set(
        &mut self,
        step: bool,
        breakpoints: &[u64],
        must_watch: bool,
    ) -> Result<(), EngineError> {
        if breakpoints.len() > MAX_BREAKPOINTS {
            return Err(EngineError::Config(format!(
                "the kvm engine has {MAX_BREAKPOINTS} breakpoints, the processor's own, not {}",
                breakpoints.len()
            )));
        }
        self.step = step;
        self.must_watch = must_watch;
        self.breakpoints = breakpoints.to_vec();
        Ok(())
    }

    /// Whether [`Self::arm`] needs to know where the vCPU is.
    pub(crate) fn is_idle(&self) -> bool {
        !self.step && self.breakpoints.is_empty() && self.mode == Mode::Off
    }

    /// Sets KVM up for a run that starts at linear address `pc`.
    pub(crate) fn arm(&mut self, fd: &VcpuFd, pc: u64) -> Result<(), EngineError> {
        let mode = if self.step {
            Mode::Step
        } else if self.must_watch && !self.breakpoints.is_empty() {
            Mode::Watch
        } else if self.stopped_at == Some(pc) && self.breakpoints.contains(&pc) {
            Mode::StepOver
        } else if self.breakpoints.is_empty() {
            Mode::Off
        } else {
            Mode::Breakpoints
        };
        self.stopped_at = None;
        self.apply(fd, mode)
    }

    /// What a KVM_EXIT_DEBUG before the instruction at `pc` means: a stop, or `None` to go on.
    pub(crate) fn stopped(
        &mut self,
        fd: &VcpuFd,
        pc: u64,
    ) -> Result<Option<DebugStop>, EngineError> {
        let at_breakpoint = self.breakpoints.contains(&pc);
        if self.mode == Mode::StepOver && !at_breakpoint {
            self.apply(fd, Mode::Breakpoints)?;
            return Ok(None);
        }
        if self.mode == Mode::Watch && !at_breakpoint {
            return Ok(None);
        }
        self.stopped_at = Some(pc);
        Ok(Some(if at_breakpoint {
            DebugStop::Breakpoint(pc)
        } else {
            DebugStop::Step
        }))
    }

    fn apply(&mut self, fd: &VcpuFd, mode: Mode) -> Result<(), EngineError> {
        let mut debug = kvm_guest_debug {
            control: match mode {
                Mode::Off => 0,
                Mode::Breakpoints => KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
                Mode::Step | Mode::Watch => KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
                Mode::StepOver => {
                    KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ
                }
            },
            ..Default::default()
        };
        if mode == Mode::Breakpoints {
            debug.arch.debugreg[7] = DR7_FIXED;
            for (index, &address) in self.breakpoints.iter().enumerate() {
                debug.arch.debugreg[index] = address;
                // Global enable; type and length zero: execution.
                debug.arch.debugreg[7] |= 0b10 << (index * 2);
            }
        }
        fd.set_guest_debug(&debug)
            .map_err(|errno| EngineError::host("set up KVM's guest debugging")(errno.into()))?;
        self.mode = mode;
        Ok(())
    }
}
