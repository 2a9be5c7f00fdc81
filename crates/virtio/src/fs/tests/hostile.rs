//! Guests and hosts that don't play by the rules.

use std::os::unix::fs::symlink;

use rustix::fs::Mode;
use rustix::io::Errno;

use super::client::Client;
use super::client::ROOT;
use super::client::device;
use super::client::device_with;
use super::client::libc_flags::RDONLY;
use super::client::libc_flags::RDWR;
use super::client::libc_flags::WRONLY;
use super::client::read_in;
use super::client::read_only;
use super::client::share;
use crate::fs::Layout;
use crate::fs::Limits;
use crate::fs::Xattrs;
use crate::fs::abi::opcode;
use crate::fs::abi::set;
use zerocopy::IntoBytes;

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let mut client = Client::writable();
    let sub = client.make_directory(ROOT, "sub", 0o755).expect("made");
    let long = vec![b'x'; 256];
    for name in [
        &b".."[..],
        b".",
        b"",
        b"a/b",
        b"/etc",
        b"../x",
        b"sub/",
        &long,
    ] {
        for parent in [ROOT, sub] {
            client.lookup_raw(parent, name).expect_err("refused");
            let mut payload = vec![0; 8];
            payload.extend(name);
            payload.push(0);
            client
                .call(opcode::MKDIR, parent, &payload, 128)
                .expect_err("refused");
            client
                .call(opcode::RMDIR, parent, &payload[8..], 0)
                .expect_err("refused");
        }
    }
    let up = client.rename((sub, ".."), (ROOT, "x"));
    assert_eq!(up, Err(Errno::INVAL));
}

#[test]
fn symbolic_links_are_never_followed_on_the_host() {
    let mut client = Client::writable();
    symlink("/etc", client.path("etc")).expect("host");
    symlink("/etc/passwd", client.path("passwd")).expect("host");
    let etc = client.lookup(ROOT, "etc").expect("the link itself");
    assert_eq!(client.lookup(etc, "passwd"), Err(Errno::NOTDIR));
    let passwd = client.lookup(ROOT, "passwd").expect("the link itself");
    assert_eq!(client.open(passwd, RDONLY), Err(Errno::LOOP));
    let chmod = client.setattr(passwd, |request| {
        (request.valid, request.mode) = (set::MODE, 0o777);
    });
    assert_eq!(chmod, Err(Errno::LOOP));
    let truncate = client.setattr(passwd, |request| request.valid = set::SIZE);
    assert_eq!(truncate, Err(Errno::LOOP));
    assert_eq!(client.list(etc, false), Err(Errno::NOTDIR));
    client
        .create(ROOT, "passwd", 0o600)
        .expect_err("not through it");
}

// The guest looks a file up; then its name becomes a link out of the tree.
#[test]
fn a_name_swapped_for_a_link_is_stale_not_followed() {
    let mut client = Client::writable();
    std::fs::create_dir(client.path("d")).expect("host");
    std::fs::write(client.path("d/f"), b"inside").expect("host");
    std::fs::write(client.path("f"), b"inside").expect("host");
    let directory = client.lookup(ROOT, "d").expect("there");
    let file = client.lookup(ROOT, "f").expect("there");
    std::fs::rename(client.path("d"), client.path("was-d")).expect("host");
    std::fs::rename(client.path("f"), client.path("was-f")).expect("host");
    symlink("/etc", client.path("d")).expect("host");
    symlink("/etc/passwd", client.path("f")).expect("host");
    for flags in [RDONLY, RDWR, WRONLY] {
        assert_eq!(client.open(file, flags), Err(Errno::STALE));
    }
    assert_eq!(client.lookup(directory, "passwd"), Err(Errno::STALE));
    assert_eq!(client.attr(file), Err(Errno::STALE));
}

#[test]
fn a_name_swapped_for_another_file_is_stale() {
    let mut client = Client::writable();
    std::fs::write(client.path("f"), b"one").expect("host");
    let node = client.lookup(ROOT, "f").expect("there");
    std::fs::write(client.path("other"), b"two").expect("host");
    std::fs::rename(client.path("other"), client.path("f")).expect("host");
    assert_eq!(client.open(node, RDONLY), Err(Errno::STALE));
    let again = client.lookup(ROOT, "f").expect("there");
    assert_ne!(again, node);
    assert_eq!(client.content("f").expect("read"), b"two");
}

#[test]
fn special_files_are_shown_but_not_opened() {
    let mut client = Client::writable();
    let fifo = client.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .expect("host");
    let _socket = std::os::unix::net::UnixListener::bind(client.path("socket")).expect("host");
    for (name, kind) in [("fifo", 0o010_000), ("socket", 0o140_000)] {
        let node = client.lookup(ROOT, name).expect("shown");
        assert_eq!(client.attr(node).expect("known").mode & 0o170_000, kind);
        for flags in [RDONLY, RDWR, WRONLY] {
            assert_eq!(client.open(node, flags), Err(Errno::NXIO));
        }
    }
    client.create(ROOT, "fifo", 0o600).expect_err("not a file");
}

