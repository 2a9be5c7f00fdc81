//! Paths of the container, resolved so that no link in it leads out of it.

use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Component;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::ResolveFlags;
use rustix::io::Errno;

use crate::error::InitError;
use crate::error::Step;

const HANDLE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);
const DIRECTORY: Mode = Mode::from_raw_mode(0o755);
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
        let clean = clean(path)?;
        let mut so_far = PathBuf::new();
        let mut parent = self
            .handle(Path::new("/"))
            .step(|| "open the root".to_owned())?;
        let count = clean.components().count();
        for (index, part) in clean.components().enumerate() {
            let what = || format!("make {} in the container", path.display());
            so_far.push(part);
            parent = match self.handle(&so_far) {
                Err(Errno::NOENT) => {
                    let last = index + 1 == count;
                    let made = if last && kind == Kind::File {
                        make_file(&parent, Path::new(part.as_os_str()))
                    } else {
                        rustix::fs::mkdirat(&parent, part.as_os_str(), DIRECTORY)
                    };
                    match made {
                        Ok(()) | Err(Errno::EXIST) => self.handle(&so_far).step(what)?,
                        Err(error) => return Err(error).step(what),
                    }
                }
                result => result.step(what)?,
            };
        }
        Ok(parent)
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

        let made = tree(&root).make("/way/deep/dir", Kind::Directory);

        // The link's target doesn't exist inside, so nothing can be made at it.
        assert!(matches!(made, Err(InitError::System { .. })), "{made:?}");
        assert!(!outside.join("deep").exists());
        fs::remove_dir_all(outside).unwrap();
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
