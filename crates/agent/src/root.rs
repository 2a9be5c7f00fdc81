//! The guest's root file system: put together from its layers, entered, and furnished.

use crate::disk;
use crate::error::AgentError;
use crate::error::Tried;
use crate::message::Layer;
use crate::message::LayerKind;
use crate::message::Mount;
use crate::message::MountKind;
use crate::message::Root;
use crate::message::Writable;
use crate::modules::Modules;
use crate::place::below;
use crate::place::bind;
use crate::place::make_directory;
use crate::place::mount;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::mount::UnmountFlags;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::path::PathBuf;

/// Where the new root is put together, in the initramfs.
const NEW_ROOT: &str = "/root";
/// Where file systems are mounted before parts of them are shown elsewhere.
const HIDDEN: &str = "/run/ringfence";
/// Where layers are joined, below the one that is written to. Short, as layers' names are.
const JOINED: &str = "/joined";

/// Puts the root together and makes it the agent's.
///
/// # Errors
///
/// A layer isn't there, or the kernel refuses a step.
pub(crate) fn enter(root: &Root, modules: &mut Modules) -> Result<(), AgentError> {
    let mut hidden = Hidden::default();
    let mut layers = Vec::new();
    for layer in &root.layers {
        let writable = root.writable == Writable::Direct;
        layers.push(hidden.layer(layer, writable, modules)?);
    }
    let target = Path::new(NEW_ROOT);
    match (root.writable, layers.as_slice()) {
        (_, []) => return Err(AgentError::config("the root file system has no layers")),
        (Writable::Direct, [layer]) => bind(layer, target, false)?,
        (Writable::Direct, _) => {
            let message = "writes can't go directly to a root of several layers";
            return Err(AgentError::config(message));
        }
        (Writable::No, _) => {
            layers.insert(0, skeleton()?);
            modules.load("overlay")?;
            join(&short_names(&layers)?, NEW_ROOT)?;
        }
        (Writable::Overlay, _) => {
            modules.load("overlay")?;
            overlay(&short_names(&layers)?, &upper(root.upper_mib)?)?;
        }
    }
    switch(target)?;
    furnish(root.writable)
}

/// The place in memory for what is written.
fn upper(size_mib: Option<u64>) -> Result<PathBuf, AgentError> {
    let place = Path::new("/run/upper");
    let size = size_mib.map_or_else(String::new, |mib| format!(",size={mib}m"));
    let options = format!("mode=755{size}");
    mount("upper", place, "tmpfs", MountFlags::empty(), &options)?;
    make_directory(&place.join("data"))?;
    make_directory(&place.join("work"))?;
    Ok(place.to_owned())
}

/// A lowest layer with the places that every root has: one that is read only can't be given them.
fn skeleton() -> Result<PathBuf, AgentError> {
    let place = Path::new("/skeleton");
    for name in ["proc", "sys", "dev", "run", "tmp", "etc"] {
        make_directory(&place.join(name))?;
    }
    Ok(place.to_owned())
}

/// Overlayfs wants the highest first. Its option string has one page, so names are short.
fn short_names(layers: &[PathBuf]) -> Result<Vec<String>, AgentError> {
    let names = layers.iter().enumerate().rev().map(|(at, layer)| {
        let short = format!("/l{at}");
        symlink(layer, &short).tried(|| format!("cannot name layer {at}"))?;
        Ok(short)
    });
    names.collect()
}

fn overlay(lower: &[String], upper: &Path) -> Result<(), AgentError> {
    // Layers say which of their directories hide those below by attributes in the name space of
    // users, and an upper layer in memory can only say it in that of the system. One overlay
    // reads one of them, so layers are joined first.
    let lower = match lower {
        [only] => only,
        several => {
            join(several, JOINED)?;
            JOINED
        }
    };
    let upper = upper.display();
    let options = format!("lowerdir={lower},upperdir={upper}/data,workdir={upper}/work");
    let flags = MountFlags::empty();
    mount("root", Path::new(NEW_ROOT), "overlay", flags, &options)
}

/// Joins several layers, read only.
fn join(lower: &[String], target: &str) -> Result<(), AgentError> {
    let options = format!("userxattr,lowerdir={}", lower.join(":"));
    mount(
        "layers",
        Path::new(target),
        "overlay",
        MountFlags::RDONLY,
        &options,
    )
}

/// File systems that are mounted out of sight, one for each source.
#[derive(Default)]
struct Hidden {
    places: BTreeMap<String, PathBuf>,
}

impl Hidden {
    fn layer(
        &mut self,
        layer: &Layer,
        writable: bool,
        modules: &mut Modules,
    ) -> Result<PathBuf, AgentError> {
        let place = match layer.kind {
            LayerKind::Directory => PathBuf::from("/"),
            LayerKind::Virtiofs => self.virtiofs(&layer.source, modules)?,
            LayerKind::Block => {
                let read_only = !writable;
                self.block(&layer.source, &layer.filesystem, "", read_only, modules)?
            }
        };
        let subpath = match layer.kind {
            LayerKind::Directory => &layer.source,
            _ => &layer.subpath,
        };
        Ok(below(&place, subpath))
    }

