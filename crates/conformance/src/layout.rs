//! Where everything lies in a test guest. Virtual equals physical below 1 GiB.
//!
//! | virtual | maps | access |
//! |---|---|---|
//! | 0 | nothing | |
//! | 4 KiB to 1 GiB | itself | supervisor, writable, executable ([`SHARED`] is the user's too) |
//! | [`USER`], 1 GiB long | 0 to 1 GiB | user, writable, executable |
//! | [`TEST`], 2 MiB long | nothing, by 4 KiB pages | a body's own: see `Guest::map` |
//! | 3 GiB to 4 GiB | itself | supervisor: devices |
//! | [`HIGH`], 1 GiB long | 4 GiB to 5 GiB | supervisor: RAM above the hole |

/// Bytes of RAM of a test guest.
pub const RAM_BYTES: u64 = 16 << 20;

/// The global descriptor table.
pub const GDT: u64 = 0x1000;
/// The interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// The first processor's task state segment; the next processor's follow at [`TSS_STRIDE`].
pub const TSS: u64 = 0x3000;
/// Distance of one task state segment from the next.
pub const TSS_STRIDE: u64 = 0x100;
/// A page that user and supervisor code may read and write: results and what handlers obey.
pub const SHARED: u64 = 0x4000;
/// The same page, for the supervisor alone (for code under SMAP).
pub const SHARED_SUPERVISOR: u64 = 0xb000;
/// Where the exception handler continues: 0 nowhere (the fault is unexpected), 1 where it came from.
pub const RESUME: u64 = SHARED;
/// How an interrupt handler ends the interrupt: see [`Eoi`].
pub const EOI_MODE: u64 = SHARED + 0x8;
/// Where the application processors' trampoline jumps to.
pub const AP_ENTRY: u64 = SHARED + 0x10;
/// Free for bodies: eight quadwords.
pub const SCRATCH: u64 = SHARED + 0x40;
/// Reported values, [`MAX_VALUES`] quadwords.
pub const VALUES: u64 = SHARED + 0x800;
/// How many values a guest may report.
pub const MAX_VALUES: usize = 0x100;
/// The exception log: a count, then [`MAX_FAULTS`] entries of eight quadwords from offset 64 on.
pub const FAULT_LOG: u64 = 0x5000;
/// How many exceptions are logged.
pub const MAX_FAULTS: u64 = 50;
/// The interrupt log: a count, then vectors as quadwords from offset 8 on (the last 255).
pub const IRQ_LOG: u64 = 0x6000;
/// How often each vector came, 256 quadwords.
pub const IRQ_COUNTS: u64 = 0x7000;
/// The application processors' real-mode entry: SIPI vector 8.
pub const TRAMPOLINE: u64 = 0x8000;
/// The handlers' code.
pub const HANDLERS: u64 = 0x1_0000;
/// Page tables.
pub const PML4: u64 = 0x2_0000;
/// Third-level table.
pub const PDPT: u64 = 0x2_1000;
/// First GiB, identity.
pub const PD_LOW: u64 = 0x2_2000;
/// First 2 MiB, by 4 KiB pages.
pub const PT_LOW: u64 = 0x2_3000;
/// The user's GiB.
pub const PD_USER: u64 = 0x2_4000;
/// The test area's directory.
pub const PD_TEST: u64 = 0x2_5000;
/// The test area's first 2 MiB.
pub const PT_TEST: u64 = 0x2_6000;
/// The devices' GiB.
pub const PD_DEVICES: u64 = 0x2_7000;
/// RAM above 4 GiB.
pub const PD_HIGH: u64 = 0x2_8000;
/// Free for a body's own page tables, up to [`CODE`].
pub const SPARE_TABLES: u64 = 0x3_0000;
/// A body's code.
pub const CODE: u64 = 0x10_0000;
/// The first processor's stack, downwards; the next processor's lie at [`STACK_STRIDE`].
pub const STACK: u64 = 0x18_0000;
/// Distance of one processor's stack from the next.
pub const STACK_STRIDE: u64 = 0x1000;
/// The stack that a change to ring 0 loads.
pub const RSP0: u64 = 0x1a_0000;
/// The first interrupt stack.
pub const IST1: u64 = 0x1c_0000;
/// The second interrupt stack.
pub const IST2: u64 = 0x1d_0000;
/// The user's stack, as the user sees it.
pub const USER_STACK: u64 = USER + 0x1e_0000;
/// Frames for bodies: from 3 MiB on.
pub const FRAMES: u64 = 0x30_0000;

/// The user's view of the first GiB.
pub const USER: u64 = 0x4000_0000;
/// The area that bodies map.
pub const TEST: u64 = 0x8000_0000;
/// Where RAM above the hole is mapped (physical 4 GiB on).
pub const HIGH: u64 = 0x1_0000_0000;
/// A free place for a device.
pub const DEVICE: u64 = 0xd000_0000;
/// The local APIC's page.
pub const LAPIC: u64 = 0xfee0_0000;

/// Ring 0 code, 64-bit.
pub const KERNEL_CODE: u16 = 0x08;
/// Ring 0 data.
pub const KERNEL_DATA: u16 = 0x10;
/// Ring 3 code, 32-bit (where SYSRET to compatibility mode goes). The selectors of user code are
/// those of Linux.
pub const USER_CODE32: u16 = 0x20 | 3;
/// Ring 3 data.
pub const USER_DATA: u16 = 0x28 | 3;
/// Ring 3 code, 64-bit.
pub const USER_CODE: u16 = 0x30 | 3;
/// The task state segments: 0x40, 0x50, 0x60, 0x70 for processors 0 to 3.
pub const TASK: u16 = 0x40;
/// Ring 0 code, 32-bit.
pub const KERNEL_CODE32: u16 = 0x80;
/// Ring 0 code, 16-bit.
pub const KERNEL_CODE16: u16 = 0x88;
/// Ring 0 data, 16-bit.
pub const KERNEL_DATA16: u16 = 0x90;
/// A data segment that is not present.
pub const ABSENT_DATA: u16 = 0x98;
/// A code segment that is not present.
pub const ABSENT_CODE: u16 = 0xa0;
/// Ring 0 data, read only.
pub const READ_ONLY_DATA: u16 = 0xa8;
/// Free for bodies: 0xb0 to 0xf8.
pub const SPARE_SELECTOR: u16 = 0xb0;
/// The last byte of the GDT.
pub const GDT_LIMIT: u16 = 0xff;

/// Writing here ends a guest that has interrupts.
pub const DONE_PORT: u16 = 0xf5;
/// The interrupt by which user code ends the guest.
pub const DONE_VECTOR: u8 = 0x80;

/// The supervisor's address of something in [`SHARED`].
#[must_use]
pub const fn supervisor(address: u64) -> u64 {
    address - SHARED + SHARED_SUPERVISOR
}

/// How the interrupt handlers end an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Eoi {
    /// Not at all: the body does.
    None = 0,
    /// By the xAPIC's page.
    Xapic = 1,
    /// By the x2APIC's MSR.
    X2apic = 2,
}
