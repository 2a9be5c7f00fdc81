//! Programs that the kernel asks: which devices a cgroup of version 2 may use.

// UNSAFETY: bpf takes a structure with pointers to the program and its license.
#![expect(unsafe_code, reason = "the kernel reads the program by a pointer")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups above stay in force.
const ALLOW_MULTI: u32 = 2;

/// The head of `union bpf_attr` for loading (linux/bpf.h); what follows is zero to the kernel.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The same for attaching.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    let pointer: *const T = attributes;
    // SAFETY: the structure is read for its own size and outlives the call, as does what it names.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

/// Attaches a program, 8 bytes an instruction, to a cgroup's directory. It lives as long as that.
pub(crate) fn attach_device_program(directory: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let license = c"Apache-2.0";
    let load = Load {
        kind: TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: u64::try_from(program.as_ptr().addr()).map_err(io::Error::other)?,
        license: u64::try_from(license.as_ptr().addr()).map_err(io::Error::other)?,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let number = bpf(PROG_LOAD, &load)?;
    // SAFETY: the kernel has just made this descriptor.
    let loaded = unsafe { OwnedFd::from_raw_fd(number) };
    let attach = Attach {
        target: directory.as_raw_fd().unsigned_abs(),
        program: loaded.as_raw_fd().unsigned_abs(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    bpf(PROG_ATTACH, &attach).map(|_| ())
}
