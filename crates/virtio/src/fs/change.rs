//! Making, moving and removing entries.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::Gid;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::RenameFlags;
use rustix::fs::Uid;
use rustix::fs::chownat;
use rustix::fs::linkat;
use rustix::fs::mkdirat;
use rustix::fs::mknodat;
use rustix::fs::renameat_with;
use rustix::fs::symlinkat;
use rustix::fs::unlinkat;
use rustix::io::Errno;

use super::FileSystem;
use super::Ids;
use super::abi::CreateIn;
use super::abi::EntryOut;
use super::abi::OpenOut;
use super::attributes::DIRECTORY_MODE;
use super::attributes::FILE_MODE;
use super::layout::RuleId;
use super::nodes::NodeId;
use super::nodes::Place;
use super::resolve::key_of;
use super::resolve::open_entry;
use super::resolve::stat_entry;
use super::resolve::stat_fd;

/// Who in the guest makes something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Maker {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl FileSystem {
    /// Gives a new entry to its maker, where ownership passes and this process may.
    fn give_to(
        &self,
        parent: NodeId,
        directory: &OwnedFd,
        name: &OsStr,
        maker: Maker,
    ) -> Result<(), Errno> {
        if !self.privileged || self.share_of(parent)?.ids != Ids::Host {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(maker.uid), Gid::from_raw(maker.gid));
        if uid.is_root() && gid.is_root() {
            return Ok(());
        }
        chownat(
            directory,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    /// Makes an entry by `make`, gives it to its maker and tells the guest of it.
    fn make(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        maker: Maker,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<EntryOut, Errno> {
        let (directory, rule) = self.changeable_entry(parent, name)?;
        make(&directory)?;
        self.give_to(parent, &directory, name, maker)?;
        self.tell_new(parent, &directory, name, rule)
    }

    fn tell_new(
        &mut self,
        parent: NodeId,
        directory: &OwnedFd,
        name: &OsStr,
        rule: Option<RuleId>,
    ) -> Result<EntryOut, Errno> {
        let share = self.nodes.get(parent)?.share().ok_or(Errno::ROFS)?;
        let stat = stat_entry(directory, name)?;
        self.tell_entry(share, parent, name, rule, &stat)
    }

    pub(super) fn mkdir(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        maker: Maker,
    ) -> Result<EntryOut, Errno> {
        let mode = Mode::from_raw_mode(mode & DIRECTORY_MODE);
        self.make(parent, name, maker, |directory| {
            mkdirat(directory, name, mode)
        })
    }

    pub(super) fn mknod(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        mode: u32,
        maker: Maker,
    ) -> Result<EntryOut, Errno> {
        let kind = FileType::from_raw_mode(mode);
        if !matches!(
            kind,
            FileType::RegularFile | FileType::Fifo | FileType::Socket
        ) {
            // A device node would give whoever opens it on the host that device.
            return Err(Errno::PERM);
        }
        let mode = Mode::from_raw_mode(mode & FILE_MODE);
        self.make(parent, name, maker, |directory| {
            mknodat(directory, name, kind, mode, 0)
        })
    }

    pub(super) fn symlink(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        target: &OsStr,
        maker: Maker,
    ) -> Result<EntryOut, Errno> {
        self.make(parent, name, maker, |directory| {
            symlinkat(target, directory, name)
        })
    }

    pub(super) fn link(
        &mut self,
        id: NodeId,
        parent: NodeId,
        name: &OsStr,
    ) -> Result<EntryOut, Errno> {
        let node = self.nodes.get(id)?;
        if node.share() != self.nodes.get(parent)?.share() {
            return Err(Errno::XDEV);
        }
        if node.is_directory() {
            return Err(Errno::PERM);
        }
        let (source, old_name) = self.entry_of(id)?;
        let (directory, rule) = self.changeable_entry(parent, name)?;
        // Without AT_SYMLINK_FOLLOW a link to a symbolic link is made, not to its target.
        linkat(&*source, &old_name, &*directory, name, AtFlags::empty())?;
        self.tell_new(parent, &directory, name, rule)
    }

    pub(super) fn unlink(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        flags: AtFlags,
    ) -> Result<(), Errno> {
        let (directory, rule) = self.changeable_entry(parent, name)?;
        if rule.is_some() {
            // Hidden things lie below.
            return Err(Errno::ACCESS);
        }
        unlinkat(&*directory, name, flags)
    }

    pub(super) fn rename(
        &mut self,
        from: (NodeId, &OsStr),
        to: (NodeId, &OsStr),
        flags: u32,
    ) -> Result<(), Errno> {
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        if self.nodes.get(from.0)?.share() != self.nodes.get(to.0)?.share() {
            return Err(Errno::XDEV);
        }
        let (source, source_rule) = self.changeable_entry(from.0, from.1)?;
        let (target, target_rule) = self.changeable_entry(to.0, to.1)?;
        if source_rule.is_some() || target_rule.is_some() {
            // What is hidden below would show under another name.
            return Err(Errno::ACCESS);
        }
        renameat_with(&*source, from.1, &*target, to.1, flags)?;
        self.follow(to, &target);
        if flags.contains(RenameFlags::EXCHANGE) {
            self.follow(from, &source);
        }
        Ok(())
    }

    /// Remembers the new place of what was moved.
    fn follow(&mut self, (parent, name): (NodeId, &OsStr), directory: &OwnedFd) {
        let share = self.nodes.get(parent).ok().and_then(|node| node.share());
        // Fails when the host moved it on already: then the next look-up finds it.
        if let (Some(share), Ok(stat)) = (share, stat_entry(directory, name))
            && let Some(id) = self.nodes.find(key_of(share, &stat))
        {
            let name = name.to_owned();
            self.nodes.move_to(id, Place::Entry { parent, name });
        }
    }

    pub(super) fn create(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        request: &CreateIn,
        maker: Maker,
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let (directory, rule) = self.changeable_entry(parent, name)?;
        let kept = self.open_flags(parent, request.flags)?;
        let mut flags = kept | OFlags::CREATE;
        flags |= OFlags::from_bits_retain(request.flags) & OFlags::EXCL;
        flags |= OFlags::NONBLOCK | OFlags::NOCTTY;
        let mode = Mode::from_raw_mode(request.mode & FILE_MODE);
        let existed = stat_entry(&directory, name).is_ok();
        let fd = open_entry(&directory, name, flags, mode)?;
        let stat = stat_fd(fd.as_fd())?;
        if super::resolve::kind_of(&stat) != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        if !existed {
            self.give_to(parent, &directory, name, maker)?;
        }
        let share = self.nodes.get(parent)?.share().ok_or(Errno::ROFS)?;
        let stat = stat_fd(fd.as_fd())?;
        let entry = self.tell_entry(share, parent, name, rule, &stat)?;
        let open = self.opened(entry.node, File::from(fd), kept);
        if open.is_err() {
            self.nodes.forget(entry.node, 1);
        }
        Ok((entry, open?))
    }
}
