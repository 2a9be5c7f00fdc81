//! The container's root: put together before it is entered, while the host's `/proc` is there.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::mount::MountPropagationFlags;
use rustix::mount::OpenTreeFlags;
use rustix::mount::UnmountFlags;

use crate::console;
use crate::devices;
use crate::error::InitError;
use crate::error::Step;
use crate::hooks;
use crate::mounts;
use crate::overlay;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Console;
use crate::plan::Root;
use crate::status::Runtime;
use crate::sys;

const READ_ONLY: u64 = 1;
const NULL: &str = "/dev/null";

/// What is known once the root is entered.
#[derive(Default)]
pub(crate) struct Entered {
    /// The program's end of its terminal.
    pub(crate) terminal: Option<OwnedFd>,
    /// The container's state, for hooks.
    pub(crate) state: String,
}

/// Mounts what the container sees. The root isn't entered yet.
pub(crate) fn build(root: &Root) -> Result<Tree, InitError> {
    let propagation = MountPropagationFlags::from_bits_retain(root.propagation);
    if !root.shared {
        rustix::mount::mount_change("/", propagation)
            .step(|| "set the mounts' propagation".to_owned())?;
    }
    let memory = match &root.overlay {
        Some(overlay) => overlay::mount_root(overlay, &root.path)?,
        None => bind_to_itself(&root.path).map(|()| None)?,
    };
    if root.shared {
        // What is mounted below stays out of other namespaces, which see the host's mounts.
        rustix::mount::mount_change(root.path.as_str(), MountPropagationFlags::PRIVATE)
            .step(|| format!("make {} private", root.path))?;
        return Tree::open(&root.path).and_then(|tree| fill(root, tree));
    }
    // pivot_root refuses a root whose mount, or whose parent mount, is shared.
    if propagation.contains(MountPropagationFlags::SHARED) {
        make_parent_private(&root.path)?;
    }
    let tree = Tree::open(&root.path)?;
    if let (Some(overlay), Some(memory)) = (&root.overlay, &memory) {
        for (number, part) in overlay.parts.iter().enumerate() {
            overlay::mount_part(&tree, memory, number, part, &overlay.options)?;
        }
    }
    drop(memory);
    fill(root, tree)
}

/// What is mounted and made in the root.
fn fill(root: &Root, tree: Tree) -> Result<Tree, InitError> {
    for (path, mode) in &root.directories {
        let made = tree.make(path, Kind::Directory)?;
        chmod(&made, *mode).step(|| format!("set the mode of {path}"))?;
    }
    for mount in &root.mounts {
        mounts::put(&tree, mount)?;
    }
    for device in &root.devices {
        devices::put(&tree, device)?;
    }
    for (name, points_to) in &root.links {
        devices::link(&tree, name, points_to)?;
    }
    for (path, text) in &root.files {
        write(&tree, path, text)?;
    }
    Ok(tree)
}

fn chmod(handle: &OwnedFd, mode: u32) -> Result<(), Errno> {
    // Most have been made with it.
    if rustix::fs::fstat(handle)?.st_mode & 0o7777 == mode {
        return Ok(());
    }
    // A handle can't be changed itself, and the path is that of the host's /proc.
    rustix::fs::chmod(
        Tree::name(handle.as_fd()).as_str(),
        Mode::from_raw_mode(mode),
    )
}

fn write(tree: &Tree, path: &str, text: &str) -> Result<(), InitError> {
    let what = || format!("write {path} in the container");
    tree.make(path, Kind::File)?;
    let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW;
    let mut file = tree
        .resolve(Path::new(path), flags)
        .map(File::from)
        .step(what)?;
    file.write_all(text.as_bytes()).step(what)
}

fn bind_to_itself(path: &str) -> Result<(), InitError> {
    rustix::mount::mount_bind_recursive(path, path).step(|| format!("bind the root {path}"))
}

/// The mount above the root, whatever directory it is at, must not pass our changes on.
fn make_parent_private(path: &str) -> Result<(), InitError> {
    let mut place = Some(Path::new(path));
    while let Some(directory) = place {
        match rustix::mount::mount_change(directory, MountPropagationFlags::PRIVATE) {
            Ok(()) if directory != Path::new(path) => return Ok(()),
            Ok(()) | Err(Errno::INVAL) => place = directory.parent(),
            Err(error) => {
                return Err(error).step(|| format!("make {} private", directory.display()));
            }
        }
    }
    Ok(())
}

/// Hides and protects paths, asks for the hooks, and enters the root.
pub(crate) fn enter(
    root: &Root,
    tree: &Tree,
    terminal: Option<&Console>,
    runtime: &mut Runtime,
) -> Result<Entered, InitError> {
    let terminal = terminal
        .map(|wanted| console::open(tree, wanted))
        .transpose()?;
    let mut state = String::new();
    if root.ask_hooks {
        state = runtime.ask("hooks")?;
        // As runc's: hooks of the container begin in its root.
        rustix::process::fchdir(tree.root()).step(|| "enter the root".to_owned())?;
        hooks::run("createContainer", &root.create_hooks, &state, &[])?;
    }
    for path in &root.read_only_paths {
        protect(tree, path)?;
    }
    if !root.masked.is_empty() {
        let null = open_null()?;
        let mut nothing = None;
        for path in &root.masked {
            mask(tree, path, &null, &mut nothing, root.label.as_deref())?;
        }
    }
    for path in &root.late_read_only {
        let what = || format!("make {path} read only");
        let handle = tree.handle(Path::new(path)).step(what)?;
        mounts::set_attributes(handle.as_fd(), false, READ_ONLY, 0, None).step(what)?;
    }
    if root.read_only {
        mounts::set_attributes(tree.root(), false, READ_ONLY, 0, None)
            .step(|| "make the root read only".to_owned())?;
    }
    change(root, tree)?;
    let own =
        MountPropagationFlags::from_bits_retain(root.propagation) - MountPropagationFlags::REC;
    if !root.shared
        && own.intersects(MountPropagationFlags::SHARED | MountPropagationFlags::UNBINDABLE)
    {
        rustix::mount::mount_change("/", own).step(|| "share the root".to_owned())?;
    }
    Ok(Entered { terminal, state })
}

