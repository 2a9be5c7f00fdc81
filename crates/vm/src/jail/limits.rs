//! Resource limits.

use rustix::process::DumpableBehavior;
use rustix::process::Resource;
use rustix::process::Rlimit;

use super::Layer;

/// Descriptors: a shared file system keeps some thousands open.
const DESCRIPTORS: u64 = 16_384;

/// Sets the limits, and keeps others of the same user from looking into the process.
///
/// Address space is not limited: engines reserve much more than they use. Nor is the size of
/// files, which disks have.
pub(super) fn set() -> Layer {
    match try_set() {
        Ok(()) => Layer::On,
        Err(error) => Layer::Off(error.to_string()),
    }
}

fn try_set() -> rustix::io::Result<()> {
    for resource in [
        Resource::Core,
        Resource::Msgqueue,
        Resource::Nice,
        Resource::Rtprio,
    ] {
        set_both(resource, 0)?;
    }
    set_both(Resource::Nofile, DESCRIPTORS)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
}

/// Soft and hard limit, never above what holds already.
fn set_both(resource: Resource, most: u64) -> rustix::io::Result<()> {
    let held = rustix::process::getrlimit(resource);
    let limit = Some(held.maximum.map_or(most, |maximum| maximum.min(most)));
    rustix::process::setrlimit(
        resource,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
}
