//! Listing directories.
//!
//! A plain host directory is streamed: the host's own positions are the guest's. One with rules is
//! read whole, since names come and go in it: its positions are list indices.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::RawDir;
use rustix::fs::SeekFrom;
use rustix::fs::seek;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::FileSystem;
use super::abi::Dirent;
use super::abi::EntryOut;
use super::abi::OPEN_CACHE_DIR;
use super::abi::OPEN_KEEP_CACHE;
use super::abi::OpenOut;
use super::abi::ReadIn;
use super::layout::Step;
use super::nodes::NodeId;
use super::resolve::open_entry;
use crate::ChainWriter;

/// Bytes of host entries fetched at once: about what one guest request takes.
const FETCH_BYTES: usize = 4096;
/// Most entries of a directory with rules.
const MAX_LISTED: usize = 65_536;

#[derive(Clone, Debug)]
struct Entry {
    inode: u64,
    /// Where reading goes on after it.
    next: u64,
    kind: FileType,
    name: OsString,
}

/// How far a directory has been read.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The host's directory, where there is one.
    directory: Option<OwnedFd>,
    /// Entries fetched and not yet given, first at `position`.
    ready: std::collections::VecDeque<Entry>,
    position: u64,
    /// All entries, for directories with rules.
    whole: Option<Vec<Entry>>,
}

impl Listing {
    /// The entry at `offset`.
    fn at(&mut self, offset: u64) -> Result<Option<Entry>, Errno> {
        if let Some(whole) = &self.whole {
            let index = usize::try_from(offset).unwrap_or(usize::MAX);
            return Ok(whole.get(index).cloned());
        }
        if offset != self.position || self.ready.is_empty() {
            self.fetch(offset)?;
        }
        Ok(self.ready.front().cloned())
    }

    /// The entry that [`Self::at`] gave was taken.
    fn advance(&mut self) {
        if let Some(taken) = self.ready.pop_front() {
            self.position = taken.next;
        }
    }

