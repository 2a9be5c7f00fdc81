//! Runs one command for the host: its streams, signals, terminal, time and end.
//!
//! One thread waits for all of them at once, so nothing holds up anything else:
//!
//! ```text
//!   host ──stdin, signal, resize, credit──► queue ──► stdin
//!   host ◄──────────── out ◄──────────────────────── stdout, stderr   (while there is credit)
//! ```

use crate::error::ServeError;
use crate::frame::Frame;
use crate::frame::HEADER_BYTES;
use crate::frame::Kind;
use crate::frame::encode;
use crate::guest::Guest;
use crate::link::CHUNK_BYTES;
use crate::link::Link;
use crate::link::LinkError;
use crate::link::json;
use crate::message::Exec;
use crate::message::Exit;
use crate::message::TerminalSize;
use crate::processes;
use crate::reaper::Child;
use crate::spawn;
use crate::spawn::Streams;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

/// What may be sent on a stream before the first grant.
pub(crate) const WINDOW_BYTES: usize = 256 << 10;
/// Outputs aren't read while this much waits for the host.
const OUT_BYTES: usize = 128 << 10;
/// How long a terminal's last output may take to come out of the kernel after the command's end.
const TERMINAL_DRAIN: Duration = Duration::from_millis(50);
/// Grants are sent for at least this much: the host always has credit for the rest of the window.
const GRANT_BYTES: usize = WINDOW_BYTES / 4;

/// Runs a command until its end, or until the host is gone.
///
/// # Errors
///
/// The host is gone or broke the protocol; the command has been killed.
pub(crate) fn run(link: &mut Link, request: &Exec, guest: &Guest) -> Result<(), ServeError> {
    let started = spawn::spawn(request, &guest.limits(), &guest.reaper);
    let (child, streams) = match started {
        Ok(started) => started,
        Err(refused) => {
            let exit = Exit {
                code: Some(refused.code),
                message: refused.message,
                ..Exit::default()
            };
            return Ok(link.send_json(Kind::Exit, &exit)?);
        }
    };
    let deadline = request
        .timeout_ms
        .and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
    let mut session = Session::new(child, streams, deadline);
    let pid = serde_json::json!({ "pid": session.child.pid.as_raw_nonzero() });
    encode(Kind::Answer, &json(&pid), &mut session.out);
    let ended = session.pump(link);
    if ended.is_err() {
        processes::kill_session(session.child.pid);
    }
    Ok(ended?)
}

struct Output {
    fd: Option<OwnedFd>,
    kind: Kind,
    credit: usize,
}

struct Session {
    child: Child,
    terminal: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
    queue: Vec<u8>,
    stdin_ends: bool,
    granted: usize,
    owed: usize,
    outputs: [Output; 2],
    out: Vec<u8>,
    chunk: Vec<u8>,
    deadline: Option<Instant>,
    timed_out: bool,
    ended: Option<Instant>,
}

/// What to wait for, in the order of the descriptors.
struct Wanted {
    link: PollFlags,
    stdin: bool,
    outputs: [bool; 2],
}

impl Session {
    fn new(child: Child, streams: Streams, deadline: Option<Instant>) -> Self {
        let output = |fd, kind| Output {
            fd,
            kind,
            credit: WINDOW_BYTES,
        };
        Self {
            child,
            terminal: streams.terminal,
            stdin: streams.stdin,
            queue: Vec::new(),
            stdin_ends: false,
            granted: WINDOW_BYTES,
            owed: 0,
            outputs: [
                output(streams.stdout, Kind::Stdout),
                output(streams.stderr, Kind::Stderr),
            ],
            out: Vec::new(),
            chunk: vec![0; CHUNK_BYTES],
            deadline,
            timed_out: false,
            ended: None,
        }
    }