    fn place(&self) -> PathBuf {
        Path::new(HIDDEN).join(self.places.len().to_string())
    }

    /// Writes are refused where it is shown, if they are: the file system is one for all places.
    fn virtiofs(&mut self, tag: &str, modules: &mut Modules) -> Result<PathBuf, AgentError> {
        if let Some(place) = self.places.get(tag) {
            return Ok(place.clone());
        }
        modules.load("virtiofs")?;
        let place = self.place();
        mount(tag, &place, "virtiofs", MountFlags::empty(), "")?;
        self.places.insert(tag.to_owned(), place.clone());
        Ok(place)
    }

    fn block(
        &mut self,
        source: &str,
        filesystem: &str,
        options: &str,
        read_only: bool,
        modules: &mut Modules,
    ) -> Result<PathBuf, AgentError> {
        if let Some(place) = self.places.get(source) {
            return Ok(place.clone());
        }
        modules.load("virtio_blk")?;
        let found = disk::find(source, filesystem)?;
        let (device, filesystem) = (found.device.to_string_lossy(), found.filesystem.as_str());
        modules.load(disk::module_of(filesystem))?;
        let place = self.place();
        let flags = if read_only {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        match mount(&device, &place, filesystem, flags, options) {
            // A journal to replay on a disk that can't be written.
            Err(error) if read_only && error.errno == Errno::ROFS.raw_os_error() => {
                let as_it_is = match filesystem {
                    "ext4" => "noload",
                    "xfs" => "norecovery",
                    _ => return Err(error),
                };
                mount(&device, &place, filesystem, flags, as_it_is)?;
            }
            other => other?,
        }
        self.places.insert(source.to_owned(), place.clone());
        Ok(place)
    }

    /// What is shown stays; the file systems themselves go out of sight.
    fn leave(self) {
        for place in self.places.values() {
            let _shown = rustix::mount::unmount(place, UnmountFlags::DETACH);
            let _empty = fs::remove_dir(place);
        }
    }
}

/// Makes the mount at `root` the root of everything, as switch_root(8) does.
fn switch(root: &Path) -> Result<(), AgentError> {
    for name in ["proc", "sys", "dev"] {
        let place = root.join(name);
        make_directory(&place)?;
        rustix::mount::mount_move(Path::new("/").join(name), &place)
            .tried(|| format!("cannot move /{name} to the new root"))?;
    }
    let what = || "cannot change to the new root".to_owned();
    rustix::process::chdir(root).tried(what)?;
    rustix::mount::mount_move(".", "/").tried(what)?;
    rustix::process::chroot(".").tried(what)?;
    rustix::process::chdir("/").tried(what)
}

/// What every program expects of a running system.
fn furnish(writable: Writable) -> Result<(), AgentError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let pts = "mode=620,ptmxmode=666,gid=5";
    let quiet = safe | MountFlags::NOEXEC;
    mount(
        "devpts",
        Path::new("/dev/pts"),
        "devpts",
        MountFlags::NOSUID,
        pts,
    )?;
    mount("shm", Path::new("/dev/shm"), "tmpfs", safe, "mode=1777")?;
    mount("run", Path::new("/run"), "tmpfs", safe, "mode=755")?;
    // A kernel without control groups runs programs all the same.
    let _optional = mount("cgroup2", Path::new("/sys/fs/cgroup"), "cgroup2", quiet, "");
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        let _there = symlink(target, Path::new("/dev").join(name));
    }
    let tmp = Path::new("/tmp");
    if writable == Writable::No {
        mount("tmp", tmp, "tmpfs", safe, "mode=1777")?;
    } else if !tmp.exists() {
        make_directory(tmp)?;
        let mode = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(tmp, mode).tried(|| "cannot open /tmp to all".into())?;
    }
    Ok(())
}

/// Does the host's further mounts, in order.
///
/// # Errors
///
/// A source isn't there, or the kernel refuses.
pub(crate) fn mount_all(mounts: &[Mount], modules: &mut Modules) -> Result<(), AgentError> {
    let mut hidden = Hidden::default();
    for wanted in mounts {
        mount_one(wanted, &mut hidden, modules)?;
    }
    hidden.leave();
    Ok(())
}

fn mount_one(wanted: &Mount, hidden: &mut Hidden, modules: &mut Modules) -> Result<(), AgentError> {
    let target = below(Path::new("/"), &wanted.target);
    match wanted.kind {
        MountKind::Virtiofs => {
            let place = hidden.virtiofs(&wanted.source, modules)?;
            bind(&below(&place, &wanted.subpath), &target, wanted.read_only)
        }
        MountKind::Block => {
            let (source, kind) = (&wanted.source, &wanted.filesystem);
            let place = hidden.block(source, kind, &wanted.options, wanted.read_only, modules)?;
            bind(&below(&place, &wanted.subpath), &target, wanted.read_only)
        }
        MountKind::Bind => {
            let source = below(Path::new("/"), &wanted.source);
            bind(&source, &target, wanted.read_only)
        }
        MountKind::Tmpfs => {
            let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
            if wanted.read_only {
                flags |= MountFlags::RDONLY;
            }
            mount("tmpfs", &target, "tmpfs", flags, &wanted.options)
        }
    }
}
