//! A small process that makes space processes.
//!
//! The VM process may start nothing once it is jailed, so it starts this one before: a copy of itself
//! that holds nothing but a socket and guest memory, and does one thing. It ends with the machine.
//!
//! A space is made of two processes that share one address space. The first is a copy of the
//! spawner; it maps the stub, starts the second, and goes on in the stub, which the monitor then
//! empties the rest of the address space around.

// UNSAFETY: forks, and prepares processes by raw system calls.
#![expect(
    unsafe_code,
    reason = "processes are made and given away below what Rust knows of"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of system calls and places in the stub are small"
)]

use std::arch::asm;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;

use super::filter;
use super::space::receiving_ends;
use super::stub;

/// What a new space is reached by.
#[derive(Debug)]
pub(crate) struct Parts {
    /// Tells of the guest's process, and of the mapper.
    pub guest: OwnedFd,
    pub mapper: OwnedFd,
    /// The guest's process.
    pub process: OwnedFd,
}

const DESCRIPTORS: usize = 3;
/// Number of the guest memory's descriptor in the spawner.
pub(crate) const MEMORY_FD: RawFd = 3;
/// The same of the patched pages' file.
pub(crate) const PATCHES_FD: RawFd = 4;
const SOCKET_FD: RawFd = 5;
/// How long a space may take to be set up.
const PATIENCE_US: u32 = 2_000_000;
const PAUSE_US: u32 = 50;
/// Signals that the guest's code can cause, and the one that the monitor sends.
const SIGNALS: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGUSR1,
];

/// The spawner, as the VM process sees it.
#[derive(Debug)]
pub(crate) struct Spawner {
    socket: OwnedFd,
}

impl Spawner {
    /// Starts it. `memory` is the machine's RAM, `patches` the file of patched pages of it.
    pub(crate) fn start(memory: RawFd, patches: RawFd) -> io::Result<Self> {
        // Asked here, before the vCPUs' threads are filtered.
        receiving_ends();
        let mut pair = [0; 2];
        // SAFETY: the array has room for two descriptors.
        let made = unsafe {
            libc::socketpair(
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
                0,
                pair.as_mut_ptr(),
            )
        };
        if made != 0 {
            return Err(io::Error::last_os_error());
        }
        let filter = filter::of_spawner();
        // SAFETY: just made, and owned by nobody else.
        let (ours, theirs) =
            unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) };
        // SAFETY: a fork. The child makes system calls alone: it takes no locks and allocates nothing.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            -1 => Err(io::Error::last_os_error()),
            0 => serve(theirs.as_raw_fd(), [memory, patches], &filter),
            _ => Ok(Self { socket: ours }),
        }
    }

    /// Makes a space around the stub in `file`.
    pub(crate) fn make(&self, file: &OwnedFd) -> io::Result<Parts> {
        send(self.socket.as_raw_fd(), &[file.as_raw_fd()])?;
        let mut descriptors = [-1; DESCRIPTORS];
        if receive(self.socket.as_raw_fd(), &mut descriptors)? != DESCRIPTORS {
            return Err(io::Error::other("no space process could be made"));
        }
        // SAFETY: received just now, and owned by nobody else.
        let [guest, mapper, process] =
            descriptors.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor) });
        Ok(Parts {
            guest,
            mapper,
            process,
        })
    }
}

/// Room for the descriptors of a message.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Sends a message of one byte with descriptors; of none when there are none.
fn send(socket: RawFd, descriptors: &[RawFd]) -> io::Result<()> {
    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeroes is an empty message header.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let len = u32::try_from(size_of_val(descriptors)).unwrap_or(0);
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer has room for as many descriptors as are ever sent.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(len) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(len) as usize;
            ptr::copy_nonoverlapping(
                descriptors.as_ptr(),
                libc::CMSG_DATA(header).cast(),
                descriptors.len(),
            );
        }
    }
    // SAFETY: the header leads to live buffers.
    if unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) } != 1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Receives a message and returns how many descriptors came with it.
fn receive(socket: RawFd, descriptors: &mut [RawFd; DESCRIPTORS]) -> io::Result<usize> {
    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = Control([0; 64]);
    // SAFETY: all zeroes is an empty message header.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: the header leads to live buffers.
    let got = unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    match got {
        -1 => return Err(io::Error::last_os_error()),
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => {}
    }
    // SAFETY: the kernel filled the control buffer, which is large enough for what is sent.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Ok(0);
        }
        let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
        let count = (bytes / size_of::<RawFd>()).min(DESCRIPTORS);
        ptr::copy_nonoverlapping(
            libc::CMSG_DATA(header).cast(),
            descriptors.as_mut_ptr(),
            count,
        );
        Ok(count)
    }
}

fn end(status: libc::c_int) -> ! {
    // SAFETY: ends the process and nothing else.
    unsafe { libc::_exit(status) }
}

