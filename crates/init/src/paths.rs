//! Paths of the container, resolved so that no link in it leads out of it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::ResolveFlags;
use rustix::io::Errno;

use crate::error::InitError;
use crate::error::Step;

const HANDLE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);
const DIRECTORY: Mode = Mode::from_raw_mode(0o755);
/// As many as the kernel follows.
const MOST_LINKS: u32 = 40;
const FILE: Mode = Mode::from_raw_mode(0o644);

/// The container's root while it is put together.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

/// What is to be there for a mount to cover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Directory,
    File,
}

impl Tree {
    pub(crate) fn open(path: &str) -> Result<Self, InitError> {
        let root = rustix::fs::open(path, HANDLE | OFlags::DIRECTORY, Mode::empty())
            .step(|| format!("open the root {path}"))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// A path of the host's `/proc` that names a descriptor of this process.
    pub(crate) fn name(descriptor: BorrowedFd<'_>) -> String {
        format!("/proc/self/fd/{}", descriptor.as_raw_fd())
    }

    /// Opens what is at a path of the container, as a handle. Links are followed inside it.
    pub(crate) fn handle(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.resolve(path, HANDLE)
    }

    /// The same, but a link at the end stays a link.
    pub(crate) fn handle_no_follow(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.resolve(path, HANDLE | OFlags::NOFOLLOW)
    }

    /// Opens a file of the container.
    pub(crate) fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        loop {
            match rustix::fs::openat2(
                &self.root,
                relative,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
            ) {
                // Somebody renamed something meanwhile: the kernel couldn't tell whether it led out.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// Makes what is missing of a path; returns a handle of its end.
    pub(crate) fn make(&self, path: &str, kind: Kind) -> Result<OwnedFd, InitError> {
        let path = Path::new(path);
        match self.handle(path) {
            Err(Errno::NOENT) => {}
            result => return result.step(|| format!("open {} in the container", path.display())),
        }
        let mut pending = parts(&clean(path)?);
        let mut so_far = PathBuf::new();
        let mut links = 0;
        while let Some(part) = pending.pop_front() {
            let what = || format!("make {} in the container", path.display());
            if part == ".." {
                so_far.pop();
                continue;
            }
            let next = so_far.join(&part);
            match self.handle_no_follow(&next) {
                Ok(handle) if is_link(&handle).step(what)? => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(Errno::LOOP).step(what);
                    }
                    // A link to what isn't there: what it names is made, seen from this root.
                    let target = rustix::fs::readlinkat(&handle, "", Vec::new()).step(what)?;
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    if target.is_absolute() {
                        so_far.clear();
                    }
                    for part in parts(&target).into_iter().rev() {
                        pending.push_front(part);
                    }
                }
                Ok(_) => so_far = next,
                Err(Errno::NOENT) => {
                    let parent = self.handle(&so_far).step(what)?;
                    let made = if pending.is_empty() && kind == Kind::File {
                        make_file(&parent, Path::new(&part))
                    } else {
                        rustix::fs::mkdirat(&parent, part.as_os_str(), DIRECTORY)
                    };
                    match made {
                        Ok(()) | Err(Errno::EXIST) => so_far = next,
                        Err(error) => return Err(error).step(what),
                    }
                }
                Err(error) => return Err(error).step(what),
            }
        }
        self.handle(&so_far)
            .step(|| format!("open {} in the container", path.display()))
    }

    /// The directory of a path, made when missing, and the last name.
    pub(crate) fn make_parent(&self, path: &str) -> Result<(OwnedFd, PathBuf), InitError> {
        let clean = clean(Path::new(path))?;
        let name = clean
            .file_name()
            .ok_or_else(|| InitError::Refused(format!("{path} isn't the path of a file")))?;
        let parent = clean.parent().unwrap_or_else(|| Path::new(""));
        let parent = self.make(&format!("/{}", parent.display()), Kind::Directory)?;
        Ok((parent, PathBuf::from(name)))
    }
}

fn is_link(handle: &OwnedFd) -> Result<bool, Errno> {
    let status = rustix::fs::fstat(handle)?;
    Ok(FileType::from_raw_mode(status.st_mode) == FileType::Symlink)
}

/// The names of a path, `..` included.
fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

fn make_file(parent: &OwnedFd, name: &Path) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(parent, name, flags | OFlags::WRONLY, FILE).map(drop)
}

/// A path without `.`, `..` and the leading slash.
pub(crate) fn clean(path: &Path) -> Result<PathBuf, InitError> {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir => {}
            Component::Prefix(_) => {
                return Err(InitError::Refused(format!(
                    "{} isn't a path",
                    path.display()
                )));
            }
        }
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree(root: &Path) -> Tree {
        Tree::open(root.to_str().unwrap()).unwrap()
    }

    fn scratch(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("ringfence-init-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn links_that_lead_out_are_followed_inside() {
        let outside = scratch("outside");
        let root = scratch("links");
        symlink(&outside, root.join("way")).unwrap();
        symlink("../../../run/file", root.join("file")).unwrap();

        tree(&root).make("/way/deep/dir", Kind::Directory).unwrap();
        tree(&root).make("/file", Kind::File).unwrap();

        // What they name is seen from the container's root, and made there.
        let inside = root.join(outside.strip_prefix("/").unwrap());
        assert!(inside.join("deep/dir").is_dir());
        assert!(root.join("run/file").is_file());
        assert!(!outside.join("deep").exists());
        fs::remove_dir_all(outside).unwrap();
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn links_to_themselves_end() {
        let root = scratch("loop");
        symlink("b", root.join("a")).unwrap();
        symlink("a", root.join("b")).unwrap();

        let made = tree(&root).make("/a/x", Kind::Directory);

        assert!(matches!(made, Err(InitError::System { .. })), "{made:?}");
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn missing_parts_are_made_with_a_file_at_the_end() {
        let root = scratch("parts");

        tree(&root).make("/a/../b/./c/file", Kind::File).unwrap();

        assert!(root.join("b/c/file").is_file());
        assert!(!root.join("a").exists());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn magic_links_are_refused() {
        let root = scratch("magic");
        symlink("/proc/self/root/etc", root.join("etc")).unwrap();

        let error = tree(&root).handle(Path::new("/etc")).unwrap_err();

        assert_eq!(error, Errno::NOENT);
        fs::remove_dir_all(root).unwrap();
    }
}
