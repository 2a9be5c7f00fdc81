//! What the guest finds in its memory.

use std::fs::File;
use std::io::Write;

use ringfence_engine::ErrorKind;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::paging::CR0_PG;
use ringfence_x86::state::CS;
use ringfence_x86::state::RBX;
use ringfence_x86::state::RSI;

use super::build::ElfBuilder;
use super::build::PVH_NOTE;
use super::build::bzimage;
use super::build::gzip;
use crate::BootProtocol;
use crate::BootSetup;
use crate::Kernel;
use crate::LoadError;
use crate::Loaded;
use crate::load;

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib << 20, HugePages::Off).expect("ram")
}

fn setup(image: Vec<u8>) -> BootSetup<'static> {
    BootSetup {
        kernel: Kernel::from_bytes(image).expect("a kernel"),
        protocol: None,
        initramfs: None,
        cmdline: "console=ttyS0 panic=-1",
        rsdp: Some(crate::ACPI_START),
        reserved: &[],
        rng_seed: [7; 32],
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("write");
    file
}

fn read<T: ringfence_memory::ByteValued>(ram: &GuestRam, at: u64) -> T {
    ram.memory().read_obj(GuestAddress(at)).expect("in RAM")
}

fn load_minimal(ram: &GuestRam) -> Loaded {
    load(ram, setup(ElfBuilder::minimal().build())).expect("loads")
}

#[test]
fn segments_are_placed_at_their_physical_addresses() {
    let mut elf = ElfBuilder::minimal();
    let mut second = vec![0; 1 << 20];
    second[700_001] = 0xaa;
    elf.segments.push((0x180_0000, second, 2 << 20));
    let ram = ram(64);
    let loaded = load(&ram, setup(elf.build())).expect("loads");
    assert_eq!(read::<u32>(&ram, 0x100_0ffc), 0xf4f4_f4f4);
    assert_eq!(read::<u8>(&ram, 0x180_0000 + 700_001), 0xaa);
    assert_eq!(loaded.kernel_end, 0x1a0_0000);
}

#[test]
fn linux_is_entered_in_long_mode_with_its_zero_page() {
    let ram = ram(64);
    let loaded = load_minimal(&ram);
    let state = &loaded.state;
    assert_eq!(loaded.protocol, BootProtocol::Linux64);
    assert_eq!(state.regs.rip, 0x100_0000);
    assert_eq!(state.regs.gpr[RSI], 0x7000);
    assert_eq!(state.sregs.segments[CS].selector, 0x10);
    assert_ne!(state.sregs.cr0 & CR0_PG, 0);
    // zero-page.rst: RSDP, e820 count, boot flag, command line pointer, setup data.
    assert_eq!(read::<u64>(&ram, 0x7070), crate::ACPI_START);
    assert_eq!(read::<u8>(&ram, 0x71e8), 3);
    assert_eq!(read::<u16>(&ram, 0x71fe), 0xaa55);
    let cmdline = u64::from(read::<u32>(&ram, 0x7228));
    let mut text = [0; 23];
    ram.memory()
        .read_slice(&mut text, GuestAddress(cmdline))
        .expect("in RAM");
    assert_eq!(&text, b"console=ttyS0 panic=-1\0");
    let data = read::<u64>(&ram, 0x7250);
    assert_eq!(read::<[u32; 2]>(&ram, data + 8), [9, 32]);
    assert_eq!(read::<[u8; 32]>(&ram, data + 16), [7; 32]);
}

#[test]
fn the_page_tables_map_the_first_4_gib_to_themselves() {
    let ram = ram(64);
    let cr3 = load_minimal(&ram).state.sregs.cr3;
    for address in [0_u64, 0x7000, 0x100_0000, 0xfee0_0000, 0xffff_ffff] {
        let next = read::<u64>(&ram, cr3) & !0xfff;
        let next = read::<u64>(&ram, next + (address >> 30) * 8) & !0xfff;
        let entry = read::<u64>(&ram, next + (address >> 21 & 511) * 8);
        assert_eq!(entry & 0x83, 0x83, "{address:#x}");
        assert_eq!(entry & !0x1f_ffff, address & !0x1f_ffff);
    }
}

#[test]
fn the_memory_map_covers_ram_and_leaves_the_pc_hole_reserved() {
    let ram = ram(64);
    load_minimal(&ram);
    let entry = |i: u64| {
        let at = 0x72d0 + i * 20;
        (
            read::<u64>(&ram, at),
            read::<u64>(&ram, at + 8),
            read::<u32>(&ram, at + 16),
        )
    };
    assert_eq!(entry(0), (0, 0x9_fc00, 1));
    assert_eq!(entry(1), (0x9_fc00, 0x6_0400, 2));
    assert_eq!(entry(2), (0x10_0000, (64 << 20) - 0x10_0000, 1));
}

