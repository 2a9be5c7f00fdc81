//! How a further processor gets from its SIPI to 64-bit code.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_x86::msr;
use ringfence_x86::paging::*;

use crate::layout;

/// Offsets in the trampoline's page.
const GDT_POINTER: u64 = 0x100;
const IDT_POINTER: u64 = 0x110;
const PROTECTED: u64 = 0x200;
const LONG: u64 = 0x400;

fn low(value: u64) -> u32 {
    u32::try_from(value).expect("a low address")
}

/// Writes the trampoline.
pub(crate) fn write(ram: &GuestRam) -> Result<(), IcedError> {
    let put = |offset: u64, bytes: &[u8]| {
        let at = GuestAddress(layout::TRAMPOLINE + offset);
        ram.memory().write_slice(bytes, at).expect("test memory");
    };
    put(0, &real_mode()?);
    put(PROTECTED, &protected_mode()?);
    put(LONG, &long_mode()?);
    put(GDT_POINTER, &layout::GDT_LIMIT.to_le_bytes());
    put(GDT_POINTER + 2, &layout::GDT.to_le_bytes());
    put(IDT_POINTER, &0xfff_u16.to_le_bytes());
    put(IDT_POINTER + 2, &layout::IDT.to_le_bytes());
    Ok(())
}

/// CS is the page, so offsets count from it.
fn real_mode() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.mov(ax, cs)?;
    a.mov(ds, ax)?;
    // A 32-bit operand loads the base whole.
    a.db(&[0x66])?;
    a.lgdt(ptr(GDT_POINTER))?;
    a.mov(eax, cr0)?;
    a.or(eax, 1)?;
    a.mov(cr0, eax)?;
    far_jump(
        &mut a,
        &[0x66, 0xea],
        layout::TRAMPOLINE + PROTECTED,
        layout::KERNEL_CODE32,
    )?;
    a.assemble(0)
}

fn protected_mode() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    a.mov(eax, i32::from(layout::KERNEL_DATA))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(ss, eax)?;
    a.mov(eax, low(CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT))?;
    a.mov(cr4, eax)?;
    a.mov(eax, low(layout::PML4))?;
    a.mov(cr3, eax)?;
    a.mov(ecx, msr::EFER)?;
    a.mov(eax, low(EFER_LME | EFER_NXE | EFER_SCE))?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.mov(
        eax,
        low(CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG),
    )?;
    a.mov(cr0, eax)?;
    far_jump(
        &mut a,
        &[0xea],
        layout::TRAMPOLINE + LONG,
        layout::KERNEL_CODE,
    )?;
    a.assemble(layout::TRAMPOLINE + PROTECTED)
}

/// There is one further processor at a time here: number 1.
fn long_mode() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.mov(rsp, layout::STACK - layout::STACK_STRIDE)?;
    a.lidt(ptr(layout::TRAMPOLINE + IDT_POINTER))?;
    // A restarted processor's task segment is busy from its first start.
    let task = layout::GDT + u64::from(layout::TASK) + 16;
    a.and(byte_ptr(task + 5), -3)?;
    a.mov(eax, i32::from(layout::TASK + 16))?;
    a.ltr(ax)?;
    a.jmp(qword_ptr(layout::supervisor(layout::AP_ENTRY)))?;
    a.assemble(layout::TRAMPOLINE + LONG)
}

/// The assembler has no far jumps to constants.
fn far_jump(
    a: &mut CodeAssembler,
    opcode: &[u8],
    target: u64,
    selector: u16,
) -> Result<(), IcedError> {
    a.db(opcode)?;
    a.dd(&[low(target)])?;
    a.dw(&[selector])
}
