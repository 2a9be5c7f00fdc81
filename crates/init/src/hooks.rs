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

/// How much of a hook's words an error repeats, in bytes.
const LONGEST: usize = 1000;

/// Runs hooks in turn, with the container's state on their standard input; the first failure ends it.
///
/// A hook without an environment has the given one.
pub(crate) fn run(
    kind: &str,
    hooks: &[Hook],
    state: &str,
    environment: &[String],
) -> Result<(), InitError> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, state, environment).map_err(|error| {
            InitError::Refused(format!("error running {kind} hook #{number}: {error}"))
        })?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &str, environment: &[String]) -> Result<(), InitError> {
    let what = || format!("run {}", hook.path);
    let mut command = Command::new(&hook.path);
    if let Some((first, others)) = hook.args.split_first() {
        command.arg0(first).args(others);
    }
    let environment = if hook.env.is_empty() {
        environment
    } else {
        &hook.env
    };
    command
        .env_clear()
        .envs(environment.iter().filter_map(|pair| pair.split_once('=')));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
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
                "{} took longer than {limit} s",
                hook.path
            )));
        }
    }
    let ended = child.wait_with_output().step(what)?;
    if ended.status.success() {
        return Ok(());
    }
    let how = match ended.status.signal() {
        Some(signal) => format!("signal {signal}"),
        None => format!("exit status {}", ended.status.code().unwrap_or(-1)),
    };
    let said =
        String::from_utf8_lossy(&ended.stderr[..ended.stderr.len().min(LONGEST)]).into_owned();
    Err(InitError::Refused(format!(
        "{} failed: {how}: {}",
        hook.path,
        said.trim()
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
