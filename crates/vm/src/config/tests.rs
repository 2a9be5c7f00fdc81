//! Documents that are understood, and those that are refused with the field's path.

use proptest::prelude::*;
use serde_json::Value;
use serde_json::json;

use super::*;

fn minimal() -> Value {
    json!({
        "version": 1, "name": "m1", "engine": "kvm", "memory_mib": 512, "vcpus": 1,
        "boot": {"kernel_fd": 5}, "control_fd": 3,
    })
}

fn full() -> Value {
    json!({
        "version": 1, "name": "m1", "engine": "bt", "memory_mib": 512,
        "huge_pages": "transparent", "vcpus": 2, "user_code": "translated",
        "boot": {"kernel_fd": 5, "initramfs_fd": 6, "cmdline": "quiet", "protocol": "pvh"},
        "serial": {"in_fd": null, "out_fd": 7}, "control_fd": 3,
        "devices": [
            {"type": "console", "in_fd": 8, "out_fd": 9},
            {"type": "block", "fd": 10, "format": "qcow2", "backing": [{"fd": 11, "format": "raw"}],
             "read_only": true, "serial": "root", "rate": {"bytes_per_s": 1_000_000}},
            {"type": "net", "tap_fds": [12], "vhost_fds": [18], "mac": "02:00:00:00:00:01"},
            {"type": "vsock", "cid": 3, "listen_fd": 13, "handout_fd": 14},
            {"type": "rng"}, {"type": "balloon"},
            {"type": "fs", "tag": "root", "entries": [
                {"path": "/usr", "fd": 15, "read_only": true, "ids": "squash:0:0", "hide": ["local"]},
                {"path": "/bin", "symlink": "usr/bin"}, {"path": "/proc", "directory": true}]},
        ],
        "notes": {"perf_map_fd": 16, "trace_fd": 17}, "jail": {"seccomp": "require"},
    })
}

fn parse_value(value: &Value) -> Result<Config, ConfigError> {
    parse(value.to_string().as_bytes())
}

/// The path that a document with one changed field is refused for.
fn refused(pointer: &str, value: Value) -> String {
    let mut document = full();
    match document.pointer_mut(pointer) {
        Some(field) => *field = value,
        None => {
            let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
            document.pointer_mut(parent).expect("there")[name] = value;
        }
    }
    let error = parse_value(&document).expect_err(pointer);
    assert!(error.to_string().contains(error.path().expect("a field")));
    error.path().expect("a field").to_owned()
}

#[test]
fn a_minimal_document_has_defaults() {
    let config = parse_value(&minimal()).expect("good");
    assert_eq!(config.huge_pages, HugePages::Off);
    assert_eq!(config.user_code, UserCode::Direct);
    assert_eq!(config.notes, NotesConfig::default());
    assert_eq!(config.boot.protocol, Protocol::Auto);
    assert_eq!(config.jail, JailConfig::default());
    assert!(config.serial.is_none() && config.devices.is_empty());
}

#[test]
fn a_full_document_is_understood() {
    let config = parse_value(&full()).expect("good");
    let kinds: Vec<_> = config.devices.iter().map(DeviceConfig::kind).collect();
    assert_eq!(
        kinds,
        ["console", "block", "net", "vsock", "rng", "balloon", "fs"]
    );
    let mut fds: Vec<i32> = config.fds().iter().map(|(_, fd)| fd.0).collect();
    fds.sort_unstable();
    assert_eq!(fds, (3..=18).filter(|&fd| fd != 4).collect::<Vec<_>>());
    let DeviceConfig::Fs(fs) = &config.devices[6] else {
        panic!("fs");
    };
    assert_eq!(
        fs.entries[1].source,
        FsSource::Symlink("usr/bin".to_owned())
    );
}

