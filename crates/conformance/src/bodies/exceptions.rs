//! Exceptions: vectors, error codes, frames and stacks (SDM 3A §6).

use crate::prelude::*;

/// Division by zero and overflow are #DE, at the instruction.
pub fn division_faults_are_de(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(DE), fault(DE)], |a| {
        a.xor(edx, edx)?;
        a.mov(eax, 1)?;
        a.xor(ecx, ecx)?;
        a.faulting(|a| a.div(ecx))?;
        a.mov(edx, 5)?;
        a.mov(ecx, 5)?;
        a.faulting(|a| a.div(ecx))?;
        a.report(rax)?;
        a.report(rdx)
    });
    assert_eq!(values, [1, 5], "the registers are untouched");
}

/// UD2 and an encoding without meaning are #UD, and RIP is that of the instruction.
pub fn undefined_opcodes_are_ud(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(UD), fault(UD), fault(UD)], |a| {
        let mut here = a.create_label();
        a.lea(rax, ptr(here))?;
        a.report(rax)?;
        a.faulting(|a| {
            a.set_label(&mut here)?;
            a.ud2()
        })?;
        // PUSH ES has no 64-bit form; a lock prefix needs a memory destination.
        a.faulting(|a| a.db(&[0x06]))?;
        a.faulting(|a| a.db(&[0xf0, 0x01, 0xc0]))
    });
    assert_eq!(guest.faults()[0].rip, values[0]);
}

/// INT3 is #BP behind the instruction.
pub fn int3_is_a_trap(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(BP)], |a| {
        let mut behind = a.create_label();
        a.lea(rax, ptr(behind))?;
        a.report(rax)?;
        a.faulting(|a| {
            a.int3()?;
            a.set_label(&mut behind)?;
            a.nop()
        })
    });
    assert_eq!(guest.faults()[0].rip, values[0]);
}

/// INT n from ring 3 needs a gate that allows it: else #GP with the gate's number (§6.12.1.2).
pub fn software_interrupts_check_the_gates_privilege(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault_with(GP, 0x42 << 3 | 2), fault(BP)], |a| {
        a.enter_user()?;
        a.faulting(|a| a.int(0x42))?;
        a.faulting(|a| a.int3())?;
        a.user_done()
    });
    assert_eq!(guest.interrupt_count(0x42), 0);
}

/// INT n through an interrupt gate clears IF, through a trap gate keeps it.
pub fn gates_clear_or_keep_if(bench: &Bench<'_>) {
    const IF: u64 = 1 << 9;
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut handler = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut handler)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.iretq()?;
        a.set_label(&mut start)?;
        for kind in [0x8e, 0x8f] {
            a.lea(rax, ptr(handler))?;
            install_gate(a, 0x90, kind)?;
            a.sti()?;
            a.int(0x90)?;
            a.cli()?;
            a.report(rbx)?;
        }
        Ok(())
    });
    assert_eq!(values[0] & IF, 0, "interrupt gate");
    assert_eq!(values[1] & IF, IF, "trap gate");
}

/// Writes a gate of `kind` for the handler in RAX (below 64 KiB × 64 KiB) through RCX and RDX.
fn install_gate(a: &mut Asm, vector: u64, kind: u64) -> Assembled {
    a.mov(rdx, layout::IDT + vector * 16)?;
    a.mov(word_ptr(rdx), ax)?;
    a.mov(word_ptr(rdx + 2), i32::from(layout::KERNEL_CODE))?;
    a.mov(word_ptr(rdx + 4), i32::try_from(kind << 8).unwrap())?;
    a.mov(rcx, rax)?;
    a.shr(rcx, 16)?;
    a.mov(word_ptr(rdx + 6), cx)?;
    a.mov(qword_ptr(rdx + 8), 0)
}

/// The vector past the IDT's limit is #GP with that vector's number.
pub fn vectors_past_the_idt_limit_are_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault_with(GP, 0x70 << 3 | 2)], |a| {
        a.mov(rbx, layout::FRAMES)?;
        a.mov(word_ptr(rbx), 0x70 * 16 - 1)?;
        a.mov(qword_ptr(rbx + 2), i32::try_from(layout::IDT).unwrap())?;
        a.lidt(ptr(rbx))?;
        a.faulting(|a| a.int(0x70))?;
        a.mov(word_ptr(rbx), 0xfff)?;
        a.lidt(ptr(rbx))
    });
}

