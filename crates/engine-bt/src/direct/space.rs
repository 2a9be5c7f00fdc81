//! A space: an address space of the host's that shows a guest's, and the process that runs in it.
//!
//! The monitor speaks with both of a space's processes by the kernel's word alone: each waits in a
//! call that its filter reports, so that while the monitor works the guest's process can't be
//! running, whatever the guest wrote where.

// UNSAFETY: raw system calls, and a frame that another process writes.
#![expect(
    unsafe_code,
    reason = "speaks with filters by ioctl and reads shared memory by pointer"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of system calls and places in the stub are small"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::sync::OnceLock;

use super::filter;
use super::spawner::Spawner;
use super::stub;
use super::stub::COMMAND_WORDS;
use crate::core::flag;
use crate::mapping::Reservation;
use crate::mapping::memory_file;

/// A system call for the mapper.
pub(crate) type Command = [u64; COMMAND_WORDS];

const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;
const NOTIF_SET_FLAGS: libc::c_ulong = 0x4008_2104;
/// Wake the answered process on this processor, since this thread is about to wait.
const SYNC_WAKE_UP: libc::c_ulong = 1;
/// A process that says nothing for so long while it should is looked at again.
const LOOK_MS: libc::c_int = 1000;

/// Whether a wait for a report ends when the process that would send it does: since Linux 6.11. On
/// others poll has to be asked first.
///
/// Asks the kernel the first time, which a filtered thread can't.
pub(super) fn receiving_ends() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        // SAFETY: plain data that the call fills with text.
        let mut name: libc::utsname = unsafe { std::mem::zeroed() };
        // SAFETY: a valid structure.
        unsafe { libc::uname(&raw mut name) };
        let release: Vec<u8> = name
            .release
            .iter()
            .map(|&byte| byte.cast_unsigned())
            .collect();
        version(&String::from_utf8_lossy(&release)) >= (6, 11)
    })
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// `struct seccomp_notif`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Notice {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    pointer: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// One end of a filter's reports.
#[derive(Debug)]
struct Listener {
    descriptor: OwnedFd,
    /// The report that waits for its answer.
    waiting: u64,
}

impl Listener {
    fn new(descriptor: OwnedFd) -> Self {
        // SAFETY: an optimisation that newer kernels have; nothing is passed by pointer.
        unsafe { libc::ioctl(descriptor.as_raw_fd(), NOTIF_SET_FLAGS, SYNC_WAKE_UP) };
        Self {
            descriptor,
            waiting: 0,
        }
    }

    /// Waits until the process is in its call, and returns the call's arguments.
    fn wait(&mut self) -> io::Result<[u64; 6]> {
        let fd = self.descriptor.as_raw_fd();
        let mut ask_first = !receiving_ends();
        loop {
            if ask_first && !self.poll()? {
                continue;
            }
            let mut notice = Notice::default();
            // SAFETY: a zeroed structure of the size that the number names.
            if unsafe { libc::ioctl(fd, NOTIF_RECV, &raw mut notice) } == 0 {
                self.waiting = notice.id;
                return Ok(notice.arguments);
            }
            let error = io::Error::last_os_error();
            // ENOENT: the process was killed meanwhile; poll says so next time.
            let again = [Some(libc::EINTR), Some(libc::ENOENT)];
            if !again.contains(&error.raw_os_error()) {
                return Err(error);
            }
            ask_first = true;
        }
    }

