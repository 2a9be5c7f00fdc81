//! System calls that have no safe form in the libraries, one function each.

// UNSAFETY: these calls take raw pointers, or change what the process is part of. The process has
// one thread from its start to its end, so that none of them can pull the ground from another.
#![expect(
    unsafe_code,
    reason = "clone, setns, prctl, mount_setattr, seccomp, keyctl and execve take raw arguments"
)]

use std::ffi::CStr;
use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::ptr;

use crate::plan::MemoryPolicy;
use crate::plan::Scheduler;
use crate::plan::Seccomp;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// A descriptor that was inherited under a number that the plan names.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only asks whether the number is open.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) }.into())?;
    // SAFETY: the number is open, and each number of the plan is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A descriptor that stays the caller's: keeps its number.
pub(crate) fn set_inheritable(number: RawFd) -> io::Result<()> {
    // SAFETY: F_SETFD changes one flag of a descriptor.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }.into())?;
    Ok(())
}

/// Leaves namespaces for new ones.
pub(crate) fn unshare(flags: u32) -> io::Result<()> {
    // SAFETY: no flag that the runtime gives separates the descriptor table or the memory.
    check(unsafe { libc::syscall(libc::SYS_unshare, libc::c_ulong::from(flags)) })?;
    Ok(())
}

/// Enters the namespaces of a namespace's file or of a process's descriptor.
pub(crate) fn setns(descriptor: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: the call takes a descriptor and a number.
    check(unsafe { libc::syscall(libc::SYS_setns, descriptor.as_raw_fd(), flags) })?;
    Ok(())
}

/// A descriptor of a process.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers.
    let number = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    owned(number)
}

fn owned(number: libc::c_long) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(number).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_PARENT: u64 = 0x8000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks; the child is the runtime's, not this process's. Returns 0 in the child.
///
/// `sibling` says whose child it is: the runtime's, or this process's own.
pub(crate) fn fork(sibling: bool, cgroup: Option<RawFd>) -> io::Result<i32> {
    let mut args = CloneArgs::default();
    if sibling {
        args.flags |= CLONE_PARENT;
    } else {
        args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.unsigned_abs());
    }
    // SAFETY: without CLONE_VM this is fork: the child goes on with a copy of the memory, and one
    // thread is all that there is.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    i32::try_from(pid).map_err(io::Error::other)
}

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Changes a mount's attributes: `MOUNT_ATTR_*`.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    below: bool,
    set: u64,
    clear: u64,
    user_namespace: Option<RawFd>,
) -> io::Result<()> {
    const AT_RECURSIVE: libc::c_int = 0x8000;
    const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;
    let mut attributes = MountAttr {
        set,
        clear,
        propagation: 0,
        user_namespace: 0,
    };
    if let Some(namespace) = user_namespace {
        attributes.set |= MOUNT_ATTR_IDMAP;
        attributes.user_namespace = u64::from(namespace.unsigned_abs());
    }
    let flags = libc::AT_EMPTY_PATH | if below { AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty string, and the attributes are read for the size that is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    })?;
    Ok(())
}

/// One operation of `prctl` with one argument.
pub(crate) fn prctl(operation: libc::c_int, argument: u64) -> io::Result<()> {
    // SAFETY: the operations used here take numbers.
    check(unsafe { libc::prctl(operation, argument, 0u64, 0u64, 0u64) }.into())?;
    Ok(())
}

fn ambient(operation: libc::c_int, capability: u64) -> io::Result<()> {
    // SAFETY: numbers alone.
    let result = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, operation, capability, 0u64, 0u64) };
    check(result.into())?;
    Ok(())
}

/// Raises one capability in the ambient set.
pub(crate) fn raise_ambient(capability: u32) -> io::Result<()> {
    ambient(libc::PR_CAP_AMBIENT_RAISE, capability.into())
}

/// Empties the ambient set.
pub(crate) fn clear_ambient() -> io::Result<()> {
    ambient(libc::PR_CAP_AMBIENT_CLEAR_ALL, 0)
}

/// Sets the three sets of the thread: effective, permitted, inheritable.
pub(crate) fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header {
        version: 0x2008_0522,
        pid: 0,
    };
    let halves = |set: u64| [set & 0xffff_ffff, set >> 32];
    let [e, p, i] = [halves(effective), halves(permitted), halves(inheritable)];
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX);
    let data: [u32; 6] = [
        low(e[0]),
        low(p[0]),
        low(i[0]),
        low(e[1]),
        low(p[1]),
        low(i[1]),
    ];
    // SAFETY: version 3 reads two triples of 32 bits, which is what `data` is.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Becomes another user and group, wholly.
pub(crate) fn become_user(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: numbers alone.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: numbers alone.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// Sets the supplementary groups.
pub(crate) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the length is that of the slice.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// Sets one limit of the process.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: the limit outlives the call; no old value is asked for.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            &raw const limit,
            ptr::null_mut::<libc::c_void>(),
        )
    })?;
    Ok(())
}

/// Installs a system call filter; with `SECCOMP_FILTER_FLAG_NEW_LISTENER` by what its calls are decided.
pub(crate) fn seccomp(filter: &Seccomp) -> io::Result<Option<OwnedFd>> {
    const NEW_LISTENER: u32 = 8;
    let program: Vec<libc::sock_filter> = filter
        .program
        .iter()
        .map(|&(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k })
        .collect();
    let header = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the header names the program's own length; the kernel copies and checks it.
    let number = check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            filter.flags,
            &raw const header,
        )
    })?;
    if filter.flags & NEW_LISTENER == 0 {
        return Ok(None);
    }
    owned(number).map(Some)
}

/// Starts a new session keyring.
pub(crate) fn join_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: the name ends with a zero byte.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) })?;
    Ok(())
}

