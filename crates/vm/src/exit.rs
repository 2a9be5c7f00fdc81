//! How the process says how its machine ended.

use std::process::ExitCode;

use ringfence_machine::MachineEnd;
use serde_json::Value;
use serde_json::json;

/// The process's exit status. Python's side mirrors the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// The guest turned the machine off.
    PowerOff = 0,
    /// The machine could not be started, for a reason on the host.
    NotStarted = 1,
    /// It could not be started as configured.
    BadConfig = 2,
    /// The guest reset it.
    Reboot = 10,
    /// The guest's kernel panicked.
    Panic = 11,
    /// A processor shut down.
    Crash = 12,
    /// It was ended from outside: by the control socket, or by its closing.
    Killed = 13,
    /// The engine or the host failed it.
    Failed = 14,
}

impl ExitStatus {
    /// The word for it in the last control event.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::PowerOff => "poweroff",
            Self::NotStarted | Self::BadConfig => "error",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::Crash => "crash",
            Self::Killed => "killed",
            Self::Failed => "failed",
        }
    }
}

impl From<&MachineEnd> for ExitStatus {
    fn from(end: &MachineEnd) -> Self {
        match end {
            MachineEnd::PowerOff => Self::PowerOff,
            MachineEnd::Reset => Self::Reboot,
            MachineEnd::Panic => Self::Panic,
            MachineEnd::Crash { .. } => Self::Crash,
            MachineEnd::Stopped => Self::Killed,
            MachineEnd::Failed { .. } => Self::Failed,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// The last control event.
pub(crate) fn event(end: &MachineEnd) -> Value {
    let mut event = json!({
        "event": "exit",
        "reason": ExitStatus::from(end).reason(),
        "message": message(end),
    });
    if let MachineEnd::Failed {
        report: Some(report),
        ..
    } = end
    {
        event["report"] = report.as_str().into();
    }
    event
}

/// What a reader wants to know beyond the reason.
fn message(end: &MachineEnd) -> String {
    match end {
        MachineEnd::PowerOff => "the guest turned the machine off".to_owned(),
        MachineEnd::Reset => "the guest reset the machine".to_owned(),
        MachineEnd::Panic => "the guest's kernel panicked".to_owned(),
        MachineEnd::Crash { vcpu } => {
            format!("processor {vcpu} shut down (triple fault)")
        }
        MachineEnd::Stopped => "the machine was ended from outside".to_owned(),
        MachineEnd::Failed { why, .. } => why.clone(),
    }
}
