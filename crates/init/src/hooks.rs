//! Hooks that run inside the container's namespaces.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;

use crate::error::InitError;
use crate::error::Step;
use crate::plan::Hook;

/// Runs hooks in turn, with the container's state on their standard input; the first failure ends it.
pub(crate) fn run(hooks: &[Hook], state: &str) -> Result<(), InitError> {
    hooks.iter().try_for_each(|hook| run_one(hook, state))
}

fn run_one(hook: &Hook, state: &str) -> Result<(), InitError> {
    let what = || format!("run the hook {}", hook.path);
    let mut command = Command::new(&hook.path);
    if let Some((first, others)) = hook.args.split_first() {
        command.arg0(first).args(others);
    }
    command
        .env_clear()
        .envs(hook.env.iter().filter_map(|pair| pair.split_once('=')));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().step(what)?;
    if let Some(mut input) = child.stdin.take() {
        // A hook needn't read its state.
        let _unread = input.write_all(state.as_bytes());
    }
    if let Some(limit) = hook.timeout {
        let pid = Pid::from_child(&child);
        if !ended_within(pid, Duration::from_secs(limit))? {
            let _gone = child.kill();
            let _status = child.wait();
            return Err(InitError::Refused(format!(
                "the hook {} took longer than {limit} s",
                hook.path
            )));
        }
    }
    let status = child.wait().step(what)?;
    if status.success() {
        return Ok(());
    }
    let how = match status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit status {}", status.code().unwrap_or(-1)),
    };
    Err(InitError::Refused(format!(
        "the hook {} failed: {how}",
        hook.path
    )))
}

fn ended_within(pid: Pid, limit: Duration) -> Result<bool, InitError> {
    let what = || "wait for a hook".to_owned();
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).step(what)?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec {
            tv_sec: i64::MAX,
            tv_nsec: 0,
        });
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).step(what),
        }
    }
}
