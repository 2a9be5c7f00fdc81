//! `ringfence-init`: one container's setup, and then its process.
//!
//! ```text
//!   runtime ──plan──► stage 1: enter and make namespaces ──fork──► stage 2: process 1 of the container
//!      ▲  │            "pid" ends stage 1                           mounts, devices, console
//!      │  └── answers ◄── "map", "cgroup", "hooks" ── asks ──────── change of the root
//!      └──── status: pid, ask, error; end of file: the program runs    privileges, filter, execve
//! ```
//! It decides nothing: the plan says each step in the kernel's own numbers, and a step that fails
//! ends the setup. It is one static program without threads, started from a sealed copy in memory,
//! since code of the container may get hold of it through `/proc`.

#![deny(unsafe_op_in_unsafe_fn)]

mod bpf;
mod console;
mod copied;
mod devices;
mod error;
mod hooks;
mod mounts;
mod overlay;
mod paths;
mod plan;
mod process;
mod reaper;
mod root;
mod stage;
mod status;
mod sys;

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::process::ExitCode;

use crate::error::InitError;
use crate::error::Step;
use crate::plan::Plan;
use crate::status::Message;
use crate::status::Runtime;

/// What most plans fit into: space that grows is copied, and reads are as small as it is.
const PLAN_SIZE: usize = 64 << 10;
/// The longest plan.
const PLAN_LIMIT: u64 = 16 << 20;

fn main() -> ExitCode {
    let (plan, mut runtime, early) = match connect() {
        Ok(connected) => connected,
        Err(error) => {
            eprintln!("ringfence-init: {error}");
            return ExitCode::from(2);
        }
    };
    match carry_out(plan, &mut runtime, early) {
        Ok(status) => status,
        Err(error) => {
            runtime.tell(&Message::Error {
                message: error.to_string(),
                errno: error.errno(),
            });
            ExitCode::from(1)
        }
    }
}

fn carry_out(plan: File, runtime: &mut Runtime, early: u32) -> Result<ExitCode, InitError> {
    if early != 0 {
        sys::unshare(early).step(|| format!("make namespaces {early:#x}"))?;
    }
    let plan = read_plan(plan)?;
    leave_to_caller(&plan, runtime)?;
    stage::run(&plan, runtime)
}

/// The command line: the descriptors of plan, status and answers, and the namespaces to make before
/// the plan comes, which takes the runtime longer to write.
fn connect() -> Result<(File, Runtime, u32), InitError> {
    let mut words = std::env::args().skip(1);
    let mut numbers = words.by_ref().take(3).map(|text| text.parse::<RawFd>());
    let mut next = || match numbers.next() {
        Some(Ok(number)) if number > 2 => {
            sys::inherited(number).map_err(|_| InitError::Usage("a descriptor is closed"))
        }
        _ => Err(InitError::Usage(
            "ringfence-init PLAN STATUS ANSWERS [EARLY]",
        )),
    };
    let (plan, status, answers) = (next()?, next()?, next()?);
    let early = words.next().map_or(Ok(0), |text| text.parse());
    let early = early.map_err(|_| InitError::Usage("the namespaces are no number"))?;
    // What the runtime's caller left open must not reach the container.
    sys::close_on_exec_from(3).step(|| "mark descriptors".to_owned())?;
    Ok((File::from(plan), Runtime::new(status, answers), early))
}

/// Closes what the runtime's caller had open and nobody gave to the container: a created container
/// may wait for long before the next program would close it.
fn leave_to_caller(plan: &Plan, runtime: &Runtime) -> Result<(), InitError> {
    let what = || "close descriptors of the caller's".to_owned();
    let mut ours = runtime.descriptors().to_vec();
    ours.extend(plan.descriptors());
    let open: Vec<RawFd> = std::fs::read_dir("/proc/self/fd")
        .step(what)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    for number in open {
        if number > 2 && !ours.contains(&number) {
            sys::close(number);
        }
    }
    Ok(())
}

fn read_plan(source: File) -> Result<Plan, InitError> {
    let mut text = Vec::with_capacity(PLAN_SIZE);
    source
        .take(PLAN_LIMIT)
        .read_to_end(&mut text)
        .step(|| "read the plan".to_owned())?;
    let mut parser = serde_json::Deserializer::from_slice(&text);
    Ok(serde_path_to_error::deserialize(&mut parser)?)
}
