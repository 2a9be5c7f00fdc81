//! Segments, descriptor tables and the task register (SDM 3A §3.4, §5, §8).

use crate::prelude::*;

const SPARE: u64 = layout::GDT + layout::SPARE_SELECTOR as u64;

/// Loading a data segment sets its accessed bit.
pub fn loading_a_segment_sets_accessed(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(SPARE, 0x00cf_9200_0000_ffff);
    guest.run(|a| {
        a.mov(eax, i32::from(layout::SPARE_SELECTOR))?;
        a.mov(es, eax)
    });
    assert_eq!(guest.peek(SPARE) >> 40 & 0xff, 0x93);
}

/// Selectors that can't be loaded fault with the selector (RPL cleared).
pub fn bad_selectors_fault_with_the_selector(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(
        &[
            fault_with(GP, 0x1f8),
            fault_with(NP, u64::from(layout::ABSENT_DATA)),
            fault_with(GP, u64::from(layout::TASK)),
            fault_with(SS, u64::from(layout::ABSENT_DATA)),
            fault_with(GP, u64::from(layout::READ_ONLY_DATA)),
            fault_with(GP, 0x0c),
        ],
        |a| {
            for selector in [0x1f8, layout::ABSENT_DATA, layout::TASK] {
                a.mov(eax, i32::from(selector))?;
                a.faulting(|a| a.mov(ds, eax))?;
            }
            for selector in [layout::ABSENT_DATA, layout::READ_ONLY_DATA] {
                a.mov(eax, i32::from(selector))?;
                a.faulting(|a| a.mov(ss, eax))?;
            }
            // A local table that isn't there.
            a.mov(eax, 0x0c)?;
            a.faulting(|a| a.mov(es, eax))
        },
    );
}

/// Null selectors load into data segments; into SS in ring 0 of 64-bit mode; never into CS.
pub fn null_selectors_load_where_they_may(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP)], |a| {
        a.mov(eax, 3)?;
        for segment in [ds, es, fs, gs] {
            a.mov(segment, eax)?;
        }
        a.mov(rax, ds)?;
        a.report(rax)?;
        a.xor(eax, eax)?;
        a.mov(ss, eax)?;
        a.push(rax)?;
        a.pop(rax)?;
        a.mov(eax, i32::from(layout::KERNEL_DATA))?;
        a.mov(ss, eax)?;
        a.enter_user()?;
        a.xor(eax, eax)?;
        a.faulting(|a| a.mov(ss, eax))?;
        a.user_done()
    });
    assert_eq!(values, [3]);
}

/// MOV to CS is #UD; a far return changes it.
pub fn cs_changes_by_far_return_alone(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(SPARE, 0x00af_9b00_0000_ffff);
    let values = guest.run_expecting(&[fault(UD)], |a| {
        a.faulting(|a| a.db(&[0x8e, 0xc8]))?;
        let mut next = a.create_label();
        a.push(i32::from(layout::SPARE_SELECTOR))?;
        a.lea(rax, ptr(next))?;
        a.push(rax)?;
        a.far_return()?;
        a.set_label(&mut next)?;
        a.mov(rax, cs)?;
        a.report(rax)?;
        let mut back = a.create_label();
        a.push(i32::from(layout::KERNEL_CODE))?;
        a.lea(rax, ptr(back))?;
        a.push(rax)?;
        a.far_return()?;
        a.set_label(&mut back)
    });
    assert_eq!(values, [u64::from(layout::SPARE_SELECTOR)]);
}

/// A far return to ring 3 pops the stack too.
pub fn a_far_return_enters_ring_3(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut user = a.create_label();
        a.push(i32::from(layout::USER_DATA))?;
        a.mov(r15, layout::USER_STACK - 64)?;
        a.push(r15)?;
        a.push(i32::from(layout::USER_CODE))?;
        a.user_address(user)?;
        a.push(r15)?;
        a.far_return()?;
        a.ring3();
        a.set_label(&mut user)?;
        a.report_segments()?;
        a.report(rsp)?;
        a.user_done()
    });
    assert_eq!(
        values,
        [
            u64::from(layout::USER_CODE),
            u64::from(layout::USER_DATA),
            layout::USER_STACK - 64
        ]
    );
}

/// SGDT and SIDT store what LGDT and LIDT loaded.
pub fn descriptor_tables_come_back(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.sgdt(ptr(rbx))?;
        a.sidt(ptr(rbx + 16))?;
        for offset in [0, 16] {
            a.movzx(eax, word_ptr(rbx + offset))?;
            a.report(rax)?;
            a.mov(rax, qword_ptr(rbx + (offset + 2)))?;
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(
        values,
        [
            u64::from(layout::GDT_LIMIT),
            layout::GDT,
            0xfff,
            layout::IDT
        ]
    );
}

/// LGDT and LIDT with a non-canonical base are #GP.
pub fn non_canonical_table_bases_are_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, 0x0000_0000_0000_ffff);
    guest.poke(layout::FRAMES + 2, 0x0000_8000_0000_0000);
    guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.mov(rbx, layout::FRAMES)?;
        a.faulting(|a| a.lgdt(ptr(rbx)))?;
        a.faulting(|a| a.lidt(ptr(rbx)))
    });
}

