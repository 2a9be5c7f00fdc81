//! Registers go in and come out.

use crate::prelude::*;

/// A new processor is in the state after reset (SDM 3A table 10-1).
pub fn a_new_processor_is_in_reset_state(bench: &Bench<'_>) {
    let guest = Guest::with(
        bench,
        Setup {
            vcpus: 2,
            ..Setup::default()
        },
    );
    let reset = guest.others[0].state().unwrap();
    assert_eq!(reset.regs.rip, 0xfff0);
    assert_eq!(reset.regs.rflags, 2);
    let code = reset.sregs.segments[state::CS];
    assert_eq!((code.selector, code.base), (0xf000, 0xffff_0000));
    assert_eq!(code.limit, 0xffff);
    assert_eq!(reset.sregs.cr0, 0x6000_0010, "CR0");
    assert_eq!((reset.sregs.cr3, reset.sregs.cr4), (0, 0), "CR3, CR4");
    assert_eq!(reset.sregs.efer, 0, "EFER");
    assert_eq!(reset.sregs.xcr0, 1, "XCR0");
    assert_eq!(reset.sregs.idt.limit, 0xffff, "IDTR limit");
    assert_eq!(reset.sregs.dr6, 0xffff_0ff0, "DR6");
    assert_eq!(reset.sregs.dr7, 0x400, "DR7");
}

/// Every general register reaches the guest and comes back.
pub fn general_registers_reach_the_guest_and_come_back(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        for register in [
            rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        ] {
            a.not(register)?;
        }
        a.hlt()
    });
    let mut before = guest.vcpu.state().unwrap();
    for (index, value) in (1..).zip(&mut before.regs.gpr) {
        *value = 0x0101_0101_0101_0101 * index;
    }
    before.regs.gpr[state::RSP] = layout::STACK;
    guest.vcpu.set_state(&before).unwrap();
    guest.finish();
    let after = guest.vcpu.state().unwrap();
    for index in (0..16).filter(|&index| index != state::RSP) {
        assert_eq!(
            after.regs.gpr[index], !before.regs.gpr[index],
            "register {index}"
        );
    }
    assert_eq!(after.regs.gpr[state::RSP], layout::STACK);
}

/// RFLAGS reach the guest and come back.
pub fn flags_reach_the_guest_and_come_back(bench: &Bench<'_>) {
    const CF: u64 = 1;
    const ZF: u64 = 1 << 6;
    const DF_FLAG: u64 = 1 << 10;
    const OF: u64 = 1 << 11;
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.report_flags()?;
        a.cmc()?;
        a.std()?;
        a.hlt()
    });
    let mut before = guest.vcpu.state().unwrap();
    before.regs.rflags = 2 | CF | ZF | OF;
    guest.vcpu.set_state(&before).unwrap();
    guest.finish();
    assert_eq!(guest.values(), [2 | CF | ZF | OF]);
    let after = guest.vcpu.state().unwrap().regs.rflags;
    assert_eq!(after & 0xfff, 2 | ZF | OF | DF_FLAG);
}

/// The instruction pointer at an exit is behind the instruction that caused it.
pub fn rip_is_behind_the_hlt(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.nop()?;
        a.hlt()
    });
    guest.finish();
    assert_eq!(guest.vcpu.state().unwrap().regs.rip, layout::CODE + 2);
}

/// 32-bit results clear the upper half, 8- and 16-bit ones don't (SDM 1 §3.4.1.1).
pub fn narrow_results_keep_or_clear_the_upper_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(rax, u64::MAX)?;
        a.mov(al, 0)?;
        a.report(rax)?;
        a.mov(ah, 1)?;
        a.report(rax)?;
        a.mov(ax, 2)?;
        a.report(rax)?;
        a.mov(eax, 3)?;
        a.report(rax)
    });
    assert_eq!(
        values,
        [
            u64::MAX - 0xff,
            u64::MAX - 0xffff + 0x100,
            u64::MAX - 0xffff + 2,
            3
        ]
    );
}

/// Segment registers' hidden parts reach the guest and come back.
pub fn segment_bases_reach_the_guest_and_come_back(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES + 8, 0xf5);
    guest.poke(layout::FRAMES + 0x1008, 0x65);
    guest.load(|a| {
        a.mov(rax, qword_ptr(8).fs())?;
        a.report(rax)?;
        a.mov(rax, qword_ptr(8).gs())?;
        a.report(rax)?;
        a.swapgs()?;
        a.hlt()
    });
    let mut before = guest.vcpu.state().unwrap();
    before.sregs.segments[state::FS].base = layout::FRAMES;
    before.sregs.segments[state::GS].base = layout::FRAMES + 0x1000;
    before.msrs = vec![(msr::KERNEL_GS_BASE, 0xffff_8000_0000_1000)];
    guest.vcpu.set_state(&before).unwrap();
    guest.finish();
    assert_eq!(guest.values(), [0xf5, 0x65]);
    let after = guest.vcpu.state().unwrap();
    assert_eq!(after.sregs.segments[state::FS].base, layout::FRAMES);
    assert_eq!(after.sregs.segments[state::GS].base, 0xffff_8000_0000_1000);
    let kernel_gs = after.msrs.iter().find(|msr| msr.0 == msr::KERNEL_GS_BASE);
    assert_eq!(kernel_gs.map(|msr| msr.1), Some(layout::FRAMES + 0x1000));
}

/// `translate` walks the page tables as the processor would, without raising anything.
pub fn translate_walks_the_page_tables(bench: &Bench<'_>) {
    let guest = Guest::new(bench);
    guest.map(3, layout::FRAMES, PTE_P | PTE_W);
    let translate = |address| guest.vcpu.translate(address).unwrap();
    assert_eq!(translate(layout::CODE + 0x123), Some(layout::CODE + 0x123));
    assert_eq!(
        translate(layout::USER + 0x20_0345),
        Some(0x20_0345),
        "2 MiB page"
    );
    assert_eq!(
        translate(layout::TEST + 0x3abc),
        Some(layout::FRAMES + 0xabc)
    );
    assert_eq!(translate(layout::TEST + 0x4000), None, "not present");
    assert_eq!(
        translate(0x0000_7000_0000_0000),
        None,
        "no third-level table"
    );
    assert_eq!(guest.mapping(3) & PTE_D, 0, "D stays clear");
    assert_eq!(
        guest.vcpu.state().unwrap().sregs.cr2,
        0,
        "no fault was raised"
    );
}
