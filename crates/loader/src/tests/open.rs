//! What is a kernel and what is not.

use std::fs::File;
use std::io::Write;

use ringfence_engine::ErrorKind;

use super::build::ElfBuilder;
use super::build::GUEST_OS_NOTE;
use super::build::PVH_NOTE;
use super::build::bzimage;
use super::build::gzip;
use crate::BootProtocol;
use crate::Kernel;
use crate::LoadError;

fn open(bytes: Vec<u8>) -> Result<Kernel, LoadError> {
    Kernel::from_bytes(bytes)
}

#[test]
fn an_elf_image_is_opened_as_it_is() {
    let kernel = open(ElfBuilder::minimal().build()).expect("a kernel");
    assert_eq!(kernel.protocol(), BootProtocol::Linux64);
    assert_eq!(kernel.end(), 0x100_1000);
    assert!(kernel.decompressed().is_none());
}

#[test]
fn a_bzimage_gives_its_elf_image_for_the_cache() {
    let elf = ElfBuilder::minimal().build();
    let kernel = open(bzimage(&gzip(&elf))).expect("a kernel");
    assert_eq!(kernel.decompressed(), Some(elf.as_slice()));
    assert_eq!(kernel.protocol(), BootProtocol::Linux64);
}

#[test]
fn the_protocol_follows_the_notes() {
    let linux = ElfBuilder::minimal()
        .with_note("Xen", PVH_NOTE, &0x100_0800_u64.to_le_bytes())
        .with_note("Xen", GUEST_OS_NOTE, b"linux\0");
    let other = ElfBuilder::minimal()
        .with_note("GNU", 3, &[1; 20])
        .with_note("Xen", PVH_NOTE, &0x100_0800_u32.to_le_bytes());
    let opened = open(other.build()).expect("a kernel");
    assert_eq!(opened.protocol(), BootProtocol::Pvh);
    assert_eq!(opened.elf.pvh_entry, Some(0x100_0800));
    let opened = open(linux.build()).expect("a kernel");
    assert_eq!(opened.protocol(), BootProtocol::Linux64);
    assert_eq!(opened.elf.pvh_entry, Some(0x100_0800));
}

#[test]
fn a_32_bit_image_is_entered_by_pvh() {
    let mut elf = ElfBuilder::minimal().with_note("Xen", PVH_NOTE, &0x100_0000_u32.to_le_bytes());
    elf.class_64 = false;
    elf.machine = 3;
    let kernel = open(elf.build()).expect("a kernel");
    assert_eq!(kernel.protocol(), BootProtocol::Pvh);
}

#[test]
fn files_that_are_no_kernel_are_refused_with_their_first_bytes() {
    for bytes in [Vec::new(), b"#!/bin/sh\n".to_vec(), vec![0; 70_000]] {
        let error = open(bytes.clone()).expect_err("not a kernel");
        assert!(matches!(error, LoadError::NotAKernel { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Format);
    }
    let error = open(b"#!/bin/sh\n".to_vec()).expect_err("not a kernel");
    assert!(error.to_string().contains("23, 21, 2f"), "{error}");
}

#[test]
fn images_for_other_machines_and_of_other_kinds_are_refused() {
    let mut arm = ElfBuilder::minimal();
    arm.machine = 183;
    let mut object = ElfBuilder::minimal();
    object.kind = 1;
    for image in [arm, object] {
        let error = open(image.build()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn old_and_32_bit_bzimages_are_refused() {
    let good = bzimage(&gzip(&ElfBuilder::minimal().build()));
    let change = |at: usize, value: u8| {
        let mut image = good.clone();
        image[at] = value;
        open(image).expect_err("refused")
    };
    for (at, value) in [(0x206, 0x0b), (0x211, 0), (0x236, 0)] {
        assert_eq!(change(at, value).kind(), ErrorKind::Unsupported, "{at:#x}");
    }
}

#[test]
fn truncated_files_say_what_is_missing() {
    let elf = ElfBuilder::minimal().build();
    let image = bzimage(&gzip(&elf));
    for (bytes, part) in [
        (elf[..2000].to_vec(), "a segment"),
        (image[..image.len() - 10].to_vec(), "the compressed kernel"),
        (image[..0x250].to_vec(), "the setup header"),
    ] {
        match open(bytes) {
            Err(LoadError::Truncated { part: found, .. }) => assert_eq!(found, part),
            other => panic!("{part}: {other:?}"),
        }
    }
}

#[test]
fn segments_that_contradict_themselves_are_refused() {
    let mut longer_in_file = ElfBuilder::minimal();
    longer_in_file.segments[0].2 = 10;
    let mut wrapping = ElfBuilder::minimal();
    wrapping.segments[0].0 = u64::MAX - 100;
    let mut empty = ElfBuilder::minimal();
    empty.segments[0] = (0x100_0000, Vec::new(), 0);
    for image in [longer_in_file, wrapping, empty] {
        let error = open(image.build()).expect_err("refused");
        assert!(matches!(error, LoadError::Damaged(_)), "{error:?}");
    }
}

#[test]
fn a_directory_is_not_read() {
    let directory = File::open("/").expect("the root directory");
    let error = Kernel::open(directory).expect_err("refused");
    assert!(matches!(error, LoadError::Read { .. }), "{error:?}");
}

#[test]
fn a_file_is_read_by_position() {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(&ElfBuilder::minimal().build())
        .expect("write");
    // The offset is at the end now, as it would be in a descriptor that somebody else wrote with.
    let kernel = Kernel::open(file).expect("a kernel");
    assert_eq!(kernel.elf.entry, 0x100_0000);
}
