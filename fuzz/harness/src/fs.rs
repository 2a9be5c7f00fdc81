//! The file system device.

use std::fs::File;
use std::path::Path;

use ringfence_virtio::fs::Cache;
use ringfence_virtio::fs::FileSystem;
use ringfence_virtio::fs::Fs;
use ringfence_virtio::fs::Ids;
use ringfence_virtio::fs::Layout;
use ringfence_virtio::fs::Limits;
use ringfence_virtio::fs::Share;
use ringfence_virtio::fs::Xattrs;

use crate::script;
use crate::script::Input;
use crate::script::Request;

/// What lies outside the shared tree.
const SECRET: &[u8] = b"this must never be read or changed by a guest";
const SHADOW: &[u8] = b"hidden inside the shared tree";

const NAMES: [&str; 12] = [
    "a",
    "b",
    "dir",
    "link",
    "up",
    "hidden",
    "..",
    ".",
    "new",
    "dir/a",
    "../secret",
    "",
];

fn populate(root: &Path) {
    let share = root.join("share");
    std::fs::create_dir_all(share.join("dir")).expect("a directory");
    std::fs::create_dir(root.join("fixed")).expect("a directory");
    std::fs::write(root.join("secret"), SECRET).expect("a file");
    std::fs::write(root.join("fixed/a"), b"fixed").expect("a file");
    std::fs::write(share.join("hidden"), SHADOW).expect("a file");
    std::fs::write(share.join("a"), b"content").expect("a file");
    std::fs::write(share.join("dir/a"), b"deeper").expect("a file");
    std::os::unix::fs::symlink("../secret", share.join("link")).expect("a link");
    std::os::unix::fs::symlink("..", share.join("up")).expect("a link");
}

fn share(path: &Path, read_only: bool) -> Share {
    Share {
        file: File::open(path).expect("a directory"),
        read_only,
        ids: Ids::Host,
        cache: Cache::Auto,
        hide: vec!["hidden".to_owned()],
    }
}

/// The file system device on a writable and a read-only directory. Oracles: what lies outside,
/// what is hidden and what is read only is unchanged.
///
/// # Panics
/// When an oracle fails.
pub fn fs(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    populate(root);
    let mut layout = Layout::new();
    let mut add = |at, path: &str, read_only| {
        let share = share(&root.join(path), read_only);
        layout.add_share(at, share).expect("a share");
    };
    add("/rw", "share", false);
    add("/ro", "fixed", true);
    let limits = Limits {
        nodes: 64,
        handles: 16,
        cached: 8,
    };
    let system = FileSystem::new(layout, Xattrs::UserAndAcl, limits).expect("a layout");
    let device = Fs::new("fuzz", system).expect("a tag");
    script::run(data, Box::new(device), fuse_request, &mut |_, _| {});
    let read = |path: &str| std::fs::read(root.join(path)).expect("still there");
    assert_eq!(read("secret"), SECRET);
    assert_eq!(read("share/hidden"), SHADOW);
    assert_eq!(read("fixed/a"), b"fixed");
    let names = |path: &str| {
        let entries = std::fs::read_dir(root.join(path)).expect("still there");
        entries.count()
    };
    assert_eq!((names(""), names("fixed")), (3, 1));
}

fn push_name(input: &mut Input<'_>, payload: &mut Vec<u8>) {
    payload.extend(NAMES[input.below(NAMES.len())].as_bytes());
    payload.push(0);
}

/// Bytes of the fixed part of each request that has names behind it, by operation code.
fn head_len(code: u32) -> Option<usize> {
    Some(match code {
        1 | 6 | 10 | 11 => 0,
        8 | 35 | 45 => 16,
        9 | 12 | 13 | 21 | 22 => 8,
        _ => return None,
    })
}

fn fuse_request(input: &mut Input<'_>) -> (u16, Request) {
    let queue = u16::from(!input.u8().is_multiple_of(4));
    let code = match input.u8() % 8 {
        0 => input.u32(),
        1 | 2 => 1,
        _ => u32::from(input.u8() % 56),
    };
    let node = match input.u8() % 8 {
        0 => input.u64(),
        _ => u64::from(input.u8() % 24),
    };
    let mut payload = Vec::new();
    match head_len(code) {
        Some(len) => {
            // Small numbers: modes, and nodes and handles that exist.
            payload.extend((0..len).map(|at| if at % 8 == 0 { input.u8() % 24 } else { 0 }));
            push_name(input, &mut payload);
            push_name(input, &mut payload);
        }
        None => {
            payload.extend(u64::from(input.u8() % 24).to_le_bytes());
            let len = usize::from(input.u8() % 96);
            payload.extend(input.bytes(len));
        }
    }
    let len = u32::try_from(40 + payload.len()).unwrap_or(u32::MAX);
    let mut bytes = [&len.to_le_bytes()[..], &code.to_le_bytes()].concat();
    bytes.extend(u64::from(input.u16()).to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(payload);
    (queue, (bytes, vec![16, input.len() % 8192]))
}
