//! The run loop: what happens between stretches of translated code.

use std::sync::Arc;

use ringfence_engine::ApicEvent;
use ringfence_engine::DebugStop;
use ringfence_engine::EngineError;
use ringfence_engine::VcpuExit;
use ringfence_x86::state::Activity;

use crate::core::Core;
use crate::core::Injected;
use crate::core::flag;
use crate::crash;
use crate::event::Source;
use crate::fault::Stop;
use crate::fault::vector;
use crate::remote::Remote;
use crate::remote::request;
use crate::signal::ThreadGuard;
use crate::signal::set_gs_base;

/// A vCPU that uses its tables: others wait for it to serve what they ask. However that ends, also
/// by a panic, they don't wait any longer.
struct Inside(Arc<Remote>);

impl Inside {
    fn new(remote: Arc<Remote>) -> Self {
        remote.set_inside(true);
        Self(remote)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        crash::note_vcpu(None);
        self.0.set_inside(false);
    }
}

impl Core {
    /// Enters generated code at host address `pc`.
    pub(crate) fn enter(&mut self, pc: u64) {
        self.sync_gs();
        let enter = self.shared.gates.enter;
        let core: *mut Self = self;
        // SAFETY: `pc` is in the code cache, GS leads to this vCPU's window, and this borrow isn't
        // used until the call returns: the gates get the vCPU by the pointer that is passed.
        #[expect(unsafe_code, reason = "switches to guest register state")]
        unsafe {
            enter(pc, core);
        }
    }

    /// Points GS at the current window.
    pub(crate) fn sync_gs(&mut self) {
        let base = self.windows.gs_base();
        if base != self.gs_base {
            set_gs_base(base, self.shared.host.fsgsbase);
            self.gs_base = base;
        }
    }

    /// Runs until something needs the monitor's caller.
    pub(crate) fn run(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(exit) = self.exits.pop_front() {
            return Ok(exit);
        }
        if self.replay.waiting.is_some() {
            return Err(EngineError::State("a read waits for its data"));
        }
        self.on_this_thread(Self::run_loop)
    }

    /// Does something that may run guest code, with the thread made ready for it.
    pub(crate) fn on_this_thread<T>(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let _guard = ThreadGuard::new().map_err(EngineError::host("set up a signal stack"))?;
        // Another vCPU may have used this thread meanwhile.
        self.gs_base = 0;
        self.sync_gs();
        self.load_fpu();
        let inside = Inside::new(Arc::clone(&self.remote));
        self.serve_awaited();
        crash::note_vcpu(Some(self.hot()));
        let result = body(self);
        drop(inside);
        self.save_fpu();
        result
    }

    fn run_loop(&mut self) -> Result<VcpuExit, EngineError> {
        loop {
            if let Some(exit) = self.serve_requests() {
                return Ok(exit);
            }
            let turn = self.turn();
            let turn = match turn {
                Err(Stop::Fault(fault)) => self.raise(fault),
                other => other,
            };
            match turn {
                Ok(()) => {}
                Err(Stop::Exit(exit)) => return Ok(exit),
                Err(Stop::Error(error)) => return Err(error),
                Err(Stop::Fault(fault)) => {
                    return Err(EngineError::Internal(format!("{fault:?} was not raised")));
                }
            }
            if let Some(result) = self.leaving.take() {
                return result;
            }
            if let Some(exit) = self.exits.pop_front() {
                return Ok(exit);
            }
        }
    }

    /// One stretch: events, then code.
    fn turn(&mut self) -> Result<(), Stop> {
        if !self.take_events()? {
            return Ok(());
        }
        if self.shadow || self.step_once {
            self.step_once = false;
            return self.step_watched();
        }
        if self.mode.is_stepped() {
            return self.step_debugged();
        }
        if self.is_direct() {
            return self.run_direct();
        }
        let pc = self.lookup()?;
        if pc != 0 {
            self.enter(pc);
        }
        Ok(())
    }

    /// Serves what other threads asked for.
    fn serve_requests(&mut self) -> Option<VcpuExit> {
        if !self.remote.has_requests() {
            return None;
        }
        let (requests, receipt) = self.remote.take();
        self.serve(requests, receipt);
        self.maybe_interrupt |= requests & request::EVENT != 0;
        if requests & request::UNHALT != 0 {
            if self.activity == Activity::Halted {
                self.activity = Activity::Running;
            } else {
                self.unhalted = true;
            }
        }
        (requests & request::KICK != 0).then_some(VcpuExit::Kicked)
    }

    /// Delivers what waits. False when the vCPU isn't executing: it has slept.
    fn take_events(&mut self) -> Result<bool, Stop> {
        if let Some(injected) = self.injected.take() {
            match injected {
                Injected::Exception(fault) => self.raise(fault)?,
                Injected::Interrupt(number) => self.interrupt(number, Source::External)?,
            }
            return Ok(true);
        }
        if self.maybe_interrupt || self.apic_touched {
            self.apic_touched = false;
            self.take_apic_events();
            self.take_interrupt()?;
        }
        if self.nmi_pending && !self.nmi_masked && !self.shadow {
            self.nmi_pending = false;
            self.nmi_masked = true;
            self.activity = Activity::Running;
            self.interrupt(vector::NMI, Source::External)?;
        }
        if self.activity == Activity::Running {
            return Ok(true);
        }
        if self.apic.is_none() {
            // Nothing will ever wake it: that is the caller's business.
            self.activity = Activity::Running;
            return Err(Stop::Exit(VcpuExit::Halt));
        }
        self.wait();
        Ok(false)
    }

