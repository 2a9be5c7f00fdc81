//! Unions of directories: what is written stays in memory or goes to a directory of its own.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Gid;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::Stat;
use rustix::fs::Uid;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::mount::OpenTreeFlags;

use crate::copied;
use crate::error::InitError;
use crate::error::Step;
use crate::mounts;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Overlay;
use crate::plan::Part;

/// The most that mount(2) takes as options, less what the other options may be.
const LONGEST: usize = 3000;
/// `MOUNT_ATTR_RDONLY`
const READ_ONLY: u64 = 1;
const HANDLE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Mounts the root at a path of the host; returns the memory that holds what is written, if any.
pub(crate) fn mount_root(overlay: &Overlay, target: &str) -> Result<Option<OwnedFd>, InitError> {
    let what = || format!("mount the overlay at {target}");
    let Some(memory) = &overlay.memory else {
        let (Some(upper), Some(work)) = (&overlay.upper, &overlay.work) else {
            let layers = Layers::new(&overlay.lower, None, &overlay.options)?;
            return layers.mount(target).map(|()| None);
        };
        let layers = Layers::new(&overlay.lower, Some((upper, work)), &overlay.options)?;
        return layers.mount(target).map(|()| None);
    };
    tmpfs(target, memory)?;
    let held = rustix::fs::open(target, HANDLE, Mode::empty()).step(what)?;
    // The root comes to lie on the memory, which then has no path any more.
    if overlay.lower.is_empty() {
        tmpfs(target, memory)?;
    } else {
        let (upper, work) = places(&held, "root", overlay.lower.first())?;
        let layers = Layers::new(&overlay.lower, Some((&upper, &work)), &overlay.options)?;
        match (layers.mount(target), &overlay.copy) {
            (Err(error), Some(copy)) if is_without(&error) => {
                for layer in overlay.lower.iter().rev() {
                    copied::lay(Path::new(layer), Path::new(copy), &[])
                        .step(|| format!("copy the layer {layer}"))?;
                }
                rustix::mount::mount_bind(copy.as_str(), target).step(what)?;
            }
            (result, _) => result?,
        }
    }
    Ok(Some(held))
}

/// Whether there is no overlay here: no module, or a policy against it in user namespaces.
fn is_without(error: &InitError) -> bool {
    let refusals = [
        Errno::PERM,
        Errno::ACCESS,
        Errno::NODEV,
        Errno::INVAL,
        Errno::OPNOTSUPP,
    ];
    refusals
        .iter()
        .any(|refusal| error.errno() == Some(refusal.raw_os_error()))
}

/// Mounts a directory of the host inside the root, with what is written in the root's memory.
pub(crate) fn mount_part(
    tree: &Tree,
    memory: &OwnedFd,
    number: usize,
    part: &Part,
    options: &[String],
) -> Result<(), InitError> {
    let (upper, work) = places(memory, &format!("part{number}"), Some(&part.lower))?;
    if !part.hide.is_empty() {
        let what = || format!("open {}", part.lower);
        let above = rustix::fs::open(upper.as_str(), HANDLE, Mode::empty()).step(what)?;
        let below = rustix::fs::open(part.lower.as_str(), HANDLE, Mode::empty()).step(what)?;
        for hidden in &part.hide {
            hide(&above, &below, Path::new(hidden))?;
        }
    }
    let target = tree.make(&part.target, Kind::Directory)?;
    let lower = std::slice::from_ref(&part.lower);
    let layers = Layers::new(lower, Some((&upper, &work)), options)?;
    match layers.mount(&Tree::name(target.as_fd())) {
        Err(error) if is_without(&error) && part.copy => {
            let copy = format!("{upper}-copy");
            copied::lay(Path::new(&part.lower), Path::new(&copy), &part.hide)
                .step(|| format!("copy {}", part.lower))?;
            bind(&copy, &target, false)
        }
        Err(error) if is_without(&error) => {
            bind(&part.lower, &target, true)?;
            for hidden in &part.hide {
                cover(tree, &format!("{}/{hidden}", part.target), memory)?;
            }
            Ok(())
        }
        result => result,
    }
}

fn bind(source: &str, target: &OwnedFd, read_only: bool) -> Result<(), InitError> {
    let what = || format!("bind {source}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let flags = flags | OpenTreeFlags::AT_RECURSIVE;
    let mount = rustix::mount::open_tree(CWD, source, flags).step(what)?;
    mounts::attach(&mount, target.as_fd()).step(what)?;
    if read_only {
        mounts::set_attributes(mount.as_fd(), true, READ_ONLY, 0, None).step(what)?;
    }
    Ok(())
}

/// Hides what can't be made not to exist: behind an empty file or directory of the root's memory.
fn cover(tree: &Tree, path: &str, memory: &OwnedFd) -> Result<(), InitError> {
    let what = || format!("hide {path}");
    let target = match tree.handle_no_follow(Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result.step(what)?,
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&target).step(what)?.st_mode);
    let empty = if kind == FileType::Directory {
        let made = rustix::fs::mkdirat(memory, "empty", Mode::RWXU);
        exists(made).step(what)?;
        "empty"
    } else {
        let made = rustix::fs::mknodat(memory, "nothing", FileType::RegularFile, Mode::RUSR, 0);
        exists(made).step(what)?;
        "nothing"
    };
    let source = format!("{}/{empty}", Tree::name(memory.as_fd()));
    bind(&source, &target, true)
}

