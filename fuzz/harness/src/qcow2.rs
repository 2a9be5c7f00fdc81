//! qcow2 images.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ringfence_block::Disk;
use ringfence_block::Format;
use ringfence_block::Image;
use ringfence_block::create_qcow2;
use ringfence_block::open;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;

use crate::script::Input;

const SIZE: u64 = 8 << 20;
const CLUSTER: u64 = 65_536;

fn new_image() -> File {
    let file = tempfile::tempfile().expect("a file");
    create_qcow2(file.try_clone().expect("a descriptor"), SIZE, None).expect("made");
    file
}

fn open_image(file: &File) -> Option<Box<dyn Disk>> {
    let image = Image {
        file: file.try_clone().expect("a descriptor"),
        format: Format::Qcow2,
    };
    open(image, Vec::new(), false).ok()
}

/// Damages an image in a few places, then uses it. Oracle: no panic, and a file that doesn't grow
/// out of proportion to what is written.
///
/// # Panics
/// When an oracle fails.
pub fn image(data: &[u8]) {
    let mut input = Input::new(data);
    let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
    let file = new_image();
    if let Some(disk) = open_image(&file) {
        let slice = ram.memory().get_slice(GuestAddress(0), 4096).expect("ram");
        disk.write(&[slice], 0).expect("a whole image");
        disk.flush().expect("a whole image");
    }
    for _ in 0..1 + input.below(12) {
        let cluster = u64::from(input.u8() % 8) * CLUSTER;
        let at = cluster + u64::from(input.u16() % 512);
        let len = 1 + input.below(8);
        let bytes = input.bytes(len);
        file.write_all_at(bytes, at).expect("patched");
    }
    let before = file.metadata().expect("a file").len();
    let Some(disk) = open_image(&file) else {
        return;
    };
    for _ in 0..24 {
        let offset = u64::from(input.u32()) % (SIZE + CLUSTER);
        let len = 512 * (1 + input.below(64));
        let slice = || [ram.memory().get_slice(GuestAddress(0), len).expect("ram")];
        // What a damaged image answers is its own affair.
        match input.u8() % 5 {
            0 | 1 => drop(disk.read(&slice(), offset)),
            2 => drop(disk.write(&slice(), offset)),
            3 => drop(disk.discard(offset, len as u64)),
            _ => drop(disk.write_zeroes(offset, len as u64, input.u8().is_multiple_of(2))),
        }
    }
    drop(disk.flush());
    let after = file.metadata().expect("a file").len();
    // A damaged table may point anywhere: the file may be long, but must not be full.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("a file"));
    let bound = before.max(SIZE) + 24 * 8 * CLUSTER;
    assert!(blocks * 512 <= bound, "{after} bytes, {blocks} blocks");
}
