//! The guest's ring 0: starts each case and keeps the record of how it ended.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::layout::PAGE;
use crate::state::MAX_CASES;
use crate::state::State;

/// Where physical memory from 0 on lies in the kernel's half: displacements reach it.
pub(crate) const KERNEL: u64 = 0xffff_ffff_8000_0000;
/// Physical addresses.
pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
pub(crate) const VARIABLES: u64 = 0x4000;
pub(crate) const STUBS: u64 = 0x5000;
pub(crate) const STUB_BYTES: u64 = 16;
pub(crate) const MAIN: u64 = 0x7000;
pub(crate) const KERNEL_STACK: u64 = 0xf000;
pub(crate) const DEMAND_TABLE: u64 = 0xf000;
pub(crate) const TABLES: u64 = 0x1_0000;
pub(crate) const INPUTS: u64 = 0x10_0000;
pub(crate) const OUTPUTS: u64 = 0x18_0000;
pub(crate) const ARENA: u64 = 0x20_0000;
pub(crate) const RAM_BYTES: u64 = 4 << 20;

/// Variables: how many cases, and whether pages appear on demand.
pub(crate) const COUNT: u64 = VARIABLES;
pub(crate) const DEMAND: u64 = VARIABLES + 8;
const LEFT: u64 = VARIABLES + 16;
const INPUT: u64 = VARIABLES + 24;
const OUTPUT: u64 = VARIABLES + 32;
const SAVED: u64 = VARIABLES + 40;

/// Selectors as Linux has them, since cases see them.
pub(crate) const KERNEL_CODE: u64 = 0x10;
pub(crate) const KERNEL_DATA: u64 = 0x18;
pub(crate) const USER_DATA: u64 = 0x2b;
pub(crate) const USER_CODE: u64 = 0x33;
pub(crate) const TASK: u16 = 0x40;

const STATE_BYTES: i32 = 1024;
const _: () = assert!(size_of::<State>() == 1024);
const RSP_AT: i32 = 32;
const RIP_AT: i32 = 128;
const FLAGS_AT: i32 = 136;
const FS_AT: i32 = 144;
const GS_AT: i32 = 152;
const TRAP_AT: i32 = 160;
const ERROR_AT: i32 = 168;
const CR2_AT: i32 = 176;
const XSAVE_AT: i32 = 192;
/// Bytes of an entry of the demand table: page number, entry, its address.
pub(crate) const DEMAND_BYTES: u64 = 24;

const _: () = assert!(INPUTS + (MAX_CASES * size_of::<State>()) as u64 <= OUTPUTS);
const _: () = assert!(OUTPUTS + (MAX_CASES * size_of::<State>()) as u64 <= ARENA);
const _: () = assert!(DEMAND_TABLE + PAGE <= TABLES);

/// An operand in the kernel's half.
fn at(physical: u64) -> AsmMemoryOperand {
    qword_ptr(KERNEL + physical)
}

/// Exceptions with an error code.
fn has_error(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// The entry of each vector.
pub(crate) fn stub(vector: u64) -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    if !has_error(vector) {
        asm.push(0_i32)?;
    }
    asm.push(i32::try_from(vector).unwrap_or(0))?;
    asm.jmp(KERNEL + MAIN)?;
    asm.assemble(KERNEL + STUBS + vector * STUB_BYTES)
}

/// Registers in encoding order but for RAX, RBX and RSP.
const OTHERS: [(AsmRegister64, i32); 13] = [
    (rcx, 1),
    (rdx, 2),
    (rbp, 5),
    (rsi, 6),
    (rdi, 7),
    (r8, 8),
    (r9, 9),
    (r10, 10),
    (r11, 11),
    (r12, 12),
    (r13, 13),
    (r14, 14),
    (r15, 15),
];

/// The common handler at [`MAIN`], and the address to start a batch at.
pub(crate) fn main(pages: usize) -> Result<(Vec<u8>, u64), IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    let mut start = asm.create_label();
    let mut capture = asm.create_label();
    let mut launch = asm.create_label();
    let mut finish = asm.create_label();
    asm.mov(at(SAVED), rax)?;
    asm.cmp(qword_ptr(rsp), 14)?;
    asm.jne(capture)?;
    asm.cmp(at(DEMAND), 0)?;
    asm.je(capture)?;
    supply(&mut asm, pages, capture)?;
    asm.set_label(&mut capture)?;
    record(&mut asm)?;
    asm.add(at(OUTPUT), STATE_BYTES)?;
    asm.add(at(INPUT), STATE_BYTES)?;
    asm.dec(at(LEFT))?;
    asm.jz(finish)?;
    asm.set_label(&mut launch)?;
    withdraw(&mut asm, pages)?;
    begin(&mut asm)?;
    asm.set_label(&mut finish)?;
    asm.hlt()?;
    asm.set_label(&mut start)?;
    asm.mov(rax, at(COUNT))?;
    asm.test(rax, rax)?;
    asm.jz(finish)?;
    asm.mov(at(LEFT), rax)?;
    asm.mov(rax, KERNEL + INPUTS)?;
    asm.mov(at(INPUT), rax)?;
    asm.mov(rax, KERNEL + OUTPUTS)?;
    asm.mov(at(OUTPUT), rax)?;
    asm.jmp(launch)?;
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = asm.assemble_options(KERNEL + MAIN, options)?;
    let entry = result.label_ip(&start)?;
    Ok((result.inner.code_buffer, entry))
}

