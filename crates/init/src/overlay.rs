//! Unions of directories: what is written stays in memory or goes to a directory of its own.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::error::InitError;
use crate::error::Step;
use crate::mounts::copy_owner;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Overlay;
use crate::plan::Part;

/// The most that mount(2) takes as options, less what the other options may be.
const LONGEST: usize = 3000;
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
        Layers::new(&overlay.lower, Some((&upper, &work)), &overlay.options)?.mount(target)?;
    }
    Ok(Some(held))
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
    for hidden in &part.hide {
        hide(Path::new(&upper), Path::new(&part.lower), Path::new(hidden))?;
    }
    let target = tree.make(&part.target, Kind::Directory)?;
    let lower = std::slice::from_ref(&part.lower);
    Layers::new(lower, Some((&upper, &work)), options)?.mount(&Tree::name(target.as_fd()))
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
    let base = format!("{}/{name}", Tree::name(memory.as_fd()));
    let what = || format!("make {name} in the overlay's memory");
    let (upper, work) = (format!("{base}/upper"), format!("{base}/work"));
    for path in [&base, &upper, &work] {
        fs::create_dir(path).step(what)?;
    }
    if let Some(lower) = like {
        copy_owner(Path::new(lower), Path::new(&upper)).step(what)?;
    }
    Ok((upper, work))
}

/// Makes a path of the lower directory not exist: a whiteout, which is a device of number 0.
fn hide(upper: &Path, lower: &Path, path: &Path) -> Result<(), InitError> {
    let what = || format!("hide {}", path.display());
    if lower.join(path).symlink_metadata().is_err() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        let mut so_far = std::path::PathBuf::new();
        for part in parent.components() {
            so_far.push(part);
            match fs::create_dir(upper.join(&so_far)) {
                Ok(()) => copy_owner(&lower.join(&so_far), &upper.join(&so_far)).step(what)?,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).step(what),
            }
        }
    }
    let place = upper.join(path);
    match rustix::fs::mknodat(CWD, &place, FileType::CharacterDevice, Mode::empty(), 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).step(what),
    }
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
