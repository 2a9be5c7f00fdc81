//! A vCPU's thread.

use ringfence_engine::EngineError;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;

use crate::MachineEnd;
use crate::lifecycle::Lifecycle;

/// Runs a vCPU whenever the machine runs, until it ends.
pub(crate) fn run(index: u32, mut vcpu: Box<dyn Vcpu>, lifecycle: &Lifecycle) {
    let slot = usize::try_from(index).unwrap_or(usize::MAX);
    while lifecycle.wait_to_run(slot, &mut *vcpu) {
        if let Some(end) = run_once(index, &mut *vcpu) {
            lifecycle.end(end);
        }
    }
}

/// Enters the guest; how the machine ends by that, if it does.
fn run_once(index: u32, vcpu: &mut dyn Vcpu) -> Option<MachineEnd> {
    match vcpu.run() {
        Ok(VcpuExit::Kicked) => None,
        Ok(VcpuExit::Shutdown) => Some(MachineEnd::Crash { vcpu: index }),
        // The board has interrupts, claims every address and sets no breakpoints: these exits are
        // an engine's mistake.
        Ok(exit @ (VcpuExit::Halt | VcpuExit::Io(_) | VcpuExit::Debug(_))) => Some(
            MachineEnd::Failed(format!("vCPU {index} came back for no reason: {exit:?}")),
        ),
        Err(error) => Some(MachineEnd::Failed(describe(index, &error))),
    }
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
