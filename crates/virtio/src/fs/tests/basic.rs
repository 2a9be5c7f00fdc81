//! What file systems are for.

use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::client::Client;
use super::client::ROOT;
use super::client::bytes_of;
use super::client::device;
use super::client::device_with;
use super::client::libc_flags::RDWR;
use super::client::libc_flags::TRUNC;
use super::client::read_only;
use super::client::share;
use crate::fs::Cache;
use crate::fs::Ids;
use crate::fs::Layout;
use crate::fs::Limits;
use crate::fs::Share;
use crate::fs::Xattrs;
use crate::fs::abi;
use crate::fs::abi::init;
use crate::fs::abi::opcode;
use crate::fs::abi::set;

#[test]
fn the_tag_is_in_the_configuration() {
    let client = Client::writable();
    let mut config = [0; 40];
    client.driver.read_config(0, &mut config);
    assert_eq!(&config[..5], b"root\0");
    assert_eq!(config[36..], [1, 0, 0, 0]);
}

#[test]
fn files_are_found_and_read_with_their_attributes() {
    let mut client = Client::writable();
    std::fs::create_dir(client.path("a")).expect("host");
    std::fs::write(client.path("a/b"), b"hello").expect("host");
    assert_eq!(client.content("a/b").expect("read"), b"hello");
    let node = client.walk("a/b").expect("there");
    let attr = client.attr(node).expect("attributes");
    let host = std::fs::metadata(client.path("a/b")).expect("host");
    assert_eq!((attr.size, attr.mode), (5, host.mode()));
    assert_eq!((attr.ino, attr.uid), (host.ino(), host.uid()));
    assert_eq!(client.lookup(ROOT, "missing"), Err(Errno::NOENT));
}

#[test]
fn what_the_guest_writes_is_on_the_host() {
    let mut client = Client::writable();
    let (node, handle) = client.create(ROOT, "new", 0o640).expect("created");
    assert_eq!(client.write(node, handle, 0, b"one two"), Ok(7));
    assert_eq!(client.write(node, handle, 4, b"TWO"), Ok(3));
    assert_eq!(client.read(node, handle, 0, 100).expect("read"), b"one TWO");
    let path = client.path("new");
    assert_eq!(std::fs::read(&path).expect("host"), b"one TWO");
    let mode = std::fs::metadata(&path).expect("host").mode();
    assert_eq!(mode & 0o777, 0o640);
    let handle = client.open(node, RDWR | TRUNC).expect("open");
    assert_eq!(client.read(node, handle, 0, 100).expect("read"), b"");
}

#[test]
fn directories_links_and_moves_are_made_on_the_host() {
    let mut client = Client::writable();
    let sub = client.make_directory(ROOT, "sub", 0o755).expect("made");
    let (file, _) = client.create(sub, "file", 0o600).expect("created");
    let link = client.named(opcode::SYMLINK, ROOT, b"link\0", "sub/file");
    link.expect("linked");
    let link = client.lookup(ROOT, "link").expect("there");
    let target = client.call(opcode::READLINK, link, &[], 4096);
    assert_eq!(target.expect("target"), b"sub/file");
    client
        .named(opcode::LINK, ROOT, &file.to_le_bytes(), "hard")
        .expect("linked");
    assert_eq!(client.lookup(ROOT, "hard"), Ok(file), "one node a file");
    client
        .rename((sub, "file"), (ROOT, "moved"))
        .expect("moved");
    assert_eq!(client.attr(file).expect("still known").nlink, 2);
    assert_eq!(client.lookup(sub, "file"), Err(Errno::NOENT));
    client
        .named(opcode::RMDIR, ROOT, &[], "sub")
        .expect("empty");
    client
        .named(opcode::UNLINK, ROOT, &[], "moved")
        .expect("there");
    assert!(client.path("hard").exists() && !client.path("moved").exists());
}

#[test]
fn a_file_that_lost_its_name_lives_on_in_its_handle() {
    let mut client = Client::writable();
    let (node, handle) = client.create(ROOT, "gone", 0o600).expect("created");
    client.write(node, handle, 0, b"still").expect("written");
    client
        .named(opcode::UNLINK, ROOT, &[], "gone")
        .expect("there");
    assert_eq!(client.attr_by(node, Some(handle)).expect("open").size, 5);
    assert_eq!(client.attr(node).expect("by any handle").nlink, 0);
    assert_eq!(client.read(node, handle, 0, 9).expect("open"), b"still");
    let release = bytes_of(&abi::ReleaseIn {
        handle,
        flags: 0,
        release_flags: 0,
        lock_owner: 0,
    });
    client
        .call(opcode::RELEASE, node, &release, 0)
        .expect("closed");
    assert_eq!(client.attr(node), Err(Errno::STALE));
}

