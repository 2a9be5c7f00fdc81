//! The first vCPU's state at the kernel's entry point, and the tables that it needs in memory.
//!
//! Spec: boot.rst "64-bit Boot Protocol"; Xen's docs/misc/pvh.pandoc; SDM 3A §3.4.5 (segment
//! descriptors), §4.5 (4-level paging).

use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_x86::paging::CR0_ET;
use ringfence_x86::paging::CR0_NE;
use ringfence_x86::paging::CR0_PE;
use ringfence_x86::paging::CR0_PG;
use ringfence_x86::paging::CR4_PAE;
use ringfence_x86::paging::EFER_LMA;
use ringfence_x86::paging::EFER_LME;
use ringfence_x86::paging::PTE_P;
use ringfence_x86::paging::PTE_PS;
use ringfence_x86::paging::PTE_W;
use ringfence_x86::state::ACCESS_DB;
use ringfence_x86::state::ACCESS_G;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::ACCESS_P;
use ringfence_x86::state::ACCESS_S;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::CS;
use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::RBX;
use ringfence_x86::state::RSI;
use ringfence_x86::state::RSP;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::LoadError;
use crate::place;

/// Selectors that boot.rst prescribes: `__BOOT_CS` and `__BOOT_DS`; the task follows.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TR: u16 = 0x20;

/// Segment types (SDM 3A §3.4.5.1, §3.5): code execute/read and data read/write, both accessed;
/// a busy 32/64-bit task state segment.
const TYPE_CODE: u32 = 0xb;
const TYPE_DATA: u32 = 0x3;
const TYPE_BUSY_TSS: u32 = 0xb;
const TSS_LIMIT: u32 = 0x67;
/// Six entries of eight bytes.
const GDT_LIMIT: u16 = 6 * 8 - 1;

/// Page directories to map all of the first 4 GiB.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = 4096;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// FCW and MXCSR after INIT and their places in the XSAVE area (SDM 1 §13.4.1, §8.1.5, §11.6.4).
const XSAVE_LEGACY_BYTES: usize = 576;
const FCW: (usize, u16) = (0, 0x37f);
const MXCSR: (usize, u32) = (24, 0x1f80);

/// The state for Linux's 64-bit entry, its zero page at [`place::ZERO_PAGE`].
pub(crate) fn linux64(ram: &GuestRam, entry: u64) -> Result<VcpuState, LoadError> {
    let code = flat(BOOT_CS, TYPE_CODE, ACCESS_L | ACCESS_G);
    let mut state = with_segments(ram, code)?;
    write_page_tables(ram)?;
    state.sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_PG;
    state.sregs.cr3 = place::PAGE_TABLES;
    state.sregs.cr4 = CR4_PAE;
    state.sregs.efer = EFER_LME | EFER_LMA;
    state.regs.rip = entry;
    state.regs.gpr[RSI] = place::ZERO_PAGE;
    state.regs.gpr[RSP] = place::STACK_TOP;
    Ok(state)
}

/// The state for a PVH entry, its start info at [`place::PVH_START_INFO`].
pub(crate) fn pvh(ram: &GuestRam, entry: u32) -> Result<VcpuState, LoadError> {
    let code = flat(BOOT_CS, TYPE_CODE, ACCESS_DB | ACCESS_G);
    let mut state = with_segments(ram, code)?;
    state.sregs.cr0 = CR0_PE | CR0_ET;
    state.regs.rip = u64::from(entry);
    state.regs.gpr[RBX] = place::PVH_START_INFO;
    Ok(state)
}

fn flat(selector: u16, kind: u32, size: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: kind | ACCESS_S | ACCESS_P | size,
    }
}

fn with_segments(ram: &GuestRam, code: Segment) -> Result<VcpuState, LoadError> {
    let data = flat(BOOT_DS, TYPE_DATA, ACCESS_DB | ACCESS_G);
    let task = Segment {
        selector: BOOT_TR,
        base: 0,
        limit: TSS_LIMIT,
        access: TYPE_BUSY_TSS | ACCESS_P,
    };
    // Null, unused, code, data, and a 16-byte task descriptor whose upper half is zero.
    let entries = [
        0,
        0,
        descriptor(code),
        descriptor(data),
        descriptor(task),
        0,
    ];
    let gdt = table(entries.into_iter());
    write(ram, "the descriptor table", place::GDT, &gdt)?;

    let mut state = VcpuState {
        xsave: initial_xsave(),
        ..VcpuState::default()
    };
    state.sregs.segments = [data; 6];
    state.sregs.segments[CS] = code;
    state.sregs.tr = task;
    state.sregs.ldtr.access = ACCESS_UNUSABLE;
    state.sregs.gdt = DescriptorTable {
        base: place::GDT,
        limit: GDT_LIMIT,
    };
    Ok(state)
}

/// A descriptor as it lies in memory (SDM 3A §3.4.5, figure 3-8).
fn descriptor(segment: Segment) -> u64 {
    let limit = if segment.access & ACCESS_G != 0 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let (base, limit, access) = (
        segment.base,
        u64::from(limit),
        u64::from(segment.access & 0xf0ff),
    );
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}

/// Maps the first 4 GiB to themselves by 2 MiB pages, which every 64-bit processor has.
fn write_page_tables(ram: &GuestRam) -> Result<(), LoadError> {
    let pdpt = place::PAGE_TABLES + TABLE_BYTES;
    let directories = pdpt + TABLE_BYTES;
    let top = table([pdpt].into_iter().map(|next| next | PTE_P | PTE_W));
    let second = table((0..DIRECTORIES).map(|i| (directories + i * TABLE_BYTES) | PTE_P | PTE_W));
    let pages = (0..DIRECTORIES * ENTRIES).map(|i| (i * LARGE_PAGE_BYTES) | PTE_P | PTE_W | PTE_PS);
    write(ram, "the page tables", place::PAGE_TABLES, &top)?;
    write(ram, "the page tables", pdpt, &second)?;
    write(ram, "the page tables", directories, &table(pages))
}

fn table(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    entries.flat_map(u64::to_le_bytes).collect()
}

fn initial_xsave() -> Vec<u8> {
    let mut area = vec![0; XSAVE_LEGACY_BYTES];
    area[FCW.0..FCW.0 + 2].copy_from_slice(&FCW.1.to_le_bytes());
    area[MXCSR.0..MXCSR.0 + 4].copy_from_slice(&MXCSR.1.to_le_bytes());
    area
}

/// Writes a boot structure.
pub(crate) fn write(
    ram: &GuestRam,
    what: &'static str,
    start: u64,
    bytes: &[u8],
) -> Result<(), LoadError> {
    ram.memory()
        .write_slice(bytes, GuestAddress(start))
        .map_err(|source| LoadError::Place { what, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_ones_that_linux_itself_uses() {
        // arch/x86/boot/compressed/head_64.S: __KERNEL_CS 0x00af9a…, __KERNEL_DS 0x00cf92…, here
        // with the accessed bit, which the processor would set.
        let code = flat(BOOT_CS, TYPE_CODE, ACCESS_L | ACCESS_G);
        let data = flat(BOOT_DS, TYPE_DATA, ACCESS_DB | ACCESS_G);
        assert_eq!(descriptor(code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(data), 0x00cf_9300_0000_ffff);
    }
}
