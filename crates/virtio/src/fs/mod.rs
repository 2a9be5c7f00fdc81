//! The file system device (virtio 1.2 §5.11): host directories, served in process by FUSE.
//!
//! ```text
//!   device ── queue ──► server (FUSE requests) ──► FileSystem ── one name at a time ──► host
//!                                                    │ layout: which names, from which directory
//!                                                    │ nodes:  what the guest knows by number
//!                                                    └ handles: what it has open
//! ```
//!
//! **No escape.** The process holds directory descriptors and no paths. The guest's kernel walks
//! paths and follows symbolic links; what arrives here is a known directory and one name, which
//! may not be `.`, `..` or contain a slash. Each host call takes that one name below that one
//! directory and never follows a symbolic link; files are opened with `openat2` and
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, and only if they are regular files, never devices,
//! FIFOs or sockets (those are the guest kernel's own business). Nothing needs `/proc`.
//!
//! **One tree from many.** A [`Layout`] composes the shared tree: directories, each with its own
//! read-only flag, hidden names, symbolic links and empty directories to mount on.
//!
//! **Rights.** Calls run as this process. Set-user-ID and set-group-ID bits and device nodes can't
//! be made; extended attributes are off unless asked for, and then `user.*` (and ACLs) alone.

mod abi;
mod attributes;
mod change;
mod device;
mod handles;
mod layout;
mod list;
mod nodes;
mod open;
mod resolve;
mod server;
mod state;
mod xattr;

pub use device::Fs;
pub use layout::{Layout, LayoutError, Share};
pub use resolve::FileSystem;

/// How a share's files are owned, seen from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ids {
    /// As on the host. New files get the guest's user when this process may give them away.
    #[default]
    Host,
    /// All by one user and group. New files belong to this process.
    Squash {
        /// User ID.
        uid: u32,
        /// Group ID.
        gid: u32,
    },
}

/// How long the guest may believe what it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Not at all: each use asks again.
    Never,
    /// A second: changes on the host show soon.
    #[default]
    Auto,
    /// A day, and the guest keeps writes back: for what nobody else changes.
    Always,
}

impl Cache {
    fn seconds(self) -> u64 {
        match self {
            Self::Never => 0,
            Self::Auto => 1,
            Self::Always => 86_400,
        }
    }
}

/// Which extended attributes pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xattrs {
    /// None: the guest stops asking after the first time, which is fastest.
    #[default]
    Off,
    /// `user.*`.
    User,
    /// `user.*` and POSIX ACLs.
    UserAndAcl,
}

/// Bounds of what one guest can make this process hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files that the guest knows at a time; about 250 bytes each.
    pub nodes: usize,
    /// Files and directories that it has open.
    pub handles: usize,
    /// Descriptors kept ready for directories and, on read-only systems, files.
    pub cached: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            nodes: 400_000,
            handles: 4096,
            cached: 1024,
        }
    }
}

#[cfg(test)]
mod tests;
