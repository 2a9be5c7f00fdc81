//! What a command may do beyond being its user: capabilities, limits, a filter of its system calls.
//!
//! The host says it in the kernel's own numbers. All of it happens between fork and exec, in the order
//! in which one step leaves the next possible.

// UNSAFETY: prlimit and seccomp take raw pointers.
#![expect(
    unsafe_code,
    reason = "prlimit and seccomp have no safe form in the libraries"
)]

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use serde::Deserialize;
use std::io;

/// The lines of `capabilities(7)`, a bit each.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Capabilities {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

/// A filter of system calls.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Filter {
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
    /// `struct sock_filter` of each instruction, in hexadecimal.
    program: String,
}

/// What a request says of a command's privileges.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Privileges {
    /// Further groups, in place of those that the guest's files give the user.
    pub(crate) groups: Option<Vec<u32>>,
    umask: Option<u32>,
    capabilities: Option<Capabilities>,
    #[serde(default)]
    no_new_privileges: bool,
    /// Each `RLIMIT_*` with its soft and its hard value.
    #[serde(default)]
    limits: Vec<(u32, u64, u64)>,
    oom_score_adj: Option<i32>,
    seccomp: Option<Filter>,
}

/// Privileges made ready, so that no memory is asked for after the fork.
#[derive(Debug)]
pub(crate) struct Prepared {
    wanted: Privileges,
    program: Vec<libc::sock_filter>,
    score: Option<String>,
}

impl Privileges {
    /// Makes them ready.
    ///
    /// # Errors
    ///
    /// The filter isn't hexadecimal.
    pub(crate) fn prepare(&self) -> io::Result<Prepared> {
        let filter = self.seccomp.as_ref();
        let program = filter.map_or(Some(Vec::new()), |filter| instructions(&filter.program));
        Ok(Prepared {
            program: program.ok_or(Errno::INVAL)?,
            score: self.oom_score_adj.map(|score| score.to_string()),
            wanted: self.clone(),
        })
    }
}

impl Prepared {
    /// What only root may do, before the command's user is taken.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(crate) fn before_user(&self) -> io::Result<()> {
        if let Some(score) = &self.score {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
            rustix::io::write(&file, score.as_bytes())?;
        }
        for &(resource, soft, hard) in &self.wanted.limits {
            set_limit(resource, soft, hard)?;
        }
        if let Some(mask) = self.wanted.umask {
            rustix::process::umask(Mode::from_raw_mode(mask));
        }
        if !self.wanted.no_new_privileges {
            // Without that promise the kernel takes a filter from root alone.
            self.filter()?;
        }
        if let Some(sets) = &self.wanted.capabilities {
            for bit in (0..u64::BITS).map(|number| 1 << number) {
                if sets.bounding & bit != 0 {
                    continue;
                }
                let one = CapabilitySet::from_bits_retain(bit);
                match rustix::thread::remove_capability_from_bounding_set(one) {
                    // Beyond the kernel's last.
                    Err(Errno::INVAL) => break,
                    result => result?,
                }
            }
        }
        Ok(rustix::thread::set_keep_capabilities(true)?)
    }

    /// What remains once the user is taken.
    ///
    /// # Errors
    ///
    /// The kernel refused.
    pub(crate) fn after_user(&self) -> io::Result<()> {
        rustix::thread::set_keep_capabilities(false)?;
        if let Some(sets) = &self.wanted.capabilities {
            set_capabilities(sets)?;
        }
        if self.wanted.no_new_privileges {
            rustix::thread::set_no_new_privs(true)?;
            self.filter()?;
        }
        Ok(())
    }

    fn filter(&self) -> io::Result<()> {
        let Some(filter) = &self.wanted.seccomp else {
            return Ok(());
        };
        let header = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(|_| Errno::INVAL)?,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the header names the program's own length; the kernel copies and checks it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                filter.flags,
                &raw const header,
            )
        };
        succeeded(result)
    }
}

fn set_capabilities(sets: &Capabilities) -> io::Result<()> {
    // What the kernel doesn't know it would refuse; what isn't in the bounds can't be had.
    let known = rustix::thread::capabilities(None)?.permitted;
    let kept = |bits| CapabilitySet::from_bits_retain(bits) & known;
    let given = CapabilitySets {
        effective: kept(sets.effective),
        permitted: kept(sets.permitted),
        inheritable: kept(sets.inheritable),
    };
    rustix::thread::set_capabilities(None, given)?;
    rustix::thread::clear_ambient_capability_set()?;
    let ambient = kept(sets.ambient) & given.permitted & given.inheritable;
    for one in ambient.iter() {
        rustix::thread::configure_capability_in_ambient_set(one, true)?;
    }
    Ok(())
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    let none = std::ptr::null_mut::<libc::rlimit64>();
    // SAFETY: the limit outlives the call; no old value is asked for.
    let result = unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, none) };
    succeeded(result)
}

fn succeeded(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn instructions(text: &str) -> Option<Vec<libc::sock_filter>> {
    let words = text.as_bytes().chunks(16).map(|digits| {
        let digits = str::from_utf8(digits)
            .ok()
            .filter(|text| text.len() == 16)?;
        let bytes = u64::from_str_radix(digits, 16).ok()?.to_be_bytes();
        let [a, b, jt, jf, c, d, e, f] = bytes;
        Some(libc::sock_filter {
            code: u16::from_ne_bytes([a, b]),
            jt,
            jf,
            k: u32::from_ne_bytes([c, d, e, f]),
        })
    });
    words.collect()
}

#[cfg(test)]
mod tests {
    use super::instructions;

    #[test]
    fn a_filter_is_read_as_the_kernel_has_it() {
        let read = instructions("060001020000ff7f").expect("it is well formed");

        let [only] = read.as_slice() else {
            panic!("one instruction was given");
        };
        assert_eq!(
            (only.code, only.jt, only.jf, only.k),
            (6, 1, 2, 0x7fff_0000)
        );
    }

    #[test]
    fn a_filter_that_is_cut_off_is_refused() {
        assert!(instructions("060001020000ff7f06").is_none());
        assert!(instructions("zz0001020000ff7f").is_none());
    }
}
