//! Linux's zero page (`struct boot_params`) and setup data.
//!
//! Spec: Documentation/arch/x86/zero-page.rst and boot.rst, protocol 2.15.

use ringfence_memory::GuestRam;

use crate::LoadError;
use crate::bzimage::HEADER_START;
use crate::load::Placed;
use crate::memory_map::MemoryMapEntry;
use crate::place;
use crate::start::write;

const ZERO_PAGE_BYTES: usize = 4096;

const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const CMDLINE_SIZE: usize = 0x238;
const SETUP_DATA: usize = 0x250;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;
const E820_MAX: usize = 128;

const PROTOCOL_2_15: u16 = 0x020f;
/// "0xFF: assigned to nobody": no loader with a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1 << 0;
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: u32 = 32;

/// Fields of the zero page, by offset.
struct ZeroPage([u8; ZERO_PAGE_BYTES]);

impl ZeroPage {
    fn put<const N: usize>(&mut self, offset: usize, value: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&value);
    }
}

/// Writes the zero page and the setup data.
///
/// `header` is the bzImage's setup header. An ELF image has none: the fields that the kernel
/// proper reads are filled in as a loader would.
pub(crate) fn write_zero_page(
    ram: &GuestRam,
    header: Option<&[u8]>,
    placed: &Placed,
    rng_seed: &[u8; 32],
) -> Result<(), LoadError> {
    let mut page = ZeroPage([0; ZERO_PAGE_BYTES]);
    if let Some(header) = header {
        page.0[HEADER_START..HEADER_START + header.len()].copy_from_slice(header);
    } else {
        page.put(BOOT_FLAG, 0xaa55_u16.to_le_bytes());
        page.put(HEADER_MAGIC, *b"HdrS");
        page.put(VERSION, PROTOCOL_2_15.to_le_bytes());
        page.put(CMDLINE_SIZE, placed.cmdline_limit.to_le_bytes());
    }
    page.put(TYPE_OF_LOADER, [LOADER_UNDEFINED]);
    page.put(LOADFLAGS, [LOADED_HIGH]);
    page.put(ACPI_RSDP_ADDR, placed.rsdp.unwrap_or(0).to_le_bytes());
    page.put(CMD_LINE_PTR, low_address(place::COMMAND_LINE));
    page.put(SETUP_DATA, place::SETUP_DATA.to_le_bytes());
    if let Some((start, len)) = placed.initramfs {
        page.put(RAMDISK_IMAGE, low_address(start));
        page.put(RAMDISK_SIZE, low_address(len));
    }
    put_memory_map(&mut page, &placed.map);
    write(ram, "the zero page", place::ZERO_PAGE, &page.0)?;
    write_rng_seed(ram, rng_seed)
}

/// Addresses and sizes below 4 GiB, as the fields of 32 bits hold them.
fn low_address(value: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = value.to_le_bytes();
    [a, b, c, d]
}

fn put_memory_map(page: &mut ZeroPage, map: &[MemoryMapEntry]) {
    let count = map.len().min(E820_MAX);
    page.put(E820_ENTRIES, [u8::try_from(count).unwrap_or(u8::MAX)]);
    for (i, entry) in map.iter().take(count).enumerate() {
        let at = E820_TABLE + i * E820_ENTRY_BYTES;
        page.put(at, entry.start.to_le_bytes());
        page.put(at + 8, entry.len_bytes.to_le_bytes());
        page.put(at + 16, (entry.kind as u32).to_le_bytes());
    }
}

/// One `struct setup_data` with no successor. Linux mixes the seed into its pool and wipes it.
fn write_rng_seed(ram: &GuestRam, seed: &[u8; 32]) -> Result<(), LoadError> {
    let mut data = Vec::new();
    data.extend_from_slice(&0_u64.to_le_bytes());
    data.extend_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    data.extend_from_slice(&SEED_BYTES.to_le_bytes());
    data.extend_from_slice(seed);
    write(ram, "the random seed", place::SETUP_DATA, &data)
}