/// A gate that isn't present is #NP with its number.
pub fn absent_gates_are_np(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.set_gate(0x71, layout::KERNEL_CODE, 0, 0x0e);
    guest.run_expecting(&[fault_with(NP, 0x71 << 3 | 2)], |a| {
        a.faulting(|a| a.int(0x71))
    });
}

/// A gate of another kind is #GP; one whose code segment is absent, #NP with that selector.
pub fn bad_gates_fault_with_what_is_bad(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.set_gate(0x72, layout::KERNEL_CODE, 0, 0x80);
    guest.set_gate(0x73, layout::ABSENT_CODE, 0, 0x8e);
    guest.set_gate(0x74, layout::KERNEL_DATA, 0, 0x8e);
    guest.set_gate(0x75, 0, 0, 0x8e);
    guest.run_expecting(
        &[
            fault_with(GP, 0x72 << 3 | 2),
            fault_with(NP, u64::from(layout::ABSENT_CODE)),
            fault_with(GP, u64::from(layout::KERNEL_DATA)),
            fault(GP),
        ],
        |a| {
            for vector in [0x72, 0x73, 0x74, 0x75] {
                a.faulting(|a| a.int(vector))?;
            }
            Ok(())
        },
    );
}

/// The frame holds SS, RSP, RFLAGS, CS and RIP as they were, on a stack aligned to 16 bytes.
pub fn the_frame_is_whole_and_aligned(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(UD)], |a| {
        a.sub(rsp, 8)?;
        a.stc()?;
        a.faulting(|a| a.ud2())?;
        a.add(rsp, 8)
    });
    let frame = guest.faults()[0];
    assert_eq!(frame.ss, u64::from(layout::KERNEL_DATA));
    assert_eq!(frame.cs, u64::from(layout::KERNEL_CODE));
    assert_eq!(frame.rsp, layout::STACK - 8, "RSP as it was, not aligned");
    assert_eq!(frame.rflags & 1, 1, "CF");
    assert_eq!(
        frame.rflags & 1 << 16,
        1 << 16,
        "RF is set for a fault (§17.3.1.1)"
    );
    assert_eq!(
        frame.handler_rsp,
        frame.rsp & !0xf,
        "the frame ends at an aligned address"
    );
}

/// A fault in ring 3 loads RSP0 and a null SS, and IRET goes back.
pub fn a_fault_in_user_mode_changes_stacks(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(UD)], |a| {
        a.enter_user()?;
        a.push(rax)?;
        a.faulting(|a| a.ud2())?;
        a.report_segments()?;
        a.report(rsp)?;
        a.user_done()
    });
    let frame = guest.faults()[0];
    assert_eq!(frame.ss, u64::from(layout::USER_DATA));
    assert_eq!(frame.cs, u64::from(layout::USER_CODE));
    assert_eq!(frame.rsp, layout::USER_STACK - 8);
    assert_eq!(frame.handler_rsp, layout::RSP0);
    assert_eq!(
        values,
        [
            u64::from(layout::USER_CODE),
            u64::from(layout::USER_DATA),
            layout::USER_STACK - 8
        ]
    );
}

/// A gate with an IST entry changes the stack without a change of ring (§6.14.5).
pub fn an_ist_gate_changes_the_stack_always(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.set_gate(UD, layout::KERNEL_CODE, 1, 0x8e);
    guest.set_gate(BP, layout::KERNEL_CODE, 2, 0xee);
    guest.run_expecting(&[fault(UD), fault(BP)], |a| {
        a.faulting(|a| a.ud2())?;
        a.enter_user()?;
        a.faulting(|a| a.int3())?;
        a.user_done()
    });
    let frames = guest.faults();
    assert_eq!(frames[0].handler_rsp, layout::IST1);
    assert_eq!(frames[0].rsp, layout::STACK);
    assert_eq!(frames[1].handler_rsp, layout::IST2);
}

