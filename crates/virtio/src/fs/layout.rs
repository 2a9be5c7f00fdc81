//! How the shared tree is composed: a small tree of names that deviate from the host's.
//!
//! Each [`Rule`] stands for one directory (or name) of the guest's tree. Directories without a
//! rule are the host's, as they are; so the tree stays as small as the configuration.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::AtFlags;
use rustix::fs::FileType;
use rustix::fs::StatxFlags;
use rustix::fs::statx;

use super::Cache;
use super::Ids;

/// A host directory (or one file) and how it's shared.
#[derive(Debug)]
pub struct Share {
    /// The directory, or a regular file opened for reading.
    pub file: File,
    /// Nothing below can be changed.
    pub read_only: bool,
    /// Who owns the files.
    pub ids: Ids,
    /// How long the guest may believe.
    pub cache: Cache,
    /// Paths below that don't exist for the guest.
    pub hide: Vec<String>,
}

/// Why a tree can't be composed so.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A path with `.`, `..`, an empty component or a NUL.
    #[error("{0:?} is not a path of plain names from the top")]
    Path(String),
    /// Two entries for the same path.
    #[error("{0:?} is given twice")]
    Twice(String),
    /// Below a symbolic link or a single file.
    #[error("{0:?} lies below something that is no directory")]
    NotADirectory(String),
    /// The descriptor can't be looked at.
    #[error("cannot examine the descriptor shared at {at:?}")]
    Descriptor {
        /// Where it should appear.
        at: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptor is neither a directory nor a regular file.
    #[error("the descriptor shared at {0:?} is neither a directory nor a regular file")]
    Kind(String),
    /// Nothing is shared.
    #[error("a shared file system needs at least one entry")]
    Empty,
}

pub(super) type RuleId = u32;
pub(super) type ShareId = u16;

#[derive(Debug, Default)]
pub(super) struct Rule {
    children: BTreeMap<OsString, RuleId>,
    pub(super) share: Option<ShareId>,
    pub(super) symlink: Option<String>,
    hidden: bool,
    /// Mentioned by the user itself, so a second mention is an error.
    stated: bool,
    /// On the way to something visible: exists even where the host has nothing.
    exists: bool,
}

/// What a name means in a directory that has a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing by that name.
    Hidden,
    /// A share begins.
    Share(ShareId, RuleId),
    /// A symbolic link of ours.
    Symlink(RuleId),
    /// The host's entry if there is one, else an empty directory of ours.
    HostOrVirtual(RuleId),
    /// The host's entry; the rule, if any, holds below it.
    Host(Option<RuleId>),
}

/// The composed tree.
#[derive(Debug)]
pub struct Layout {
    rules: Vec<Rule>,
    pub(super) shares: Vec<Share>,
}

pub(super) const ROOT_RULE: RuleId = 0;

impl Default for Layout {
    fn default() -> Self {
        let root = Rule {
            exists: true,
            ..Rule::default()
        };
        Self {
            rules: vec![root],
            shares: Vec::new(),
        }
    }
}

fn components(path: &str) -> Result<Vec<&OsStr>, LayoutError> {
    let bad = |name: &str| matches!(name, "" | "." | "..") || name.contains('\0');
    let path_names = path.trim_matches('/');
    if path_names.is_empty() {
        return Ok(Vec::new());
    }
    let names: Vec<&str> = path_names.split('/').collect();
    if names.iter().any(|name| bad(name)) {
        return Err(LayoutError::Path(path.to_owned()));
    }
    Ok(names.into_iter().map(OsStr::new).collect())
}

impl Layout {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One directory as the whole tree.
    ///
    /// # Errors
    /// As [`Self::add_share`].
    pub fn single(share: Share) -> Result<Self, LayoutError> {
        let mut layout = Self::new();
        layout.add_share("/", share)?;
        Ok(layout)
    }

    fn rule_mut(&mut self, id: RuleId) -> &mut Rule {
        &mut self.rules[id as usize]
    }

    pub(super) fn rule(&self, id: RuleId) -> &Rule {
        &self.rules[id as usize]
    }

    fn child(&mut self, parent: RuleId, name: &OsStr) -> RuleId {
        if let Some(&id) = self.rule(parent).children.get(name) {
            return id;
        }
        let id = RuleId::try_from(self.rules.len()).unwrap_or(RuleId::MAX);
        self.rules.push(Rule::default());
        self.rule_mut(parent).children.insert(name.to_owned(), id);
        id
    }

