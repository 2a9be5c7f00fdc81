//! From a node and a name to a host file: the only place that does.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringfence_device::Counter;
use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::ResolveFlags;
use rustix::fs::Statx;
use rustix::fs::StatxFlags;
use rustix::fs::makedev;
use rustix::fs::openat2;
use rustix::fs::statx;
use rustix::io::Errno;

use super::Layout;
use super::LayoutError;
use super::Limits;
use super::Xattrs;
use super::abi::EntryOut;
use super::handles::Handles;
use super::layout::ROOT_RULE;
use super::layout::RuleId;
use super::layout::Share;
use super::layout::ShareId;
use super::layout::Step;
use super::layout::is_plain_name;
use super::nodes::Key;
use super::nodes::Node;
use super::nodes::NodeId;
use super::nodes::Nodes;
use super::nodes::Place;

/// No component may lead out, through a link or into `/proc`'s.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);
/// Longest chain of directories that is walked.
const MAX_DEPTH: usize = 2048;

/// Counters of a file system.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: Counter,
    pub(super) errors: Counter,
    pub(super) bytes_read: Counter,
    pub(super) bytes_written: Counter,
}

/// A shared tree and what the guest knows of it.
pub struct FileSystem {
    pub(super) layout: Layout,
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) xattrs: Xattrs,
    pub(super) limits: Limits,
    pub(super) counters: Counters,
    /// The guest opens nothing: reads name the node (read-only trees).
    pub(super) without_open: bool,
    /// The guest keeps writes back.
    pub(super) writeback: bool,
    /// The shares' own descriptors.
    roots: Vec<Arc<OwnedFd>>,
    /// Host devices in the order they were met: the first one's inode numbers show as they are.
    devices: Vec<u64>,
    /// This process may give files away.
    pub(super) privileged: bool,
}

impl std::fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSystem")
            .field("layout", &self.layout)
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

pub(super) fn key_of(share: ShareId, stat: &Statx) -> Key {
    Key {
        share,
        device: makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    }
}

pub(super) fn kind_of(stat: &Statx) -> FileType {
    FileType::from_raw_mode(u32::from(stat.stx_mode))
}