#[test]
fn wrong_fields_are_named_by_their_path() {
    for (pointer, value, path) in [
        ("/version", json!(2), "version"),
        ("/version", json!("1"), "version"),
        ("/vcpus", json!(0), "vcpus"),
        ("/vcpus", json!(33), "vcpus"),
        ("/vcpus", json!(-1), "vcpus"),
        ("/memory_mib", json!(0), "memory_mib"),
        ("/memory_mib", json!(1_u64 << 40), "memory_mib"),
        ("/name", json!(""), "name"),
        ("/name", json!("a b"), "name"),
        ("/boot/cmdline", json!("a\0b"), "boot.cmdline"),
        ("/boot/kernel_fd", json!("5"), "boot.kernel_fd"),
        ("/boot/kernel", json!("/boot/vmlinuz"), "boot.kernel"),
        ("/huge_pages", json!("yes"), "huge_pages"),
        ("/user_code", json!("native"), "user_code"),
        ("/notes/trace_fd", json!(16), "notes.trace_fd"),
        ("/notes/log", json!(18), "notes.log"),
        ("/jail/seccomp", json!(true), "jail.seccomp"),
        ("/devices/0/type", json!("floppy"), "devices[0].type"),
        ("/devices/0/type", json!(null), "devices[0].type"),
        ("/devices/1/format", json!("auto"), "devices[1].format"),
        ("/devices/1/format", json!("raw"), "devices[1].backing"),
        (
            "/devices/1/serial",
            json!("x".repeat(21)),
            "devices[1].serial",
        ),
        (
            "/devices/1/backing/0/path",
            json!("/x"),
            "devices[1].backing[0].path",
        ),
        (
            "/devices/1/rate/bytes_per_s",
            json!(-1),
            "devices[1].rate.bytes_per_s",
        ),
        ("/devices/2/mac", json!("02:00:00:00:00"), "devices[2].mac"),
        (
            "/devices/2/mac",
            json!("03:00:00:00:00:01"),
            "devices[2].mac",
        ),
        (
            "/devices/2/mac",
            json!("02:00:00:00:00:+1"),
            "devices[2].mac",
        ),
        ("/devices/2/tap_fds", json!([]), "devices[2].tap_fds"),
        ("/devices/2/link_fd", json!(20), "devices[2].tap_fds"),
        (
            "/devices/2/vhost_fds",
            json!([20, 21]),
            "devices[2].vhost_fds",
        ),
        ("/devices/2/rate", json!({}), "devices[2].vhost_fds"),
        ("/devices/2/mtu", json!(1279), "devices[2].mtu"),
        ("/devices/3/cid", json!(2), "devices[3].cid"),
        ("/devices/4/seed", json!(1), "devices[4].seed"),
        ("/devices/6/tag", json!("x".repeat(37)), "devices[6].tag"),
        ("/devices/6/entries", json!([]), "devices[6].entries"),
        (
            "/devices/6/entries/0/ids",
            json!("squash:0"),
            "devices[6].entries[0].ids",
        ),
        (
            "/devices/6/entries/1/fd",
            json!(30),
            "devices[6].entries[1]",
        ),
    ] {
        assert_eq!(refused(pointer, value), path);
    }
}

#[test]
fn a_missing_field_names_its_parent() {
    let mut document = minimal();
    document["boot"].as_object_mut().expect("object").clear();
    let error = parse_value(&document).expect_err("no kernel");
    assert_eq!(error.path(), Some("boot"));
    assert!(error.to_string().contains("kernel_fd"), "{error}");
}

#[test]
fn a_descriptor_belongs_to_one_field() {
    assert_eq!(refused("/devices/0/in_fd", json!(5)), "devices[0].in_fd");
    assert_eq!(refused("/devices/0/in_fd", json!(2)), "devices[0].in_fd");
    assert_eq!(refused("/control_fd", json!(-1)), "control_fd");
}

#[test]
fn what_is_no_document_is_refused() {
    for text in ["", "{", "[]", "null", "{}", "\u{fffd}"] {
        parse(text.as_bytes()).expect_err(text);
    }
    let long = vec![b' '; MAX_DOCUMENT_BYTES + 1];
    assert!(matches!(parse(&long), Err(ConfigError::TooLong(_))));
    let deep = "[".repeat(500_000);
    parse(deep.as_bytes()).expect_err("too deep");
}

proptest! {
    #[test]
    fn edited_documents_are_understood_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut text = full().to_string().into_bytes();
        for (index, byte) in edits {
            let at = index.index(text.len());
            text[at] = byte;
        }
        if let Ok(config) = parse(&text) {
            prop_assert!((1..=MAX_VCPUS).contains(&config.vcpus));
        }
    }
}
