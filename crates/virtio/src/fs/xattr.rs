//! Extended attributes: off, `user.*`, or `user.*` and POSIX ACLs.
//!
//! `security.*` and `trusted.*` never pass: file capabilities set by a guest would hold on the host.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::XattrFlags;
use rustix::fs::fgetxattr;
use rustix::fs::flistxattr;
use rustix::fs::fremovexattr;
use rustix::fs::fsetxattr;
use rustix::io::Errno;

use super::FileSystem;
use super::Xattrs;
use super::nodes::NodeId;
use super::resolve::open_entry;

/// Largest value and list (the kernel's XATTR_SIZE_MAX, XATTR_LIST_MAX).
pub(super) const MAX_XATTR: usize = 65_536;

impl FileSystem {
    fn check_name(&self, name: &OsStr) -> Result<(), Errno> {
        let bytes = name.as_bytes();
        let user = bytes.starts_with(b"user.") && bytes.len() <= 255;
        let acl = matches!(
            bytes,
            b"system.posix_acl_access" | b"system.posix_acl_default"
        );
        match self.xattrs {
            // The guest's kernel remembers and doesn't ask again.
            Xattrs::Off => Err(Errno::NOSYS),
            Xattrs::User if user => Ok(()),
            Xattrs::UserAndAcl if user || acl => Ok(()),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn file_with_xattrs(&mut self, id: NodeId) -> Result<std::fs::File, Errno> {
        match self.nodes.get(id)?.kind {
            FileType::RegularFile => self.file_for_change(id),
            FileType::Directory => {
                let directory = self.directory(id)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                open_entry(&directory, OsStr::new("."), flags, Mode::empty())
                    .map(std::fs::File::from)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    pub(super) fn getxattr(&mut self, id: NodeId, name: &OsStr) -> Result<Vec<u8>, Errno> {
        self.check_name(name)?;
        let file = self.file_with_xattrs(id)?;
        let mut value = vec![0; MAX_XATTR];
        let len = fgetxattr(&file, name, &mut value[..])?;
        value.truncate(len);
        Ok(value)
    }

    /// The names that pass, each with its NUL.
    pub(super) fn listxattr(&mut self, id: NodeId) -> Result<Vec<u8>, Errno> {
        if self.xattrs == Xattrs::Off {
            return Err(Errno::NOSYS);
        }
        let file = self.file_with_xattrs(id)?;
        let mut list = vec![0; MAX_XATTR];
        let len = flistxattr(&file, &mut list[..])?;
        let visible = |name: &&[u8]| {
            let name = name.strip_suffix(b"\0").unwrap_or(name);
            self.check_name(OsStr::from_bytes(name)).is_ok()
        };
        let names = list[..len].split_inclusive(|&byte| byte == 0);
        Ok(names.filter(visible).flatten().copied().collect())
    }

    pub(super) fn setxattr(
        &mut self,
        id: NodeId,
        name: &OsStr,
        value: &[u8],
        flags: u32,
    ) -> Result<(), Errno> {
        self.check_name(name)?;
        self.check_writable(id)?;
        let file = self.file_with_xattrs(id)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        fsetxattr(&file, name, value, flags)
    }

    pub(super) fn removexattr(&mut self, id: NodeId, name: &OsStr) -> Result<(), Errno> {
        self.check_name(name)?;
        self.check_writable(id)?;
        let file = self.file_with_xattrs(id)?;
        fremovexattr(&file, name)
    }
}
