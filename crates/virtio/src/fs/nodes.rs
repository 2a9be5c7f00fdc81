//! What the guest knows by number: nodes, their places, and descriptors of directories.
//!
//! A node remembers where it was last seen (directory and name), not a descriptor: a guest knows
//! hundreds of thousands of files, a process may have open a few thousand. Directories in use have
//! a descriptor ready; the others are walked to again, and checked to be the same.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::abi::ROOT_NODE;
use super::layout::RuleId;
use super::layout::ShareId;
use super::state::NodeRecord;

pub(super) type NodeId = u64;

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) share: ShareId,
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// Where a node lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Ours alone: a directory on the way to a share, or a symbolic link.
    Virtual,
    /// The share's own descriptor.
    ShareRoot,
    /// An entry of a host directory.
    Entry { parent: NodeId, name: OsString },
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) key: Option<Key>,
    pub(super) place: Place,
    /// Names below that deviate from the host's.
    pub(super) rule: Option<RuleId>,
    pub(super) kind: FileType,
    /// How often the guest was told of it.
    lookups: u64,
    /// Nodes whose place names this one.
    children: u64,
    /// For directories in use.
    pub(super) directory: Option<Arc<OwnedFd>>,
    used: u64,
}

impl Node {
    pub(super) fn share(&self) -> Option<ShareId> {
        self.key.map(|key| key.share)
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }
}

/// All nodes of a file system.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<NodeId, Node>,
    by_key: HashMap<Key, NodeId>,
    by_rule: HashMap<RuleId, NodeId>,
    next: NodeId,
    limit: usize,
    cached: usize,
    cache_limit: usize,
    clock: u64,
}

impl Nodes {
    /// With a root, which is never forgotten.
    pub(super) fn new(
        limit: usize,
        cache_limit: usize,
        root_rule: RuleId,
        root: Option<Key>,
    ) -> Self {
        let mut new = Self {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            by_rule: HashMap::new(),
            next: ROOT_NODE,
            limit: limit.max(1),
            cached: 0,
            cache_limit: cache_limit.max(8),
            clock: 0,
        };
        let place = if root.is_some() {
            Place::ShareRoot
        } else {
            Place::Virtual
        };
        let _ = new.insert(root, place, Some(root_rule), FileType::Directory);
        new
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn get(&self, id: NodeId) -> Result<&Node, Errno> {
        // A node that the guest wasn't told of, or has forgotten.
        self.nodes.get(&id).ok_or(Errno::STALE)
    }

    fn insert(
        &mut self,
        key: Option<Key>,
        place: Place,
        rule: Option<RuleId>,
        kind: FileType,
    ) -> Result<NodeId, Errno> {
        if self.nodes.len() >= self.limit {
            return Err(Errno::NOMEM);
        }
        let id = self.next;
        self.next = id.saturating_add(1);
        self.hold_parent(&place);
        match (key, rule) {
            (Some(key), _) => drop(self.by_key.insert(key, id)),
            (None, Some(rule)) => drop(self.by_rule.insert(rule, id)),
            (None, None) => {}
        }
        let node = Node {
            key,
            place,
            rule,
            kind,
            lookups: 0,
            children: 0,
            directory: None,
            used: 0,
        };
        self.nodes.insert(id, node);
        Ok(id)
    }

    fn hold_parent(&mut self, place: &Place) {
        if let Place::Entry { parent, .. } = place
            && let Some(parent) = self.nodes.get_mut(parent)
        {
            parent.children += 1;
        }
    }

    fn release_parent(&mut self, place: &Place) {
        if let Place::Entry { parent, .. } = *place {
            if let Some(node) = self.nodes.get_mut(&parent) {
                node.children = node.children.saturating_sub(1);
            }
            self.collect(parent);
        }
    }

    /// The node of the host file `key`, seen at `place`; counts as told to the guest.
    pub(super) fn tell(
        &mut self,
        key: Key,
        place: Place,
        rule: Option<RuleId>,
        kind: FileType,
    ) -> Result<NodeId, Errno> {
        let id = match self.by_key.get(&key).copied() {
            Some(id) if self.nodes.get(&id).is_some_and(|node| node.kind == kind) => {
                self.move_to(id, place);
                id
            }
            // The number was reused for another kind of file: the old one is gone.
            _ => self.insert(Some(key), place, rule, kind)?,
        };
        self.count_lookup(id);
        Ok(id)
    }

    /// The node of a directory or link of ours.
    pub(super) fn tell_virtual(&mut self, rule: RuleId, kind: FileType) -> Result<NodeId, Errno> {
        let id = match self.by_rule.get(&rule) {
            Some(&id) => id,
            None => self.insert(None, Place::Virtual, Some(rule), kind)?,
        };
        self.count_lookup(id);
        Ok(id)
    }

    fn count_lookup(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_add(1);
        }
    }

