//! Descriptors that came with the document or with a message.

// UNSAFETY: takes ownership of inherited descriptor numbers.
#![expect(
    unsafe_code,
    reason = "inherited descriptors are plain numbers until somebody owns them"
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;

use crate::config::Config;
use crate::config::Fd;

/// Standard error is the log.
const FIRST: Fd = 3;

/// Descriptors that nobody has taken yet.
#[derive(Debug, Default)]
pub(crate) struct Fds(BTreeMap<Fd, OwnedFd>);

/// Takes over one inherited descriptor.
///
/// Called once for each number, before the process has opened any of its own.
pub(crate) fn inherit(fd: Fd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD changes nothing, and fails for a number that isn't open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if fd < FIRST || flags < 0 {
        return Err(io::Error::other(format!("descriptor {fd} is not open")));
    }
    // SAFETY: it is open, and nobody else in the process owns it: see above.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}

impl Fds {
    /// Takes over what `config` names, and closes all others above standard error.
    pub(crate) fn claim(config: &Config) -> io::Result<Self> {
        let mut numbers: Vec<Fd> = config
            .control_fd
            .into_iter()
            .chain(config.listen_fd)
            .collect();
        numbers.extend(config.ports.iter().map(|port| port.fd));
        numbers.extend(config.publish.iter().map(|publish| publish.fd));
        numbers.sort_unstable();
        if let Some(twice) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(io::Error::other(format!(
                "descriptor {} is named twice",
                twice[0]
            )));
        }
        let mut owned = BTreeMap::new();
        let mut next = FIRST;
        for fd in numbers {
            owned.insert(fd, inherit(fd)?);
            close_range(next, fd - 1);
            next = fd + 1;
        }
        close_range(next, Fd::MAX);
        Ok(Self(owned))
    }

    /// Descriptors that came with a message, numbered from 0.
    pub(crate) fn of_message(fds: Vec<OwnedFd>) -> Self {
        Self((0..).zip(fds).collect())
    }

    /// Takes one out.
    pub(crate) fn take(&mut self, fd: Fd) -> io::Result<OwnedFd> {
        self.0
            .remove(&fd)
            .ok_or_else(|| io::Error::other(format!("there is no descriptor {fd}")))
    }
}

fn close_range(first: Fd, last: Fd) {
    if first <= last {
        // SAFETY: nobody owns a descriptor in this range: the process has opened none yet, and
        // those that the document names are outside. Old kernels without the call leave them open.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}