/// The spawner's life.
fn serve(socket: RawFd, files: [RawFd; 2], filter: &[filter::Instruction]) -> ! {
    // SAFETY: system calls on this process's own state; the descriptors are moved out of each
    // other's way first.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        let socket = libc::fcntl(socket, libc::F_DUPFD, 16);
        let files = files.map(|file| libc::fcntl(file, libc::F_DUPFD, 16));
        if socket < 0 || files.iter().any(|&file| file < 0) {
            end(1);
        }
        libc::dup2(files[0], MEMORY_FD);
        libc::dup2(files[1], PATCHES_FD);
        libc::dup2(socket, SOCKET_FD);
        libc::close(0);
        libc::close(1);
        libc::close(2);
        libc::syscall(libc::SYS_close_range, SOCKET_FD + 1, u32::MAX, 0);
        let nothing = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        libc::setrlimit(libc::RLIMIT_FSIZE, &raw const nothing);
        libc::setrlimit(libc::RLIMIT_CORE, &raw const nothing);
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_ptr().cast_mut().cast(),
        };
        let set = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        );
        if set != 0 {
            end(1);
        }
    }
    loop {
        let mut descriptors = [-1; DESCRIPTORS];
        match receive(SOCKET_FD, &mut descriptors) {
            Ok(1) => {}
            Ok(_) => continue,
            Err(_) => end(0),
        }
        if make_space(descriptors[0]).is_err() {
            let _ = send(SOCKET_FD, &[]);
        }
    }
}

/// Makes one space and sends what it is reached by.
fn make_space(file: RawFd) -> Result<(), ()> {
    // SAFETY: a new mapping of the file at an address of the kernel's choice.
    let view = unsafe {
        libc::mmap(
            ptr::null_mut(),
            stub::BYTES as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file,
            0,
        )
    };
    if view == libc::MAP_FAILED {
        return Err(());
    }
    let head = view as u64 + stub::HEAD;
    // SAFETY: aligned words inside the mapping, which only atomics access.
    let [guest, mapper, process] = [
        stub::GUEST_LISTENER,
        stub::MAPPER_LISTENER,
        stub::GUEST_PROCESS,
    ]
    .map(|offset| unsafe { AtomicI32::from_ptr((head + offset) as *mut i32) });
    for word in [guest, mapper, process] {
        word.store(-1, Ordering::SeqCst);
    }
    // Descriptors are shared: the filters' own appear here, and need no way out of the space.
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: a fork that shares the descriptors; the child makes system calls alone.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        become_space(file);
    }
    let mut result = Err(());
    if child > 0 {
        let mut waited_us = 0;
        while [guest, mapper, process]
            .iter()
            .any(|word| word.load(Ordering::SeqCst) < 0)
            && waited_us < PATIENCE_US
        {
            // SAFETY: sleeps.
            unsafe { libc::usleep(PAUSE_US) };
            waited_us += PAUSE_US;
        }
        let parts = [
            guest.load(Ordering::SeqCst),
            mapper.load(Ordering::SeqCst),
            process.load(Ordering::SeqCst),
        ];
        if parts.iter().all(|&part| part >= 0) {
            result = send(SOCKET_FD, &parts).map_err(|_| ());
        }
        for part in parts.into_iter().filter(|&part| part >= 0) {
            // SAFETY: this process's copies, which nobody uses any more.
            unsafe { libc::close(part) };
        }
        if result.is_err() {
            // It can signal nobody, but what it started ends with it. Spaces that were well are
            // lost too, which their vCPUs can do without.
            end(1);
        }
    }
    // SAFETY: the mapping and the descriptor are this function's own.
    unsafe {
        libc::munmap(view, stub::BYTES as usize);
        libc::close(file);
    }
    result
}

/// `struct sigaction` as the kernel takes it.
#[repr(C)]
struct KernelAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// The child's way into the stub.
fn become_space(file: RawFd) -> ! {
    let entries = stub::entries();
    if map_stub(file).is_err() || set_signals(entries.signal).is_err() {
        end(1);
    }
    // SAFETY: the stub is mapped, and never comes back.
    unsafe { asm!("jmp {}", in(reg) entries.begin, options(noreturn)) }
}

/// Maps the stub's parts, each with what may be done to it.
fn map_stub(file: RawFd) -> Result<(), ()> {
    let write = libc::PROT_READ | libc::PROT_WRITE;
    let parts = [
        (0, stub::COMMANDS, libc::PROT_READ | libc::PROT_EXEC),
        (stub::COMMANDS, stub::COMMAND_BYTES, libc::PROT_READ),
        (stub::HEAD, stub::BYTES - stub::HEAD, write),
    ];
    for (offset, len, protection) in parts {
        let address = stub::BASE + offset;
        // SAFETY: the place is this process's own, and nothing of it lies there.
        let mapped = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                len as usize,
                protection,
                libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
                file,
                offset.cast_signed(),
            )
        };
        if mapped as u64 != address {
            return Err(());
        }
    }
    Ok(())
}

/// Sends every signal of the guest's code to the stub, on the frame's stack.
fn set_signals(handler: u64) -> Result<(), ()> {
    const SA_RESTORER: u64 = 0x0400_0000;
    const ALL: u64 = u64::MAX;
    let action = KernelAction {
        handler,
        flags: u64::from((libc::SA_SIGINFO | libc::SA_ONSTACK).cast_unsigned()) | SA_RESTORER,
        restorer: handler,
        mask: ALL,
    };
    let none = 0_u64;
    let size = size_of::<u64>();
    // SAFETY: signal state of this process, whose one thread goes on in the stub.
    unsafe {
        for signal in SIGNALS {
            let set = libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const action,
                ptr::null_mut::<KernelAction>(),
                size,
            );
            if set != 0 {
                return Err(());
            }
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null_mut::<u64>(),
            size,
        );
    }
    Ok(())
}
