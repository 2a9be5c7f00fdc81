//! Device nodes and the links of `/dev`.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Gid;
use rustix::fs::Mode;
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

use crate::error::InitError;
use crate::error::Step;
use crate::mounts;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Device;

/// Makes a node, or binds the host's where nodes can't be made.
pub(crate) fn put(tree: &Tree, device: &Device) -> Result<(), InitError> {
    if device.bind {
        return bind(tree, device);
    }
    let what = || format!("make the device {}", device.path);
    let (parent, name) = tree.make_parent(&device.path)?;
    let kind = FileType::from_raw_mode(device.mode);
    let mode = Mode::from_raw_mode(device.mode & 0o7777);
    let number = rustix::fs::makedev(device.major, device.minor);
    match rustix::fs::mknodat(&parent, &name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => return same(&parent, &name, device),
        Err(Errno::PERM) => return bind(tree, device),
        Err(error) => return Err(error).step(what),
    }
    // The kernel takes the umask from the mode; a link that took the node's place isn't followed.
    let owner = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(
        &parent,
        &name,
        Some(owner.0),
        Some(owner.1),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .step(what)?;
    let node = rustix::fs::openat(
        &parent,
        &name,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(what)?;
    rustix::fs::chmod(Tree::name(node.as_fd()).as_str(), mode).step(what)
}

/// Something is there already: it must be the same device.
fn same(parent: &impl AsFd, name: &Path, device: &Device) -> Result<(), InitError> {
    let what = || format!("look at {}", device.path);
    let status = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).step(what)?;
    let number = rustix::fs::makedev(device.major, device.minor);
    let kind = FileType::from_raw_mode(device.mode);
    let fifo = kind == FileType::Fifo;
    if FileType::from_raw_mode(status.st_mode) == kind && (fifo || status.st_rdev == number) {
        return Ok(());
    }
    Err(InitError::Refused(format!(
        "{} is in the image and isn't that device",
        device.path
    )))
}

fn bind(tree: &Tree, device: &Device) -> Result<(), InitError> {
    let what = || format!("bind the host's {}", device.path);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let source = rustix::mount::open_tree(CWD, device.path.as_str(), flags).step(what)?;
    let target = tree.make(&device.path, Kind::File)?;
    mounts::attach(&source, target.as_fd()).step(what)
}

/// Makes a link; one that is there stays.
pub(crate) fn link(tree: &Tree, name: &str, points_to: &str) -> Result<(), InitError> {
    let (parent, last) = tree.make_parent(name)?;
    match rustix::fs::symlinkat(points_to, &parent, &last) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).step(|| format!("make the link {name}")),
    }
}