/// Marks every descriptor from `first` on to be closed by the next program.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: a mark is set; nothing is closed.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Sets how programs of the process see the machine.
pub(crate) fn personality(value: u64) -> io::Result<()> {
    // SAFETY: a number alone.
    check(unsafe { libc::syscall(libc::SYS_personality, value) })?;
    Ok(())
}

/// Sets class and priority of the process's I/O.
pub(crate) fn io_priority(value: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: numbers alone.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })?;
    Ok(())
}

/// The terminal's program end of its multiplexer end.
pub(crate) fn terminal_peer(multiplexer: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: the number is read and outlives the call.
    let unlocked =
        unsafe { libc::ioctl(multiplexer.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) };
    check(unlocked.into())?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the call takes flags and returns a new descriptor.
    let peer =
        check(unsafe { libc::ioctl(multiplexer.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    owned(peer)
}

/// The number of a terminal in its file system.
pub(crate) fn terminal_number(multiplexer: BorrowedFd<'_>) -> io::Result<u32> {
    let mut number: libc::c_uint = 0;
    // SAFETY: the kernel writes one number.
    check(unsafe { libc::ioctl(multiplexer.as_raw_fd(), libc::TIOCGPTN, &raw mut number) }.into())?;
    Ok(number)
}

/// Makes a terminal the session's own.
pub(crate) fn take_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a number alone.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())?;
    Ok(())
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    const SET_FLAGS: libc::Ioctl = 0x8914;
    // SAFETY: the call takes numbers.
    let socket = check(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into(),
    )?;
    let socket = owned(socket)?;
    let mut name = [0 as libc::c_char; libc::IFNAMSIZ];
    for (place, byte) in name.iter_mut().zip(*b"lo") {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    let up = i16::try_from(libc::IFF_UP).map_err(io::Error::other)?;
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: up },
    };
    // SAFETY: the request outlives the call; the kernel reads name and flags.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SET_FLAGS, &raw const request) }.into())?;
    Ok(())
}

extern "C" fn leave(signal: libc::c_int) {
    // SAFETY: it ends the process, and touches nothing of it.
    unsafe { libc::_exit(128 + signal) }
}

/// Lets those signals end the process that ask for it, until the program takes over.
pub(crate) fn end_by_signals() {
    let handler: extern "C" fn(libc::c_int) = leave;
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the handler calls nothing but _exit, which may be called at any time.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Gives every signal its default action and blocks none.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action runs no code of ours. KILL and STOP refuse, which is right.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an all-zero set is the empty one.
    unsafe {
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, ptr::null_mut());
    }
}

/// Becomes another program. Returns only when it can't.
pub(crate) fn execute(
    program: Result<&CStr, BorrowedFd<'_>>,
    args: &[CString],
    env: &[CString],
) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (args, env) = (pointers(args), pointers(env));
    // SAFETY: both lists end with a null pointer, and their strings outlive the call.
    unsafe {
        match program {
            Ok(path) => libc::syscall(libc::SYS_execve, path.as_ptr(), args.as_ptr(), env.as_ptr()),
            Err(descriptor) => libc::syscall(
                libc::SYS_execveat,
                descriptor.as_raw_fd(),
                c"".as_ptr(),
                args.as_ptr(),
                env.as_ptr(),
                libc::AT_EMPTY_PATH,
            ),
        };
    }
    io::Error::last_os_error()
}

/// Blocks every signal and returns the next one: for the container's process 1.
pub(crate) fn wait_signal() -> io::Result<i32> {
    // SAFETY: the set is filled before it is read; no information is asked for.
    let signal = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigwaitinfo(&raw const all, ptr::null_mut())
    };
    check(signal.into())?;
    Ok(signal)
}

/// Blocks every signal.
pub(crate) fn block_signals() {
    // SAFETY: the set is filled before it is read.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const all, ptr::null_mut());
    }
}

/// Closes a descriptor that nobody here owns; one that isn't open is left.
pub(crate) fn close(number: RawFd) {
    // SAFETY: it was inherited, and no value of this process stands for it.
    unsafe { libc::close(number) };
}

/// Lets the process run on every processor that its cgroup has, or on those of a mask.
pub(crate) fn set_affinity(processors: Option<&[u64]>) -> io::Result<()> {
    let all = [u64::MAX; 128];
    let mask = processors.unwrap_or(&all);
    // SAFETY: the length is that of the slice; the kernel takes what it knows of it.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(mask),
            mask.as_ptr(),
        )
    })?;
    Ok(())
}

/// Sets how the process is scheduled.
pub(crate) fn set_scheduler(wanted: &Scheduler) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let attributes = Attributes {
        size: u32::try_from(size_of::<Attributes>()).map_err(io::Error::other)?,
        policy: wanted.policy,
        flags: wanted.flags,
        nice: wanted.nice,
        priority: wanted.priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
    };
    // SAFETY: the kernel reads as many bytes as the first field says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })?;
    Ok(())
}

/// Sets from which nodes memory comes.
pub(crate) fn set_memory_policy(wanted: &MemoryPolicy) -> io::Result<()> {
    let bits = wanted.nodes.len() * 64;
    let nodes = if bits == 0 {
        ptr::null()
    } else {
        wanted.nodes.as_ptr()
    };
    // The kernel reads one bit less than it is told.
    let length = if bits == 0 { 0 } else { bits + 1 };
    // SAFETY: the length is that of the list.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, wanted.mode, nodes, length) })?;
    Ok(())
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the caller, which never returns to the owners of these, uses none of them again.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) })?;
    Ok(())
}

/// Ends the process at once: for one that shares all its state with a fork of itself.
pub(crate) fn end(status: i32) -> ! {
    // SAFETY: nothing runs after it.
    unsafe { libc::_exit(status) }
}
