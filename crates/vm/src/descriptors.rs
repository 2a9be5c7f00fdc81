//! The descriptors that the process was started with: taken over once, and all others closed.

// UNSAFETY: takes ownership of inherited descriptor numbers, and closes ranges of them.
#![expect(
    unsafe_code,
    reason = "inherited descriptors are plain numbers until somebody owns them"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;

use crate::VmError;
use crate::config::Config;
use crate::config::ConfigError;
use crate::config::Fd;

/// Standard error is the log.
const LAST_KEPT: u32 = 2;

/// Inherited descriptors that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Descriptors(BTreeMap<Fd, OwnedFd>);

/// Takes over one inherited descriptor, the configuration's.
///
/// Called once, before anything else in the process has opened one.
pub(crate) fn take_config(fd: Fd) -> Result<File, VmError> {
    require_open("--config-fd", fd)?;
    // SAFETY: it is open, and at the very start of the process nobody else owns a descriptor.
    Ok(unsafe { File::from_raw_fd(fd.0) })
}

impl Descriptors {
    /// Takes over what the document names, and closes every other descriptor above standard
    /// error: whatever a caller leaked must not be in reach of a guest that breaks out.
    ///
    /// Called once, before the process opens descriptors of its own; the configuration's own has
    /// been closed.
    pub(crate) fn claim(config: &Config) -> Result<Self, VmError> {
        let mut named = BTreeMap::new();
        for (path, fd) in config.fds() {
            require_open(&path, fd)?;
            named.insert(fd, path);
        }
        let mut next = LAST_KEPT + 1;
        for fd in named.keys().filter_map(|fd| u32::try_from(fd.0).ok()) {
            close_range(next, fd.checked_sub(1))?;
            next = fd + 1;
        }
        close_range(next, Some(u32::MAX))?;
        let owned = named.into_keys().map(|fd| {
            set_close_on_exec(fd);
            // SAFETY: it was checked to be open, the document names it once (`check_fds`), and
            // nobody else in the process owns a descriptor yet.
            (fd, unsafe { OwnedFd::from_raw_fd(fd.0) })
        });
        Ok(Self(owned.collect()))
    }

    /// Those that came beside a request, numbered from 0.
    pub(crate) fn of_message(fds: Vec<OwnedFd>) -> Self {
        Self((0..).map(Fd).zip(fds).collect())
    }

    /// Looks at a descriptor that somebody takes later.
    pub(crate) fn look(&self, fd: Fd) -> Result<&OwnedFd, VmError> {
        self.0.get(&fd).ok_or_else(|| VmError::Host {
            action: "use a descriptor twice",
            source: io::Error::from_raw_os_error(libc::EBADF),
        })
    }

    /// Takes a descriptor out.
    pub(crate) fn take(&mut self, fd: Fd) -> Result<OwnedFd, VmError> {
        self.0.remove(&fd).ok_or_else(|| VmError::Host {
            action: "use a descriptor twice",
            source: io::Error::from_raw_os_error(libc::EBADF),
        })
    }

    /// [`Self::take`] for a field that may be empty.
    pub(crate) fn take_optional(&mut self, fd: Option<Fd>) -> Result<Option<OwnedFd>, VmError> {
        fd.map(|fd| self.take(fd)).transpose()
    }
}

fn require_open(path: &str, fd: Fd) -> Result<(), VmError> {
    // SAFETY: F_GETFD changes nothing, and fails for a number that isn't open.
    let flags = unsafe { libc::fcntl(fd.0, libc::F_GETFD) };
    if flags < 0 {
        let message = format!("descriptor {} is not open", fd.0);
        return Err(ConfigError::field(path, message).into());
    }
    Ok(())
}

fn set_close_on_exec(fd: Fd) {
    // SAFETY: the descriptor is open. A failure would leave it open in a program that this
    // process never starts.
    unsafe { libc::fcntl(fd.0, libc::F_SETFD, libc::FD_CLOEXEC) };
}

/// Closes `first` to `last`, if there is such a range.
fn close_range(first: u32, last: Option<u32>) -> Result<(), VmError> {
    let Some(last) = last.filter(|&last| last >= first) else {
        return Ok(());
    };
    // SAFETY: nobody owns a descriptor in this range: the process has opened none yet, and those
    // that the document names are outside.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::ENOSYS) {
        return Err(VmError::host("close inherited descriptors")(error));
    }
    close_one_by_one(first, last)
}

/// For kernels before 5.9.
fn close_one_by_one(first: u32, last: u32) -> Result<(), VmError> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let open = limit.current.unwrap_or(1 << 20);
    let open = u32::try_from(open).unwrap_or(u32::MAX);
    for fd in first..=last.min(open) {
        let fd = i32::try_from(fd).map_err(|_| VmError::Usage)?;
        // SAFETY: as in `close_range`.
        unsafe { libc::close(fd) };
    }
    Ok(())
}
