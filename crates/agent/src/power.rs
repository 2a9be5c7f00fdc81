//! The guest's orderly end.

use crate::error::AgentError;
use crate::guest::Guest;
use rustix::mount::MountFlags;
use rustix::mount::UnmountFlags;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process_group;
use rustix::system::RebootCommand;
use std::fs;
use std::time::Duration;

/// What killed processes get to be gone.
const KILLED: Duration = Duration::from_secs(2);

/// Whether the agent may turn the guest off.
///
/// # Errors
///
/// It isn't the guest's first process.
pub(crate) fn check(guest: &Guest) -> Result<(), AgentError> {
    if guest.is_init {
        return Ok(());
    }
    let message = "the agent is not the guest's first process, so it can't turn it off";
    Err(AgentError::state(message))
}

/// Ends all commands, writes everything back and turns the guest off. Returns only on failure.
///
/// # Errors
///
/// The agent isn't the guest's first process, or its kernel refuses.
pub(crate) fn off(guest: &Guest, reboot: bool, grace_ms: u64) -> Result<(), AgentError> {
    check(guest)?;
    // To the kernel, process 1 is all processes but the caller (kill(2)).
    let _none = kill_process_group(Pid::INIT, Signal::TERM);
    if !guest.reaper.wait_none(Duration::from_millis(grace_ms)) {
        let _none = kill_process_group(Pid::INIT, Signal::KILL);
        guest.reaper.wait_none(KILLED);
    }
    if guest.is_contained {
        end();
    }
    rustix::fs::sync();
    unmount_all();
    let command = if reboot {
        RebootCommand::Restart
    } else {
        RebootCommand::PowerOff
    };
    rustix::system::reboot(command)
        .map_err(|errno| AgentError::errno("the guest's kernel can't turn it off", errno))
}

/// Ends the agent, and with it the container whose first process it is.
#[expect(
    clippy::disallowed_methods,
    clippy::exit,
    reason = "threads that serve others go on otherwise, and all that they hold is the kernel's to free"
)]
pub(crate) fn end() -> ! {
    std::process::exit(0)
}

/// Takes file systems away, last mounted first; what is busy becomes read only.
fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts: Vec<_> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            Some((fields.next()?, fields.next()?))
        })
        .collect();
    for (place, kind) in mounts.iter().rev() {
        // These hold nothing, and the first is being read.
        if matches!(*kind, "proc" | "sysfs" | "devtmpfs" | "devpts") {
            continue;
        }
        if rustix::mount::unmount(*place, UnmountFlags::empty()).is_err() {
            let _busy = rustix::mount::mount_remount(*place, MountFlags::RDONLY, c"");
        }
    }
    rustix::fs::sync();
}
