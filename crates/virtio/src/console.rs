//! The console device (virtio 1.2 §5.3): one port, with size and emergency write.
//!
//! Output never blocks the worker: what the host doesn't take waits in the guest's queue. Input is
//! read only when the guest has lent a buffer. The descriptors' own flags are left alone, since
//! other programs may share them.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use ringfence_device::Counter;
use ringfence_memory::vectored;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::Active;
use crate::DeviceKind;
use crate::Interest;
use crate::Outcome;
use crate::Session;
use crate::StartError;
use crate::VirtioDevice;
use crate::chain::Chain;

const RX: u16 = 0;
const TX: u16 = 1;

/// VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_EMERG_WRITE (§5.3.3). Several ports (F_MULTIPORT) are
/// not offered: streams to the guest are vsock's business.
const FEATURES: u64 = 1 << 0 | 1 << 2;
/// Offset of `emerg_wr` in the configuration (§5.3.4).
const EMERGENCY_WRITE: u64 = 8;

const INPUT: u32 = 0;
const OUTPUT: u32 = 1;
const RESIZED: u32 = 2;

/// Bytes written at once: what a pipe that is ready takes without blocking (`PIPE_BUF`).
const PIECE: usize = 4096;
/// Bytes of one request that are written at a turn.
const TURN_BYTES: usize = 256 << 10;

/// Changes the console's size from outside.
#[derive(Debug)]
pub struct ConsoleHandle {
    size: Mutex<(u16, u16)>,
    changed: EventFd,
}

impl ConsoleHandle {
    /// The terminal has this many columns and rows now.
    pub fn resize(&self, columns: u16, rows: u16) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = (columns, rows);
        // Fails only when the counter is full: the device hears of it already.
        let _ = self.changed.write(1);
    }

    fn size(&self) -> (u16, u16) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    input: Option<File>,
    output: Option<File>,
    handle: Arc<ConsoleHandle>,
    /// Bytes of the request at the front of the queue that are out already.
    written: usize,
    /// The output takes nothing now: its descriptor is watched.
    waiting: bool,
    /// A long request goes on at the next turn.
    goes_on: bool,
    bytes_in: Counter,
    bytes_out: Counter,
}

impl Console {
    /// A console on two descriptors.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(input: Option<File>, output: Option<File>) -> std::io::Result<Self> {
        Ok(Self {
            input,
            output,
            handle: Arc::new(ConsoleHandle {
                size: Mutex::new((80, 25)),
                changed: EventFd::new(EFD_NONBLOCK)?,
            }),
            written: 0,
            waiting: false,
            goes_on: false,
            bytes_in: Counter::new(),
            bytes_out: Counter::new(),
        })
    }

    /// To change its size with.
    #[must_use]
    pub fn handle(&self) -> Arc<ConsoleHandle> {
        Arc::clone(&self.handle)
    }

    /// Hears of input only while the guest can take it.
    fn watch_input(&self, session: &Session, on: bool) {
        let Some(input) = &self.input else { return };
        session.events.remove(input);
        if on {
            // Files can't be watched; there is nothing to type in them either.
            let _ = session.events.add(input, INPUT, Interest::Read);
        }
    }

    fn receive(&mut self, active: &mut Active) {
        let Some(chain) = active.pop(RX) else {
            self.watch_input(&active.session, false);
            return;
        };
        let Some(input) = &self.input else { return };
        let writer = chain.writer(&active.session.memory);
        let slices = writer.slices(writer.remaining());
        let len = match vectored::read(input.as_fd(), &slices) {
            Ok(len) => len,
            Err(error) if is_transient(&error) => {
                unpop(active);
                return;
            }
            Err(_) => 0,
        };
        if len == 0 && writer.remaining() > 0 {
            // The end: nobody types any more.
            unpop(active);
            self.watch_input(&active.session, false);
            self.input = None;
            return;
        }
        self.bytes_in.add(len as u64);
        let written = u32::try_from(len).unwrap_or(u32::MAX);
        active.complete(RX, chain.head(), written);
        active.notify(RX);
    }

    fn send(&mut self, active: &mut Active) {
        if self.waiting {
            return;
        }
        active.serve(TX, |session, chain| self.send_chain(session, chain));
        if std::mem::take(&mut self.goes_on)
            && let Some(queue) = active.queue(TX)
        {
            queue.ring_again();
        }
    }

    /// Writes one request, as far as the host takes it.
    fn send_chain(&mut self, session: &Session, chain: &Chain) -> Outcome {
        let mut reader = chain.reader(&session.memory);
        reader.skip(self.written);
        let turn_end = self.written + TURN_BYTES;
        while reader.remaining() > 0 {
            if self.written >= turn_end {
                self.goes_on = true;
                return Outcome::Blocked;
            }
            let Some(output) = &self.output else { break };
            if !is_writable(output) {
                // Fails for files, which are always writable.
                self.waiting = session.events.add(output, OUTPUT, Interest::Write).is_ok();
                return Outcome::Blocked;
            }
            let slices = reader.slices(PIECE);
            match vectored::write(output.as_fd(), &slices) {
                Ok(len) => {
                    self.written += len;
                    self.bytes_out.add(len as u64);
                    reader.skip(len);
                }
                Err(error) if is_transient(&error) => {}
                // Nobody reads any more: output is lost, as on an unplugged terminal.
                Err(_) => self.output = None,
            }
        }
        self.written = 0;
        Outcome::Done(0)
    }
}

fn unpop(active: &mut Active) {
    if let Some(queue) = active.queue(RX) {
        queue.unpop();
    }
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
    )
}

