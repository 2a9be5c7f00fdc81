//! Attributes: what a file is, its times and owner, and changes to them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::Gid;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::Statx;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use rustix::fs::UTIME_NOW;
use rustix::fs::UTIME_OMIT;
use rustix::fs::Uid;
use rustix::fs::chownat;
use rustix::fs::fchmod;
use rustix::fs::ftruncate;
use rustix::fs::readlinkat;
use rustix::fs::utimensat;
use rustix::io::Errno;

use super::FileSystem;
use super::Ids;
use super::abi::Attr;
use super::abi::AttrOut;
use super::abi::EntryOut;
use super::abi::GETATTR_HANDLE;
use super::abi::GetattrIn;
use super::abi::SetattrIn;
use super::abi::StatfsOut;
use super::abi::set;
use super::layout::RuleId;
use super::layout::ShareId;
use super::nodes::NodeId;
use super::nodes::Place;
use super::resolve::key_of;
use super::resolve::stale_if_gone;
use super::resolve::stat_entry;
use super::resolve::stat_fd;

/// Permission bits that a guest may set on files. The set-ID bits are not among them: a file on
/// the host must not run as whoever runs this process.
pub(super) const FILE_MODE: u32 = 0o1777;
/// On directories, set-group-ID only says which group new files get.
pub(super) const DIRECTORY_MODE: u32 = 0o3777;
/// Inode numbers of our own directories and links.
const VIRTUAL_INODES: u64 = 1 << 62;