    /// Waits for a report, but not for ever: whether there is one.
    fn poll(&self) -> io::Result<bool> {
        let mut poll = libc::pollfd {
            fd: self.descriptor.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one live entry.
        let ready = unsafe { libc::poll(&raw mut poll, 1, LOOK_MS) };
        if ready > 0 && poll.revents & libc::POLLIN == 0 {
            return Err(io::Error::other("a space process ended"));
        }
        Ok(ready > 0)
    }

    /// Lets the process go on.
    fn answer(&mut self) -> io::Result<()> {
        let answer = Answer {
            id: self.waiting,
            ..Answer::default()
        };
        // SAFETY: a whole structure of the size that the number names.
        if unsafe { libc::ioctl(self.descriptor.as_raw_fd(), NOTIF_SEND, &raw const answer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Offsets in the kernel's signal context (arch/x86/include/uapi/asm/sigcontext.h).
mod context {
    pub(super) const REGISTERS: u64 = 40;
    pub(super) const FPSTATE: u64 = REGISTERS + 23 * 8;
    pub(super) const MASK: u64 = 296;
    pub(super) const BYTES: u64 = 304;
    /// The part of the vector state's area that says how large it is.
    pub(super) const SOFTWARE: u64 = 464;
    pub(super) const SOFTWARE_END: u64 = 512;
}

/// Indices into the context's registers.
pub(crate) mod register {
    pub(crate) const RIP: usize = 16;
    pub(crate) const FLAGS: usize = 17;
    pub(crate) const ERROR: usize = 19;
    pub(crate) const TRAP: usize = 20;
    pub(crate) const FAULT_ADDRESS: usize = 22;
    pub(super) const COUNT: usize = 23;
    /// The context's place of each general register, by its number in instructions.
    pub(crate) const GENERAL: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
}

/// The registers of a signal context.
pub(crate) type Registers = [u64; register::COUNT];

/// A space.
#[derive(Debug)]
pub(crate) struct Space {
    /// The stub's parts behind its code.
    view: Reservation,
    guest: Listener,
    mapper: Listener,
    process: OwnedFd,
    /// Offset of the context in the stub, and of its vector state.
    context: u64,
    fpstate: u64,
    /// Both as the kernel first wrote them: what isn't registers is put back before each entry.
    pristine: Box<[u8]>,
    software: [u8; 48],
}

impl Space {
    /// Makes an empty space.
    pub(crate) fn new(spawner: &Spawner) -> io::Result<Self> {
        let file = memory_file(c"ringfence-bt-space", stub::BYTES)?;
        let view = Reservation::of_file(&file, stub::BYTES, libc::PROT_READ | libc::PROT_WRITE)?;
        write_stub(&view);
        let parts = spawner.make(&file)?;
        let mut space = Self {
            view,
            guest: Listener::new(parts.guest),
            mapper: Listener::new(parts.mapper),
            process: parts.process,
            context: 0,
            fpstate: 0,
            pristine: Box::default(),
            software: [0; 48],
        };
        space.mapper.wait()?;
        let arguments = space.guest.wait()?;
        space.learn_frame(arguments[2])?;
        space.execute(&[
            unmap(0, stub::BASE),
            unmap(stub::END, stub::TASK_END - stub::END),
        ])?;
        Ok(space)
    }

    /// The guest's process, for signals.
    pub(crate) fn process(&self) -> RawFd {
        self.process.as_raw_fd()
    }

    /// Has the mapper execute commands. The guest's process waits meanwhile.
    pub(crate) fn execute(&mut self, commands: &[Command]) -> io::Result<()> {
        for batch in commands.chunks(stub::MOST_COMMANDS) {
            let start = self.view.start() + stub::COMMANDS;
            // SAFETY: the commands' part has room for a whole batch, and the mapper reads it later.
            unsafe {
                (start as *mut u64).write_volatile(batch.len() as u64);
                std::ptr::copy_nonoverlapping(
                    batch.as_ptr(),
                    (start + 8) as *mut Command,
                    batch.len(),
                );
            }
            self.mapper.answer()?;
            let [failed, ..] = self.mapper.wait()?;
            if failed != 0 {
                return Err(io::Error::other(format!("{failed} mappings failed")));
            }
        }
        Ok(())
    }

    /// Runs the guest's code until it stops, and returns the number of the signal that stopped it
    /// (as the guest's process says).
    pub(crate) fn run(&mut self) -> io::Result<u64> {
        self.guest.answer()?;
        Ok(self.guest.wait()?[0])
    }

    /// The context lies where the kernel puts it: always in the same place, known from the first
    /// signal, which comes before any of the guest's code.
    fn learn_frame(&mut self, context: u64) -> io::Result<()> {
        let inside = |address: u64, bytes: u64| {
            let offset = address.wrapping_sub(stub::BASE);
            (offset >= stub::FRAME && offset <= stub::BYTES - bytes).then_some(offset)
        };
        let bad = || io::Error::other("a signal frame of an unknown kind");
        self.context = inside(context, context::BYTES).ok_or_else(bad)?;
        let mut head = vec![0; context::BYTES as usize].into_boxed_slice();
        self.read(self.context, &mut head);
        self.pristine = head;
        let fpstate = self.word(self.context + context::FPSTATE);
        self.fpstate = inside(fpstate, 1024).ok_or_else(bad)?;
        let mut software = [0; 48];
        self.read(self.fpstate + context::SOFTWARE, &mut software);
        self.software = software;
        Ok(())
    }

    /// Registers as the last signal found them.
    pub(crate) fn registers(&self) -> Registers {
        std::array::from_fn(|index| self.word(self.context + context::REGISTERS + 8 * index as u64))
    }

    /// Sets what the process goes on with, and puts back whatever else is in the frame.
    pub(crate) fn set_registers(&mut self, registers: &Registers) {
        let pristine = std::mem::take(&mut self.pristine);
        self.write(self.context, &pristine);
        self.pristine = pristine;
        for index in (0..16).chain([register::RIP, register::FLAGS]) {
            let at = self.context + context::REGISTERS + 8 * index as u64;
            self.set_word(at, registers[index]);
        }
        let kept = registers[register::FLAGS] & stub::KEPT_FLAGS;
        self.set_word(stub::HEAD + stub::FLAGS, kept | flag::IF | flag::ONE);
        self.set_word(self.context + context::MASK, 0);
        let software = self.software;
        self.write(self.fpstate + context::SOFTWARE, &software);
    }

    /// x87 and vector state as the last signal found it, in XSAVE's standard format.
    pub(crate) fn vectors(&self, area: &mut [u8]) {
        self.read(self.fpstate, area);
    }

    /// Sets the state that the process goes on with.
    pub(crate) fn set_vectors(&mut self, area: &[u8]) {
        self.write(self.fpstate, &area[..context::SOFTWARE as usize]);
        let rest = &area[context::SOFTWARE_END as usize..];
        self.write(self.fpstate + context::SOFTWARE_END, rest);
    }

    /// Ticks of the time-stamp counter for which the last visit ran the guest's code, as the space
    /// says.
    pub(crate) fn ticks_inside(&self) -> u64 {
        let [entered, left] =
            [stub::ENTERED, stub::LEFT].map(|offset| self.word(stub::HEAD + offset));
        left.saturating_sub(entered)
    }

    /// Selectors of DS, ES, FS and GS, which code can load without a trap.
    pub(crate) fn selectors(&self) -> [u16; 4] {
        let word = self.word(stub::HEAD + stub::SELECTORS);
        std::array::from_fn(|index| (word >> (16 * index)) as u16)
    }

    /// FS and GS bases.
    pub(crate) fn bases(&self) -> (u64, u64) {
        (
            self.word(stub::HEAD + stub::FS_BASE),
            self.word(stub::HEAD + stub::GS_BASE),
        )
    }

    pub(crate) fn set_bases(&mut self, fs: u64, gs: u64) {
        self.set_word(stub::HEAD + stub::FS_BASE, fs);
        self.set_word(stub::HEAD + stub::GS_BASE, gs);
    }

    fn word(&self, offset: u64) -> u64 {
        debug_assert!(offset + 8 <= stub::BYTES);
        // SAFETY: inside the view; another process may write it, which a volatile read allows.
        unsafe { ((self.view.start() + offset) as *const u64).read_volatile() }
    }

    fn set_word(&mut self, offset: u64, value: u64) {
        debug_assert!(offset + 8 <= stub::BYTES);
        // SAFETY: as above.
        unsafe { ((self.view.start() + offset) as *mut u64).write_volatile(value) }
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        assert!(offset + data.len() as u64 <= stub::BYTES);
        // SAFETY: inside the view.
        unsafe { crate::ram::read_raw(self.view.start() + offset, data) };
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(offset + data.len() as u64 <= stub::BYTES);
        // SAFETY: inside the view.
        unsafe {
            crate::ram::copy_raw(data.as_ptr() as u64, self.view.start() + offset, data.len());
        }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        kill(self.process(), libc::SIGKILL);
    }
}

/// Sends a signal to a space's process. A descriptor that is none, or a process that ended, is no
/// error.
pub(crate) fn kill(process: RawFd, signal: libc::c_int) {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: no memory is passed.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process, signal, none, 0) };
}

/// A command that unmaps.
pub(crate) fn unmap(address: u64, len: u64) -> Command {
    [libc::SYS_munmap.cast_unsigned(), address, len, 0, 0, 0, 0]
}

/// Writes the stub's code, and the filters into its head.
fn write_stub(view: &Reservation) {
    let entries = stub::entries();
    let head = view.start() + stub::HEAD;
    let guest = filter::of_guest(&entries);
    let mapper = filter::of_mapper();
    let there = stub::BASE + stub::HEAD;
    let code = stub::code();
    // SAFETY: the code's part holds a page, the head has room for both filters and what names
    // them (`struct sock_fprog`), and no process uses the file yet.
    unsafe {
        crate::ram::copy_raw(code.as_ptr() as u64, view.start(), code.len());
        ((head + stub::SIGNAL_STACK) as *mut [u64; 3]).write_unaligned([
            stub::BASE + stub::FRAME,
            0,
            stub::FRAME_BYTES,
        ]);
        for (program, at) in [(&guest, stub::GUEST_FILTER), (&mapper, stub::MAPPER_FILTER)] {
            crate::ram::copy_raw(
                program.as_ptr() as u64,
                head + at,
                size_of_val(&program[..]),
            );
        }
        ((head + stub::GUEST_PROGRAM) as *mut [u64; 2])
            .write_unaligned([guest.len() as u64, there + stub::GUEST_FILTER]);
        ((head + stub::MAPPER_PROGRAM) as *mut [u64; 2])
            .write_unaligned([mapper.len() as u64, there + stub::MAPPER_FILTER]);
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn a_kernels_version_is_read_from_its_release() {
        for (release, numbers) in [
            ("6.11.0-rc1", (6, 11)),
            ("6.1.0-49-cloud-amd64", (6, 1)),
            ("7.0+", (7, 0)),
            ("unknown", (0, 0)),
        ] {
            assert_eq!(version(release), numbers);
        }
    }
}
