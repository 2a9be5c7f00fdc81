//! Where the boot structures lie in the first MiB.
//!
//! The kernel copies what it needs before it reuses this memory: the zero page and the command
//! line early in `x86_64_start_kernel`, setup data and the initramfs after reserving them.

/// Global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// PVH start info, with the module list and memory map after it.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
/// Linux's zero page (`struct boot_params`).
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Top of a small stack, for kernels that expect one.
pub(crate) const STACK_TOP: u64 = 0x8ff0;
/// Page tables: one PML4, one PDPT, four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The list of setup data.
pub(crate) const SETUP_DATA: u64 = 0x1_0000;
/// Command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes that a command line may have here, without its final zero.
pub(crate) const COMMAND_LINE_MAX: usize = 0xffff;

/// First address past conventional memory; a PC keeps its extended BIOS data area above.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where the board's ACPI tables go; the root pointer is their first (ACPI 6.5 §5.2.5.1 has it
/// searched for from here).
pub const ACPI_START: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_LEN_BYTES: u64 = 0x2_0000;
/// First address past the area for structures: kernels load above.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