    /// Sleeps until another thread has something for this vCPU.
    fn wait(&mut self) {
        self.remote.set_inside(false);
        self.remote.sleep(None);
        self.remote.set_inside(true);
    }

    fn take_apic_events(&mut self) {
        let Some(apic) = self.apic.clone() else {
            return;
        };
        while let Some(event) = apic.take_event() {
            match event {
                ApicEvent::Init => self.reset_by_init(),
                ApicEvent::Sipi(page) => {
                    if self.activity == Activity::WaitForSipi {
                        self.start_at(page);
                    }
                }
                ApicEvent::Nmi => self.nmi_pending = true,
            }
        }
    }

    /// Delivers an interrupt from the APIC when it may be.
    fn take_interrupt(&mut self) -> Result<(), Stop> {
        let Some(apic) = self.apic.clone() else {
            self.maybe_interrupt = false;
            return Ok(());
        };
        let sleeping = matches!(
            self.activity,
            Activity::Uninitialized | Activity::WaitForSipi
        );
        if sleeping || !apic.has_interrupt() {
            self.maybe_interrupt = false;
            return Ok(());
        }
        if !self.has(flag::IF) || self.shadow {
            // Asked again when the flag changes: see the users of `maybe_interrupt`.
            return Ok(());
        }
        if let Some(number) = apic.acknowledge() {
            self.activity = Activity::Running;
            if self.is_user() {
                self.note_user_work();
            }
            self.remote.counters.interrupts.bump();
            self.interrupt(number, Source::External)?;
        }
        Ok(())
    }

    /// One instruction under a debugger, the guest's own or the monitor's.
    fn step_debugged(&mut self) -> Result<(), Stop> {
        let linear = self.linear_rip(self.rip);
        if self.resumed_at != Some(linear) {
            self.resumed_at = Some(linear);
            if self.breakpoints.contains(&linear) {
                return Err(Stop::Exit(VcpuExit::Debug(DebugStop::Breakpoint(linear))));
            }
        }
        self.check_instruction_breakpoints(linear)?;
        self.resumed_at = None;
        self.step_watched()?;
        let linear = self.linear_rip(self.rip);
        let stop = if self.breakpoints.contains(&linear) {
            self.resumed_at = Some(linear);
            DebugStop::Breakpoint(linear)
        } else if self.single_step {
            DebugStop::Step
        } else {
            return Ok(());
        };
        Err(Stop::Exit(VcpuExit::Debug(stop)))
    }

    /// Gives the read that the last exit asked for its data and completes the instruction.
    pub(crate) fn complete_read(&mut self, data: &[u8]) -> Result<(), EngineError> {
        match self.replay.waiting {
            None => return Err(EngineError::State("no read waits for data")),
            Some(len) if len != data.len() => {
                return Err(EngineError::State(
                    "the data has another length than the read",
                ));
            }
            Some(_) => {}
        }
        self.replay.waiting = None;
        self.replay.answers.push(data.to_vec());
        self.on_this_thread(|core| {
            let stepped = match core.step() {
                Err(Stop::Fault(fault)) => core.raise(fault),
                other => other,
            };
            match stepped {
                Ok(()) => Ok(()),
                Err(Stop::Exit(exit)) => {
                    core.exits.push_back(exit);
                    Ok(())
                }
                Err(Stop::Error(error)) => Err(error),
                Err(Stop::Fault(fault)) => {
                    Err(EngineError::Internal(format!("{fault:?} was not raised")))
                }
            }
        })
    }

    /// The waker that other threads use.
    pub(crate) fn waker(&self) -> Arc<dyn ringfence_engine::VcpuWaker> {
        Arc::clone(&self.remote) as Arc<dyn ringfence_engine::VcpuWaker>
    }
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;
    use std::panic::catch_unwind;

    use super::*;
    use crate::mapping::memory_file;
    use crate::window::BLOCKS_BYTES;
    use crate::window::Windows;

    #[test]
    fn nobody_waits_for_a_vcpu_that_panicked() {
        let blocks = memory_file(c"test-blocks", BLOCKS_BYTES as u64).expect("a file");
        let windows = Windows::new(1, &blocks, 0).expect("address space");
        let remote = Arc::new(Remote::new(&windows).expect("a mapping"));
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let _inside = Inside::new(Arc::clone(&remote));
            let ticket = remote.post_awaited(request::FLUSH_CODE);
            assert!(!remote.is_served(ticket));
            std::panic::panic_any(ticket);
        }));
        let ticket = outcome.expect_err("it panicked").downcast::<u64>();
        assert!(remote.is_served(*ticket.expect("by the number")));
    }
}
