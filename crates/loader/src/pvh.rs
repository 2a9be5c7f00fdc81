//! PVH's start info: what the kernel finds behind EBX.
//!
//! Spec: xen/include/public/arch-x86/hvm/start_info.h, version 1.

use ringfence_memory::GuestRam;

use crate::LoadError;
use crate::load::Placed;
use crate::place;
use crate::start::write;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const START_INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;

/// Writes the start info, its one module (the initramfs) and the memory map behind it.
pub(crate) fn write_start_info(ram: &GuestRam, placed: &Placed) -> Result<(), LoadError> {
    let modules = place::PVH_START_INFO + START_INFO_BYTES;
    let map = modules + MODULE_BYTES;
    let entries = u32::try_from(placed.map.len()).unwrap_or(u32::MAX);
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&0_u32.to_le_bytes()); // flags
    out.extend_from_slice(&u32::from(placed.initramfs.is_some()).to_le_bytes());
    out.extend_from_slice(&modules.to_le_bytes());
    out.extend_from_slice(&place::COMMAND_LINE.to_le_bytes());
    out.extend_from_slice(&placed.rsdp.unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&map.to_le_bytes());
    out.extend_from_slice(&entries.to_le_bytes());
    out.extend_from_slice(&0_u32.to_le_bytes());
    let (start, len) = placed.initramfs.unwrap_or_default();
    for field in [start, len, 0, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    for entry in &placed.map {
        out.extend_from_slice(&entry.start.to_le_bytes());
        out.extend_from_slice(&entry.len_bytes.to_le_bytes());
        out.extend_from_slice(&(entry.kind as u32).to_le_bytes());
        out.extend_from_slice(&0_u32.to_le_bytes());
    }
    write(ram, "the PVH start info", place::PVH_START_INFO, &out)
}
