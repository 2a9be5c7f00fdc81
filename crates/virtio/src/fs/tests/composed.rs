//! One tree from several directories, with hidden names.

use rustix::io::Errno;
use tempfile::TempDir;

use super::client::Client;
use super::client::ROOT;
use super::client::device;
use super::client::read_only;
use super::client::share;
use crate::fs::Layout;
use crate::fs::LayoutError;
use crate::fs::Share;
use crate::fs::abi::opcode;

fn host() -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for path in ["usr/bin", "etc/ssl/private", "etc/ssh", "work"] {
        std::fs::create_dir_all(dir.path().join(path)).expect("host");
    }
    for path in [
        "usr/bin/sh",
        "etc/passwd",
        "etc/shadow",
        "etc/ssl/certs",
        "etc/ssl/private/key",
        "etc/ssh/host_key",
        "resolv",
    ] {
        std::fs::write(dir.path().join(path), path).expect("host");
    }
    dir
}

/// The host's programs, `/etc` without secrets, a writable directory.
fn composed() -> Client {
    let dir = host();
    let etc = Share {
        hide: ["shadow", "ssh", "ssl/private"].map(str::to_owned).to_vec(),
        ..read_only(&dir.path().join("etc"))
    };
    let mut layout = Layout::new();
    let at = |path: &str| dir.path().join(path);
    layout
        .add_share("/usr", read_only(&at("usr")))
        .expect("usr");
    layout.add_share("/etc", etc).expect("etc");
    layout
        .add_share("/etc/resolv.conf", read_only(&at("resolv")))
        .expect("a file");
    layout
        .add_share("/srv/deep/work", share(&at("work")))
        .expect("work");
    layout.add_symlink("/bin", "usr/bin").expect("bin");
    layout.add_directory("/proc").expect("proc");
    Client::mount(dir, device(layout))
}

fn names(client: &mut Client, path: &str, plus: bool) -> Vec<String> {
    let node = client.walk(path).expect("there");
    let listed = client.list(node, plus).expect("listed");
    let mut names: Vec<String> = listed.into_iter().map(|(name, _)| name).collect();
    names.sort();
    names
}

#[test]
fn the_top_is_made_of_what_was_given() {
    let mut client = composed();
    for plus in [false, true] {
        let top = names(&mut client, "/", plus);
        assert_eq!(top, ["bin", "etc", "proc", "srv", "usr"]);
    }
    assert_eq!(client.content("usr/bin/sh").expect("read"), b"usr/bin/sh");
    assert_eq!(names(&mut client, "srv/deep", true), ["work"]);
    assert!(names(&mut client, "proc", false).is_empty());
    let link = client.walk("bin").expect("there");
    let target = client.call(opcode::READLINK, link, &[], 64);
    assert_eq!(target.expect("target"), b"usr/bin");
}

#[test]
fn hidden_names_are_neither_listed_nor_found() {
    let mut client = composed();
    for plus in [false, true] {
        let etc = names(&mut client, "etc", plus);
        assert_eq!(etc, ["passwd", "resolv.conf", "ssl"]);
        assert_eq!(names(&mut client, "etc/ssl", plus), ["certs"]);
    }
    for hidden in ["etc/shadow", "etc/ssh", "etc/ssl/private"] {
        assert_eq!(client.walk(hidden), Err(Errno::NOENT), "{hidden}");
    }
    assert_eq!(client.content("etc/resolv.conf").expect("read"), b"resolv");
}

#[test]
fn each_share_keeps_its_own_rights() {
    let mut client = composed();
    let work = client.walk("srv/deep/work").expect("there");
    let (node, handle) = client.create(work, "new", 0o600).expect("writable");
    client.write(node, handle, 0, b"x").expect("writable");
    let bin = client.walk("usr/bin").expect("there");
    assert_eq!(client.create(bin, "new", 0o600), Err(Errno::ROFS));
    let sh = client.walk("usr/bin/sh").expect("there");
    assert_eq!(client.open(sh, 1), Err(Errno::ROFS));
    assert_eq!(client.create(ROOT, "new", 0o600), Err(Errno::ROFS));
    let link = client.named(opcode::LINK, work, &sh.to_le_bytes(), "sh");
    assert_eq!(link, Err(Errno::XDEV));
    let moved = client.rename((bin, "sh"), (work, "sh"));
    assert_eq!(moved, Err(Errno::XDEV));
}

// A directory with hidden names below it must not be moved to where they'd show.
#[test]
fn hidden_names_cannot_be_made_moved_or_reached_by_moving_their_parents() {
    let dir = host();
    let etc = Share {
        hide: vec!["shadow".to_owned(), "ssl/private".to_owned()],
        ..share(&dir.path().join("etc"))
    };
    let layout = Layout::single(etc).expect("a layout");
    let mut client = Client::mount(dir, device(layout));
    for (from, to) in [("ssl", "tls"), ("shadow", "x"), ("passwd", "shadow")] {
        let refused = client.rename((ROOT, from), (ROOT, to));
        assert_eq!(refused, Err(Errno::ACCESS), "{from} to {to}");
    }
    assert_eq!(client.create(ROOT, "shadow", 0o600), Err(Errno::ACCESS));
    let refused = client.named(opcode::UNLINK, ROOT, &[], "shadow");
    assert_eq!(refused, Err(Errno::ACCESS));
    client
        .rename((ROOT, "passwd"), (ROOT, "users"))
        .expect("nothing hidden there");
}

#[test]
fn trees_that_cannot_be_are_refused_with_the_path() {
    let dir = host();
    let usr = || read_only(&dir.path().join("usr"));
    let mut layout = Layout::new();
    layout.add_share("/usr", usr()).expect("usr");
    layout.add_symlink("/bin", "usr/bin").expect("bin");
    assert!(matches!(
        layout.add_share("usr/", usr()),
        Err(LayoutError::Twice(_))
    ));
    assert!(matches!(
        layout.add_share("/bin/sub", usr()),
        Err(LayoutError::NotADirectory(_))
    ));
    for bad in ["/a/../b", "/a//b", "/./a", "/a\0b"] {
        let refused = layout.add_share(bad, usr());
        assert!(matches!(refused, Err(LayoutError::Path(_))), "{bad:?}");
    }
    let device = read_only(std::path::Path::new("/dev/null"));
    assert!(matches!(
        layout.add_share("/null", device),
        Err(LayoutError::Kind(_))
    ));
}