fn is_writable(output: &File) -> bool {
    let mut fds = [PollFd::new(output, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // An error or hang-up counts as writable: the write says which.
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 64]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.handle.size();
        let mut config = [0; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4] = 1;
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // §5.3.4: one character, with no queues set up; for the first words of a dying kernel.
        if offset == EMERGENCY_WRITE
            && let (Some(output), [byte, ..]) = (&mut self.output, data)
            && is_writable(output)
        {
            let _ = output.write(&[*byte]);
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        self.written = 0;
        self.waiting = false;
        active
            .session
            .events
            .add(&self.handle.changed, RESIZED, Interest::Read)
            .map_err(|source| StartError::Host {
                action: "watch for console size changes",
                source,
            })
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        match index {
            RX => self.watch_input(&active.session, true),
            _ => self.send(active),
        }
    }

    fn event_ready(&mut self, active: &mut Active, token: u32) {
        match token {
            INPUT => self.receive(active),
            OUTPUT => {
                if let Some(output) = &self.output {
                    active.session.events.remove(output);
                }
                self.waiting = false;
                self.send(active);
            }
            _ => {
                // Empty when the ring was taken already.
                let _ = self.handle.changed.read();
                active.session.interrupt.config_changed();
            }
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("bytes_in", self.bytes_in.get()),
            ("bytes_out", self.bytes_out.get()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::pipe::pipe;

    use super::*;
    use crate::testing::TestDriver;

    struct Terminal {
        driver: TestDriver,
        /// What the guest prints.
        screen: File,
        /// What a person types.
        keyboard: File,
        handle: Arc<ConsoleHandle>,
    }

    fn terminal() -> Terminal {
        let (screen, output) = pipe().expect("a pipe");
        let (input, keyboard) = pipe().expect("a pipe");
        let console = Console::new(Some(File::from(input)), Some(File::from(output)));
        let console = console.expect("a console");
        let handle = console.handle();
        Terminal {
            driver: TestDriver::start(Box::new(console)),
            screen: File::from(screen),
            keyboard: File::from(keyboard),
            handle,
        }
    }

    #[test]
    fn what_the_guest_prints_comes_out() {
        let mut terminal = terminal();
        terminal.driver.request(TX, &[b"hello, ", b"world"], &[]);
        let mut text = [0; 12];
        terminal.screen.read_exact(&mut text).expect("output");
        assert_eq!(&text, b"hello, world");
    }

    #[test]
    fn what_is_typed_waits_until_the_guest_lends_a_buffer() {
        let mut terminal = terminal();
        terminal.keyboard.write_all(b"ls\n").expect("typed");
        terminal.driver.run();
        terminal.driver.add(RX, &[], &[16]);
        terminal.driver.kick_and_run(RX);
        assert_eq!(terminal.driver.take_used(RX).expect("input").1, b"ls\n");
    }

    #[test]
    fn the_end_of_input_leaves_the_worker_idle() {
        let mut terminal = terminal();
        terminal.driver.add(RX, &[], &[16]);
        drop(terminal.keyboard);
        terminal.driver.kick_and_run(RX);
        assert!(terminal.driver.take_used(RX).is_none());
    }

    #[test]
    fn output_that_nobody_takes_waits_in_the_guests_queue_and_arrives_whole() {
        let mut terminal = terminal();
        let text: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let head = terminal
            .driver
            .add(TX, &[&text[..150_000], &text[150_000..]], &[]);
        terminal.driver.kick_and_run(TX);
        assert!(terminal.driver.take_used(TX).is_none(), "the pipe is full");
        let mut got: Vec<u8> = Vec::new();
        while got.len() < text.len() {
            let mut piece = vec![0; 8192];
            let len = terminal.screen.read(&mut piece).expect("output");
            got.extend(&piece[..len]);
            terminal.driver.run();
        }
        assert!(got == text, "the bytes differ");
        assert_eq!(terminal.driver.take_used(TX).expect("done").0, head);
    }

    #[test]
    fn a_long_request_is_written_in_turns() {
        let file = tempfile::tempfile().expect("a file");
        let copy = file.try_clone().expect("a descriptor");
        let console = Console::new(None, Some(copy)).expect("a console");
        let mut driver = TestDriver::start(Box::new(console));
        driver.add(TX, &[&vec![b'x'; 1 << 20]], &[]);
        driver.kick(TX);
        driver.events.run_once(0).expect("loop");
        assert!(driver.take_used(TX).is_none(), "not in one turn");
        driver.run();
        assert!(driver.take_used(TX).is_some());
        assert_eq!(file.metadata().expect("a file").len(), 1 << 20);
    }

    #[test]
    fn output_to_a_closed_reader_is_dropped() {
        let mut terminal = terminal();
        drop(terminal.screen);
        terminal.driver.request(TX, &[b"nobody"], &[]);
        terminal.driver.request(TX, &[b"listens"], &[]);
    }

    #[test]
    fn a_resize_is_told_and_read() {
        let mut terminal = terminal();
        terminal.handle.resize(132, 43);
        terminal.driver.run();
        assert_eq!(terminal.driver.interrupts.take(), [0]);
        let mut size = [0; 4];
        terminal.driver.read_config(0, &mut size);
        assert_eq!(size, [132, 0, 43, 0]);
        terminal.driver.write_config(EMERGENCY_WRITE, b"!\0\0\0");
        let mut last = [0];
        terminal.screen.read_exact(&mut last).expect("output");
        assert_eq!(&last, b"!");
    }

    #[test]
    fn consoles_without_ends_take_everything() {
        let console = Console::new(None, None).expect("a console");
        let mut driver = TestDriver::start(Box::new(console));
        driver.request(TX, &[b"void"], &[]);
        driver.add(RX, &[], &[16]);
        driver.kick_and_run(RX);
        assert!(driver.take_used(RX).is_none());
    }
}
