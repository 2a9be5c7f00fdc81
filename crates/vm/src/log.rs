//! The process's log: one line an event on standard error.
//!
//! What a guest can cause is logged through rate-limited macros already; this bounds everything
//! else too, so that no loop anywhere fills the log's disk. A line that doesn't fit the reader's
//! pipe is dropped: no thread waits for its log.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use ringfence_clock::NS_PER_S;
use ringfence_clock::monotonic_ns;
use ringfence_device::tracing::Event;
use ringfence_device::tracing::Level;
use ringfence_device::tracing::Metadata;
use ringfence_device::tracing::Subscriber;
use ringfence_device::tracing::field::Field;
use ringfence_device::tracing::field::Visit;
use ringfence_device::tracing::span;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;

/// Lines a second.
const LINES_PER_S: u64 = 100;
/// A longer line is cut.
const LINE_BYTES: usize = 1024;

/// Writes events to standard error.
pub(crate) struct StderrLog {
    name: String,
    /// The current second, shifted left by 16, and the lines in it.
    window: AtomicU64,
}

impl StderrLog {
    /// A log whose lines begin with the machine's name.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            window: AtomicU64::new(0),
        }
    }

    fn admit(&self) -> bool {
        let second = monotonic_ns() / NS_PER_S;
        let step = |window: u64| {
            let lines = if window >> 16 == second {
                window & 0xffff
            } else {
                0
            };
            (lines < LINES_PER_S).then_some(second << 16 | (lines + 1))
        };
        self.window
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, step)
            .is_ok()
    }
}

struct Line {
    text: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string can't fail.
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

impl Subscriber for StderrLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        if !self.admit() {
            return;
        }
        let mut line = Line {
            text: String::new(),
            fields: String::new(),
        };
        event.record(&mut line);
        let level = event.metadata().level();
        write_line(&format!(
            "{level} {}: {}{}",
            self.name, line.text, line.fields
        ));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Writes one line to standard error, if it takes it.
pub(crate) fn write_line(text: &str) {
    let printable = text.chars().filter(|c| !c.is_control());
    let mut line: String = printable.take(LINE_BYTES).collect();
    line.push('\n');
    let stderr = rustix::stdio::stderr();
    let mut poll = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec::default();
    if matches!(rustix::event::poll(&mut poll, Some(&now)), Ok(1)) {
        // A reader that is gone reads nothing.
        let _ = rustix::io::write(stderr, line.as_bytes());
    }
}
