//! What the guest knows and has open, in a snapshot.
//!
//! Files are found again by place and checked by their host inode when used: what was replaced
//! meanwhile is stale, and the guest looks it up anew.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;

use ringfence_device::RestoreError;
use rustix::fs::FileType;
use rustix::fs::OFlags;
use serde::Deserialize;
use serde::Serialize;

use super::FileSystem;
use super::layout::RuleId;
use super::nodes::Key;
use super::nodes::NodeId;
use super::nodes::Place;

const WHAT: &str = "fs";
/// Version of [`FsState`].
const STATE_VERSION: u32 = 1;

/// One node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct NodeRecord {
    pub(super) id: NodeId,
    /// Share, host device, host inode.
    pub(super) key: Option<(u16, u64, u64)>,
    /// Parent and name, for entries of host directories.
    pub(super) entry: Option<(NodeId, Vec<u8>)>,
    pub(super) rule: Option<RuleId>,
    /// The file type bits of its mode.
    pub(super) kind: u32,
    pub(super) lookups: u64,
}

impl NodeRecord {
    pub(super) fn key(&self) -> Option<Key> {
        self.key.map(|(share, device, inode)| Key {
            share,
            device,
            inode,
        })
    }

    pub(super) fn place(&self) -> Place {
        match (&self.entry, self.key) {
            (Some((parent, name)), _) => Place::Entry {
                parent: *parent,
                name: OsString::from_vec(name.clone()),
            },
            (None, Some(_)) => Place::ShareRoot,
            (None, None) => Place::Virtual,
        }
    }

    pub(super) fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.kind)
    }

    pub(super) fn entry_of(place: &Place) -> Option<(NodeId, Vec<u8>)> {
        match place {
            Place::Entry { parent, name } => Some((*parent, name.as_bytes().to_vec())),
            Place::Virtual | Place::ShareRoot => None,
        }
    }
}

/// One open file: handle, node, flags.
pub(super) type HandleRecord = (u64, NodeId, u32);

#[derive(Debug, Serialize, Deserialize)]
struct FsState {
    version: u32,
    without_open: bool,
    writeback: bool,
    nodes: Vec<NodeRecord>,
    files: Vec<HandleRecord>,
    directories: Vec<(u64, NodeId)>,
}

impl FileSystem {
    pub(super) fn save(&self) -> serde_json::Value {
        let (files, directories) = self.handles.records();
        let state = FsState {
            version: STATE_VERSION,
            without_open: self.without_open,
            writeback: self.writeback,
            nodes: self.nodes.records(),
            files,
            directories,
        };
        // Plain numbers and lists: this can't fail.
        serde_json::to_value(state).unwrap_or_default()
    }

    pub(super) fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        let state: FsState = RestoreError::parse(WHAT, state)?;
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        let shares = self.layout.shares.len();
        let rules = self.layout.rules();
        let fits = |record: &NodeRecord| {
            record
                .key
                .is_none_or(|(share, ..)| usize::from(share) < shares)
                && record.rule.is_none_or(|rule| (rule as usize) < rules)
        };
        if !state.nodes.iter().all(fits) {
            return Err(RestoreError::Mismatch {
                what: WHAT,
                why: "the shared tree is composed differently".to_owned(),
            });
        }
        self.reset();
        (self.without_open, self.writeback) = (state.without_open, state.writeback);
        self.nodes.load(&state.nodes);
        for (handle, node, flags) in state.files {
            // Truncating again would lose data; a file that is gone has a bad handle.
            let flags = OFlags::from_bits_retain(flags).difference(OFlags::TRUNC);
            if let Ok(file) = self.open_node(node, flags) {
                self.handles.load_file(handle, node, file, flags);
            }
        }
        for (handle, node) in state.directories {
            if let Ok(listing) = self.new_listing(node) {
                self.handles.load_directory(handle, node, listing);
            }
        }
        Ok(())
    }
}