/// A page fault on a page that is only withdrawn: supplies it and returns to the case.
fn supply(asm: &mut CodeAssembler, pages: usize, capture: CodeLabel) -> Result<(), IcedError> {
    let mut next = asm.create_label();
    let mut found = asm.create_label();
    let mut give_up = asm.create_label();
    asm.mov(at(SAVED + 8), rcx)?;
    asm.mov(at(SAVED + 16), rdx)?;
    asm.mov(rax, cr2)?;
    asm.shr(rax, 12)?;
    asm.mov(rcx, KERNEL + DEMAND_TABLE)?;
    asm.mov(edx, u32::try_from(pages).unwrap_or(0))?;
    asm.set_label(&mut next)?;
    asm.cmp(qword_ptr(rcx), rax)?;
    asm.je(found)?;
    asm.add(rcx, i32::try_from(DEMAND_BYTES).unwrap_or(0))?;
    asm.dec(edx)?;
    asm.jnz(next)?;
    asm.jmp(give_up)?;
    asm.set_label(&mut found)?;
    asm.mov(rax, qword_ptr(rcx + 8))?;
    asm.mov(rdx, qword_ptr(rcx + 16))?;
    asm.test(byte_ptr(rdx), 1)?;
    asm.jnz(give_up)?;
    asm.mov(qword_ptr(rdx), rax)?;
    asm.mov(rcx, at(SAVED + 8))?;
    asm.mov(rdx, at(SAVED + 16))?;
    asm.mov(rax, at(SAVED))?;
    asm.add(rsp, 16)?;
    asm.iretq()?;
    asm.set_label(&mut give_up)?;
    asm.mov(rcx, at(SAVED + 8))?;
    asm.mov(rdx, at(SAVED + 16))?;
    asm.jmp(capture)
}

/// Writes the record of the case that ended.
fn record(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.mov(rax, at(OUTPUT))?;
    for (register, index) in OTHERS {
        asm.mov(qword_ptr(rax + 8 * index), register)?;
    }
    asm.mov(qword_ptr(rax + 24), rbx)?;
    asm.mov(rbx, rax)?;
    asm.mov(rcx, at(SAVED))?;
    asm.mov(qword_ptr(rbx), rcx)?;
    for (from, to) in [
        (0, TRAP_AT),
        (8, ERROR_AT),
        (16, RIP_AT),
        (32, FLAGS_AT),
        (40, RSP_AT),
    ] {
        asm.mov(rcx, qword_ptr(rsp + from))?;
        asm.mov(qword_ptr(rbx + to), rcx)?;
    }
    asm.rdfsbase(rcx)?;
    asm.mov(qword_ptr(rbx + FS_AT), rcx)?;
    asm.rdgsbase(rcx)?;
    asm.mov(qword_ptr(rbx + GS_AT), rcx)?;
    asm.mov(rcx, cr2)?;
    asm.mov(qword_ptr(rbx + CR2_AT), rcx)?;
    asm.mov(eax, 7)?;
    asm.xor(edx, edx)?;
    asm.xsave64(ptr(rbx + XSAVE_AT))
}

/// Takes all pages away when they are to appear on demand.
fn withdraw(asm: &mut CodeAssembler, pages: usize) -> Result<(), IcedError> {
    let mut next = asm.create_label();
    let mut done = asm.create_label();
    asm.cmp(at(DEMAND), 0)?;
    asm.je(done)?;
    asm.mov(rcx, KERNEL + DEMAND_TABLE)?;
    asm.mov(edx, u32::try_from(pages).unwrap_or(0))?;
    asm.set_label(&mut next)?;
    asm.mov(rax, qword_ptr(rcx + 16))?;
    asm.mov(qword_ptr(rax), 0)?;
    asm.add(rcx, i32::try_from(DEMAND_BYTES).unwrap_or(0))?;
    asm.dec(edx)?;
    asm.jnz(next)?;
    asm.mov(rax, cr3)?;
    asm.mov(cr3, rax)?;
    asm.set_label(&mut done)?;
    asm.nop()
}

/// Starts the next case.
fn begin(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    asm.mov(rbx, at(INPUT))?;
    asm.mov(eax, 7)?;
    asm.xor(edx, edx)?;
    asm.xrstor64(ptr(rbx + XSAVE_AT))?;
    asm.mov(rcx, qword_ptr(rbx + FS_AT))?;
    asm.wrfsbase(rcx)?;
    asm.mov(rcx, qword_ptr(rbx + GS_AT))?;
    asm.wrgsbase(rcx)?;
    asm.mov(rsp, KERNEL + KERNEL_STACK)?;
    asm.push(i32::try_from(USER_DATA).unwrap_or(0))?;
    asm.push(qword_ptr(rbx + RSP_AT))?;
    asm.push(qword_ptr(rbx + FLAGS_AT))?;
    asm.push(i32::try_from(USER_CODE).unwrap_or(0))?;
    asm.push(qword_ptr(rbx + RIP_AT))?;
    for (register, index) in OTHERS {
        asm.mov(register, qword_ptr(rbx + 8 * index))?;
    }
    asm.mov(rax, qword_ptr(rbx))?;
    asm.mov(rbx, qword_ptr(rbx + 24))?;
    asm.iretq()
}
