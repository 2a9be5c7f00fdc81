//! One vCPU: the loop around KVM_RUN.
//!
//! ```text
//!          ┌────────────── serve the access under way ◄─────────────┐
//!   run ──►│ unclaimed? ──► Io exit (a write completes first)       │ access
//!          ▼                                                        │
//!        KVM_RUN ──► halt, shutdown, debug stop ──► exit            │
//!          │  └──────────────────────────────────────────────────────┘
//!          └─ interrupted ──► kicked? ──► Kicked exit, else again
//! ```
//! KVM completes an access at the next KVM_RUN (§5), so a kick is looked at after the call only:
//! by then nothing is half done, and the state can be read.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::CpuId;
use kvm_bindings::KVM_EXIT_DEBUG;
use kvm_bindings::KVM_EXIT_FAIL_ENTRY;
use kvm_bindings::KVM_EXIT_HLT;
use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_bindings::KVM_EXIT_INTR;
use kvm_bindings::KVM_EXIT_IO;
use kvm_bindings::KVM_EXIT_IRQ_WINDOW_OPEN;
use kvm_bindings::KVM_EXIT_MMIO;
use kvm_bindings::KVM_EXIT_SET_TPR;
use kvm_bindings::KVM_EXIT_SHUTDOWN;
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use ringfence_engine::EngineError;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::VcpuWaker;
use ringfence_x86::cpuid::CpuidTable;

use ringfence_x86::state::VcpuState;

use crate::cpuid;
use crate::debug::Debugger;
use crate::io::PendingAccess;
use crate::kick::Entered;
use crate::kick::Kick;
use crate::run_page::RunPage;
use crate::state;
use crate::vm::Shared;

/// A vCPU of the `kvm` engine.
pub(crate) struct KvmVcpu {
    // Dropped in this order: the mapping (in `fd`), then the memory that the guest uses.
    fd: VcpuFd,
    page: RunPage,
    shared: Arc<Shared>,
    kick: Arc<Kick>,
    index: u32,
    debugger: Debugger,
    access: Option<PendingAccess>,
    /// The page holds an exit that came while an instruction was being completed.
    unserved: bool,
}

/// How KVM_RUN came back.
enum Entry {
    Interrupted,
    Exit,
}

impl KvmVcpu {
    pub(crate) fn new(
        vm: &VmFd,
        index: u32,
        cpuid: &CpuidTable,
        shared: &Arc<Shared>,
    ) -> Result<Self, EngineError> {
        let mut fd = vm
            .create_vcpu(u64::from(index))
            .map_err(|errno| EngineError::host("create a vCPU in KVM")(errno.into()))?;
        let entries = CpuId::from_entries(&cpuid::entries(cpuid)).map_err(|error| {
            EngineError::Config(format!("the CPUID table is unusable: {error}"))
        })?;
        fd.set_cpuid2(&entries)
            .map_err(|errno| EngineError::host("give a vCPU its CPUID")(errno.into()))?;
        let page = RunPage::new(&mut fd, vm.run_size());
        Ok(Self {
            fd,
            page,
            shared: Arc::clone(shared),
            kick: Arc::default(),
            index,
            debugger: Debugger::default(),
            access: None,
            unserved: false,
        })
    }

