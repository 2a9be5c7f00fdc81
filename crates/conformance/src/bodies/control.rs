//! Control registers and privileged instructions (SDM 3A §2.5, §5.9).

use crate::prelude::*;

/// Instructions that ring 3 may not run.
pub fn privileged_instructions_are_gp_in_user_mode(bench: &Bench<'_>) {
    type Privileged = fn(&mut Asm) -> Assembled;
    const INSTRUCTIONS: [Privileged; 14] = [
        |a| a.hlt(),
        |a| a.cli(),
        |a| a.sti(),
        |a| a.clts(),
        |a| a.mov(rax, cr0),
        |a| a.mov(cr3, rax),
        |a| a.mov(rax, dr7),
        |a| a.lgdt(ptr(layout::SCRATCH)),
        |a| a.lidt(ptr(layout::SCRATCH)),
        |a| a.ltr(ax),
        |a| a.lmsw(ax),
        |a| a.invlpg(byte_ptr(layout::SCRATCH)),
        |a| a.wbinvd(),
        |a| a.in_(al, 0x70),
    ];
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP); 14], |a| {
        a.enter_user()?;
        for instruction in INSTRUCTIONS {
            a.faulting(instruction)?;
        }
        a.user_done()
    });
}

/// CR0 refuses paging without protection, and NW without CD.
pub fn cr0_refuses_impossible_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.faulting(|a| a.change_cr0(paging::CR0_PE, 0))?;
        a.faulting(|a| a.change_cr0(0, paging::CR0_NW))
    });
}

/// CR0 refuses its upper half.
pub fn cr0_refuses_its_upper_half(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| a.faulting(|a| a.change_cr0(0, 1 << 32)));
}

/// CR4 refuses reserved bits, and to leave PAE in long mode.
pub fn cr4_refuses_impossible_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP), fault(GP), fault(GP)], |a| {
        a.mov(rbx, cr4)?;
        for bit in [15, 31] {
            a.mov(rax, rbx)?;
            a.bts(rax, bit)?;
            a.faulting(|a| a.mov(cr4, rax))?;
        }
        a.mov(rax, rbx)?;
        a.btr(rax, 5)?;
        a.faulting(|a| a.mov(cr4, rax))
    });
}

/// CR3 refuses bits past the physical address width.
pub fn cr3_refuses_reserved_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.mov(rax, layout::PML4 | 1 << 52)?;
        a.faulting(|a| a.mov(cr3, rax))
    });
}

/// CR8 holds four bits.
pub fn cr8_holds_four_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP)], |a| {
        a.mov(eax, 0xf)?;
        a.mov(cr8, rax)?;
        a.mov(rcx, cr8)?;
        a.report(rcx)?;
        a.mov(eax, 0x10)?;
        a.faulting(|a| a.mov(cr8, rax))?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)
    });
    assert_eq!(values, [0xf]);
}

/// CR8 in the state is the register.
pub fn cr8_reaches_the_state_and_comes_back(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(rcx, cr8)?;
        a.report(rcx)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        a.hlt()
    });
    let mut state = guest.vcpu.state().unwrap();
    state.sregs.cr8 = 9;
    guest.vcpu.set_state(&state).unwrap();
    guest.finish();
    assert_eq!(guest.values(), [9]);
    assert_eq!(guest.vcpu.state().unwrap().sregs.cr8, 5);
}

/// CR1, CR5 and their like don't exist.
pub fn unknown_control_registers_are_ud(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(UD), fault(UD)], |a| {
        a.faulting(|a| a.db(&[0x0f, 0x20, 0xc8]))?;
        a.faulting(|a| a.db(&[0x0f, 0x22, 0xe8]))
    });
}

/// LMSW sets PE, MP, EM and TS, and can't clear PE; SMSW reads CR0.
pub fn lmsw_changes_the_low_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(eax, 0x8)?;
        a.lmsw(ax)?;
        a.smsw(rcx)?;
        a.report(rcx)?;
        a.clts()?;
        a.mov(rax, cr0)?;
        a.report(rax)
    });
    assert_eq!(values[0] & 0xf, 0x9, "PE stays, MP cleared, TS set");
    assert_eq!(values[1] & 0xf, 0x1);
}

/// XSETBV takes the known combinations alone, in ring 0 alone.
pub fn xsetbv_refuses_impossible_combinations(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(XSAVE) {
        guest.run_expecting(&[fault(UD)], |a| a.faulting(|a| a.xsetbv()));
        return;
    }
    let faults = [
        fault(UD),
        fault(GP),
        fault(GP),
        fault(GP),
        fault(GP),
        fault(GP),
    ];
    let values = guest.run_expecting(&faults, |a| {
        a.clear_cr4(paging::CR4_OSXSAVE)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 3)?;
        a.faulting(|a| a.xsetbv())?;
        a.set_cr4(paging::CR4_OSXSAVE)?;
        // x87 is always there; AVX needs SSE; bit 62 is not a component; register 1 isn't one.
        for bits in [2, 5] {
            a.mov(eax, bits)?;
            a.faulting(|a| a.xsetbv())?;
        }
        a.mov(eax, 3)?;
        a.mov(edx, 1 << 30)?;
        a.faulting(|a| a.xsetbv())?;
        a.xor(edx, edx)?;
        a.mov(ecx, 1)?;
        a.faulting(|a| a.xsetbv())?;
        a.xor(ecx, ecx)?;
        a.mov(eax, 3)?;
        a.xsetbv()?;
        a.xgetbv()?;
        a.report(rax)?;
        a.enter_user()?;
        a.faulting(|a| a.xsetbv())?;
        a.user_done()
    });
    assert_eq!(values, [3]);
}

