//! The last words of a process that a bug of its own ends by a signal: where it was, and the guest's
//! registers, for a report.

// UNSAFETY: reads the vCPU's state by pointer, in a signal handler.
#![expect(unsafe_code, reason = "a signal handler has only pointers")]

use std::cell::Cell;
use std::fmt;
use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use crate::hot::Hot;

static WANTED: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// The vCPU that this thread runs.
    static VCPU: Cell<*const Hot> = const { Cell::new(std::ptr::null()) };
}

/// Has a signal that nobody but the process itself can have caused reported on standard error, for a
/// program that has no other use for such signals.
pub fn report_crashes() {
    WANTED.store(true, Ordering::Relaxed);
}

/// Says which vCPU this thread runs from here on: none, or one that outlives the next call.
pub(crate) fn note_vcpu(hot: Option<&Hot>) {
    VCPU.set(hot.map_or(std::ptr::null(), std::ptr::from_ref));
}

/// Writes to standard error what is about to end the process, if that is wanted. Allocates nothing and takes no lock: this is called
/// by a signal handler.
pub(crate) fn report(signal: libc::c_int, pc: u64, address: u64) {
    if !WANTED.swap(false, Ordering::Relaxed) {
        return;
    }
    unsafe extern "C" {
        /// Where the linker's first byte lies.
        static __executable_start: u8;
    }
    let start = (&raw const __executable_start) as u64;
    say(format_args!(
        "ringfence: internal error: signal {signal} at {pc:#x} (program at {start:#x}), address {address:#x}\n"
    ));
    let hot = VCPU.get();
    if hot.is_null() {
        return;
    }
    // SAFETY: whoever noted it keeps it; the vCPU's own thread is this one.
    let hot = unsafe { &*hot };
    say(format_args!(
        "ringfence: guest code page {:#x}, registers {:x?}\n",
        hot.pc_base, hot.gpr
    ));
    say(format_args!(
        "ringfence: segment bases {:x?}, last fault: trap {} at {:#x}, address {:#x}\n",
        hot.seg_base, hot.fault_signal, hot.fault_pc, hot.fault_address
    ));
}

/// A line of bounded length.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

fn say(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; 512],
        len: 0,
    };
    let _ = line.write_fmt(text);
    // SAFETY: initialised bytes; a failure leaves nobody to tell.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;
    use std::process::Stdio;

    use crate::signal::Registration;

    const CHILD: &str = "RINGFENCE_CRASHES";

    /// Run by the test below in a process of its own.
    #[test]
    fn crashes_when_it_is_told_to() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        super::report_crashes();
        let _registration = Registration::new((1, 2)).expect("handlers");
        // SAFETY: not safe at all, which is the point: nothing lies there.
        unsafe { std::ptr::without_provenance::<u8>(0x18).read_volatile() };
    }

    #[test]
    fn a_process_that_ends_by_a_signal_says_where_it_was() {
        let program = std::env::current_exe().expect("this program");
        let mut child = Command::new(program)
            .args([
                "--exact",
                "crash::tests::crashes_when_it_is_told_to",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a child");
        let mut text = String::new();
        let mut stderr = child.stderr.take().expect("a pipe");
        stderr.read_to_string(&mut text).expect("text");
        let status = child.wait().expect("it ended");
        assert_eq!(status.signal(), Some(libc::SIGSEGV));
        assert!(text.contains("internal error: signal 11 at 0x"), "{text}");
        assert!(text.contains("address 0x18"), "{text}");
    }
}
