//! Process 1 that stays: it reaps what is left to it and passes signals on to the program.

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::WaitOptions;

use crate::error::InitError;
use crate::error::Step;
use crate::sys;

/// Forks. Returns in the program's process alone; the other ends as the program ends.
pub(crate) fn stay() -> Result<(), InitError> {
    sys::block_signals();
    let pid = sys::fork(false, None).step(|| "create the program's process".to_owned())?;
    let Some(program) = Pid::from_raw(pid) else {
        return Ok(());
    };
    // What it holds open would keep pipes of the runtime's from ending.
    sys::close_from(3).step(|| "close descriptors".to_owned())?;
    let status = reap(program)?;
    sys::end(status);
}

fn reap(program: Pid) -> Result<i32, InitError> {
    loop {
        let number = match sys::wait_signal() {
            Ok(number) => number,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).step(|| "wait for a signal".to_owned()),
        };
        if number != libc::SIGCHLD {
            if let Some(signal) = Signal::from_named_raw(number) {
                // The program may be gone already; its status comes next.
                let _gone = rustix::process::kill_process(program, signal);
            }
            continue;
        }
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid == program {
                let by_signal = status.terminating_signal().map(|signal| 128 + signal);
                return Ok(status.exit_status().or(by_signal).unwrap_or(255));
            }
        }
    }
}