/// A fault whose stack can't be written is a double fault, which an IST stack survives.
pub fn a_fault_on_a_bad_stack_is_a_double_fault(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.set_gate(DF, layout::KERNEL_CODE, 1, 0x8e);
    let values = guest.run_expecting(&[fault(DF)], |a| {
        a.mov(rbx, rsp)?;
        a.faulting(|a| {
            a.mov(rsp, layout::TEST + 0x8000)?;
            a.ud2()
        })?;
        a.mov(rsp, rbx)?;
        a.mov(rax, cr2)?;
        a.report(rax)
    });
    assert_eq!(
        values,
        [layout::TEST + 0x8000 - 8],
        "CR2 is the push that failed"
    );
}

/// A contributory fault while delivering one is a double fault; a benign one is not (table 6-5).
pub fn two_contributory_faults_are_a_double_fault(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.set_gate(DE, 0, 0, 0x8e);
    guest.set_gate(UD, 0, 0, 0x8e);
    // The second #GP comes while an earlier exception is delivered: EXT is set.
    guest.run_expecting(&[fault(DF), fault_with(GP, 1)], |a| {
        a.xor(ecx, ecx)?;
        // #DE meets #GP (a null selector in its gate): both contributory.
        a.faulting(|a| a.div(ecx))?;
        // #UD is benign, so the #GP comes alone.
        a.faulting(|a| a.ud2())
    });
}

/// #AC for an unaligned access in ring 3 with CR0.AM and RFLAGS.AC; never in ring 0.
pub fn alignment_checks_are_for_user_code(bench: &Bench<'_>) {
    const FLAG_AC: i32 = 1 << 18;
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault_with(AC, 0)], |a| {
        a.change_cr0(0, paging::CR0_AM)?;
        a.push(FLAG_AC | 2)?;
        a.popfq()?;
        let scratch = a.shared(layout::SCRATCH);
        a.mov(eax, dword_ptr(scratch + 1))?;
        a.enter_user_with(FLAG_AC | 2)?;
        a.mov(eax, dword_ptr(layout::SCRATCH + 4))?;
        a.faulting(|a| a.mov(eax, dword_ptr(layout::SCRATCH + 1)))?;
        a.user_done()
    });
}

/// CR0.TS makes x87 and SSE instructions #NM until CLTS; WAIT needs MP too.
pub fn task_switched_makes_vector_code_nm(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(NM), fault(NM), fault(NM)], |a| {
        a.change_cr0(0, paging::CR0_TS | paging::CR0_MP)?;
        a.faulting(|a| a.fld1())?;
        a.faulting(|a| a.pxor(xmm0, xmm0))?;
        a.faulting(|a| a.wait())?;
        a.clts()?;
        a.pxor(xmm0, xmm0)?;
        a.fld1()
    });
}

/// CR0.EM makes x87 instructions #NM and SSE ones #UD.
pub fn emulation_bit_makes_vector_code_fault(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(NM), fault(UD)], |a| {
        a.change_cr0(paging::CR0_TS, paging::CR0_EM)?;
        a.faulting(|a| a.fld1())?;
        a.faulting(|a| a.pxor(xmm0, xmm0))?;
        a.change_cr0(paging::CR0_EM, 0)
    });
}

/// An unmasked x87 exception is #MF at the next x87 instruction.
pub fn x87_errors_come_at_the_next_x87_instruction(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(MF)], |a| {
        let scratch = a.shared(layout::SCRATCH);
        a.fninit()?;
        // Unmask division by zero.
        a.mov(word_ptr(scratch), 0x37b)?;
        a.fldcw(word_ptr(scratch))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.mov(eax, 1)?;
        a.report(rax)?;
        a.faulting(|a| a.fld1())?;
        a.fnstsw(ax)?;
        a.and(eax, 0x84)?;
        a.report(rax)?;
        a.fninit()
    });
    assert_eq!(values, [1, 0x84], "ZE and ES");
}

/// An unmasked x87 exception is #MF at WAIT.
pub fn x87_errors_come_at_wait(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(MF)], |a| {
        let scratch = a.shared(layout::SCRATCH);
        a.fninit()?;
        a.mov(word_ptr(scratch), 0x37b)?;
        a.fldcw(word_ptr(scratch))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.faulting(|a| a.wait())?;
        a.fninit()
    });
}

