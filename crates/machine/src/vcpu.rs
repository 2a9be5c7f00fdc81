//! A vCPU's thread.

use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use ringfence_engine::EngineError;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_engine::panic_message;
use ringfence_memory::GuestRam;

use crate::MachineEnd;
use crate::lifecycle::Lifecycle;
use crate::report;

/// Runs a vCPU whenever the machine runs, until it ends.
pub(crate) fn run(index: u32, mut vcpu: Box<dyn Vcpu>, lifecycle: &Lifecycle, ram: &GuestRam) {
    let slot = usize::try_from(index).unwrap_or(usize::MAX);
    while lifecycle.wait_to_run(slot, &mut *vcpu) {
        if let Some(end) = run_once(index, &mut *vcpu, ram) {
            lifecycle.end(end);
        }
    }
}

/// Enters the guest; how the machine ends by that, if it does.
fn run_once(index: u32, vcpu: &mut dyn Vcpu, ram: &GuestRam) -> Option<MachineEnd> {
    // The vCPU isn't entered again after a panic: it is only looked at.
    let result = catch_unwind(AssertUnwindSafe(|| vcpu.run())).unwrap_or_else(|panic| {
        let text = format!("the monitor panicked: {}", panic_message(&*panic));
        Err(EngineError::Internal(text))
    });
    let why = match result {
        Ok(VcpuExit::Kicked) => return None,
        Ok(VcpuExit::Shutdown) => return Some(MachineEnd::Crash { vcpu: index }),
        // The board has interrupts, claims every address and sets no breakpoints: these exits are
        // an engine's mistake.
        Ok(exit @ (VcpuExit::Halt | VcpuExit::Io(_) | VcpuExit::Debug(_))) => {
            format!("vCPU {index} came back for no reason: {exit:?}")
        }
        Err(error) => describe(index, &error),
    };
    // What broke the engine may break its answers too.
    let report = catch_unwind(AssertUnwindSafe(|| report::of(vcpu, ram))).ok();
    Some(MachineEnd::Failed { why, report })
}

fn describe(index: u32, error: &EngineError) -> String {
    let mut text = format!("vCPU {index}: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
