//! The test guest's descriptor tables, page tables and first state.

use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_x86::paging::*;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::CS;
use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;
use ringfence_x86::state::RSP;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::handlers;
use crate::layout::*;

const TABLE: u64 = PTE_P | PTE_W | PTE_U;
const LARGE: u64 = 2 << 20;
/// How many task state segments (and processors) there are.
pub(crate) const PROCESSORS: u16 = 4;

/// Writes a quadword of guest memory.
pub(crate) fn poke(ram: &GuestRam, address: u64, value: u64) {
    ram.memory()
        .write_obj(value, GuestAddress(address))
        .expect("test memory");
}

fn entry(table: u64, index: u64) -> u64 {
    table + index * 8
}

/// Page tables as in the layout's table.
pub(crate) fn write_pages(ram: &GuestRam) {
    for (table, index, value) in [
        (PML4, 0, PDPT | TABLE),
        (PDPT, 0, PD_LOW | TABLE),
        (PDPT, 1, PD_USER | TABLE),
        (PDPT, 2, PD_TEST | TABLE),
        (PDPT, 3, PD_DEVICES | TABLE),
        (PDPT, 4, PD_HIGH | TABLE),
        (PD_LOW, 0, PT_LOW | TABLE),
        (PD_TEST, 0, PT_TEST | TABLE),
    ] {
        poke(ram, entry(table, index), value);
    }
    for index in 0..512 {
        let at = index * LARGE;
        let large = PTE_P | PTE_W | PTE_PS;
        if index > 0 {
            poke(ram, entry(PD_LOW, index), at | large);
        }
        poke(ram, entry(PD_USER, index), at | large | PTE_U);
        poke(ram, entry(PD_DEVICES, index), (at + 0xc000_0000) | large);
        poke(ram, entry(PD_HIGH, index), (at + HIGH) | large);
        let page = index * 0x1000;
        let flags = match page {
            0 => 0,
            SHARED => PTE_P | PTE_W | PTE_U,
            _ => PTE_P | PTE_W,
        };
        poke(ram, entry(PT_LOW, index), page | flags);
    }
    let alias = SHARED_SUPERVISOR / 0x1000;
    poke(ram, entry(PT_LOW, alias), SHARED | PTE_P | PTE_W);
}

/// The GDT and the task state segments.
pub(crate) fn write_segments(ram: &GuestRam) {
    for (selector, descriptor) in [
        (KERNEL_CODE, 0x00af_9b00_0000_ffff),
        (KERNEL_DATA, 0x00cf_9300_0000_ffff),
        (USER_CODE32, 0x00cf_fb00_0000_ffff),
        (USER_DATA, 0x00cf_f300_0000_ffff),
        (USER_CODE, 0x00af_fb00_0000_ffff),
        (KERNEL_CODE32, 0x00cf_9b00_0000_ffff),
        (KERNEL_CODE16, 0x0000_9b00_0000_ffff),
        (KERNEL_DATA16, 0x0000_9300_0000_ffff),
        (ABSENT_DATA, 0x00cf_1300_0000_ffff),
        (ABSENT_CODE, 0x00af_1b00_0000_ffff),
        (READ_ONLY_DATA, 0x00cf_9100_0000_ffff),
    ] {
        poke(ram, GDT + u64::from(selector & !7), descriptor);
    }
    for processor in 0..PROCESSORS {
        let base = TSS + u64::from(processor) * TSS_STRIDE;
        let [low, high] = task_descriptor(base, 0x67);
        let at = GDT + u64::from(TASK + processor * 16);
        poke(ram, at, low);
        poke(ram, at + 8, high);
        // The stacks are quadwords at offset 4 (SDM 3A figure 9-11).
        let stack = |top: u64| top - u64::from(processor) * STACK_STRIDE;
        poke(ram, base + 4, stack(RSP0));
        poke(ram, base + 0x24, stack(IST1));
        poke(ram, base + 0x2c, stack(IST2));
        // The I/O permission map lies behind the limit: no port is open.
        ram.memory()
            .write_obj(0x68_u16, GuestAddress(base + 0x66))
            .expect("test memory");
    }
}

/// A 64-bit task state segment's descriptor, available (SDM 3A §9.2.3).
pub(crate) fn task_descriptor(base: u64, limit: u64) -> [u64; 2] {
    let low = limit & 0xffff
        | (base & 0xff_ffff) << 16
        | 0x89 << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56;
    [low, base >> 32]
}

/// The two quadwords of a gate of `kind` (0x8e interrupt, 0x8f trap; SDM 3A figure 6-8).
pub(crate) fn gate(handler: u64, selector: u16, ist: u64, kind: u64) -> [u64; 2] {
    let low = handler & 0xffff
        | u64::from(selector) << 16
        | ist << 32
        | kind << 40
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// The IDT: interrupt gates; user code may raise breakpoints, overflows and the end.
pub(crate) fn write_gates(ram: &GuestRam) {
    for vector in 0..=u8::MAX {
        let kind = if matches!(vector, 3 | 4 | DONE_VECTOR) {
            0xee
        } else {
            0x8e
        };
        let [low, high] = gate(handlers::handler(vector), KERNEL_CODE, 0, kind);
        let at = IDT + u64::from(vector) * 16;
        poke(ram, at, low);
        poke(ram, at + 8, high);
    }
}

fn flat(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    }
}

/// Leaves out of a state what setting it shall not touch.
pub(crate) fn only_registers(state: &mut VcpuState) {
    state.msrs.clear();
    state.xsave.clear();
    state.lapic.clear();
}

/// Turns a state at [`CODE`] into ring 3 at the user's view of it.
pub(crate) fn user_mode(state: &mut VcpuState) {
    only_registers(state);
    state.sregs.segments = [flat(USER_DATA, 0xc0f3); 6];
    state.sregs.segments[CS] = flat(USER_CODE, 0xa0fb);
    state.regs.rip |= USER;
    state.regs.gpr[RSP] = USER_STACK;
}

/// Turns a reset state into 64-bit mode in ring 0 at [`CODE`].
pub(crate) fn long_mode(state: &mut VcpuState) {
    only_registers(state);
    let sregs = &mut state.sregs;
    sregs.segments = [flat(KERNEL_DATA, 0xc093); 6];
    sregs.segments[CS] = flat(KERNEL_CODE, 0xa09b);
    sregs.segments[FS] = flat(0, 0xc093);
    sregs.segments[GS] = flat(0, 0xc093);
    sregs.tr = Segment {
        selector: TASK,
        base: TSS,
        limit: 0x67,
        access: 0x8b,
    };
    sregs.ldtr = Segment {
        access: ACCESS_UNUSABLE,
        ..Segment::default()
    };
    sregs.gdt = DescriptorTable {
        base: GDT,
        limit: GDT_LIMIT,
    };
    sregs.idt = DescriptorTable {
        base: IDT,
        limit: 0xfff,
    };
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    sregs.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    state.regs.rip = CODE;
    state.regs.rflags = 2;
    state.regs.gpr = [0; 16];
    state.regs.gpr[RSP] = STACK;
}