#[test]
fn a_bzimages_own_header_reaches_the_kernel() {
    let mut image = bzimage(&gzip(&ElfBuilder::minimal().build()));
    image[0x230..0x234].copy_from_slice(&0x20_0000_u32.to_le_bytes());
    let ram = ram(64);
    load(&ram, setup(image)).expect("loads");
    assert_eq!(read::<u32>(&ram, 0x7230), 0x20_0000);
    assert_eq!(read::<u8>(&ram, 0x7210), 0xff);
}

#[test]
fn the_initramfs_lies_at_the_top_of_low_memory() {
    let content: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    let ram = ram(64);
    let mut setup = setup(ElfBuilder::minimal().build());
    setup.initramfs = Some(file(&content));
    let (start, len) = load(&ram, setup).expect("loads").initramfs.expect("placed");
    assert_eq!(len, 100_000);
    assert_eq!(start, ((64 << 20) - 100_000) & !0xfff);
    let mut found = vec![0; content.len()];
    ram.memory()
        .read_slice(&mut found, GuestAddress(start))
        .expect("in RAM");
    assert!(found == content);
    assert_eq!(u64::from(read::<u32>(&ram, 0x7218)), start);
    assert_eq!(u64::from(read::<u32>(&ram, 0x721c)), len);
}

#[test]
fn pvh_is_entered_in_protected_mode_with_its_start_info() {
    let elf = ElfBuilder::minimal().with_note("Xen", PVH_NOTE, &0x100_0040_u32.to_le_bytes());
    let ram = ram(64);
    let mut setup = setup(elf.build());
    setup.initramfs = Some(file(b"initramfs"));
    let loaded = load(&ram, setup).expect("loads");
    assert_eq!(loaded.state.regs.rip, 0x100_0040);
    assert_eq!(loaded.state.sregs.cr0 & CR0_PG, 0);
    let info = loaded.state.regs.gpr[RBX];
    assert_eq!(read::<u32>(&ram, info), 0x336e_c578);
    assert_eq!(read::<u32>(&ram, info + 12), 1);
    let module = read::<u64>(&ram, info + 16);
    let (start, len) = loaded.initramfs.expect("placed");
    assert_eq!(read::<[u64; 2]>(&ram, module), [start, len]);
    assert_eq!(read::<u64>(&ram, info + 32), crate::ACPI_START);
    let map = read::<u64>(&ram, info + 40);
    assert_eq!(read::<u32>(&ram, info + 48), 3);
    assert_eq!(read::<[u64; 2]>(&ram, map), [0, 0x9_fc00]);
}

#[test]
fn too_little_memory_is_refused() {
    let small = ram(16);
    let error = load(&small, setup(ElfBuilder::minimal().build())).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("more memory"), "{error}");

    let ram = ram(17);
    let mut setup = setup(ElfBuilder::minimal().build());
    setup.initramfs = Some(file(&vec![1; 2 << 20]));
    let error = load(&ram, setup).expect_err("refused");
    assert!(
        matches!(
            error,
            LoadError::NoRoom {
                part: "the initramfs",
                ..
            }
        ),
        "{error:?}"
    );
}

#[test]
fn command_lines_that_the_kernel_would_cut_are_refused() {
    let ram = ram(64);
    let long = "x".repeat(2048);
    for (cmdline, kind) in [
        (long.as_str(), ErrorKind::Config),
        ("a\0b", ErrorKind::Config),
    ] {
        let mut setup = setup(ElfBuilder::minimal().build());
        setup.cmdline = cmdline;
        assert_eq!(load(&ram, setup).expect_err("refused").kind(), kind);
    }
    let longest = "x".repeat(2047);
    let mut setup = setup(ElfBuilder::minimal().build());
    setup.cmdline = &longest;
    load(&ram, setup).expect("loads");
}

#[test]
fn a_segment_among_the_boot_structures_is_refused() {
    let mut elf = ElfBuilder::minimal();
    elf.segments[0].0 = 0x8000;
    let error = load(&ram(64), setup(elf.build())).expect_err("refused");
    assert!(matches!(error, LoadError::LowSegment(0x8000)), "{error:?}");
}

#[test]
fn an_entry_point_outside_the_kernel_is_refused() {
    let mut elf = ElfBuilder::minimal();
    elf.entry = 0xffff_ffff_8100_0000;
    let error = load(&ram(64), setup(elf.build())).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn asking_for_pvh_without_a_pvh_entry_is_refused() {
    let mut setup = setup(ElfBuilder::minimal().build());
    setup.protocol = Some(BootProtocol::Pvh);
    let error = load(&ram(64), setup).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}
