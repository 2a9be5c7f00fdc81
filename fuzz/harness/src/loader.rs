//! Kernel images.

use std::fs::File;
use std::io::Write;

use ringfence_loader::BootProtocol;
use ringfence_loader::BootSetup;
use ringfence_loader::Kernel;
use ringfence_loader::Loaded;
use ringfence_loader::load;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;

use crate::script::Input;

const RAM_BYTES: u64 = 32 << 20;
/// Where the whole kernel lies, and its length.
const START: u64 = 0x100_0000;
const LEN: u16 = 4096;

/// A payload in each compression that a kernel's build knows.
const PAYLOADS: [&[u8]; 7] = [
    include_bytes!("../../../crates/loader/vectors/payload.gzip"),
    include_bytes!("../../../crates/loader/vectors/payload.bzip2"),
    include_bytes!("../../../crates/loader/vectors/payload.lzma"),
    include_bytes!("../../../crates/loader/vectors/payload.xz"),
    include_bytes!("../../../crates/loader/vectors/payload.lzo"),
    include_bytes!("../../../crates/loader/vectors/payload.lz4"),
    include_bytes!("../../../crates/loader/vectors/payload.zstd"),
];

/// An ELF image of one segment, with a note that names a PVH entry point.
fn elf() -> Vec<u8> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect();
    let program = |kind: u8, at: u64, address: u64, len: u64| -> Vec<u8> {
        let fields: Vec<u8> = words(&[at, address, address, len, len, 4]);
        [vec![kind, 0, 0, 0, 7, 0, 0, 0], fields].concat()
    };
    let note: Vec<u8> = [
        &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..],
        b"Xen\0",
        &[0, 0, 0, 1],
    ]
    .concat();
    let magic = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let kind: Vec<u8> = halves(&[2, 62, 1, 0]);
    let places: Vec<u8> = words(&[START, 64, 0]);
    let sizes: Vec<u8> = halves(&[0, 0, 64, 56, 2, 0, 0, 0]);
    let content = 64 + 2 * 56;
    let segment = program(1, content, START, u64::from(LEN));
    let notes = program(4, content + u64::from(LEN), 0, note.len() as u64);
    let code = vec![0xf4; usize::from(LEN)];
    [magic, kind, places, sizes, segment, notes, code, note].concat()
}

/// Setup code of one sector with a header of protocol 2.15, and a payload.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &[1, 0, 0xff, 7]);
    put(0x24c, &(payload.len() as u64).to_le_bytes()[..4]);
    image.extend_from_slice(payload);
    image
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(plain).expect("memory");
    encoder.finish().expect("memory")
}

/// An image before it is damaged.
fn whole(input: &mut Input<'_>) -> Vec<u8> {
    match usize::from(input.u8()) % (PAYLOADS.len() + 6) {
        at if at < PAYLOADS.len() => bzimage(PAYLOADS[at]),
        at if at < PAYLOADS.len() + 3 => elf(),
        _ => {
            // Damage inside survives the checksum.
            let mut inner = elf();
            damage(&mut inner, input);
            bzimage(&gzip(&inner))
        }
    }
}

fn damage(image: &mut Vec<u8>, input: &mut Input<'_>) {
    for _ in 0..input.below(10) {
        // Most of what is read lies at the start: headers, and those of the payload.
        let span = if input.u8().is_multiple_of(4) {
            image.len()
        } else {
            image.len().min(1100)
        };
        let at = input.below(0x1_0000) % span;
        let bytes = input.bytes(8);
        let end = (at + bytes.len()).min(image.len());
        image[at..end].copy_from_slice(&bytes[..end - at]);
    }
    if input.u8().is_multiple_of(8) {
        image.truncate(1 + input.below(0x1_0000) % image.len());
    }
}

fn initramfs(len: usize) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&vec![0x5a; len]).expect("written");
    file
}

/// Damages a kernel in a few places, then opens and places it. Oracle: no panic, and what was
/// placed lies in RAM, in order.
///
/// # Panics
/// When an oracle fails.
pub fn kernel(data: &[u8]) {
    let mut input = Input::new(data);
    let mut image = whole(&mut input);
    damage(&mut image, &mut input);
    let Ok(kernel) = Kernel::from_bytes(image) else {
        return;
    };
    let ram = GuestRam::new(RAM_BYTES, HugePages::Off).expect("ram");
    let protocol = match input.u8() % 3 {
        0 => None,
        1 => Some(BootProtocol::Linux64),
        _ => Some(BootProtocol::Pvh),
    };
    let cmdline = "x".repeat(input.below(3000));
    let setup = BootSetup {
        kernel,
        protocol,
        initramfs: input
            .u8()
            .is_multiple_of(2)
            .then(|| initramfs(input.below(0x1_0000))),
        cmdline: &cmdline,
        rsdp: None,
        reserved: &[],
        rng_seed: [7; 32],
    };
    if let Ok(loaded) = load(&ram, setup) {
        check(&loaded);
    }
}

fn check(loaded: &Loaded) {
    assert!(loaded.kernel_end <= RAM_BYTES, "{loaded:?}");
    if let Some((start, len)) = loaded.initramfs {
        assert!(start >= loaded.kernel_end, "{loaded:?}");
        assert!(start + len <= RAM_BYTES, "{loaded:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_images_are_kernels() {
        for image in [elf(), bzimage(&gzip(&elf()))] {
            let kernel = Kernel::from_bytes(image).expect("a kernel");
            let ram = GuestRam::new(RAM_BYTES, HugePages::Off).expect("ram");
            let setup = BootSetup {
                kernel,
                protocol: Some(BootProtocol::Pvh),
                initramfs: Some(initramfs(5000)),
                cmdline: "quiet",
                rsdp: None,
                reserved: &[],
                rng_seed: [7; 32],
            };
            let loaded = load(&ram, setup).expect("placed");
            assert_eq!(loaded.kernel_end, START + u64::from(LEN));
            check(&loaded);
        }
    }
}