/// LTR makes an available task segment busy, and refuses a busy or a wrong one.
pub fn ltr_makes_the_task_segment_busy(bench: &Bench<'_>) {
    const SECOND: u16 = layout::TASK + 16;
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(
        &[
            fault_with(GP, u64::from(SECOND)),
            fault_with(GP, u64::from(layout::KERNEL_DATA)),
        ],
        |a| {
            a.mov(eax, i32::from(SECOND))?;
            a.ltr(ax)?;
            a.str(ecx)?;
            a.report(rcx)?;
            a.faulting(|a| a.ltr(ax))?;
            a.mov(eax, i32::from(layout::KERNEL_DATA))?;
            a.faulting(|a| a.ltr(ax))
        },
    );
    assert_eq!(values, [u64::from(SECOND)]);
    assert_eq!(
        guest.peek(layout::GDT + u64::from(SECOND)) >> 40 & 0xff,
        0x8b
    );
}

/// LTR refuses the null selector.
pub fn ltr_refuses_the_null_selector(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.xor(eax, eax)?;
        a.faulting(|a| a.ltr(ax))
    });
}

/// A local descriptor table serves selectors with the TI bit.
pub fn local_descriptors_are_found(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    // An LDT of two descriptors at FRAMES.
    guest.poke(SPARE, 0x0000_8230_0000_000f);
    guest.poke(SPARE + 8, 0);
    guest.poke(layout::FRAMES + 8, 0x00cf_9300_0000_ffff);
    let values = guest.run_expecting(&[fault_with(GP, 0x14)], |a| {
        a.mov(eax, i32::from(layout::SPARE_SELECTOR))?;
        a.lldt(ax)?;
        a.sldt(ecx)?;
        a.report(rcx)?;
        a.mov(eax, 0x0c)?;
        a.mov(es, eax)?;
        a.mov(rax, es)?;
        a.report(rax)?;
        a.mov(eax, 0x14)?;
        a.faulting(|a| a.mov(es, eax))?;
        a.xor(eax, eax)?;
        a.lldt(ax)
    });
    assert_eq!(values, [u64::from(layout::SPARE_SELECTOR), 0x0c]);
}

/// LAR, LSL, VERR and VERW answer by ZF and don't fault.
pub fn selectors_can_be_asked_about(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(ecx, i32::from(layout::READ_ONLY_DATA))?;
        a.lar(eax, ecx)?;
        // Bits 19:16 are undefined.
        a.and(eax, 0x00f0_ff00)?;
        a.report(rax)?;
        a.lsl(eax, ecx)?;
        a.report(rax)?;
        a.verr(cx)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)?;
        a.verw(cx)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)?;
        a.mov(ecx, 0x1f8)?;
        a.lar(eax, ecx)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)
    });
    assert_eq!(values, [0x00c0_9100, 0xffff_ffff, 1, 0, 0]);
}

/// SWAPGS exchanges the base with the MSR, in ring 0 alone.
pub fn swapgs_exchanges_the_bases(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP)], |a| {
        a.write_msr(msr::GS_BASE, 0x1111)?;
        a.write_msr(msr::KERNEL_GS_BASE, 0xffff_8000_0000_2222)?;
        a.swapgs()?;
        for register in [msr::GS_BASE, msr::KERNEL_GS_BASE] {
            a.read_msr(register)?;
            a.report(rax)?;
        }
        a.enter_user()?;
        a.faulting(|a| a.swapgs())?;
        a.user_done()
    });
    assert_eq!(values, [0xffff_8000_0000_2222, 0x1111]);
}

/// RDFSBASE and its like work where CR4 allows them, else #UD.
pub fn fsgsbase_instructions_follow_cr4(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(FSGSBASE) {
        guest.run_expecting(&[fault(UD)], |a| a.faulting(|a| a.rdfsbase(rax)));
        return;
    }
    let values = guest.run_expecting(&[fault(UD)], |a| {
        a.mov(rax, cr4)?;
        a.btr(rax, 16)?;
        a.mov(cr4, rax)?;
        a.faulting(|a| a.rdfsbase(rax))?;
        a.set_cr4(paging::CR4_FSGSBASE)?;
        a.mov(rax, layout::FRAMES)?;
        a.wrfsbase(rax)?;
        a.mov(qword_ptr(8).fs(), 0x77)?;
        a.enter_user()?;
        a.mov(eax, 0x5555)?;
        a.wrgsbase(rax)?;
        a.rdfsbase(rcx)?;
        a.report(rcx)?;
        a.rdgsbase(rcx)?;
        a.report(rcx)?;
        a.user_done()
    });
    assert_eq!(values, [layout::FRAMES, 0x5555]);
    assert_eq!(guest.peek(layout::FRAMES + 8), 0x77);
}

/// WRFSBASE and WRGSBASE refuse non-canonical bases.
pub fn fsgsbase_values_are_canonical(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(FSGSBASE) {
        guest.run_expecting(&[fault(UD)], |a| a.faulting(|a| a.wrgsbase(rax)));
        return;
    }
    guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.set_cr4(paging::CR4_FSGSBASE)?;
        a.mov(rax, 0x0000_8000_0000_0000_u64)?;
        a.faulting(|a| a.wrfsbase(rax))?;
        a.faulting(|a| a.wrgsbase(rax))
    });
}

/// UMIP keeps SGDT and its like from ring 3.
pub fn umip_keeps_table_addresses_from_user_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(UMIP) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.set_cr4(paging::CR4_UMIP))?;
            a.enter_user()?;
            a.sldt(eax)?;
            a.user_done()
        });
        return;
    }
    guest.run_expecting(&[fault(GP), fault(GP), fault(GP)], |a| {
        a.set_cr4(paging::CR4_UMIP)?;
        a.str(eax)?;
        a.enter_user()?;
        a.faulting(|a| a.sgdt(ptr(layout::SCRATCH)))?;
        a.faulting(|a| a.sldt(eax))?;
        a.faulting(|a| a.smsw(eax))?;
        a.user_done()
    });
}