#[test]
fn nothing_in_a_read_only_share_can_be_changed() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("f"), b"content").expect("host");
    let layout = Layout::single(read_only(dir.path())).expect("a layout");
    let mut client = Client::mount(dir, device(layout));
    let file = client.lookup(ROOT, "f").expect("there");
    let refused = Err(Errno::ROFS);
    assert_eq!(client.create(ROOT, "new", 0o600).map(drop), refused);
    assert_eq!(client.make_directory(ROOT, "new", 0o700).map(drop), refused);
    assert_eq!(client.rename((ROOT, "f"), (ROOT, "g")), refused);
    for (code, head) in [
        (opcode::UNLINK, &[][..]),
        (opcode::RMDIR, &[]),
        (
            opcode::MKNOD,
            &[0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        (opcode::SYMLINK, b"new\0"),
        (opcode::LINK, &file.to_le_bytes()),
    ] {
        let result = client.named(code, ROOT, head, "f");
        assert_eq!(result.map(drop), refused, "{code}");
    }
    for valid in [set::MODE, set::UID, set::SIZE, set::MTIME] {
        let result = client.setattr(file, |request| request.valid = valid);
        assert_eq!(result.map(drop), refused, "{valid}");
    }
    assert_eq!(client.write(file, 0, 0, b"x").map(drop), refused);
    for code in [opcode::FALLOCATE, opcode::FSYNCDIR] {
        let result = client.call(code, file, &[0; 64], 64);
        assert_eq!(result.map(drop), refused, "{code}");
    }
    assert_eq!(client.content("f").expect("read"), b"content");
}

#[test]
fn handles_of_other_files_and_wild_numbers_are_refused() {
    let mut client = Client::writable();
    let (one, handle) = client.create(ROOT, "one", 0o600).expect("created");
    let (two, _) = client.create(ROOT, "two", 0o600).expect("created");
    assert_eq!(client.read(two, handle, 0, 1), Err(Errno::BADF));
    assert_eq!(client.write(two, handle, 0, b"x"), Err(Errno::BADF));
    assert_eq!(client.read(one, u64::MAX, 0, 1), Err(Errno::BADF));
    assert_eq!(client.attr(u64::MAX), Err(Errno::STALE));
    assert_eq!(client.lookup(0, "x"), Err(Errno::STALE));
    assert_eq!(client.read(one, handle, u64::MAX, 1), Err(Errno::INVAL));
    let listing = read_in(handle, 0, 4096);
    let refused = client.call(opcode::READDIR, one, listing.as_bytes(), 4096);
    assert_eq!(refused, Err(Errno::BADF));
}

#[test]
fn requests_of_every_code_with_no_or_absurd_payload_do_no_harm() {
    let mut client = Client::writable();
    let (node, _) = client.create(ROOT, "f", 0o600).expect("created");
    for code in (0..=60).filter(|&code| code != opcode::FORGET && code != opcode::BATCH_FORGET) {
        if code == opcode::INTERRUPT {
            continue;
        }
        for payload in [&[][..], &[0; 3], &[0xff; 200], &[0; 9000]] {
            for target in [ROOT, node, 0, u64::MAX] {
                // What is answered is the device's choice; that it's answered is the point.
                let _ = client.call(code, target, payload, 4096);
            }
        }
    }
    client.init();
    client.lookup(ROOT, "f").expect("still serving");
}

#[test]
fn replies_without_room_are_not_written() {
    let mut client = Client::writable();
    client.create(ROOT, "f", 0o600).expect("created");
    let small = client.call(opcode::LOOKUP, ROOT, b"f\0", 10);
    assert_eq!(small, Err(Errno::INVAL));
    let none = client.driver.request(1, &[b"tiny"], &[100]);
    assert!(none.is_empty());
    let head = [&[0; 40][..], b"f\0"].concat();
    assert!(client.driver.request(1, &[&head], &[]).is_empty());
}

#[test]
fn nodes_and_handles_are_bounded_and_forgetting_frees_them() {
    let dir = tempfile::tempdir().expect("a directory");
    for n in 0..100 {
        std::fs::write(dir.path().join(n.to_string()), b"").expect("host");
    }
    let limits = Limits {
        nodes: 50,
        handles: 10,
        cached: 8,
    };
    let layout = Layout::single(share(dir.path())).expect("a layout");
    let mut client = Client::mount(dir, device_with(layout, Xattrs::Off, limits));
    let nodes: Vec<_> = (0..100)
        .map(|n| client.lookup(ROOT, &n.to_string()))
        .collect();
    assert_eq!(nodes.iter().filter(|node| node.is_ok()).count(), 49);
    assert_eq!(nodes[99], Err(Errno::NOMEM));
    assert_eq!(
        client.list(ROOT, true).expect("listed all the same").len(),
        100
    );
    let first = nodes[0].expect("the first");
    let open = (0..20)
        .filter(|_| client.open(first, RDONLY).is_ok())
        .count();
    assert_eq!(open, 9, "one is the listing's");
    for node in nodes.into_iter().flatten() {
        client.forget(node, u64::MAX);
    }
    client.forget(ROOT, u64::MAX);
    assert_eq!(client.counter("nodes"), 1);
    client.lookup(ROOT, "99").expect("room again");
}

#[test]
fn deep_trees_are_walked_again_when_their_descriptors_were_given_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut path = dir.path().to_path_buf();
    for n in 0..60 {
        path.push(format!("d{n}"));
    }
    std::fs::create_dir_all(&path).expect("host");
    std::fs::write(path.join("leaf"), b"deep").expect("host");
    let limits = Limits {
        cached: 8,
        ..Limits::default()
    };
    let layout = Layout::single(share(dir.path())).expect("a layout");
    let mut client = Client::mount(dir, device_with(layout, Xattrs::Off, limits));
    let way: Vec<String> = (0..60).map(|n| format!("d{n}")).collect();
    let leaf = format!("{}/leaf", way.join("/"));
    for _ in 0..3 {
        assert_eq!(client.content(&leaf).expect("read"), b"deep");
    }
}
