//! What the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::list::Listing;
use super::nodes::NodeId;
use super::state::HandleRecord;

/// An open regular file.
#[derive(Debug)]
pub(super) struct FileHandle {
    pub(super) file: File,
    pub(super) node: NodeId,
    flags: OFlags,
}

/// Handles by number, and descriptors kept for guests that open nothing.
#[derive(Debug)]
pub(super) struct Handles {
    files: HashMap<u64, FileHandle>,
    directories: HashMap<u64, (NodeId, Listing)>,
    /// Read-only trees: by node, with the time of last use.
    kept_files: HashMap<NodeId, (u64, Arc<File>)>,
    kept_listings: HashMap<NodeId, (u64, Listing)>,
    next: u64,
    clock: u64,
    limit: usize,
    keep: usize,
}

impl Handles {
    pub(super) fn new(limit: usize, keep: usize) -> Self {
        Self {
            files: HashMap::new(),
            directories: HashMap::new(),
            kept_files: HashMap::new(),
            kept_listings: HashMap::new(),
            next: 1,
            clock: 0,
            limit,
            keep: keep.max(1),
        }
    }

    fn number(&mut self) -> Result<u64, Errno> {
        if self.files.len() + self.directories.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        let number = self.next;
        self.next += 1;
        Ok(number)
    }

    pub(super) fn add_file(
        &mut self,
        node: NodeId,
        file: File,
        flags: OFlags,
    ) -> Result<u64, Errno> {
        let number = self.number()?;
        self.files.insert(number, FileHandle { file, node, flags });
        Ok(number)
    }

    pub(super) fn add_directory(&mut self, node: NodeId, listing: Listing) -> Result<u64, Errno> {
        let number = self.number()?;
        self.directories.insert(number, (node, listing));
        Ok(number)
    }

    /// The open file `handle`, which must be `node`'s.
    pub(super) fn file_of(&self, handle: u64, node: NodeId) -> Result<&FileHandle, Errno> {
        let file = self.files.get(&handle).ok_or(Errno::BADF)?;
        if file.node == node {
            Ok(file)
        } else {
            Err(Errno::BADF)
        }
    }

    /// Takes a directory's listing to work on; give it back with [`Self::put_listing`].
    pub(super) fn take_listing(&mut self, handle: u64, node: NodeId) -> Result<Listing, Errno> {
        match self.directories.get_mut(&handle) {
            Some((owner, listing)) if *owner == node => Ok(std::mem::take(listing)),
            _ => Err(Errno::BADF),
        }
    }

    pub(super) fn put_listing(&mut self, handle: u64, listing: Listing) {
        if let Some((_, slot)) = self.directories.get_mut(&handle) {
            *slot = listing;
        }
    }

    pub(super) fn take_kept_listing(&mut self, node: NodeId) -> Option<Listing> {
        self.kept_listings.remove(&node).map(|(_, listing)| listing)
    }

    pub(super) fn keep_listing(&mut self, node: NodeId, listing: Listing) {
        // A listing being read needs its buffer; the others can be made again.
        make_room(&mut self.kept_listings, self.keep / 8);
        self.clock += 1;
        self.kept_listings.insert(node, (self.clock, listing));
    }

    pub(super) fn kept_file(&mut self, node: NodeId) -> Option<Arc<File>> {
        self.clock += 1;
        let (used, file) = self.kept_files.get_mut(&node)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    pub(super) fn keep_file(&mut self, node: NodeId, file: &Arc<File>) {
        make_room(&mut self.kept_files, self.keep);
        self.clock += 1;
        self.kept_files.insert(node, (self.clock, Arc::clone(file)));
    }

    /// Any open file of `node`: for files that have lost their name.
    pub(super) fn any_of(&self, node: NodeId) -> Option<&File> {
        self.files
            .values()
            .find(|handle| handle.node == node)
            .map(|handle| &handle.file)
    }

    pub(super) fn close_file(&mut self, handle: u64) {
        self.files.remove(&handle);
    }

    pub(super) fn close_directory(&mut self, handle: u64) {
        self.directories.remove(&handle);
    }

    pub(super) fn records(&self) -> (Vec<HandleRecord>, Vec<(u64, NodeId)>) {
        let file =
            |(&number, handle): (&u64, &FileHandle)| (number, handle.node, handle.flags.bits());
        let directory = |(&number, (node, _)): (&u64, &(NodeId, Listing))| (number, *node);
        (
            self.files.iter().map(file).collect(),
            self.directories.iter().map(directory).collect(),
        )
    }

    pub(super) fn load_file(&mut self, number: u64, node: NodeId, file: File, flags: OFlags) {
        self.next = self.next.max(number.saturating_add(1));
        self.files.insert(number, FileHandle { file, node, flags });
    }

    pub(super) fn load_directory(&mut self, number: u64, node: NodeId, listing: Listing) {
        self.next = self.next.max(number.saturating_add(1));
        self.directories.insert(number, (node, listing));
    }

    pub(super) fn open(&self) -> usize {
        self.files.len() + self.directories.len()
    }
}

/// Drops the quarter that was unused for longest when there are `limit`.
fn make_room<T>(kept: &mut HashMap<NodeId, (u64, T)>, limit: usize) {
    if kept.len() < limit.max(4) {
        return;
    }
    let mut by_age: Vec<(u64, NodeId)> = kept.iter().map(|(&id, &(used, _))| (used, id)).collect();
    by_age.sort_unstable();
    for (_, id) in by_age.iter().take(kept.len() / 4 + 1) {
        kept.remove(id);
    }
}
