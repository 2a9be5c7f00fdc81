//! The test guest's exception and interrupt handlers.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::asm::Asm;
use crate::asm::Assembled;
use crate::fault::NMI;
use crate::fault::WITH_ERROR_CODE;
use crate::layout;

/// First vector that isn't an exception.
const FIRST_INTERRUPT: u8 = 0x20;
/// One stub's place.
const STUB_BYTES: u64 = 16;
/// Behind the stubs.
const COMMON: u64 = layout::HANDLERS + 256 * STUB_BYTES;

/// Address of the handler of `vector`.
pub(crate) fn handler(vector: u8) -> u64 {
    layout::HANDLERS + u64::from(vector) * STUB_BYTES
}

/// The code for [`layout::HANDLERS`].
pub(crate) fn assemble(has_chips: bool) -> Result<Vec<u8>, IcedError> {
    let mut common = Asm::new(64, has_chips)?;
    let exception = common_exception(&mut common)?;
    let interrupt = common_interrupt(&mut common)?;
    let mut done = common.create_label();
    common.set_label(&mut done)?;
    common.done()?;
    let result = common.assemble_options(
        COMMON,
        iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS,
    )?;
    let target = [
        result.label_ip(&exception)?,
        result.label_ip(&interrupt)?,
        result.label_ip(&done)?,
    ];
    let mut code = Vec::new();
    for vector in 0..=u8::MAX {
        let mut stub = stub(vector, target)?;
        // Padding that shows up at once when it is run.
        stub.resize(usize::try_from(STUB_BYTES).unwrap_or_default(), 0xcc);
        code.extend(stub);
    }
    code.extend(result.inner.code_buffer);
    Ok(code)
}

fn stub(vector: u8, [exception, interrupt, done]: [u64; 3]) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    if vector == layout::DONE_VECTOR {
        a.jmp(done)?;
    } else if vector >= FIRST_INTERRUPT || vector == NMI {
        a.push(i32::from(vector))?;
        a.jmp(interrupt)?;
    } else {
        if !WITH_ERROR_CODE.contains(&vector) {
            a.push(0)?;
        }
        a.push(i32::from(vector))?;
        a.jmp(exception)?;
    }
    a.assemble(handler(vector))
}

/// Stack at entry: vector, error, RIP, CS, RFLAGS, RSP, SS.
fn common_exception(a: &mut Asm) -> Result<CodeLabel, IcedError> {
    const SAVED: i32 = 3 * 8;
    let mut start = a.create_label();
    let mut unexpected = a.create_label();
    let mut leave = a.create_label();
    a.set_label(&mut start)?;
    a.push(rax)?;
    a.push(rbx)?;
    a.push(rcx)?;
    log_fault(a, SAVED)?;
    a.mov(rax, qword_ptr(layout::supervisor(layout::RESUME)))?;
    a.test(rax, rax)?;
    a.jz(unexpected)?;
    a.cmp(rax, 1)?;
    a.je(leave)?;
    a.mov(qword_ptr(rsp + (SAVED + 16)), rax)?;
    a.mov(qword_ptr(layout::supervisor(layout::RESUME)), 0)?;
    // A way on must not trap at once again.
    a.btr(qword_ptr(rsp + (SAVED + 32)), 8)?;
    a.set_label(&mut leave)?;
    a.pop(rcx)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(&mut unexpected)?;
    a.done()?;
    Ok(start)
}

/// Appends to the fault log; what isn't room for is lost (and missed by the body).
fn log_fault(a: &mut Asm, saved: i32) -> Assembled {
    let mut full = a.create_label();
    a.mov(ebx, 1)?;
    a.lock().xadd(qword_ptr(layout::FAULT_LOG), rbx)?;
    a.cmp(rbx, i32::try_from(layout::MAX_FAULTS).unwrap_or(0))?;
    a.jae(full)?;
    a.imul_3(rbx, rbx, 72)?;
    a.add(rbx, i32::try_from(layout::FAULT_LOG + 64).unwrap_or(0))?;
    for index in 0..7 {
        a.mov(rcx, qword_ptr(rsp + (saved + 8 * index)))?;
        a.mov(qword_ptr(rbx + 8 * index), rcx)?;
    }
    a.mov(rcx, cr2)?;
    a.mov(qword_ptr(rbx + 56), rcx)?;
    a.lea(rcx, ptr(rsp + (saved + 56)))?;
    a.mov(qword_ptr(rbx + 64), rcx)?;
    a.set_label(&mut full)
}

/// Stack at entry: vector, RIP and so on.
fn common_interrupt(a: &mut Asm) -> Result<CodeLabel, IcedError> {
    let mut start = a.create_label();
    let mut x2apic = a.create_label();
    let mut leave = a.create_label();
    a.set_label(&mut start)?;
    a.push(rax)?;
    a.push(rcx)?;
    a.push(rdx)?;
    a.mov(rcx, qword_ptr(rsp + 24))?;
    a.mov(eax, 1)?;
    a.lock().xadd(qword_ptr(layout::IRQ_LOG), rax)?;
    a.movzx(eax, al)?;
    a.mov(qword_ptr(rax * 8 + (layout::IRQ_LOG + 8)), rcx)?;
    // Counted last: bodies wait for the count and then read the log.
    a.lock().inc(qword_ptr(rcx * 8 + layout::IRQ_COUNTS))?;
    // An NMI has no end-of-interrupt.
    a.cmp(rcx, i32::from(NMI))?;
    a.je(leave)?;
    a.mov(rax, qword_ptr(layout::supervisor(layout::EOI_MODE)))?;
    a.cmp(rax, 1)?;
    a.jb(leave)?;
    a.ja(x2apic)?;
    a.mov(eax, 0xfee0_00b0_u32)?;
    a.mov(dword_ptr(rax), 0)?;
    a.jmp(leave)?;
    a.set_label(&mut x2apic)?;
    a.write_msr(0x80b, 0)?;
    a.set_label(&mut leave)?;
    a.pop(rdx)?;
    a.pop(rcx)?;
    a.pop(rax)?;
    a.add(rsp, 8)?;
    a.iretq()?;
    Ok(start)
}
