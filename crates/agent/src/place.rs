//! Small steps of setting up: directories, mounts, devices that come a moment later.

use crate::error::AgentError;
use crate::error::Tried;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

const DEVICE_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks for a device that comes.
pub(crate) const DEVICE_STEP: Duration = Duration::from_millis(2);

/// Mounts a file system, making the place when it is missing.
///
/// # Errors
///
/// The kernel refuses.
pub(crate) fn mount(
    source: &str,
    target: &Path,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), AgentError> {
    let what = || format!("cannot mount {kind} {source} on {}", target.display());
    make_directory(target)?;
    let options = CString::new(options)
        .map_err(|_| AgentError::config("mount options have a zero byte in them"))?;
    rustix::mount::mount(source, target, kind, flags, options.as_c_str()).tried(what)
}

/// Makes a directory with those above it, if it is missing.
///
/// # Errors
///
/// It can't be made.
pub(crate) fn make_directory(path: &Path) -> Result<(), AgentError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).tried(|| format!("cannot make the directory {}", path.display()))
}

/// Shows `source`, a directory or file, at `target` as well.
///
/// # Errors
///
/// The kernel refuses.
pub(crate) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), AgentError> {
    let what = || format!("cannot bind {} to {}", source.display(), target.display());
    if fs::metadata(source).tried(what)?.is_dir() {
        make_directory(target)?;
    } else if !target.exists() {
        make_directory(target.parent().unwrap_or_else(|| Path::new("/")))?;
        fs::File::create(target).tried(what)?;
    }
    rustix::mount::mount_bind_recursive(source, target).tried(what)?;
    if read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        rustix::mount::mount_remount(target, flags, c"").tried(what)?;
    }
    Ok(())
}

/// Below `root`, whatever a path says: `..` doesn't lead out of it.
pub(crate) fn below(root: &Path, path: &str) -> PathBuf {
    let parts = path
        .split('/')
        .filter(|part| !matches!(*part, "" | "." | ".."));
    let mut below = root.to_owned();
    below.extend(parts);
    below
}

/// The device node of `/dev/NAME` or `serial:NUMBER`, waiting for its driver.
///
/// # Errors
///
/// There is no such device.
pub(crate) fn block_device(source: &str) -> Result<PathBuf, AgentError> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        let found = match source.strip_prefix("serial:") {
            Some(serial) => by_serial(serial),
            None => Some(PathBuf::from(source)),
        };
        if let Some(path) = found.filter(|path| path.exists()) {
            return Ok(path);
        }
        if Instant::now() > deadline {
            return Err(AgentError::config(format!("there is no disk {source}")));
        }
        wait(DEVICE_STEP);
    }
}

fn by_serial(serial: &str) -> Option<PathBuf> {
    let disks = fs::read_dir("/sys/block").ok()?;
    disks.flatten().find_map(|disk| {
        let text = fs::read_to_string(disk.path().join("serial")).ok()?;
        (text.trim_end() == serial).then(|| Path::new("/dev").join(disk.file_name()))
    })
}

/// Waits that long, or a little less when a signal comes.
pub(crate) fn wait(time: Duration) {
    if let Ok(time) = rustix::time::Timespec::try_from(time) {
        let _interrupted = rustix::thread::nanosleep(&time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_leads_out_of_its_root() {
        let root = Path::new("/run/fs");
        assert_eq!(below(root, "/"), root);
        assert_eq!(below(root, "a/./b//c"), Path::new("/run/fs/a/b/c"));
        assert_eq!(below(root, "../../etc"), Path::new("/run/fs/etc"));
    }
}
