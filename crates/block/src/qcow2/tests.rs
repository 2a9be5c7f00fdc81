//! Headers that lie, and images with random damage.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;

use super::*;
use crate::create_qcow2;

fn new_image(size: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    let copy = file.try_clone().expect("a descriptor");
    create_qcow2(copy, size, None).expect("made");
    file
}

fn open(file: &File) -> Result<Qcow2Disk, DiskError> {
    Qcow2Disk::open(file.try_clone().expect("a descriptor"), Vec::new(), false)
}

fn patched(offset: u64, bytes: &[u8]) -> DiskError {
    let file = new_image(64 << 20);
    file.write_all_at(bytes, offset).expect("patched");
    open(&file).expect_err("refused")
}

#[test]
fn headers_with_absurd_sizes_are_refused_before_allocating() {
    for (offset, bytes, why) in [
        (4, &9_u32.to_be_bytes()[..], "version"),
        (20, &21_u32.to_be_bytes(), "cluster size"),
        (20, &8_u32.to_be_bytes(), "cluster size"),
        (20, &u32::MAX.to_be_bytes(), "cluster size"),
        (24, &u64::MAX.to_be_bytes(), "disk size"),
        (24, &0_u64.to_be_bytes(), "disk size"),
        (24, &(1_u64 << 45).to_be_bytes(), "L1 table"),
        (36, &u32::MAX.to_be_bytes(), "L1 table"),
        (36, &0_u32.to_be_bytes(), "L1 table"),
        (40, &u64::MAX.to_be_bytes(), "L1 table"),
        (40, &(1_u64 << 40).to_be_bytes(), "L1 table"),
        (48, &(1_u64 << 40).to_be_bytes(), "refcount table"),
        (56, &u32::MAX.to_be_bytes(), "refcount table"),
        (32, &1_u32.to_be_bytes(), "encrypted"),
        (72, &(1_u64 << 4).to_be_bytes(), "extended"),
        (72, &(1_u64 << 60).to_be_bytes(), "not known"),
        (72, &2_u64.to_be_bytes(), "marked corrupt"),
        (100, &u32::MAX.to_be_bytes(), "header length"),
        (8, &u64::MAX.to_be_bytes(), "backing file name"),
    ] {
        let error = patched(offset, bytes).to_string();
        assert!(error.contains(why), "{offset}: {error}");
    }
}

/// A small generator, so that each run sees the same damage.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

// Whatever is damaged, requests end, with data or an error, and nothing panics.
#[test]
fn damaged_images_give_errors_or_data_but_never_a_panic() {
    let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
    let slice = || {
        [ram.memory()
            .get_slice(GuestAddress(0), 64 << 10)
            .expect("ram")]
    };
    let mut random = Random(0x5eed);
    let mut opened = 0;
    for _ in 0..300 {
        let file = new_image(16 << 20);
        if let Ok(disk) = open(&file) {
            disk.write(&slice(), 0).expect("a whole image");
            disk.write(&slice(), 8 << 20).expect("a whole image");
            disk.flush().expect("a whole image");
        }
        let len = file.metadata().expect("a file").len();
        for _ in 0..1 + random.next() % 6 {
            // The tables are in the first clusters: that is where damage is interesting.
            let cluster = random.next() % 8 * 65_536;
            let offset = (cluster + random.next() % 64) % len;
            let byte = random.next().to_le_bytes()[0];
            file.write_all_at(&[byte], offset).expect("patched");
        }
        let Ok(disk) = open(&file) else { continue };
        opened += 1;
        for offset in [0, 1 << 20, 8 << 20, (16 << 20) - (64 << 10)] {
            let _ = disk.read(&slice(), offset);
            let _ = disk.write(&slice(), offset);
            let _ = disk.discard(offset, 64 << 10);
        }
        let _ = disk.flush();
    }
    assert!(opened > 50, "most damage must reach the tables: {opened}");
}
