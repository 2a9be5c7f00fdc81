//! The process namespace: it begins with a child.

// UNSAFETY: forks.
#![expect(unsafe_code, reason = "fork has no safe wrapper")]

use std::io;

use rustix::process::Pid;
use rustix::process::Signal;
use rustix::process::WaitOptions;

/// Continues in a child process, which is the first of its namespace. The parent never returns:
/// it lets go of everything, waits, and ends as the child ends.
pub(super) fn continue_in_child() -> io::Result<()> {
    // SAFETY: the process has one thread, so the child's memory is consistent.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // Killing the parent kills the machine. A parent that was killed before this call is
            // missed; such a machine ends by its control socket.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        }
        child => end_like(child),
    }
}

/// Waits for the child and ends in the same way.
fn end_like(child: i32) -> ! {
    // SAFETY: nothing of this process is used any more but the child's number; every descriptor
    // belongs to the child now, and this copy would keep the other ends from noticing its death.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
    let status = loop {
        let pid = Pid::from_raw(child);
        match rustix::process::waitpid(pid, WaitOptions::empty()) {
            Ok(Some((_, status))) => break Some(status),
            Err(rustix::io::Errno::INTR) | Ok(None) => {}
            Err(_) => break None,
        }
    };
    let signal = status.and_then(|status| status.terminating_signal());
    if let Some(signal) = signal {
        // SAFETY: restores the signal's own action and raises it: the process ends here.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    let code = status.and_then(|status| status.exit_status()).unwrap_or(1);
    // SAFETY: ends the process without running what belongs to the child (buffers, destructors).
    unsafe { libc::_exit(code) }
}