    fn fetch(&mut self, offset: u64) -> Result<(), Errno> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        // The guest's positions are those that the host gave; the host refuses others.
        seek(directory, SeekFrom::Start(offset))?;
        self.ready.clear();
        self.position = offset;
        let mut space = [const { MaybeUninit::uninit() }; FETCH_BYTES];
        let mut raw = RawDir::new(directory, &mut space);
        while let Some(entry) = raw.next() {
            let entry = entry?;
            self.ready.push_back(Entry {
                inode: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: entry.file_type(),
                name: OsStr::from_bytes(entry.file_name().to_bytes()).to_owned(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl FileSystem {
    pub(super) fn opendir(&mut self, id: NodeId) -> Result<OpenOut, Errno> {
        if self.without_open {
            return Err(Errno::NOSYS);
        }
        let listing = self.new_listing(id)?;
        Ok(OpenOut {
            handle: self.handles.add_directory(id, listing)?,
            open_flags: self.directory_cache_flags(id),
            padding: 0,
        })
    }

    fn directory_cache_flags(&self, id: NodeId) -> u32 {
        match self.share_of(id).map(|share| share.cache) {
            Ok(super::Cache::Always) => OPEN_KEEP_CACHE | OPEN_CACHE_DIR,
            _ => 0,
        }
    }

    pub(super) fn new_listing(&mut self, id: NodeId) -> Result<Listing, Errno> {
        let node = self.nodes.get(id)?;
        if !node.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let (rule, is_host) = (node.rule, node.share().is_some());
        let mut listing = Listing::default();
        if is_host {
            let directory = self.directory(id)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let dot = OsStr::new(".");
            listing.directory = Some(open_entry(&directory, dot, flags, Mode::empty())?);
        }
        if let Some(rule) = rule {
            listing.whole = Some(self.list_whole(rule, &mut listing)?);
            listing.directory = None;
        }
        Ok(listing)
    }

    /// Host entries that aren't hidden, then those of our own.
    fn list_whole(
        &self,
        rule: super::layout::RuleId,
        host: &mut Listing,
    ) -> Result<Vec<Entry>, Errno> {
        let mut names = std::collections::HashSet::new();
        let mut entries = Vec::new();
        let mut offset = 0;
        while let Some(mut entry) = host.at(offset)? {
            host.advance();
            offset = entry.next;
            entry.kind = match self.layout.step(rule, &entry.name) {
                Step::Hidden => continue,
                Step::Host(_) | Step::HostOrVirtual(_) => entry.kind,
                Step::Share(..) => FileType::Unknown,
                Step::Symlink(_) => FileType::Symlink,
            };
            if entries.len() >= MAX_LISTED {
                return Err(Errno::OVERFLOW);
            }
            names.insert(entry.name.clone());
            entries.push(entry);
        }
        let own = self
            .layout
            .own_names(rule)
            .filter(|(name, _)| !names.contains(*name));
        for (name, child) in own {
            entries.push(Entry {
                inode: 1,
                next: 0,
                kind: match (&child.symlink, child.share) {
                    (Some(_), _) => FileType::Symlink,
                    (None, Some(_)) => FileType::Unknown,
                    (None, None) => FileType::Directory,
                },
                name: name.to_owned(),
            });
        }
        for (entry, next) in entries.iter_mut().zip(1..) {
            entry.next = next;
        }
        Ok(entries)
    }

    /// READDIR and, with `plus`, READDIRPLUS.
    pub(super) fn readdir(
        &mut self,
        id: NodeId,
        request: &ReadIn,
        body: &mut ChainWriter<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        body.limit(request.size as usize);
        if self.without_open {
            let mut listing = match self.handles.take_kept_listing(id) {
                // From the start: what changed since is to be seen.
                Some(listing) if request.offset != 0 => listing,
                _ => self.new_listing(id)?,
            };
            let result = self.fill(id, &mut listing, request.offset, body, plus);
            self.handles.keep_listing(id, listing);
            return result;
        }
        let mut listing = self.handles.take_listing(request.handle, id)?;
        let result = self.fill(id, &mut listing, request.offset, body, plus);
        self.handles.put_listing(request.handle, listing);
        result
    }

    fn fill(
        &mut self,
        id: NodeId,
        listing: &mut Listing,
        start: u64,
        body: &mut ChainWriter<'_>,
        plus: bool,
    ) -> Result<(), Errno> {
        let mut offset = start;
        while let Some(entry) = listing.at(offset)? {
            let size = entry_bytes(&entry.name, plus);
            if size > body.remaining() {
                break;
            }
            let told = if plus {
                self.tell_listed(id, &entry)?
            } else {
                None
            };
            if !put_entry(body, &entry, plus, told.as_ref()) {
                break;
            }
            offset = entry.next;
            listing.advance();
        }
        Ok(())
    }

    /// The look-up that READDIRPLUS saves. `None` for `.`, `..` and what went away meanwhile.
    fn tell_listed(&mut self, id: NodeId, entry: &Entry) -> Result<Option<EntryOut>, Errno> {
        if matches!(entry.name.as_bytes(), b"." | b"..") {
            return Ok(None);
        }
        match self.lookup(id, &entry.name) {
            // Without room for more nodes the guest looks up what it needs.
            Err(Errno::NOMEM) | Ok(None) => Ok(None),
            Err(Errno::ACCESS | Errno::STALE) => Ok(None),
            other => other,
        }
    }
}

fn padded(len: usize) -> usize {
    len.next_multiple_of(8)
}

fn entry_bytes(name: &OsStr, plus: bool) -> usize {
    let head = if plus { size_of::<EntryOut>() } else { 0 };
    head + padded(size_of::<Dirent>() + name.len())
}

fn put_entry(
    body: &mut ChainWriter<'_>,
    entry: &Entry,
    plus: bool,
    told: Option<&EntryOut>,
) -> bool {
    let nothing = EntryOut::default();
    let mut bytes = Vec::with_capacity(entry_bytes(&entry.name, plus));
    if plus {
        bytes.extend(told.unwrap_or(&nothing).as_bytes());
    }
    let record = Dirent {
        ino: told.map_or(entry.inode, |told| told.attr.ino),
        offset: entry.next,
        name_len: u32::try_from(entry.name.len()).unwrap_or(0),
        // The type bits of st_mode, as directory entries carry them.
        kind: entry.kind.as_raw_mode() >> 12,
    };
    bytes.extend(record.as_bytes());
    bytes.extend(entry.name.as_bytes());
    bytes.resize(entry_bytes(&entry.name, plus), 0);
    body.write_all(&bytes).is_ok()
}