/// IOPL lets ring 3 use ports and IF.
pub fn iopl_lets_user_code_use_ports(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(0x300, 4, device.clone());
    guest.run(|a| {
        a.enter_user_with(0x3002)?;
        a.mov(edx, 0x300)?;
        a.out(dx, al)?;
        a.cli()?;
        a.user_done()
    });
    assert_eq!(device.take().len(), 1);
}

/// The task segment's permission map opens single ports to ring 3.
pub fn the_permission_map_opens_single_ports(bench: &Bench<'_>) {
    const SECOND: u16 = layout::TASK + 16;
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(0x10, 8, device.clone());
    // Processor 1's task segment, made longer: the map starts behind it; port 0x12 and 0x13 open.
    let base = layout::TSS + layout::TSS_STRIDE;
    let descriptor = layout::GDT + u64::from(SECOND);
    guest.poke(descriptor, guest.peek(descriptor) & !0xffff | 0x70);
    guest.write(
        base + 0x68,
        &[0xff, 0xff, 0xf3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
    );
    let faults = [fault(GP), fault(GP), fault(GP)];
    guest.run_expecting(&faults, |a| {
        a.mov(eax, i32::from(SECOND))?;
        a.ltr(ax)?;
        a.enter_user()?;
        a.in_(al, 0x12)?;
        a.in_(ax, 0x12)?;
        a.faulting(|a| a.in_(al, 0x11))?;
        a.faulting(|a| a.in_(ax, 0x13))?;
        a.mov(edx, 0x300)?;
        a.faulting(|a| a.in_(al, dx))?;
        a.user_done()
    });
    assert_eq!(device.take(), [Seen::Read(2, 1), Seen::Read(2, 2)]);
}

/// POPF in ring 3 leaves IF and IOPL alone, silently.
pub fn popf_in_user_mode_keeps_if_and_iopl(bench: &Bench<'_>) {
    for (before, popped, after) in [(2, 0x3203, 3), (0x202, 0x3003, 0x203)] {
        let mut guest = Guest::new(bench);
        let values = guest.run(|a| {
            a.enter_user_with(before)?;
            a.push(popped)?;
            a.popfq()?;
            a.report_flags()?;
            a.user_done()
        });
        assert_eq!(values, [after]);
    }
}

/// Execution breakpoints of the guest's own are faults before the instruction.
pub fn the_guests_execution_breakpoints_fault(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(DB)], |a| {
        let mut place = a.create_label();
        let mut after = a.create_label();
        a.lea(rax, ptr(place))?;
        a.mov(dr0, rax)?;
        a.mov(eax, 0x402)?;
        a.mov(dr7, rax)?;
        a.xor(ecx, ecx)?;
        a.resume_at(after)?;
        a.set_label(&mut place)?;
        a.inc(ecx)?;
        a.set_label(&mut after)?;
        a.mov(rax, dr6)?;
        a.report(rax)?;
        a.report(rcx)?;
        a.mov(eax, 0x400)?;
        a.mov(dr7, rax)
    });
    assert_eq!(values[0] & 0xf, 1, "B0");
    assert_eq!(values[1], 0, "the instruction did not run");
}

/// Data breakpoints are traps behind the access.
pub fn the_guests_data_breakpoints_trap(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(DB)], |a| {
        a.mov(rbx, layout::FRAMES)?;
        a.mov(dr1, rbx)?;
        // Writes of 4 bytes, breakpoint 1.
        a.mov(rax, 0x00d0_0408_u64)?;
        a.mov(dr7, rax)?;
        a.mov(ecx, dword_ptr(rbx))?;
        a.mov(dword_ptr(rbx + 4), ecx)?;
        a.log_traps()?;
        a.mov(dword_ptr(rbx), 7)?;
        a.mov(rax, dr6)?;
        a.report(rax)?;
        a.mov(eax, 0x400)?;
        a.mov(dr7, rax)
    });
    assert_eq!(values[0] & 0xf, 2, "B1");
    assert_eq!(guest.peek(layout::FRAMES), 7, "the write is done");
}

/// A load of SS holds a data breakpoint of its own back until the next instruction is complete.
pub fn a_load_of_ss_delays_a_data_breakpoint(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, u64::from(layout::KERNEL_DATA));
    let values = guest.run_expecting(&[fault(DB)], |a| {
        let mut after = a.create_label();
        a.mov(rbx, layout::FRAMES)?;
        a.mov(dr1, rbx)?;
        // Accesses of 4 bytes, breakpoint 1.
        a.mov(rax, 0x00f0_0408_u64)?;
        a.mov(dr7, rax)?;
        a.log_traps()?;
        a.mov(ss, word_ptr(rbx))?;
        a.inc(ecx)?;
        a.set_label(&mut after)?;
        a.mov(rax, dr6)?;
        a.report(rax)?;
        a.mov(eax, 0x400)?;
        a.mov(dr7, rax)?;
        a.lea(rax, ptr(after))?;
        a.report(rax)
    });
    assert_eq!(values[0] & 0xf, 2, "B1");
    assert_eq!(guest.faults()[0].rip, values[1]);
}

/// DR7.GD guards the debug registers.
pub fn general_detect_guards_the_debug_registers(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(DB)], |a| {
        a.mov(eax, 0x2400)?;
        a.mov(dr7, rax)?;
        a.faulting(|a| a.mov(rcx, dr0))?;
        a.mov(rax, dr6)?;
        a.report(rax)?;
        a.mov(rax, dr7)?;
        a.report(rax)
    });
    assert_eq!(values[0] & 1 << 13, 1 << 13, "BD");
    assert_eq!(values[1] & 1 << 13, 0, "GD is cleared by the fault");
}