/// Device numbers as FUSE has them: major in bits 8 to 19, minor around it.
fn device_number(stat: &Statx) -> u32 {
    let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
    minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

fn seconds(time: i64) -> u64 {
    // The protocol carries the bits; the guest reads them as signed again.
    u64::from_ne_bytes(time.to_ne_bytes())
}

impl FileSystem {
    fn attr(&mut self, share: ShareId, stat: &Statx) -> Attr {
        let (uid, gid) = match self.layout.share(share).ids {
            Ids::Host => (stat.stx_uid, stat.stx_gid),
            Ids::Squash { uid, gid } => (uid, gid),
        };
        Attr {
            ino: self.visible_inode(key_of(share, stat)),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: seconds(stat.stx_atime.tv_sec),
            mtime: seconds(stat.stx_mtime.tv_sec),
            ctime: seconds(stat.stx_ctime.tv_sec),
            atime_ns: stat.stx_atime.tv_nsec,
            mtime_ns: stat.stx_mtime.tv_nsec,
            ctime_ns: stat.stx_ctime.tv_nsec,
            mode: u32::from(stat.stx_mode),
            nlink: stat.stx_nlink,
            uid,
            gid,
            rdev: device_number(stat),
            block_size: stat.stx_blksize,
            flags: 0,
        }
    }

    fn virtual_attr(rule: RuleId, kind: FileType) -> Attr {
        let (permissions, nlink) = match kind {
            FileType::Symlink => (0o777, 1),
            _ => (0o755, 2),
        };
        Attr {
            ino: VIRTUAL_INODES | u64::from(rule),
            mode: kind.as_raw_mode() | permissions,
            nlink,
            block_size: 4096,
            ..Attr::default()
        }
    }

    pub(super) fn entry_out(&mut self, node: NodeId, share: ShareId, stat: &Statx) -> EntryOut {
        let valid = self.layout.share(share).cache.seconds();
        EntryOut {
            node,
            entry_valid: valid,
            attr_valid: valid,
            attr: self.attr(share, stat),
            ..EntryOut::default()
        }
    }

    pub(super) fn virtual_entry_out(&self, node: NodeId, rule: RuleId, kind: FileType) -> EntryOut {
        let valid = super::Cache::Always.seconds();
        let mut attr = Self::virtual_attr(rule, kind);
        attr.size = self
            .link_target(rule)
            .map_or(0, |target| target.len() as u64);
        EntryOut {
            node,
            entry_valid: valid,
            attr_valid: valid,
            attr,
            ..EntryOut::default()
        }
    }

    fn link_target(&self, rule: RuleId) -> Option<&str> {
        self.layout.rule(rule).symlink.as_deref()
    }

    /// What `node` is now: by its place, or by a handle when it has none any more.
    fn stat_node(&mut self, id: NodeId) -> Result<Statx, Errno> {
        if let Some(fd) = self.nodes.cached_directory(id) {
            return stat_fd(&fd);
        }
        let node = self.nodes.get(id)?;
        match (&node.place, node.share()) {
            (Place::ShareRoot, Some(share)) => stat_fd(self.share_root(share)),
            (Place::Entry { .. }, _) => {
                let by_place = self.stat_by_place(id);
                match (by_place, self.handles.any_of(id)) {
                    (Err(Errno::STALE), Some(file)) => stat_fd(file),
                    (by_place, _) => by_place,
                }
            }
            _ => Err(Errno::STALE),
        }
    }

    fn stat_by_place(&mut self, id: NodeId) -> Result<Statx, Errno> {
        let (directory, name) = self.entry_of(id)?;
        let stat = stat_entry(&directory, &name).map_err(stale_if_gone)?;
        self.check_same(self.nodes.get(id)?, &stat)?;
        Ok(stat)
    }

    fn attr_out(&mut self, share: ShareId, stat: &Statx) -> AttrOut {
        AttrOut {
            valid: self.layout.share(share).cache.seconds(),
            valid_ns: 0,
            padding: 0,
            attr: self.attr(share, stat),
        }
    }

    pub(super) fn getattr(&mut self, id: NodeId, request: &GetattrIn) -> Result<AttrOut, Errno> {
        let node = self.nodes.get(id)?;
        let Some(share) = node.share() else {
            let rule = node.rule.ok_or(Errno::STALE)?;
            let entry = self.virtual_entry_out(id, rule, node.kind);
            return Ok(AttrOut {
                valid: entry.attr_valid,
                valid_ns: 0,
                padding: 0,
                attr: entry.attr,
            });
        };
        let by_handle = (request.flags & GETATTR_HANDLE != 0)
            .then(|| self.handles.file_of(request.handle, id).ok())
            .flatten();
        let stat = match by_handle {
            Some(file) => stat_fd(&file.file)?,
            None => self.stat_node(id)?,
        };
        Ok(self.attr_out(share, &stat))
    }

    pub(super) fn setattr(&mut self, id: NodeId, request: &SetattrIn) -> Result<AttrOut, Errno> {
        self.check_writable(id)?;
        if request.valid & set::MODE != 0 {
            self.change_mode(id, request.mode)?;
        }
        if request.valid & (set::UID | set::GID) != 0 {
            self.change_owner(id, request)?;
        }
        if request.valid & set::SIZE != 0 {
            self.change_size(id, request)?;
        }
        if request.valid & (set::ATIME | set::MTIME) != 0 {
            self.change_times(id, request)?;
        }
        let share = self.nodes.get(id)?.share().ok_or(Errno::STALE)?;
        let stat = self.stat_node(id)?;
        Ok(self.attr_out(share, &stat))
    }

    fn change_mode(&mut self, id: NodeId, mode: u32) -> Result<(), Errno> {
        let node = self.nodes.get(id)?;
        if node.is_directory() {
            let directory = self.directory(id)?;
            // A path descriptor can't be changed; its own entry "." can be opened.
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let fd = super::resolve::open_entry(
                &directory,
                std::ffi::OsStr::from_bytes(b"."),
                flags,
                Mode::empty(),
            )?;
            return fchmod(fd, Mode::from_raw_mode(mode & DIRECTORY_MODE));
        }
        let file = self.file_for_change(id)?;
        fchmod(file, Mode::from_raw_mode(mode & FILE_MODE))
    }

    /// Some descriptor of a regular file, however it can be opened.
    pub(super) fn file_for_change(&mut self, id: NodeId) -> Result<File, Errno> {
        match self.open_node(id, OFlags::RDONLY) {
            Err(Errno::ACCESS) => self.open_node(id, OFlags::WRONLY),
            other => other,
        }
    }

    fn change_owner(&mut self, id: NodeId, request: &SetattrIn) -> Result<(), Errno> {
        let uid = (request.valid & set::UID != 0).then_some(request.uid);
        let gid = (request.valid & set::GID != 0).then_some(request.gid);
        if let Ids::Squash { uid: u, gid: g } = self.share_of(id)?.ids {
            // Everything belongs to that one user already; nobody else can have it.
            let same = uid.is_none_or(|uid| uid == u) && gid.is_none_or(|gid| gid == g);
            return if same { Ok(()) } else { Err(Errno::PERM) };
        }
        let invalid = |id: &u32| *id == u32::MAX;
        if uid.as_ref().is_some_and(invalid) || gid.as_ref().is_some_and(invalid) {
            return Err(Errno::INVAL);
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        if self.nodes.get(id)?.place == Place::ShareRoot {
            return Err(Errno::PERM);
        }
        let (directory, name) = self.entry_of(id)?;
        chownat(&*directory, &name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn change_size(&mut self, id: NodeId, request: &SetattrIn) -> Result<(), Errno> {
        if request.valid & set::HANDLE != 0
            && let Ok(handle) = self.handles.file_of(request.handle, id)
        {
            return ftruncate(&handle.file, request.size);
        }
        let file = self.open_node(id, OFlags::WRONLY)?;
        ftruncate(file, request.size)
    }

    fn change_times(&mut self, id: NodeId, request: &SetattrIn) -> Result<(), Errno> {
        let time = |given: u32, now: u32, seconds: u64, nanoseconds: u32| {
            let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
            if request.valid & given == 0 {
                special(UTIME_OMIT)
            } else if request.valid & now != 0 {
                special(UTIME_NOW)
            } else {
                Timespec {
                    tv_sec: i64::from_ne_bytes(seconds.to_ne_bytes()),
                    tv_nsec: i64::from(nanoseconds),
                }
            }
        };
        let times = Timestamps {
            last_access: time(set::ATIME, set::ATIME_NOW, request.atime, request.atime_ns),
            last_modification: time(set::MTIME, set::MTIME_NOW, request.mtime, request.mtime_ns),
        };
        if self.nodes.get(id)?.place == Place::ShareRoot {
            let directory = self.directory(id)?;
            return utimensat(&*directory, c".", &times, AtFlags::SYMLINK_NOFOLLOW);
        }
        let (directory, name) = self.entry_of(id)?;
        utimensat(&*directory, &name, &times, AtFlags::SYMLINK_NOFOLLOW)
    }

    pub(super) fn readlink(&mut self, id: NodeId) -> Result<Vec<u8>, Errno> {
        let node = self.nodes.get(id)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        if node.key.is_none() {
            let target = node.rule.and_then(|rule| self.link_target(rule));
            return Ok(target.ok_or(Errno::STALE)?.as_bytes().to_vec());
        }
        let (directory, name) = self.entry_of(id)?;
        let target = readlinkat(&*directory, &name, Vec::new()).map_err(stale_if_gone)?;
        Ok(target.into_bytes())
    }

    pub(super) fn statfs(&mut self, id: NodeId) -> Result<StatfsOut, Errno> {
        let share = self.nodes.get(id)?.share().unwrap_or(0);
        let mut out = StatfsOut {
            blocks: 0,
            blocks_free: 0,
            blocks_available: 0,
            files: 0,
            files_free: 0,
            block_size: 4096,
            name_len: 255,
            fragment_size: 4096,
            padding: 0,
            spare: [0; 6],
        };
        if self.layout.shares.is_empty() {
            return Ok(out);
        }
        let stat = rustix::fs::fstatvfs(self.share_root(share).as_fd())?;
        out.blocks = stat.f_blocks;
        out.blocks_free = stat.f_bfree;
        out.blocks_available = stat.f_bavail;
        out.files = stat.f_files;
        out.files_free = stat.f_ffree;
        out.block_size = u32::try_from(stat.f_bsize).unwrap_or(4096);
        out.fragment_size = u32::try_from(stat.f_frsize).unwrap_or(4096);
        Ok(out)
    }
}
