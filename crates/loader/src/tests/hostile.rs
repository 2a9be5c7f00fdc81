//! Damaged images never panic, and never take more memory than they may.

use proptest::prelude::*;

use super::build::ElfBuilder;
use super::build::PVH_NOTE;
use super::build::bzimage;
use super::build::gzip;
use crate::Kernel;

fn elf() -> Vec<u8> {
    ElfBuilder::minimal()
        .with_note("Xen", PVH_NOTE, &0x100_0000_u32.to_le_bytes())
        .build()
}

/// Bytes to overwrite, most of them in the headers.
fn edits() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let at = prop_oneof![0_usize..0x290, 0_usize..5000];
    prop::collection::vec((at, any::<u8>()), 1..12)
}

fn apply(mut image: Vec<u8>, edits: &[(usize, u8)], keep: usize) -> Vec<u8> {
    for &(at, value) in edits {
        if let Some(byte) = image.get_mut(at) {
            *byte = value;
        }
    }
    image.truncate(keep);
    image
}

proptest! {
    #[test]
    fn edited_elf_images_open_or_are_refused(edits in edits(), keep in 0_usize..6000) {
        if let Ok(kernel) = Kernel::from_bytes(apply(elf(), &edits, keep)) {
            prop_assert!(!kernel.elf.segments.is_empty());
        }
    }

    #[test]
    fn edited_bzimages_open_or_are_refused(edits in edits(), keep in 0_usize..6000) {
        let opened = Kernel::from_bytes(apply(bzimage(&gzip(&elf())), &edits, keep));
        prop_assert!(opened.map_or(true, |kernel| !kernel.elf.segments.is_empty()));
    }
}
