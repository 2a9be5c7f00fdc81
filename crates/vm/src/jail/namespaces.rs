//! Namespaces of its own, an empty root, and no capabilities.

// UNSAFETY: unshare changes what the calling process is part of.
#![expect(
    unsafe_code,
    reason = "rustix marks unshare unsafe for the one flag that separates descriptor tables"
)]

use std::fs;
use std::io;

use rustix::mount::MountFlags;
use rustix::mount::MountPropagationFlags;
use rustix::mount::UnmountFlags;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use rustix::thread::UnshareFlags;

use super::Access;
use super::Layer;
use super::process;

/// Everything but users; processes come by a fork.
const OTHERS: UnshareFlags = UnshareFlags::NEWNS
    .union(UnshareFlags::NEWNET)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS)
    .union(UnshareFlags::NEWPID);

/// Where the empty root is mounted before it becomes the root: a directory that every system has.
const PLACE: &str = "/proc";
const CURRENT: &str = ".";

/// Enters namespaces; says which hold.
///
/// User IDs are a problem with shares that keep host owners: inside a user namespace only this
/// process's own ID would have a name. Such a process keeps its users, and can have the other
/// namespaces only when it is privileged. `before_root` is called while there still are paths.
pub(super) fn enter(
    keeps_owners: Option<Access>,
    before_root: impl FnOnce(),
) -> Vec<(&'static str, Layer)> {
    let user = match keeps_owners {
        None => enter_user_namespace(),
        Some(_) => Layer::Off("shares keep their host owners".to_owned()),
    };
    let others = match unshare(OTHERS) {
        Ok(()) => process::continue_in_child(),
        Err(error) => Err(error),
    };
    before_root();
    let (namespaces, root) = match others {
        Ok(()) => (Layer::On, result(empty_root())),
        Err(error) => {
            let why = error.to_string();
            (Layer::Off(why.clone()), Layer::Off(why))
        }
    };
    vec![
        ("user namespace", user),
        ("namespaces", namespaces),
        ("empty root", root),
    ]
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the flags don't separate the descriptor table (CLONE_FILES), which is what the
    // function is unsafe for.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

fn result(result: io::Result<()>) -> Layer {
    match result {
        Ok(()) => Layer::On,
        Err(error) => Layer::Off(error.to_string()),
    }
}

/// One user and group, with the numbers that they have outside.
fn enter_user_namespace() -> Layer {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if let Err(error) = unshare(UnshareFlags::NEWUSER) {
        return Layer::Off(error.to_string());
    }
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    let written = fs::write("/proc/self/setgroups", "deny")
        .and_then(|()| fs::write("/proc/self/uid_map", format!("{uid} {uid} 1")))
        .and_then(|()| fs::write("/proc/self/gid_map", format!("{gid} {gid} 1")));
    result(written)
}

/// An empty file system that can't be written as the only one.
fn empty_root() -> io::Result<()> {
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    rustix::mount::mount_change("/", private)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(
        "none",
        PLACE,
        "tmpfs",
        flags,
        Some(c"size=4k,nr_inodes=1,mode=555"),
    )?;
    rustix::process::chdir(PLACE)?;
    // The old root ends up over the new one, and is taken away.
    rustix::process::pivot_root(CURRENT, CURRENT)?;
    rustix::mount::unmount(CURRENT, UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    rustix::mount::mount_remount("/", flags | MountFlags::RDONLY, c"")?;
    Ok(())
}

/// Gives up all capabilities but those that shares with host owners need: to read anybody's
/// files, and to write them and give them away.
pub(super) fn drop_capabilities(keeps_owners: Option<Access>) -> Layer {
    let wanted = match keeps_owners {
        None => CapabilitySet::empty(),
        Some(Access::Read) => CapabilitySet::DAC_READ_SEARCH,
        Some(Access::Write) => {
            CapabilitySet::CHOWN
                | CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::DAC_READ_SEARCH
                | CapabilitySet::FOWNER
                | CapabilitySet::FSETID
        }
    };
    let dropped = rustix::thread::capabilities(None).and_then(|held| {
        let kept = wanted & held.permitted;
        rustix::thread::set_capabilities(
            None,
            CapabilitySets {
                effective: kept,
                permitted: kept,
                inheritable: CapabilitySet::empty(),
            },
        )
    });
    result(dropped.map_err(Into::into))
}
