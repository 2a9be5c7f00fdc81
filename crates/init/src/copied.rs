//! Layers put together by copying, where the kernel or its policy has no overlay for this process.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::fs::Metadata;
use std::io;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::CWD;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::Timespec;
use rustix::fs::Timestamps;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

const LONGEST_LIST: usize = 65536;
const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];
const NOTES: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// Lays one layer over what is in a directory that nobody else uses yet.
///
/// Sockets and device nodes stay behind, and so does what can't be read: an overlay shows them, but a
/// container can't use them.
pub(crate) fn lay(layer: &Path, into: &Path, hidden: &[String]) -> io::Result<()> {
    let mut copier = Copier {
        hidden: hidden.iter().map(|path| layer.join(path)).collect(),
        links: HashMap::new(),
    };
    let status = fs::symlink_metadata(layer)?;
    copier.directory(layer, into, &status)
}

struct Copier {
    hidden: Vec<PathBuf>,
    /// Files with several names, by device and inode: where the first was copied to.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Copier {
    fn directory(&mut self, from: &Path, to: &Path, status: &Metadata) -> io::Result<()> {
        // A link that a layer below has put there isn't entered: it may lead out.
        let before = fs::symlink_metadata(to).ok();
        if before.as_ref().is_some_and(|before| !before.is_dir()) || is_opaque(from) {
            remove(to)?;
        }
        match fs::create_dir(to) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            result => result?,
        }
        let entries = match fs::read_dir(from) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(()),
            result => result?,
        };
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if !self.hidden.contains(&path) {
                self.entry(&path, &to.join(entry.file_name()))?;
            }
        }
        dress(from, to, status)
    }

    fn entry(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let status = fs::symlink_metadata(from)?;
        let kind = status.file_type();
        if kind.is_dir() {
            return self.directory(from, to, &status);
        }
        remove(to)?;
        if kind.is_block_device() || kind.is_char_device() || kind.is_socket() {
            // A whiteout among them: what it hides has just been removed.
            return Ok(());
        }
        let key = (status.dev(), status.ino());
        if status.nlink() > 1 {
            if let Some(first) = self.links.get(&key) {
                return fs::hard_link(first, to);
            }
            self.links.insert(key, to.to_owned());
        }
        if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(from)?, to)?;
        } else if kind.is_fifo() {
            rustix::fs::mknodat(CWD, to, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        } else {
            match fs::copy(from, to) {
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    self.links.remove(&key);
                    return remove(to);
                }
                result => result?,
            };
        }
        dress(from, to, &status)
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(status) if status.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn is_opaque(path: &Path) -> bool {
    let mut value = [0; 2];
    OPAQUE
        .iter()
        .any(|name| rustix::fs::lgetxattr(path, *name, &mut value) == Ok(1) && value[0] == b'y')
}

/// Owner, mode, attributes and times: in the order in which one doesn't undo another.
fn dress(from: &Path, to: &Path, status: &Metadata) -> io::Result<()> {
    match std::os::unix::fs::lchown(to, Some(status.uid()), Some(status.gid())) {
        // An owner without a number in this user namespace: it stays its root's.
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
        result => result?,
    }
    if !status.is_symlink() {
        fs::set_permissions(to, status.permissions())?;
    }
    let mut list = vec![0; LONGEST_LIST];
    let length = rustix::fs::llistxattr(from, &mut list).unwrap_or(0);
    let mut value = vec![0; LONGEST_LIST];
    for name in list[..length].split(|&byte| byte == 0) {
        if name.is_empty() || NOTES.iter().any(|notes| name.starts_with(notes)) {
            continue;
        }
        let name = OsStr::from_bytes(name);
        if let Ok(size) = rustix::fs::lgetxattr(from, name, &mut value) {
            // Some only root may set, and some file systems have none.
            let _kept = rustix::fs::lsetxattr(to, name, &value[..size], XattrFlags::empty());
        }
    }
    let time = Timespec {
        tv_sec: status.mtime(),
        tv_nsec: status.mtime_nsec(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        to,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::fs::symlink;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("ringfence-copied-{name}-{}", std::process::id()));
        let _gone = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn the_higher_layer_covers_replaces_and_removes() {
        let top = scratch("layers");
        let (low, high, into) = (top.join("low"), top.join("high"), top.join("into"));
        fs::create_dir_all(low.join("kept")).unwrap();
        fs::create_dir_all(low.join("file")).unwrap();
        fs::create_dir_all(high.join("kept")).unwrap();
        fs::write(low.join("kept/a"), "low").unwrap();
        fs::write(low.join("kept/b"), "low").unwrap();
        fs::write(high.join("kept/b"), "high").unwrap();
        fs::hard_link(high.join("kept/b"), high.join("kept/c")).unwrap();
        fs::write(high.join("file"), "was a directory").unwrap();
        fs::set_permissions(high.join("file"), fs::Permissions::from_mode(0o640)).unwrap();

        lay(&low, &into, &[]).unwrap();
        lay(&high, &into, &[]).unwrap();

        let read = |name: &str| fs::read_to_string(into.join(name)).unwrap();
        assert_eq!(
            (read("kept/a"), read("kept/b")),
            ("low".into(), "high".into())
        );
        assert_eq!(
            fs::metadata(into.join("kept/b")).unwrap().ino(),
            fs::metadata(into.join("kept/c")).unwrap().ino()
        );
        assert_eq!(read("file"), "was a directory");
        assert_eq!(
            fs::metadata(into.join("file")).unwrap().mode() & 0o777,
            0o640
        );
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn links_of_a_layer_below_are_not_entered() {
        let top = scratch("links");
        let (low, high, into) = (top.join("low"), top.join("high"), top.join("into"));
        let outside = top.join("outside");
        fs::create_dir_all(&low).unwrap();
        fs::create_dir_all(&outside).unwrap();
        symlink(&outside, low.join("way")).unwrap();
        fs::create_dir_all(high.join("way")).unwrap();
        fs::write(high.join("way/file"), "inside").unwrap();

        lay(&low, &into, &[]).unwrap();
        lay(&high, &into, &[]).unwrap();

        assert!(into.join("way/file").is_file());
        assert!(!outside.join("file").exists());
        fs::remove_dir_all(top).unwrap();
    }

    #[test]
    fn what_is_hidden_is_left_out() {
        let top = scratch("hidden");
        let (low, into) = (top.join("low"), top.join("into"));
        fs::create_dir_all(low.join("a")).unwrap();
        fs::write(low.join("a/secret"), "x").unwrap();
        fs::write(low.join("a/open"), "x").unwrap();

        lay(&low, &into, &["a/secret".to_owned()]).unwrap();

        assert!(into.join("a/open").exists());
        assert!(!into.join("a/secret").exists());
        fs::remove_dir_all(top).unwrap();
    }
}