/// An unmasked SSE exception is #XM, at the instruction.
pub fn sse_errors_are_xm(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(XM)], |a| {
        let scratch = a.shared(layout::SCRATCH);
        a.mov(dword_ptr(scratch), 0x1d80)?;
        a.ldmxcsr(dword_ptr(scratch))?;
        a.mov(eax, 1)?;
        a.cvtsi2sd(xmm0, eax)?;
        a.pxor(xmm1, xmm1)?;
        a.faulting(|a| a.divsd(xmm0, xmm1))?;
        a.stmxcsr(dword_ptr(scratch))?;
        a.mov(eax, dword_ptr(scratch))?;
        a.and(eax, 0x3f)?;
        a.report(rax)?;
        a.mov(dword_ptr(scratch), 0x1f80)?;
        a.ldmxcsr(dword_ptr(scratch))
    });
    assert_eq!(values, [4], "ZE");
}

/// RFLAGS.TF traps behind each instruction, with BS in DR6.
pub fn the_trap_flag_traps_behind_each_instruction(bench: &Bench<'_>) {
    const TF: i32 = 1 << 8;
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(DB), fault(DB), fault(DB)], |a| {
        a.log_traps()?;
        a.push(2)?;
        a.push(TF | 2)?;
        a.popfq()?;
        a.nop()?;
        a.nop()?;
        a.popfq()?;
        a.mov(rax, dr6)?;
        a.report(rax)
    });
    assert_eq!(values[0] & 1 << 14, 1 << 14, "BS");
    let places: Vec<u64> = guest.faults().iter().map(|fault| fault.rip).collect();
    assert_eq!(places[1] - places[0], 1);
    assert_eq!(places[2] - places[1], 1);
}

/// INT1 (ICEBP) is #DB.
pub fn int1_is_db(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(DB)], |a| a.faulting(|a| a.db(&[0xf1])));
}

/// Non-canonical data addresses are #GP, by the stack #SS.
pub fn non_canonical_addresses_are_gp_or_ss(bench: &Bench<'_>) {
    const HOLE: u64 = 0x0000_8000_0000_0000;
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP), fault(GP), fault(SS)], |a| {
        a.mov(rbx, HOLE)?;
        a.mov(rbp, HOLE)?;
        a.faulting(|a| a.mov(rax, qword_ptr(rbx)))?;
        a.faulting(|a| a.mov(qword_ptr(rbx), rax))?;
        a.faulting(|a| a.mov(rax, qword_ptr(rbp)))
    });
}

/// A jump to a non-canonical address is #GP.
pub fn jumps_to_non_canonical_addresses_are_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.mov(rbx, 0x0000_9000_0000_0000_u64)?;
        a.mov(rbp, rsp)?;
        a.faulting(|a| a.jmp(rbx))?;
        a.faulting(|a| {
            a.push(rbx)?;
            a.ret()
        })?;
        a.mov(rsp, rbp)
    });
}

/// A call whose target lies where it pushes goes to that target, also to an absent one.
pub fn a_call_reads_its_target_before_it_pushes(bench: &Bench<'_>) {
    const ABSENT: u64 = 0xffff_ffff_ffff_ff61;
    let mut guest = Guest::new(bench);
    let faults = [page_fault(ABSENT, PF_U | PF_I)];
    let values = guest.run_expecting(&faults, |a| {
        let mut here = a.create_label();
        a.enter_user()?;
        a.user_address(here)?;
        a.mov(qword_ptr(rsp - 8), r15)?;
        a.call(qword_ptr(rsp - 8))?;
        a.ud2()?;
        a.set_label(&mut here)?;
        a.mov(eax, 7)?;
        a.report(rax)?;
        a.mov(rax, ABSENT)?;
        a.mov(qword_ptr(rsp - 8), rax)?;
        a.faulting(|a| a.call(qword_ptr(rsp - 8)))?;
        a.user_done()
    });
    assert_eq!(values, [7]);
    assert_eq!(guest.faults()[0].rip, ABSENT);
}