    /// It is seen at another place now.
    pub(super) fn move_to(&mut self, id: NodeId, place: Place) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if node.place == place || node.place == Place::ShareRoot {
            return;
        }
        // Hold first: the new parent may be kept alive by the old place alone.
        self.hold_parent(&place);
        if let Some(node) = self.nodes.get_mut(&id) {
            let old = std::mem::replace(&mut node.place, place);
            self.release_parent(&old);
        }
    }

    pub(super) fn find(&self, key: Key) -> Option<NodeId> {
        self.by_key.get(&key).copied()
    }

    /// The guest forgets `count` tellings.
    pub(super) fn forget(&mut self, id: NodeId, count: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.collect(id);
    }

    /// Drops a node that nobody knows any more, and then its parents.
    fn collect(&mut self, id: NodeId) {
        let mut next = Some(id);
        while let Some(id) = next.take() {
            let unused = |node: &Node| node.lookups == 0 && node.children == 0;
            if id == ROOT_NODE || !self.nodes.get(&id).is_some_and(unused) {
                return;
            }
            let Some(node) = self.nodes.remove(&id) else {
                return;
            };
            self.cached -= usize::from(node.directory.is_some());
            if let Some(key) = node.key
                && self.by_key.get(&key) == Some(&id)
            {
                self.by_key.remove(&key);
            }
            if let (None, Some(rule)) = (node.key, node.rule) {
                self.by_rule.remove(&rule);
            }
            if let Place::Entry { parent, .. } = node.place {
                if let Some(node) = self.nodes.get_mut(&parent) {
                    node.children = node.children.saturating_sub(1);
                }
                next = Some(parent);
            }
        }
    }

    /// Forgets all but the root: the guest mounts anew.
    pub(super) fn clear(&mut self) {
        self.nodes.retain(|&id, _| id == ROOT_NODE);
        self.by_key.retain(|_, &mut id| id == ROOT_NODE);
        self.by_rule.retain(|_, &mut id| id == ROOT_NODE);
        for node in self.nodes.values_mut() {
            (node.children, node.lookups) = (0, 0);
        }
        self.cached = self
            .nodes
            .values()
            .filter(|n| n.directory.is_some())
            .count();
    }

    /// The ready descriptor of a directory.
    pub(super) fn cached_directory(&mut self, id: NodeId) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let node = self.nodes.get_mut(&id)?;
        node.used = self.clock;
        node.directory.clone()
    }

    /// Keeps a directory's descriptor ready; the ones unused for longest make room.
    pub(super) fn cache_directory(&mut self, id: NodeId, fd: &Arc<OwnedFd>) {
        if self.cached >= self.cache_limit {
            self.evict();
        }
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.used = self.clock;
            if node.directory.replace(Arc::clone(fd)).is_none() {
                self.cached += 1;
            }
        }
    }

    fn evict(&mut self) {
        let mut by_age: Vec<(u64, NodeId)> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.directory.is_some())
            .map(|(&id, node)| (node.used, id))
            .collect();
        by_age.sort_unstable();
        for &(_, id) in by_age.iter().take(self.cache_limit / 4 + 1) {
            if let Some(node) = self.nodes.get_mut(&id) {
                node.directory = None;
                self.cached -= 1;
            }
        }
    }

    pub(super) fn records(&self) -> Vec<NodeRecord> {
        let record = |(&id, node): (&NodeId, &Node)| NodeRecord {
            id,
            key: node.key.map(|key| (key.share, key.device, key.inode)),
            entry: NodeRecord::entry_of(&node.place),
            rule: node.rule,
            kind: node.kind.as_raw_mode(),
            lookups: node.lookups,
        };
        self.nodes.iter().map(record).collect()
    }

    /// Takes over saved nodes; the root is there already.
    pub(super) fn load(&mut self, records: &[NodeRecord]) {
        for record in records.iter().filter(|record| record.id != ROOT_NODE) {
            self.next = record.id;
            let inserted = self.insert(
                record.key(),
                record.place(),
                record.rule,
                record.file_type(),
            );
            if let Some(node) = inserted.ok().and_then(|id| self.nodes.get_mut(&id)) {
                node.lookups = record.lookups;
            }
        }
        let last = self.nodes.keys().max().copied().unwrap_or(ROOT_NODE);
        self.next = last.saturating_add(1);
        self.count_children();
    }

    /// Parents may have come after their children.
    fn count_children(&mut self) {
        let mut children: HashMap<NodeId, u64> = HashMap::new();
        for node in self.nodes.values() {
            if let Place::Entry { parent, .. } = node.place {
                *children.entry(parent).or_default() += 1;
            }
        }
        for (id, node) in &mut self.nodes {
            node.children = children.get(id).copied().unwrap_or(0);
        }
    }

    /// The place of an entry.
    pub(super) fn entry(&self, id: NodeId) -> Result<Option<(NodeId, &OsStr)>, Errno> {
        match &self.get(id)?.place {
            Place::Entry { parent, name } => Ok(Some((*parent, name))),
            Place::Virtual | Place::ShareRoot => Ok(None),
        }
    }
}