fn protect(tree: &Tree, path: &str) -> Result<(), InitError> {
    let what = || format!("make {path} read only");
    let handle = match tree.handle(Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result.step(what)?,
    };
    let copy = mounts::copy_of(handle.as_fd(), true).step(what)?;
    mounts::attach(&copy, handle.as_fd()).step(what)?;
    mounts::set_attributes(copy.as_fd(), true, READ_ONLY, 0, None).step(what)
}

/// The host's null device, which masks a file: the container's own could be anything.
fn open_null() -> Result<OwnedFd, InitError> {
    let what = || "open /dev/null".to_owned();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let null = rustix::fs::open(NULL, flags, Mode::empty()).step(what)?;
    let status = rustix::fs::fstat(&null).step(what)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice
        && status.st_rdev == rustix::fs::makedev(1, 3)
    {
        return Ok(null);
    }
    Err(InitError::Refused(
        "the host's /dev/null isn't the null device".to_owned(),
    ))
}

/// Hides a path. Directories are all hidden by one empty file system, made for the first of them.
fn mask(
    tree: &Tree,
    path: &str,
    null: &OwnedFd,
    nothing: &mut Option<OwnedFd>,
    label: Option<&str>,
) -> Result<(), InitError> {
    let what = || format!("hide {path}");
    let handle = match tree.handle(Path::new(path)) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result.step(what)?,
    };
    let status = rustix::fs::fstat(&handle).step(what)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        if let Some(nothing) = nothing {
            let copy = mounts::copy_of(nothing.as_fd(), false).step(what)?;
            return mounts::attach(&copy, handle.as_fd()).step(what);
        }
        let data = label.map_or_else(CString::default, |text| {
            CString::new(text).unwrap_or_default()
        });
        let place = Tree::name(handle.as_fd());
        rustix::mount::mount(
            "tmpfs",
            place.as_str(),
            "tmpfs",
            MountFlags::RDONLY,
            data.as_c_str(),
        )
        .step(what)?;
        *nothing = Some(tree.handle(Path::new(path)).step(what)?);
        return Ok(());
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let copy = rustix::mount::open_tree(null, "", flags).step(what)?;
    mounts::attach(&copy, handle.as_fd()).step(what)
}

fn change(root: &Root, tree: &Tree) -> Result<(), InitError> {
    let what = || "change the root".to_owned();
    rustix::process::fchdir(tree.root()).step(what)?;
    if root.shared {
        rustix::process::chroot(".").step(what)?;
        return rustix::process::chdir("/").step(what);
    }
    if root.no_pivot {
        hide_bare_file_systems(&root.path);
        rustix::mount::mount_move(".", "/").step(what)?;
        rustix::process::chroot(".").step(what)?;
        return rustix::process::chdir("/").step(what);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).step(what)?;
    // The old root comes to lie on the new one, and is taken away with all that is below it. By
    // "." it isn't meant until it's where we are: what is shared in the new root stays shared.
    rustix::process::pivot_root(".", ".").step(what)?;
    rustix::process::fchdir(&old).step(what)?;
    rustix::mount::mount_change(
        ".",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .step(what)?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).step(what)?;
    rustix::process::chdir("/").step(what)
}

/// Without pivot_root the host's mounts stay behind the new root. A `/proc` or `/sys` among them
/// with nothing masked would let a user namespace inside mount its own such.
fn hide_bare_file_systems(root: &str) {
    let Ok(table) = std::fs::read_to_string("/proc/self/mountinfo") else {
        return;
    };
    let places = table.lines().rev().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let kind = after.split(' ').next()?;
        let place = before.split(' ').nth(4)?;
        let inside = place == root || place.starts_with(&format!("{root}/"));
        (matches!(kind, "proc" | "sysfs") && !inside).then_some(place)
    });
    for place in places {
        if rustix::mount::unmount(place, UnmountFlags::DETACH).is_err() {
            let _kept = rustix::mount::mount("tmpfs", place, "tmpfs", MountFlags::empty(), c"");
        }
    }
}

/// Names the machine, and sets kernel settings of its namespaces.
pub(crate) fn settle(plan: &crate::plan::Plan) -> Result<(), InitError> {
    if plan.loopback {
        sys::loopback_up().step(|| "bring the loopback interface up".to_owned())?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes())
            .step(|| format!("set the host name {name}"))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes())
            .step(|| format!("set the domain name {name}"))?;
    }
    for (name, value) in &plan.sysctl {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        std::fs::write(&path, value).step(|| format!("write {value} to {path}"))?;
    }
    Ok(())
}
