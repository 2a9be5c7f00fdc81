//! The log: lines on standard error, a bounded number a second.

use std::io::Write;
use std::time::Instant;
use std::time::SystemTime;

const LINES_PER_S: u32 = 50;

/// Seconds since the epoch.
pub(crate) fn seconds() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Writes lines that begin with the network's name.
#[derive(Debug)]
pub(crate) struct Log {
    name: String,
    window: Instant,
    lines: u32,
    suppressed: u64,
}

impl Log {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            window: Instant::now(),
            lines: 0,
            suppressed: 0,
        }
    }

    pub(crate) fn line(&mut self, text: &str) {
        if self.window.elapsed().as_secs() > 0 {
            self.window = Instant::now();
            self.lines = 0;
        }
        self.lines += 1;
        if self.lines > LINES_PER_S {
            self.suppressed += 1;
            return;
        }
        let suppressed = std::mem::take(&mut self.suppressed);
        let note = match suppressed {
            0 => String::new(),
            count => format!(" ({count} lines left out)"),
        };
        // Whoever reads the log may be gone.
        let _ = writeln!(std::io::stderr(), "{}: {text}{note}", self.name);
    }
}
