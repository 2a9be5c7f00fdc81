//! The container's mounts. Targets are descriptors, never paths that could change meanwhile.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::mount::MountPropagationFlags;
use rustix::mount::MoveMountFlags;
use rustix::mount::OpenTreeFlags;

use crate::error::InitError;
use crate::error::Step;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Mount;
use crate::sys;

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);
const ATTACH: MoveMountFlags =
    MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH.union(MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH);
const READ_ONLY: u64 = 1;

/// Puts one mount in its place.
pub(crate) fn put(tree: &Tree, mount: &Mount) -> Result<(), InitError> {
    match &mount.filesystem {
        None => bind(tree, mount),
        Some(filesystem) => new(tree, mount, filesystem),
    }
    .and_then(|()| propagate(tree, mount))
}

fn new(tree: &Tree, mount: &Mount, filesystem: &str) -> Result<(), InitError> {
    if mount.no_link {
        refuse_link(tree, &mount.target)?;
    }
    let was_there = tree.handle(Path::new(&mount.target)).is_ok();
    let target = tree.make(&mount.target, Kind::Directory)?;
    let what = || format!("mount {filesystem} at {}", mount.target);
    let flags = MountFlags::from_bits_retain(u32::try_from(mount.flags).unwrap_or(u32::MAX));
    let mode = mode_of(&target);
    let mut data = mount.data.clone();
    let says_mode = data.split(',').any(|word| word.starts_with("mode="));
    if filesystem == "tmpfs"
        && was_there
        && !says_mode
        && let Some(mode) = &mode
    {
        // It looks as what it covers did, unless it is said how.
        let comma = if data.is_empty() { "" } else { "," };
        data = format!("{data}{comma}mode={:o}", mode.mode());
    }
    let data = CString::new(data)
        .map_err(|_| InitError::Refused(format!("{}: options hold a zero byte", mount.target)))?;
    let copied = if mount.copy_up {
        Some(tree.handle(Path::new(&mount.target)).step(what)?)
    } else {
        None
    };
    let place = Tree::name(target.as_fd());
    // The file system is writable until it holds what it is to hold.
    let first = if mount.copy_up {
        flags - MountFlags::RDONLY
    } else {
        flags
    };
    rustix::mount::mount(
        mount.source.as_str(),
        place.as_str(),
        filesystem,
        first,
        data.as_c_str(),
    )
    .step(what)?;
    if let Some(hidden) = copied {
        let new = tree.handle(Path::new(&mount.target)).step(what)?;
        copy_tree(
            Path::new(&Tree::name(hidden.as_fd())),
            Path::new(&Tree::name(new.as_fd())),
        )
        .step(|| format!("copy what {} hides", mount.target))?;
        if let Some(mode) = mode {
            let _kept = fs::set_permissions(Tree::name(new.as_fd()), mode);
        }
        if flags.contains(MountFlags::RDONLY) {
            set_attributes(new.as_fd(), false, READ_ONLY, 0, None).step(what)?;
        }
    }
    Ok(())
}

fn mode_of(target: &OwnedFd) -> Option<fs::Permissions> {
    let status = rustix::fs::fstat(target).ok()?;
    Some(fs::Permissions::from_mode(status.st_mode & 0o7777))
}

/// `/proc` and `/sys` tell of the host, so a link must not put them where others are looked for.
fn refuse_link(tree: &Tree, target: &str) -> Result<(), InitError> {
    let Ok(handle) = tree.handle_no_follow(Path::new(target)) else {
        return Ok(());
    };
    let status = rustix::fs::fstat(&handle).step(|| format!("look at {target}"))?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        return Ok(());
    }
    Err(InitError::Refused(format!(
        "{target} must be mounted on ordinary directory"
    )))
}

fn bind(tree: &Tree, mount: &Mount) -> Result<(), InitError> {
    let what = || format!("bind {} at {}", mount.source, mount.target);
    let mut flags = CLONE;
    if mount.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let source = match mount.tree {
        Some(number) => sys::inherited(number).step(what)?,
        None => rustix::mount::open_tree(CWD, mount.source.as_str(), flags).step(what)?,
    };
    let status = rustix::fs::fstat(&source).step(what)?;
    let kind = match FileType::from_raw_mode(status.st_mode) {
        FileType::Directory => Kind::Directory,
        _ => Kind::File,
    };
    let target = tree.make(&mount.target, kind)?;
    attach(&source, target.as_fd()).step(what)?;
    // Attributes come last: a mount that is attached can be changed by the older call too.
    if mount.set | mount.clear != 0 {
        set_attributes(source.as_fd(), false, mount.set, mount.clear, None).step(what)?;
    }
    if mount.set_below | mount.clear_below != 0 {
        set_attributes(
            source.as_fd(),
            true,
            mount.set_below,
            mount.clear_below,
            None,
        )
        .step(what)?;
    }
    Ok(())
}

/// Attaches a mount that is nowhere yet.
pub(crate) fn attach(mount: &OwnedFd, target: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::mount::move_mount(mount, "", target, "", ATTACH)
}

/// A copy of what is at a handle, as a mount that is nowhere yet.
pub(crate) fn copy_of(handle: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = CLONE | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(handle, "", flags)
}

/// Sets attributes, by the older call where the kernel (before 5.12) lacks the newer.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    below: bool,
    set: u64,
    clear: u64,
    id_map: Option<i32>,
) -> std::io::Result<()> {
    match sys::mount_setattr(mount, below, set, clear, id_map) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) && id_map.is_none() => {
            let name = Tree::name(mount);
            let flags = held_flags(mount)? | flags_of(set) | MountFlags::BIND;
            let flags = flags - flags_of(clear);
            rustix::mount::mount_remount(name.as_str(), flags, c"").map_err(Into::into)
        }
        result => result,
    }
}

/// `MOUNT_ATTR_*` and `MS_*` agree in the four lowest bits: read only, no setuid, devices, programs.
fn flags_of(attributes: u64) -> MountFlags {
    MountFlags::from_bits_truncate(u32::try_from(attributes & 0xf).unwrap_or(0))
}

fn held_flags(mount: BorrowedFd<'_>) -> std::io::Result<MountFlags> {
    let status = rustix::fs::fstatvfs(mount)?;
    let low = status.f_flag.bits() & 0xf;
    Ok(MountFlags::from_bits_truncate(
        u32::try_from(low).unwrap_or(0),
    ))
}

fn propagate(tree: &Tree, mount: &Mount) -> Result<(), InitError> {
    if mount.propagation.is_empty() {
        return Ok(());
    }
    let what = || format!("set the propagation of {}", mount.target);
    let handle = tree.handle(Path::new(&mount.target)).step(what)?;
    let name = Tree::name(handle.as_fd());
    for &flags in &mount.propagation {
        let flags = MountPropagationFlags::from_bits_retain(flags);
        rustix::mount::mount_change(name.as_str(), flags).step(what)?;
    }
    Ok(())
}

/// Gives a file another's owner and mode.
pub(crate) fn copy_owner(from: &Path, to: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let status = fs::metadata(from)?;
    match std::os::unix::fs::chown(to, Some(status.uid()), Some(status.gid())) {
        // An owner that has no number in this user namespace: the copy is its root's.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
        result => result?,
    }
    fs::set_permissions(to, status.permissions())
}

/// Copies a small directory tree: links as links, and files with their owners and modes.
fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&source, &target)?;
            copy_owner(&source, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
            copy_owner(&source, &target)?;
        }
    }
    Ok(())
}