    /// One KVM_RUN.
    fn enter(&mut self) -> Result<Entry, EngineError> {
        match self.fd.run() {
            Ok(_) => Ok(Entry::Exit),
            // EAGAIN: an application processor got its INIT or SIPI and may be entered now.
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
                Ok(Entry::Interrupted)
            }
            Err(errno) => Err(EngineError::host("run a vCPU")(errno.into())),
        }
    }

    fn run_entered(&mut self, entered: &Entered<'_>) -> Result<VcpuExit, EngineError> {
        if !self.debugger.is_idle() && !self.unserved && self.access.is_none() {
            let pc = self.linear_pc()?;
            self.debugger.arm(&self.fd, pc)?;
        }
        loop {
            if let Some(exit) = self.serve(entered)? {
                return Ok(exit);
            }
            if !self.unserved
                && let Entry::Interrupted = self.enter()?
            {
                if entered.take() {
                    self.shared.counts.kicks.fetch_add(1, Ordering::Relaxed);
                    return Ok(VcpuExit::Kicked);
                }
                continue;
            }
            self.unserved = false;
            if let Some(exit) = self.dispatch()? {
                return Ok(exit);
            }
        }
    }

    /// Serves the access under way; returns an exit when the caller has to.
    fn serve(&mut self, entered: &Entered<'_>) -> Result<Option<VcpuExit>, EngineError> {
        let Some(mut access) = self.access.take() else {
            return Ok(None);
        };
        let exit = access.serve(&mut self.page, &self.shared);
        let unfinished = !access.is_done();
        if unfinished {
            self.access = Some(access);
        } else if exit.is_some() {
            self.complete_instruction(entered)?;
        }
        Ok(exit.map(VcpuExit::Io))
    }

    /// Lets KVM complete the instruction whose access was served, without entering the guest.
    fn complete_instruction(&mut self, entered: &Entered<'_>) -> Result<(), EngineError> {
        entered.hold();
        let entry = self.enter();
        entered.rearm();
        // An instruction with more to move, or a single step that ends here, exits once more.
        self.unserved = matches!(entry?, Entry::Exit);
        Ok(())
    }

    /// Acts on an exit; `None` to go on.
    fn dispatch(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        let counts = &self.shared.counts;
        match self.page.exit_reason() {
            KVM_EXIT_IO => self.access = Some(PendingAccess::new(self.page.pio()?)),
            KVM_EXIT_MMIO => self.access = Some(PendingAccess::new(self.page.mmio()?)),
            KVM_EXIT_HLT => {
                counts.halts.fetch_add(1, Ordering::Relaxed);
                return Ok(Some(VcpuExit::Halt));
            }
            KVM_EXIT_SHUTDOWN => return Ok(Some(VcpuExit::Shutdown)),
            KVM_EXIT_DEBUG => {
                let stop = self.debugger.stopped(&self.fd, self.page.debug_pc())?;
                counts.stops.fetch_add(1, Ordering::Relaxed);
                return Ok(stop.map(VcpuExit::Debug));
            }
            KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR => {}
            reason => return Err(self.failure(reason)),
        }
        Ok(None)
    }

    fn failure(&self, reason: u32) -> EngineError {
        let place = self.linear_pc().map_or_else(
            |error| format!("an unknown place ({error})"),
            |pc| format!("{pc:#x}"),
        );
        let index = self.index;
        match reason {
            KVM_EXIT_INTERNAL_ERROR => EngineError::Guest(format!(
                "KVM can't run the instruction of vCPU {index} at {place} (KVM_EXIT_INTERNAL_ERROR, sub-error {})",
                self.page.internal_error()
            )),
            KVM_EXIT_FAIL_ENTRY => EngineError::Guest(format!(
                "the processor refuses the state of vCPU {index} at {place} (KVM_EXIT_FAIL_ENTRY, reason {:#x})",
                self.page.fail_entry()
            )),
            other => EngineError::Internal(format!(
                "KVM returned from vCPU {index} at {place} for the unknown reason {other}"
            )),
        }
    }

    fn linear_pc(&self) -> Result<u64, EngineError> {
        let host = |errno: vmm_sys_util::errno::Error| {
            EngineError::host("read a vCPU's registers")(errno.into())
        };
        let rip = self.fd.get_regs().map_err(host)?.rip;
        let sregs = self.fd.get_sregs().map_err(host)?;
        // In 64-bit mode CS has no base (SDM 3A §3.2.4).
        Ok(
            if sregs.cs.l != 0 && sregs.efer & ringfence_x86::paging::EFER_LMA != 0 {
                rip
            } else {
                sregs.cs.base.wrapping_add(rip) & u64::from(u32::MAX)
            },
        )
    }

    /// Lets KVM finish whatever instruction is under way, with data that nobody will look at:
    /// KVM would else complete it after the next state was loaded.
    fn give_up(&mut self) -> Result<(), EngineError> {
        /// More than the parts of the widest access (64 bytes, 8 at a time).
        const MAX_PARTS: usize = 16;
        let was_under_way = self.access.take().is_some() || self.unserved;
        let kick = Arc::clone(&self.kick);
        let entered = kick.enter(self.page.immediate_exit());
        for _ in 0..MAX_PARTS {
            if !was_under_way {
                break;
            }
            self.complete_instruction(&entered)?;
            if !self.unserved {
                break;
            }
        }
        self.unserved = false;
        Ok(())
    }

    /// Arms processor breakpoints whether or not they fire here: to find out.
    pub(crate) fn try_breakpoint(&mut self, address: u64) -> Result<(), EngineError> {
        self.debugger.set(false, &[address], false)
    }

    fn waits(&self) -> bool {
        self.access.as_ref().is_some_and(|access| access.waits)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        if self.waits() {
            return Err(EngineError::State(
                "the guest waits for the data of a read: complete it first",
            ));
        }
        let kick = Arc::clone(&self.kick);
        let entered = kick.enter(self.page.immediate_exit());
        self.run_entered(&entered)
    }

    fn complete_read(&mut self, data: &[u8]) -> Result<(), EngineError> {
        let Some(mut access) = self.access.take_if(|access| access.waits) else {
            return Err(EngineError::State("no read waits for data"));
        };
        let result = access.complete(&mut self.page, data);
        if !access.is_done() {
            self.access = Some(access);
            return result;
        }
        let kick = Arc::clone(&self.kick);
        self.complete_instruction(&kick.enter(self.page.immediate_exit()))
    }

    fn state(&self) -> Result<VcpuState, EngineError> {
        state::save(&self.fd, &self.shared)
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        self.give_up()?;
        self.page.set_cr8(state.sregs.cr8);
        state::load(&self.fd, state, &self.shared)
    }

    fn waker(&self) -> Arc<dyn VcpuWaker> {
        Arc::clone(&self.kick) as Arc<dyn VcpuWaker>
    }

    fn set_debug(&mut self, single_step: bool, breakpoints: &[u64]) -> Result<(), EngineError> {
        if !self.shared.host.caps.debug {
            return Err(EngineError::unsupported("single step and breakpoints"));
        }
        let must_watch = !breakpoints.is_empty() && !self.shared.host.breakpoints_fire();
        self.debugger.set(single_step, breakpoints, must_watch)
    }

    fn translate(&self, address: u64) -> Result<Option<u64>, EngineError> {
        let translation = self
            .fd
            .translate_gva(address)
            .map_err(|errno| EngineError::host("translate a guest address")(errno.into()))?;
        Ok((translation.valid != 0).then_some(translation.physical_address))
    }
}
