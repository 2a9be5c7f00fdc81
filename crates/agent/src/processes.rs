//! Signals to commands and to what they started.

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::kill_process;
use rustix::process::kill_process_group;
use std::fs;

/// Sends a signal to a command's process group. Unknown numbers and groups that are gone are ignored.
pub(crate) fn signal_group(leader: Pid, number: i32) {
    if let Some(signal) = Signal::from_named_raw(number) {
        let _gone = kill_process_group(leader, signal);
    }
}

/// Kills a command, its process group, and all in its session: what a shell put in the background.
pub(crate) fn kill_session(leader: Pid) {
    let _gone = kill_process_group(leader, Signal::KILL);
    for pid in session_members(leader) {
        let _gone = kill_process(pid, Signal::KILL);
    }
}

fn session_members(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| session_of(*pid) == Some(leader.as_raw_nonzero().get()))
        .filter_map(Pid::from_raw)
        .collect()
}

/// Field 6 of /proc/PID/stat (proc(5)); the name before it may have any characters in it.
fn session_of(pid: i32) -> Option<i32> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(3)?.parse().ok()
}