#[test]
fn long_directories_are_listed_whole_both_ways() {
    let mut client = Client::writable();
    let mut expected: Vec<String> = (0..700).map(|n| format!("file-number-{n}")).collect();
    for name in &expected {
        std::fs::write(client.path(name), b"").expect("host");
    }
    expected.sort();
    for plus in [false, true] {
        let listed = client.list(ROOT, plus).expect("listed");
        let mut names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
        names.sort();
        assert_eq!(names, expected);
    }
    assert_eq!(client.counter("nodes"), 701, "READDIRPLUS tells of each");
}

#[test]
fn attributes_can_be_changed() {
    let mut client = Client::writable();
    let (node, _) = client.create(ROOT, "f", 0o600).expect("created");
    let attr = client.setattr(node, |request| {
        request.valid = set::MODE | set::SIZE | set::MTIME;
        (request.mode, request.size) = (0o751, 12345);
        (request.mtime, request.mtime_ns) = (1_000_000, 7);
    });
    let attr = attr.expect("changed");
    assert_eq!((attr.mode & 0o777, attr.size), (0o751, 12345));
    assert_eq!((attr.mtime, attr.mtime_ns), (1_000_000, 7));
    let sub = client.make_directory(ROOT, "d", 0o700).expect("made");
    let attr = client.setattr(sub, |request| {
        (request.valid, request.mode) = (set::MODE, 0o2775);
    });
    assert_eq!(attr.expect("changed").mode & 0o7777, 0o2775);
}

#[test]
fn holes_are_found_punched_and_allocated() {
    let mut client = Client::writable();
    let (node, handle) = client.create(ROOT, "sparse", 0o600).expect("created");
    client.write(node, handle, 1 << 20, b"x").expect("written");
    let seek = |whence| {
        bytes_of(&abi::LseekIn {
            handle,
            offset: 0,
            whence,
            padding: 0,
        })
    };
    let data: Result<abi::LseekOut, _> = client.typed(opcode::LSEEK, node, &seek(3));
    assert_eq!(data.expect("data").offset, 1 << 20);
    let hole: Result<abi::LseekOut, _> = client.typed(opcode::LSEEK, node, &seek(4));
    assert_eq!(hole.expect("hole").offset, 0);
    let allocate = |mode, offset, len| {
        bytes_of(&abi::FallocateIn {
            handle,
            offset,
            len,
            mode,
            padding: 0,
        })
    };
    let punch = allocate(3, 1 << 20, 4096);
    client
        .call(opcode::FALLOCATE, node, &punch, 0)
        .expect("punched");
    assert_eq!(client.read(node, handle, 1 << 20, 1).expect("read"), [0]);
    let grow = allocate(0, 0, 2 << 20);
    client
        .call(opcode::FALLOCATE, node, &grow, 0)
        .expect("grown");
    assert_eq!(client.attr(node).expect("known").size, 2 << 20);
    let odd = allocate(0x80, 0, 4096);
    let refused = client.call(opcode::FALLOCATE, node, &odd, 0);
    assert_eq!(refused, Err(Errno::OPNOTSUPP));
}

#[test]
fn ranges_are_copied_on_the_host() {
    let mut client = Client::writable();
    let (from, source) = client.create(ROOT, "from", 0o600).expect("created");
    let (to, target) = client.create(ROOT, "to", 0o600).expect("created");
    client
        .write(from, source, 0, b"0123456789")
        .expect("written");
    let copy = bytes_of(&abi::CopyFileRangeIn {
        handle_in: source,
        offset_in: 2,
        node_out: to,
        handle_out: target,
        offset_out: 0,
        len: 5,
        flags: 0,
    });
    let out: abi::WriteOut = client
        .typed(opcode::COPY_FILE_RANGE, from, &copy)
        .expect("copied");
    assert_eq!(out.size, 5);
    assert_eq!(client.content("to").expect("read"), b"23456");
}

#[test]
fn squashed_files_belong_to_one_user_whatever_the_host_says() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("f"), b"").expect("host");
    let squashed = Share {
        ids: Ids::Squash {
            uid: 1000,
            gid: 100,
        },
        ..share(dir.path())
    };
    let layout = Layout::single(squashed).expect("a layout");
    let mut client = Client::mount(dir, device(layout));
    let node = client.lookup(ROOT, "f").expect("there");
    let attr = client.attr(node).expect("attributes");
    assert_eq!((attr.uid, attr.gid), (1000, 100));
    let mut give_to = |uid| {
        client.setattr(node, |request| {
            (request.valid, request.uid) = (set::UID, uid);
        })
    };
    assert!(matches!(give_to(0), Err(Errno::PERM)));
    give_to(1000).expect("it is theirs already");
}

