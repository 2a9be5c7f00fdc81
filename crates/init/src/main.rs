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

/// The longest plan.
const PLAN_LIMIT: u64 = 16 << 20;

fn main() -> ExitCode {
    let mut runtime = match connect() {
        Ok((plan, runtime)) => (plan, runtime),
        Err(error) => {
            eprintln!("ringfence-init: {error}");
            return ExitCode::from(2);
        }
    };
    let carried_out = read_plan(runtime.0).and_then(|plan| {
        leave_to_caller(&plan, &runtime.1)?;
        stage::run(&plan, &mut runtime.1)
    });
    match carried_out {
        Ok(status) => status,
        Err(error) => {
            runtime.1.tell(&Message::Error {
                message: error.to_string(),
                errno: error.errno(),
            });
            ExitCode::from(1)
        }
    }
}

/// The three descriptors of the command line: plan, status, answers.
fn connect() -> Result<(File, Runtime), InitError> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<RawFd>());
    let mut next = || match numbers.next() {
        Some(Ok(number)) if number > 2 => {
            sys::inherited(number).map_err(|_| InitError::Usage("a descriptor is closed"))
        }
        _ => Err(InitError::Usage("ringfence-init PLAN STATUS ANSWERS")),
    };
    let (plan, status, answers) = (next()?, next()?, next()?);
    // What the runtime's caller left open must not reach the container.
    sys::close_on_exec_from(3).step(|| "mark descriptors".to_owned())?;
    Ok((File::from(plan), Runtime::new(status, answers)))
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
    let mut text = Vec::new();
    source
        .take(PLAN_LIMIT)
        .read_to_end(&mut text)
        .step(|| "read the plan".to_owned())?;
    let mut parser = serde_json::Deserializer::from_slice(&text);
    Ok(serde_path_to_error::deserialize(&mut parser)?)
}