/// What an open file or directory is.
pub(super) fn stat_fd(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

/// What the entry `name` is, not what it points to.
pub(super) fn stat_entry(directory: &OwnedFd, name: &OsStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(directory, name, flags, StatxFlags::BASIC_STATS)
}

/// Opens one entry below `directory`, never through a link.
pub(super) fn open_entry(
    directory: &OwnedFd,
    name: &OsStr,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(directory, name, flags, mode, RESOLVE)
}

impl FileSystem {
    /// Serves `layout`.
    ///
    /// # Errors
    /// [`LayoutError`] when it is empty or a descriptor can't be used.
    pub fn new(layout: Layout, xattrs: Xattrs, limits: Limits) -> Result<Self, LayoutError> {
        if layout.is_empty() {
            return Err(LayoutError::Empty);
        }
        let descriptor = |source: std::io::Error| LayoutError::Descriptor {
            at: "/".to_owned(),
            source,
        };
        let roots = layout
            .shares
            .iter()
            .map(|share| Ok(Arc::new(OwnedFd::from(share.file.try_clone()?))))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(descriptor)?;
        let root_share = layout.rule(ROOT_RULE).share;
        let root_key = match root_share {
            None => None,
            Some(share) => {
                let stat = stat_fd(&roots[usize::from(share)])
                    .map_err(|error| descriptor(error.into()))?;
                Some(key_of(share, &stat))
            }
        };
        let nodes = Nodes::new(limits.nodes, limits.cached, ROOT_RULE, root_key);
        Ok(Self {
            layout,
            nodes,
            handles: Handles::new(limits.handles, limits.cached),
            xattrs,
            limits,
            counters: Counters::default(),
            without_open: false,
            writeback: false,
            roots,
            devices: Vec::new(),
            privileged: rustix::process::geteuid().is_root(),
        })
    }

    /// Forgets what the guest knew: it mounts anew, or the device was reset.
    pub fn reset(&mut self) {
        self.nodes.clear();
        self.handles = Handles::new(self.limits.handles, self.limits.cached);
        (self.without_open, self.writeback) = (false, false);
    }

    pub(super) fn share_of(&self, node: NodeId) -> Result<&Share, Errno> {
        // Directories of ours can't be changed.
        let share = self.nodes.get(node)?.share().ok_or(Errno::ROFS)?;
        Ok(self.layout.share(share))
    }

    /// Refuses changes below read-only shares.
    pub(super) fn check_writable(&self, node: NodeId) -> Result<(), Errno> {
        if self.share_of(node)?.read_only {
            return Err(Errno::ROFS);
        }
        Ok(())
    }

    pub(super) fn share_root(&self, share: ShareId) -> Arc<OwnedFd> {
        Arc::clone(&self.roots[usize::from(share)])
    }

    /// A descriptor of the directory `id`, walked to again when none is ready.
    pub(super) fn directory(&mut self, id: NodeId) -> Result<Arc<OwnedFd>, Errno> {
        let mut way = Vec::new();
        let mut at = id;
        let mut fd = loop {
            if let Some(fd) = self.nodes.cached_directory(at) {
                break fd;
            }
            let node = self.nodes.get(at)?;
            if !node.is_directory() {
                return Err(Errno::NOTDIR);
            }
            match (&node.place, node.share()) {
                (Place::ShareRoot, Some(share)) => break self.share_root(share),
                (Place::Entry { parent, .. }, _) if way.len() < MAX_DEPTH => {
                    way.push(at);
                    at = *parent;
                }
                (Place::Entry { .. }, _) => return Err(Errno::LOOP),
                _ => return Err(Errno::NOENT),
            }
        };
        while let Some(id) = way.pop() {
            fd = Arc::new(self.open_directory(&fd, id)?);
            self.nodes.cache_directory(id, &fd);
        }
        Ok(fd)
    }

    fn open_directory(&self, parent: &OwnedFd, id: NodeId) -> Result<OwnedFd, Errno> {
        let node = self.nodes.get(id)?;
        let Place::Entry { name, .. } = &node.place else {
            return Err(Errno::STALE);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = open_entry(parent, name, flags, Mode::empty()).map_err(stale_if_gone)?;
        self.check_same(node, &stat_fd(&fd)?)?;
        Ok(fd)
    }

    /// Whether `stat` is still the file that the guest means.
    pub(super) fn check_same(&self, node: &Node, stat: &Statx) -> Result<(), Errno> {
        let same = node
            .key
            .is_some_and(|key| key == key_of(key.share, stat) && node.kind == kind_of(stat));
        if same { Ok(()) } else { Err(Errno::STALE) }
    }

    /// The host directory and name of an entry, for calls that take both.
    pub(super) fn entry_of(
        &mut self,
        id: NodeId,
    ) -> Result<(Arc<OwnedFd>, std::ffi::OsString), Errno> {
        let (parent, name) = self.nodes.entry(id)?.ok_or(Errno::PERM)?;
        let name = name.to_owned();
        Ok((self.directory(parent)?, name))
    }

    /// Where a new or existing `name` in `parent` is a plain host entry that may be changed.
    pub(super) fn changeable_entry(
        &mut self,
        parent: NodeId,
        name: &OsStr,
    ) -> Result<(Arc<OwnedFd>, Option<RuleId>), Errno> {
        if !is_plain_name(name) {
            return Err(Errno::INVAL);
        }
        self.check_writable(parent)?;
        let rule = match self.nodes.get(parent)?.rule {
            None => None,
            Some(rule) => match self.layout.step(rule, name) {
                Step::Host(rule) => rule,
                // Hidden names and our own can't be made, moved or removed.
                _ => return Err(Errno::ACCESS),
            },
        };
        Ok((self.directory(parent)?, rule))
    }

    /// The entry `name` of `parent`, told to the guest. `None`: there is none.
    pub(super) fn lookup(
        &mut self,
        parent: NodeId,
        name: &OsStr,
    ) -> Result<Option<EntryOut>, Errno> {
        if !is_plain_name(name) {
            return Err(if name.len() > 255 {
                Errno::NAMETOOLONG
            } else {
                Errno::INVAL
            });
        }
        let node = self.nodes.get(parent)?;
        if !node.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let step = match node.rule {
            Some(rule) => self.layout.step(rule, name),
            None => Step::Host(None),
        };
        match step {
            Step::Hidden => Ok(None),
            Step::Share(share, rule) => self.tell_share(share, rule).map(Some),
            Step::Symlink(rule) => self.tell_virtual(rule, FileType::Symlink).map(Some),
            Step::Host(rule) => self.lookup_host(parent, name, rule),
            Step::HostOrVirtual(rule) => match self.lookup_host(parent, name, Some(rule))? {
                Some(found) => Ok(Some(found)),
                None => self.tell_virtual(rule, FileType::Directory).map(Some),
            },
        }
    }

    fn lookup_host(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        rule: Option<RuleId>,
    ) -> Result<Option<EntryOut>, Errno> {
        let Some(share) = self.nodes.get(parent)?.share() else {
            return Ok(None);
        };
        let directory = self.directory(parent)?;
        match stat_entry(&directory, name) {
            Ok(stat) => self.tell_entry(share, parent, name, rule, &stat).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells the guest of a host entry.
    pub(super) fn tell_entry(
        &mut self,
        share: ShareId,
        parent: NodeId,
        name: &OsStr,
        rule: Option<RuleId>,
        stat: &Statx,
    ) -> Result<EntryOut, Errno> {
        let place = Place::Entry {
            parent,
            name: name.to_owned(),
        };
        let node = self
            .nodes
            .tell(key_of(share, stat), place, rule, kind_of(stat))?;
        Ok(self.entry_out(node, share, stat))
    }

    fn tell_share(&mut self, share: ShareId, rule: RuleId) -> Result<EntryOut, Errno> {
        let stat = stat_fd(self.share_root(share))?;
        let key = key_of(share, &stat);
        let kind = kind_of(&stat);
        let node = self.nodes.tell(key, Place::ShareRoot, Some(rule), kind)?;
        Ok(self.entry_out(node, share, &stat))
    }

    fn tell_virtual(&mut self, rule: RuleId, kind: FileType) -> Result<EntryOut, Errno> {
        let node = self.nodes.tell_virtual(rule, kind)?;
        Ok(self.virtual_entry_out(node, rule, kind))
    }

    /// The inode number that the guest sees. Numbers of the first host device show as they are,
    /// those of others are told apart in the upper bits: programs take two files with the same
    /// number for one.
    pub(super) fn visible_inode(&mut self, key: Key) -> u64 {
        let known = self.devices.iter().position(|&device| device == key.device);
        let index = known.unwrap_or_else(|| {
            self.devices.push(key.device);
            self.devices.len() - 1
        });
        key.inode ^ (index as u64) << 48
    }

    /// Nodes that the guest knows, for `inspect`.
    pub(super) fn known(&self) -> u64 {
        self.nodes.len() as u64
    }
}

/// An entry that isn't where it was: the guest is to look it up again.
pub(super) fn stale_if_gone(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Errno::STALE,
        other => other,
    }
}
