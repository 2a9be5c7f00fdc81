//! System call filters: what isn't listed kills the process.

use std::collections::BTreeMap;
use std::io;

use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompFilter;
use seccompiler::TargetArch;

use super::Layer;
use super::calls::Rules;

/// Whether the kernel filters.
pub(super) fn available() -> Layer {
    match program(Rules::default()) {
        Ok(_) => Layer::On,
        Err(error) => Layer::Off(error.to_string()),
    }
}

fn program(rules: Rules) -> Result<BpfProgram, seccompiler::BackendError> {
    let allowed: BTreeMap<_, _> = rules.0;
    SeccompFilter::new(
        allowed,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Holds the calling thread to these calls from now on.
pub(super) fn apply(rules: Rules) -> io::Result<()> {
    let program = program(rules).map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}