    fn pump(&mut self, link: &mut Link) -> Result<(), LinkError> {
        loop {
            while let Some(frame) = link.buffered()? {
                self.take(&frame)?;
            }
            self.feed();
            self.check_end();
            if self.ended.is_some() && self.outputs.iter().all(|output| output.fd.is_none()) {
                return self.finish(link);
            }
            self.send(link)?;
            let ready = self.wait(link)?;
            if ready.link.contains(PollFlags::IN) && !link.fill()? {
                return Err(LinkError::Closed);
            }
            if ready.link.intersects(PollFlags::ERR | PollFlags::HUP)
                && !ready.link.contains(PollFlags::IN)
            {
                return Err(LinkError::Closed);
            }
            for (at, ready) in ready.outputs.into_iter().enumerate() {
                if ready {
                    self.read_output(at);
                }
            }
        }
    }

    /// Waits for something to do; says what is ready.
    fn wait(&self, link: &Link) -> Result<Wanted, LinkError> {
        let mut wanted = Wanted {
            link: PollFlags::IN,
            stdin: !self.queue.is_empty() && self.stdin.is_some(),
            outputs: [self.wants_output(0), self.wants_output(1)],
        };
        if !self.out.is_empty() {
            wanted.link |= PollFlags::OUT;
        }
        let mut fds = Vec::with_capacity(5);
        fds.push(PollFd::from_borrowed_fd(link.as_fd(), wanted.link));
        if self.ended.is_none() {
            fds.push(PollFd::from_borrowed_fd(self.child.event(), PollFlags::IN));
        }
        if let (true, Some(fd)) = (wanted.stdin, &self.stdin) {
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        let first_output = fds.len();
        for (output, wants) in self.outputs.iter().zip(wanted.outputs) {
            if let (true, Some(fd)) = (wants, &output.fd) {
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        match rustix::event::poll(&mut fds, self.timeout().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = fds.iter().map(PollFd::revents);
        wanted.link = ready.next().unwrap_or(PollFlags::empty());
        let mut ready = fds.iter().skip(first_output).map(PollFd::revents);
        for wants in wanted.outputs.iter_mut().filter(|wants| **wants) {
            *wants = ready.next().is_some_and(|flags| !flags.is_empty());
        }
        if self.ended.is_some() {
            // What is there now is all that the command wrote: look, whatever poll says.
            wanted.outputs = [self.wants_output(0), self.wants_output(1)];
        }
        Ok(wanted)
    }

    fn wants_output(&self, at: usize) -> bool {
        let output = self.outputs.get(at);
        self.out.len() < OUT_BYTES
            && output.is_some_and(|output| output.fd.is_some() && output.credit > 0)
    }

    fn timeout(&self) -> Option<Timespec> {
        let now = Instant::now();
        if self.ended.is_some() {
            // Only what the host must take first is waited for.
            let soon = if self.wants_output(0) || self.wants_output(1) {
                Duration::from_millis(if self.terminal.is_some() { 5 } else { 0 })
            } else {
                return None;
            };
            return Timespec::try_from(soon).ok();
        }
        let left = self.deadline?.saturating_duration_since(now);
        // Rounded up, so that it is over when we wake.
        Timespec::try_from(left + Duration::from_millis(1)).ok()
    }

    /// Does what a frame of the host asks.
    fn take(&mut self, frame: &Frame) -> Result<(), LinkError> {
        let payload = frame.payload.as_slice();
        match (frame.kind, payload) {
            (Kind::Stdin, []) => self.stdin_ends = true,
            (Kind::Stdin, bytes) => {
                self.granted = self
                    .granted
                    .checked_sub(bytes.len())
                    .ok_or(LinkError::Unexpected(Kind::Stdin))?;
                if self.stdin.is_some() && !self.stdin_ends {
                    self.queue.extend_from_slice(bytes);
                } else {
                    self.owed += bytes.len();
                }
            }
            (Kind::Credit, [stream, a, b, c, d]) => {
                let bytes = usize::try_from(u32::from_le_bytes([*a, *b, *c, *d])).unwrap_or(0);
                let at = usize::from(*stream).wrapping_sub(1);
                if let Some(output) = self.outputs.get_mut(at) {
                    output.credit = output.credit.saturating_add(bytes);
                }
            }
            (Kind::Signal, [a, b, c, d]) => {
                let number = i32::from_le_bytes([*a, *b, *c, *d]);
                if self.ended.is_none() {
                    processes::signal_group(self.child.pid, number);
                }
            }
            (Kind::Resize, [a, b, c, d]) => {
                let size = TerminalSize {
                    columns: u16::from_le_bytes([*a, *b]),
                    rows: u16::from_le_bytes([*c, *d]),
                };
                if let Some(terminal) = &self.terminal {
                    let _gone = spawn::resize(terminal, size);
                }
            }
            (kind, _) => return Err(LinkError::Unexpected(kind)),
        }
        Ok(())
    }

    /// Passes on what waits for the command, and grants the host as much again.
    fn feed(&mut self) {
        if let (Some(fd), false) = (&self.stdin, self.queue.is_empty()) {
            match rustix::io::write(fd, &self.queue) {
                Ok(count) => {
                    self.queue.drain(..count);
                    self.owed += count;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                // The command reads no more: neither do we.
                Err(_) => {
                    self.owed += self.queue.len();
                    self.queue.clear();
                    self.stdin = None;
                }
            }
        }
        if self.stdin_ends && self.queue.is_empty() {
            if let (Some(terminal), true) = (&self.terminal, self.stdin.is_some()) {
                // What Ctrl-D does: a terminal has no other end.
                let _gone = rustix::io::write(terminal, b"\x04");
            }
            self.stdin = None;
        }
        if self.owed >= GRANT_BYTES {
            let count = u32::try_from(self.owed).unwrap_or(u32::MAX);
            let [a, b, c, d] = count.to_le_bytes();
            encode(Kind::Credit, &[0, a, b, c, d], &mut self.out);
            self.granted += self.owed;
            self.owed = 0;
        }
    }

    fn check_end(&mut self) {
        if self.ended.is_none() && self.child.status().is_some() {
            self.ended = Some(Instant::now());
        }
        let over = self.deadline.is_some_and(|at| Instant::now() >= at);
        if over && self.ended.is_none() && !self.timed_out {
            self.timed_out = true;
            self.deadline = None;
            processes::kill_session(self.child.pid);
        }
    }

    /// Reads one piece of an output, as far as the host lets us, and frames it.
    fn read_output(&mut self, at: usize) {
        let (Some(output), chunk) = (self.outputs.get_mut(at), &mut self.chunk) else {
            return;
        };
        let Some(fd) = &output.fd else {
            return;
        };
        let most = output.credit.min(chunk.len());
        let Some(room) = chunk.get_mut(..most) else {
            return;
        };
        match rustix::io::read(fd, &mut *room) {
            Ok(count) if count > 0 => {
                self.out.reserve(count + HEADER_BYTES);
                encode(
                    output.kind,
                    room.get(..count).unwrap_or_default(),
                    &mut self.out,
                );
                output.credit -= count;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                // The command is gone; whoever it left behind may keep its output open.
                let patience = if self.terminal.is_some() {
                    TERMINAL_DRAIN
                } else {
                    Duration::ZERO
                };
                if self.ended.is_some_and(|at| at.elapsed() >= patience) {
                    output.fd = None;
                }
            }
            // The end; of a terminal it is an error.
            _ => output.fd = None,
        }
    }

    fn send(&mut self, link: &Link) -> Result<(), LinkError> {
        let mut sent = 0;
        while sent < self.out.len() {
            let rest = self.out.get(sent..).unwrap_or_default();
            let count = link.send_some(rest)?;
            if count == 0 {
                break;
            }
            sent += count;
        }
        self.out.drain(..sent);
        Ok(())
    }

    /// Tells the host how it ended, behind all output.
    fn finish(&mut self, link: &mut Link) -> Result<(), LinkError> {
        let status = self.child.status();
        let exit = Exit {
            code: status.and_then(rustix::process::WaitStatus::exit_status),
            signal: status.and_then(rustix::process::WaitStatus::terminating_signal),
            timed_out: self.timed_out,
            message: String::new(),
        };
        encode(Kind::Exit, &json(&exit), &mut self.out);
        while !self.out.is_empty() {
            self.send(link)?;
            if self.out.is_empty() {
                break;
            }
            let flags = PollFlags::OUT;
            let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), flags)];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, None))?;
        }
        Ok(())
    }
}