fn exists(made: Result<(), Errno>) -> Result<(), Errno> {
    match made {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

fn tmpfs(target: &str, options: &str) -> Result<(), InitError> {
    let data = CString::new(options).unwrap_or_default();
    rustix::mount::mount(
        "tmpfs",
        target,
        "tmpfs",
        MountFlags::empty(),
        data.as_c_str(),
    )
    .step(|| format!("mount memory at {target}"))
}

/// The two directories that an overlay writes to, by paths that work while `memory` is open.
fn places(
    memory: &OwnedFd,
    name: &str,
    like: Option<&String>,
) -> Result<(String, String), InitError> {
    let what = || format!("make {name} in the overlay's memory");
    let (upper, work) = (format!("{name}/upper"), format!("{name}/work"));
    // By the descriptor: a path through /proc takes longer than what is done at its end.
    for path in [name, &upper, &work] {
        rustix::fs::mkdirat(memory, path, Mode::RWXU).step(what)?;
    }
    if let Some(lower) = like {
        let below = rustix::fs::open(lower.as_str(), HANDLE, Mode::empty()).step(what)?;
        let status = rustix::fs::fstat(&below).step(what)?;
        look_like(memory, Path::new(&upper), &status).step(what)?;
    }
    let base = Tree::name(memory.as_fd());
    Ok((format!("{base}/{upper}"), format!("{base}/{work}")))
}

/// Gives a directory another's owner and mode.
fn look_like(folder: &OwnedFd, path: &Path, like: &Stat) -> Result<(), Errno> {
    let owner = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
    let flags = AtFlags::empty();
    match rustix::fs::chownat(folder, path, Some(owner.0), Some(owner.1), flags) {
        // An owner that has no number in this user namespace: it is its root's.
        Err(Errno::INVAL) => {}
        result => result?,
    }
    rustix::fs::chmodat(folder, path, Mode::from_raw_mode(like.st_mode), flags)
}

/// Makes a path of the lower directory not exist: a whiteout, which is a device of number 0.
fn hide(upper: &OwnedFd, lower: &OwnedFd, path: &Path) -> Result<(), InitError> {
    let what = || format!("hide {}", path.display());
    let white_out =
        || match rustix::fs::mknodat(upper, path, FileType::CharacterDevice, Mode::empty(), 0) {
            Err(Errno::EXIST) => Ok(()),
            result => result,
        };
    match white_out() {
        Err(Errno::NOENT) => {}
        result => return result.step(what),
    }
    let mut parents: Vec<&Path> = path.ancestors().skip(1).collect();
    // The last is the directory itself.
    parents.pop();
    for parent in parents.into_iter().rev() {
        match rustix::fs::mkdirat(upper, parent, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => continue,
            Err(error) => return Err(error).step(what),
        }
        match rustix::fs::statat(lower, parent, AtFlags::empty()) {
            Ok(status) => look_like(upper, parent, &status).step(what)?,
            // It has gone, and what was to be hidden with it.
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error).step(what),
        }
    }
    white_out().step(what)
}

/// An overlay's options, and the descriptors that they name.
struct Layers {
    data: CString,
    _held: Vec<OwnedFd>,
}

impl Layers {
    fn new(
        lower: &[String],
        upper: Option<(&String, &String)>,
        options: &[String],
    ) -> Result<Self, InitError> {
        let mut held = Vec::new();
        let mut names: Vec<String> = lower.iter().map(|path| escaped(path)).collect();
        if names.iter().map(String::len).sum::<usize>() > LONGEST {
            for (name, path) in names.iter_mut().zip(lower) {
                let layer = rustix::fs::open(path.as_str(), HANDLE, Mode::empty())
                    .step(|| format!("open the layer {path}"))?;
                *name = Tree::name(layer.as_fd());
                held.push(layer);
            }
        }
        let mut parts = vec![format!("lowerdir={}", names.join(":"))];
        if let Some((upper, work)) = upper {
            parts.push(format!(
                "upperdir={},workdir={}",
                escaped(upper),
                escaped(work)
            ));
        }
        parts.extend(options.iter().cloned());
        let data = CString::new(parts.join(","))
            .map_err(|_| InitError::Refused("a layer's path holds a zero byte".to_owned()))?;
        Ok(Self { data, _held: held })
    }

    fn mount(&self, target: &str) -> Result<(), InitError> {
        let flags = MountFlags::empty();
        rustix::mount::mount("overlay", target, "overlay", flags, self.data.as_c_str())
            .step(|| format!("mount the overlay at {target}"))
    }
}

fn escaped(path: &str) -> String {
    path.replace('\\', "\\\\")
        .replace(':', "\\:")
        .replace(',', "\\,")
}
