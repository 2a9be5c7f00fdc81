//! Where a serial port's bytes go: buffered, bounded in rate and in length, and never waiting.
//!
//! A guest can send as fast as it can write a port, for as long as it lives. Whoever reads its
//! output may be slow, or the output may be a log file on a disk that shall not fill. So bytes
//! past the limits are dropped and counted, and a vCPU never waits for its output.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;

use ringfence_clock::NS_PER_S;
use ringfence_clock::monotonic_ns;
use ringfence_device::Counter;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

use crate::Timer;
use crate::Timers;

/// Bytes that wait for a slow reader before more are dropped.
const BUFFER_BYTES: usize = 64 << 10;
/// A line this long is written without waiting for its end.
const LONG_LINE_BYTES: usize = 1024;
/// A pipe that polls as writable takes this much without blocking (POSIX's PIPE_BUF on Linux).
const WRITE_BYTES: usize = 4096;
/// How long the start of a line waits for its end (a prompt has none).
const PROMPT_NS: u64 = 3_000_000;
/// When to look again at a reader that was slow.
const RETRY_NS: u64 = 20_000_000;

/// How much output is passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputLimits {
    /// Bytes a second, on the long run.
    pub bytes_per_s: u64,
    /// Bytes at once after a pause.
    pub burst_bytes: u64,
    /// Bytes in all; what comes after is dropped.
    pub total_bytes: u64,
}

#[derive(Debug)]
struct Buffer {
    bytes: Vec<u8>,
    /// Bytes that may pass now, in billionths.
    credit: u128,
    credit_at_ns: u64,
    total_left: u64,
    /// Something was dropped since the last byte that was kept.
    gap: bool,
}

/// An output file with its limits.
#[derive(Debug)]
pub struct SerialOutput {
    file: OwnedFd,
    limits: OutputLimits,
    buffer: Mutex<Buffer>,
    timer: OnceLock<Arc<Timer>>,
    written: Counter,
    dropped: Counter,
}

impl SerialOutput {
    /// An output to `file`, whose waiting bytes are written by one of `timers`.
    ///
    /// # Errors
    /// What the host said when it refused a timer.
    pub fn new(file: OwnedFd, limits: OutputLimits, timers: &Timers) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self {
            file,
            limits,
            buffer: Mutex::new(Buffer {
                bytes: Vec::new(),
                credit: u128::from(limits.burst_bytes) * u128::from(NS_PER_S),
                credit_at_ns: monotonic_ns(),
                total_left: limits.total_bytes,
                gap: false,
            }),
            timer: OnceLock::new(),
            written: Counter::new(),
            dropped: Counter::new(),
        });
        let owner = Arc::downgrade(&output);
        let timer = timers.add(move || {
            if let Some(output) = owner.upgrade() {
                output.flush();
            }
        })?;
        // Just made: it has none yet.
        let _ = output.timer.set(timer);
        Ok(output)
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that were written, and bytes that were dropped.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.written.get(), self.dropped.get())
    }

    /// Takes bytes, or drops them.
    pub fn push(&self, bytes: &[u8]) {
        let mut buffer = self.buffer();
        for &byte in bytes {
            if buffer.admit(&self.limits) {
                if std::mem::take(&mut buffer.gap) {
                    buffer.bytes.extend_from_slice(b"\n[output dropped]\n");
                }
                buffer.bytes.push(byte);
            } else {
                buffer.gap = true;
                self.dropped.increment();
            }
        }
        let ends_line = bytes.contains(&b'\n');
        if ends_line || buffer.bytes.len() >= LONG_LINE_BYTES {
            self.write_out(&mut buffer);
        } else if !buffer.bytes.is_empty() {
            self.write_later(PROMPT_NS);
        }
    }

    /// Writes what waits, as far as the reader takes it.
    pub fn flush(&self) {
        self.write_out(&mut self.buffer());
    }

    fn write_later(&self, after_ns: u64) {
        if let Some(timer) = self.timer.get()
            && timer.due_ns().is_none()
        {
            timer.arm(monotonic_ns().saturating_add(after_ns));
        }
    }

    fn write_out(&self, buffer: &mut Buffer) {
        let mut done = 0;
        while let Some(chunk) = buffer.bytes.get(done..).filter(|rest| !rest.is_empty()) {
            if !self.is_writable() {
                break;
            }
            let chunk = &chunk[..chunk.len().min(WRITE_BYTES)];
            match rustix::io::write(&self.file, chunk) {
                Ok(0) => break,
                Ok(count) => {
                    done += count;
                    self.written.add(count as u64);
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => break,
                Err(_) => {
                    // The reader is gone or the disk is full: nothing will take these bytes.
                    self.dropped.add(chunk.len() as u64);
                    done += chunk.len();
                }
            }
        }
        buffer.bytes.drain(..done);
        if !buffer.bytes.is_empty() {
            self.write_later(RETRY_NS);
        }
    }

    /// The file may be shared with others (a terminal), so it isn't made non-blocking.
    fn is_writable(&self) -> bool {
        let mut poll = [PollFd::new(&self.file, PollFlags::OUT)];
        let now = Timespec::default();
        matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1))
    }
}

