//! Which device of a disk holds the root, and what is on it.
//!
//! The disk is the guest's own and so is the look at it: nothing of the host is reached by what a
//! file system claims to be. (How the host stores a disk is another matter, and always said.)

use crate::error::AgentError;
use crate::place::block_device;
use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

/// What a device's file system is called when it is to be looked at.
const AUTO: &str = "auto";
/// The partition that is to be looked for, behind the disk's name.
const ANY: &str = "any";

/// Where each file system has its magic number (Linux include/uapi/linux/magic.h and the
/// superblocks' definitions).
const KNOWN: [(&str, u64, &[u8]); 6] = [
    ("ext4", 1024 + 56, &[0x53, 0xef]),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 0x8001, b"CD001"),
];

/// A device with its file system.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its node.
    pub(crate) device: PathBuf,
    /// As mount(8) names it.
    pub(crate) filesystem: String,
}

/// The module of a file system, where it isn't called like it.
pub(crate) fn module_of(filesystem: &str) -> &str {
    match filesystem {
        "iso9660" => "isofs",
        "ext2" | "ext3" => "ext4",
        other => other,
    }
}

/// What to mount of `/dev/NAME` or `serial:NUMBER`, which `/PARTITION` may follow: a number, or
/// `any` for the whole disk or its largest partition, whichever has a file system.
///
/// # Errors
///
/// There is no such device, or no file system that is known.
pub(crate) fn find(source: &str, filesystem: &str) -> Result<Found, AgentError> {
    let (disk, partition) = match source
        .strip_prefix("serial:")
        .and_then(|_| source.split_once('/'))
    {
        Some((disk, partition)) => (disk, partition),
        None => (source, ""),
    };
    let disk = block_device(disk)?;
    let candidates = match partition {
        "" => vec![disk],
        ANY => {
            let mut all = vec![disk.clone()];
            all.extend(partitions(&disk).into_iter().map(|(_, device)| device));
            all
        }
        number => {
            let found = partitions(&disk).into_iter().find(|(n, _)| n == number);
            let device = found
                .map(|(_, device)| device)
                .ok_or_else(|| AgentError::config(format!("the disk has no partition {number}")))?;
            vec![device]
        }
    };
    if filesystem == AUTO {
        let known = candidates
            .iter()
            .find_map(|device| Some(found(device, identify(device)?)));
        return known.ok_or_else(|| {
            let names: Vec<&str> = KNOWN.iter().map(|(name, _, _)| *name).collect();
            let message = format!("the disk has none of the file systems {}", names.join(", "));
            AgentError::config(message)
        });
    }
    // What is said is tried even where its magic number isn't known.
    let says_so = |device: &&PathBuf| identify(device) == Some(filesystem);
    let device = candidates
        .iter()
        .find(says_so)
        .or_else(|| candidates.first());
    device
        .map(|device| found(device, filesystem))
        .ok_or_else(|| AgentError::config(format!("there is no disk {source}")))
}

fn found(device: &Path, filesystem: &str) -> Found {
    Found {
        device: device.to_owned(),
        filesystem: filesystem.to_owned(),
    }
}

/// The partitions of a disk, largest first: number and node.
fn partitions(disk: &Path) -> Vec<(String, PathBuf)> {
    let Some(name) = disk.file_name() else {
        return Vec::new();
    };
    let Ok(entries) = fs::read_dir(Path::new("/sys/class/block").join(name)) else {
        return Vec::new();
    };
    let mut found: Vec<(u64, String, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = fs::read_to_string(entry.path().join("partition")).ok()?;
            let size = fs::read_to_string(entry.path().join("size")).ok()?;
            let size = size.trim().parse().ok()?;
            let node = Path::new("/dev").join(entry.file_name());
            Some((size, number.trim().to_owned(), node))
        })
        .collect();
    found.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let without_size = found.into_iter().map(|(_, number, node)| (number, node));
    without_size.collect()
}

/// What is on a device, by its magic number.
fn identify(device: &Path) -> Option<&'static str> {
    let file = File::open(device).ok()?;
    let holds = |at: u64, magic: &[u8]| {
        let mut bytes = vec![0; magic.len()];
        file.read_exact_at(&mut bytes, at).is_ok() && bytes == magic
    };
    let known = KNOWN.iter().find(|(_, at, magic)| holds(*at, magic));
    known.map(|(name, _, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(at: u64, magic: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("sized");
        file.as_file().write_all_at(magic, at).expect("written");
        file
    }

    #[test]
    fn each_file_system_is_known_by_its_magic_number() {
        for (name, at, magic) in KNOWN {
            assert_eq!(identify(device(at, magic).path()), Some(name));
        }
    }

    #[test]
    fn a_device_is_looked_at_only_when_asked() {
        let file = device(0, b"XFSB");
        let source = file.path().to_str().expect("a path");
        let of = |filesystem| find(source, filesystem).map(|found| found.filesystem);
        assert_eq!(of("auto").as_deref(), Ok("xfs"));
        assert_eq!(of("ext4").as_deref(), Ok("ext4"));
    }

    #[test]
    fn an_empty_device_is_refused_with_what_is_known() {
        let file = device(0, b"");
        let source = file.path().to_str().expect("a path");
        let error = find(source, "auto").expect_err("nothing there");
        assert!(error.message.contains("ext4, xfs"), "{error}");
    }
}