#[test]
fn read_only_trees_are_read_without_opening() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("f"), b"content").expect("host");
    let layout = Layout::single(read_only(dir.path())).expect("a layout");
    let mut client = Client::mount(dir, device(layout));
    assert_ne!(client.flags & init::NO_OPEN_SUPPORT, 0);
    let node = client.lookup(ROOT, "f").expect("there");
    assert_eq!(client.open(node, 0), Err(Errno::NOSYS));
    assert_eq!(client.read(node, 0, 3, 100).expect("read"), b"tent");
    assert_eq!(client.list(ROOT, true).expect("listed").len(), 1);
    assert_eq!(client.counter("handles"), 0);
}

#[test]
fn missing_names_are_remembered_by_the_guest_unless_caching_is_off() {
    for (cache, expected) in [(Cache::Auto, Ok(0)), (Cache::Never, Err(Errno::NOENT))] {
        let dir = tempfile::tempdir().expect("a directory");
        let uncached = Share {
            cache,
            ..share(dir.path())
        };
        let layout = Layout::single(uncached).expect("a layout");
        let mut client = Client::mount(dir, device(layout));
        let found = client.lookup_raw(ROOT, b"missing");
        assert_eq!(found.map(|entry| entry.node), expected);
    }
}

#[test]
fn extended_attributes_pass_as_configured() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("f"), b"").expect("host");
    let layout = Layout::single(share(dir.path())).expect("a layout");
    let device = device_with(layout, Xattrs::User, Limits::default());
    let mut client = Client::mount(dir, device);
    let node = client.lookup(ROOT, "f").expect("there");
    let mut set = |name: &str| {
        let mut payload = abi::SetxattrIn { size: 5, flags: 0 }.as_bytes().to_vec();
        payload.extend(name.as_bytes());
        payload.extend(b"\0value");
        client.call(opcode::SETXATTR, node, &payload, 0)
    };
    set("user.mine").expect("the file system has user attributes");
    for refused in [
        "security.capability",
        "trusted.x",
        "system.posix_acl_access",
    ] {
        assert_eq!(set(refused), Err(Errno::OPNOTSUPP), "{refused}");
    }
    let get = |size| abi::GetxattrIn { size, padding: 0 };
    let value = client.named(opcode::GETXATTR, node, get(64).as_bytes(), "user.mine");
    assert_eq!(value.expect("set"), b"value");
    let size = client.named(opcode::GETXATTR, node, get(0).as_bytes(), "user.mine");
    assert_eq!(size.expect("set")[..4], [5, 0, 0, 0]);
    let short = client.named(opcode::GETXATTR, node, get(3).as_bytes(), "user.mine");
    assert_eq!(short, Err(Errno::RANGE));
    let list = client.call(opcode::LISTXATTR, node, get(64).as_bytes(), 64);
    assert_eq!(list.expect("listed"), b"user.mine\0");
    let mut off = Client::writable();
    let (node, _) = off.create(ROOT, "f", 0o600).expect("created");
    let refused = off.named(opcode::GETXATTR, node, get(64).as_bytes(), "user.x");
    assert_eq!(refused, Err(Errno::NOSYS));
}

#[test]
fn set_id_bits_and_device_nodes_cannot_be_made() {
    let mut client = Client::writable();
    let (node, _) = client.create(ROOT, "f", 0o6755).expect("created");
    client
        .setattr(node, |request| {
            (request.valid, request.mode) = (set::MODE, 0o6755);
        })
        .expect("changed");
    let mode = std::fs::metadata(client.path("f")).expect("host");
    assert_eq!(mode.permissions().mode() & 0o7777, 0o755);
    for kind in [0o020_000, 0o060_000] {
        let make = abi::MknodIn {
            mode: kind | 0o666,
            rdev: 0x103,
            umask: 0,
            padding: 0,
        };
        let refused = client.named(opcode::MKNOD, ROOT, make.as_bytes(), "null");
        assert_eq!(refused, Err(Errno::PERM));
    }
}

#[test]
fn statfs_tells_of_the_hosts_file_system() {
    let mut client = Client::writable();
    let out: abi::StatfsOut = client.typed(opcode::STATFS, ROOT, &[]).expect("statfs");
    assert!(out.blocks > 0 && out.block_size > 0);
}