impl Buffer {
    /// Whether one more byte may pass; counts it then.
    fn admit(&mut self, limits: &OutputLimits) -> bool {
        const BYTE: u128 = NS_PER_S as u128;
        let now = monotonic_ns();
        let earned =
            u128::from(now.saturating_sub(self.credit_at_ns)) * u128::from(limits.bytes_per_s);
        self.credit = (self.credit + earned).min(u128::from(limits.burst_bytes) * BYTE);
        self.credit_at_ns = now;
        if self.credit < BYTE || self.total_left == 0 || self.bytes.len() >= BUFFER_BYTES {
            return false;
        }
        self.credit -= BYTE;
        self.total_left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;
    use std::time::Instant;

    use super::*;

    const LIMITS: OutputLimits = OutputLimits {
        bytes_per_s: 1,
        burst_bytes: 1000,
        total_bytes: 10_000,
    };

    fn output(limits: OutputLimits) -> (Arc<SerialOutput>, io::PipeReader, Arc<Timers>) {
        let (reader, writer) = io::pipe().expect("a pipe");
        let timers = Timers::new().expect("timers");
        let output = SerialOutput::new(writer.into(), limits, &timers).expect("a timer");
        (output, reader, timers)
    }

    fn read(reader: &mut io::PipeReader, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).expect("enough bytes");
        bytes
    }

    #[test]
    fn a_line_is_written_at_its_end() {
        let (output, mut reader, _timers) = output(LIMITS);
        for byte in b"hello\n" {
            output.push(&[*byte]);
        }
        assert_eq!(read(&mut reader, 6), b"hello\n");
        assert_eq!(output.counts(), (6, 0));
    }

    #[test]
    fn a_prompt_is_written_after_a_moment() {
        let (output, mut reader, timers) = output(LIMITS);
        let run = timers.clone();
        let thread = std::thread::spawn(move || run.run());
        output.push(b"login: ");
        assert_eq!(read(&mut reader, 7), b"login: ");
        timers.stop();
        thread.join().expect("no panic").expect("no error");
    }

    #[test]
    fn bytes_past_the_rate_are_dropped_and_marked() {
        let (output, mut reader, _timers) = output(OutputLimits {
            bytes_per_s: 1000,
            ..LIMITS
        });
        output.push(&[b'x'; 3000]);
        let (_, dropped) = output.counts();
        assert!((1900..=2000).contains(&dropped), "{dropped}");
        let end = Instant::now() + Duration::from_secs(20);
        while output.counts().1 == dropped || output.buffer().gap {
            assert!(Instant::now() < end);
            output.push(b"y");
        }
        output.flush();
        let kept = output.counts().0;
        let text = read(&mut reader, usize::try_from(kept).expect("small"));
        let text = String::from_utf8(text).expect("ASCII");
        assert!(text.ends_with("\n[output dropped]\ny"), "{text}");
    }

    #[test]
    fn a_total_limit_ends_the_output() {
        let (output, _reader, _timers) = output(OutputLimits {
            total_bytes: 10,
            ..LIMITS
        });
        output.push(b"0123456789abc\n");
        assert_eq!(output.counts(), (10, 4));
    }

    #[test]
    fn a_reader_that_does_not_read_costs_bounded_memory_and_no_time() {
        let (output, _reader, _timers) = output(OutputLimits {
            bytes_per_s: u64::MAX,
            burst_bytes: u64::MAX,
            total_bytes: u64::MAX,
        });
        for _ in 0..2000 {
            output.push(&[b'x'; 200]);
        }
        assert!(output.buffer().bytes.len() <= BUFFER_BYTES + 64);
        let (written, dropped) = output.counts();
        assert!(written > 0 && dropped > 100_000, "{written} {dropped}");
    }

    #[test]
    fn a_closed_reader_drops_everything() {
        let (output, reader, _timers) = output(LIMITS);
        drop(reader);
        output.push(b"hello\n");
        assert_eq!(output.counts(), (0, 6));
    }
}