    /// The rule of `path` below `from`, made on the way.
    fn reach(&mut self, from: RuleId, path: &str, exists: bool) -> Result<RuleId, LayoutError> {
        let mut at = from;
        for name in components(path)? {
            if self.is_leaf(at) {
                return Err(LayoutError::NotADirectory(path.to_owned()));
            }
            at = self.child(at, name);
            self.rule_mut(at).exists |= exists;
        }
        Ok(at)
    }

    fn is_leaf(&self, id: RuleId) -> bool {
        let rule = self.rule(id);
        let is_file = rule.share.is_some_and(|share| !self.is_directory(share));
        rule.symlink.is_some() || rule.hidden || is_file
    }

    fn is_directory(&self, share: ShareId) -> bool {
        let share = &self.shares[usize::from(share)];
        kind_of(&share.file).is_ok_and(|kind| kind == FileType::Directory)
    }

    fn state(&mut self, path: &str) -> Result<RuleId, LayoutError> {
        let id = self.reach(ROOT_RULE, path, true)?;
        if std::mem::replace(&mut self.rule_mut(id).stated, true) {
            return Err(LayoutError::Twice(path.to_owned()));
        }
        Ok(id)
    }

    /// Puts a host directory or file at `at`.
    ///
    /// # Errors
    /// [`LayoutError`] when the path or the descriptor can't be used.
    pub fn add_share(&mut self, at: &str, share: Share) -> Result<(), LayoutError> {
        let kind = kind_of(&share.file).map_err(|source| LayoutError::Descriptor {
            at: at.to_owned(),
            source,
        })?;
        let usable = match kind {
            FileType::Directory => true,
            FileType::RegularFile => !components(at)?.is_empty(),
            _ => false,
        };
        if !usable {
            return Err(LayoutError::Kind(at.to_owned()));
        }
        let rule = self.state(at)?;
        let hidden = share.hide.clone();
        let id = ShareId::try_from(self.shares.len()).unwrap_or(ShareId::MAX);
        self.shares.push(share);
        self.rule_mut(rule).share = Some(id);
        for path in hidden {
            let hidden = self.reach(rule, &path, false)?;
            if hidden == rule {
                return Err(LayoutError::Path(path));
            }
            self.rule_mut(hidden).hidden = true;
        }
        Ok(())
    }

    /// Puts a symbolic link at `at`.
    ///
    /// # Errors
    /// [`LayoutError`] when the path can't be used.
    pub fn add_symlink(&mut self, at: &str, target: &str) -> Result<(), LayoutError> {
        if components(at)?.is_empty() || target.is_empty() || target.contains('\0') {
            return Err(LayoutError::Path(at.to_owned()));
        }
        let rule = self.state(at)?;
        self.rule_mut(rule).symlink = Some(target.to_owned());
        Ok(())
    }

    /// Puts an empty directory at `at`, for the guest to mount on.
    ///
    /// # Errors
    /// [`LayoutError`] when the path can't be used.
    pub fn add_directory(&mut self, at: &str) -> Result<(), LayoutError> {
        self.state(at).map(|_| ())
    }

    /// What `name` is in the directory of `rule`.
    pub(super) fn step(&self, rule: RuleId, name: &OsStr) -> Step {
        let Some(&id) = self.rule(rule).children.get(name) else {
            return Step::Host(None);
        };
        let child = self.rule(id);
        if child.hidden {
            Step::Hidden
        } else if let Some(share) = child.share {
            Step::Share(share, id)
        } else if child.symlink.is_some() {
            Step::Symlink(id)
        } else if child.exists {
            Step::HostOrVirtual(id)
        } else {
            Step::Host(Some(id))
        }
    }

    /// Names that the directory of `rule` has whatever the host says.
    pub(super) fn own_names(&self, rule: RuleId) -> impl Iterator<Item = (&OsStr, &Rule)> {
        self.rule(rule)
            .children
            .iter()
            .map(|(name, &id)| (name.as_os_str(), self.rule(id)))
            .filter(|(_, rule)| rule.exists && !rule.hidden)
    }

    pub(super) fn share(&self, id: ShareId) -> &Share {
        &self.shares[usize::from(id)]
    }

    /// Whether nothing in it can be changed.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.shares.iter().all(|share| share.read_only)
    }

    pub(super) fn rules(&self) -> usize {
        self.rules.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rules.len() == 1 && self.shares.is_empty()
    }
}

fn kind_of(file: &File) -> io::Result<FileType> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(u32::from(stat.stx_mode)))
}

/// A name as the guest may give it: one component, not `.` or `..`.
pub(super) fn is_plain_name(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    !matches!(bytes, b"" | b"." | b"..") && !bytes.contains(&b'/') && bytes.len() <= 255
}
