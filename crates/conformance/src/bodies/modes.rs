//! Modes other than 64-bit: real mode, protected mode, and the way between.

use iced_x86::code_asm::CodeAssembler;

use crate::prelude::*;

const START: u64 = 0x9000;

/// Puts the processor in real mode at 0000:9000 with this code.
fn real_mode(bench: &Bench<'_>, code: impl FnOnce(&mut CodeAssembler) -> Assembled) -> Guest {
    let mut guest = Guest::new(bench);
    let mut a = CodeAssembler::new(16).unwrap();
    code(&mut a).unwrap();
    guest.write(START, &a.assemble(START).unwrap());
    let mut state = guest.vcpu.state().unwrap();
    state.msrs.clear();
    state.xsave.clear();
    let sregs = &mut state.sregs;
    let real = |selector: u16, access| state::Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        access,
    };
    sregs.segments = [real(0, 0x93); 6];
    sregs.segments[state::CS] = real(0, 0x9b);
    sregs.tr = state::Segment {
        limit: 0xffff,
        access: 0x8b,
        ..state::Segment::default()
    };
    sregs.idt = state::DescriptorTable {
        base: 0,
        limit: 0x3ff,
    };
    sregs.cr0 = paging::CR0_ET;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    state.regs.rip = START;
    state.regs.gpr = [0; 16];
    state.regs.gpr[state::RSP] = 0xf000;
    guest.vcpu.set_state(&state).unwrap();
    guest
}

/// Segments are selector × 16, and offsets are 16 bits.
pub fn real_mode_addresses_by_segment_and_offset(bench: &Bench<'_>) {
    let mut guest = real_mode(bench, |a| {
        a.mov(ax, 0x2345)?;
        a.mov(ds, ax)?;
        a.mov(bx, 0x10)?;
        a.mov(byte_ptr(bx + 2), 0x5a)?;
        a.mov(ax, ds)?;
        a.hlt()
    });
    guest.halt();
    assert_eq!(guest.peek(0x2_3462) & 0xff, 0x5a);
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 0x2345);
}

/// Interrupts go through the vector table at 0 and come back by IRET.
pub fn real_mode_interrupts_use_the_vector_table(bench: &Bench<'_>) {
    let mut guest = real_mode(bench, |a| {
        a.int(0x21)?;
        a.inc(bx)?;
        a.hlt()
    });
    // The handler at 0900:0100: add bx, 4; iret.
    guest.write(0x9100, &[0x83, 0xc3, 0x04, 0xcf]);
    guest.write(0x21 * 4, &[0x00, 0x01, 0x00, 0x09]);
    guest.halt();
    let state = guest.vcpu.state().unwrap();
    assert_eq!(state.regs.gpr[state::RBX], 5);
    assert_eq!(state.regs.gpr[state::RSP], 0xf000);
}

/// Calls push 16-bit addresses; 32-bit operands work by prefix.
pub fn real_mode_calls_push_16_bits(bench: &Bench<'_>) {
    let mut guest = real_mode(bench, |a| {
        let mut function = a.create_label();
        a.call(function)?;
        a.hlt()?;
        a.set_label(&mut function)?;
        a.mov(eax, 0x1234_5678)?;
        a.mov(bp, sp)?;
        a.mov(cx, word_ptr(bp))?;
        a.ret()
    });
    guest.halt();
    let state = guest.vcpu.state().unwrap();
    assert_eq!(state.regs.gpr[state::RAX], 0x1234_5678);
    assert_eq!(state.regs.gpr[state::RCX], START + 3);
    assert_eq!(state.regs.gpr[state::RBP], 0xeffe);
}

/// An access past a segment's limit is a fault through the vector table.
pub fn real_mode_checks_the_limit(bench: &Bench<'_>) {
    let mut guest = real_mode(bench, |a| {
        a.mov(bx, -1)?;
        a.mov(ax, word_ptr(bx))?;
        a.hlt()
    });
    // #GP's handler: mov cx, 13; hlt.
    guest.write(0x9100, &[0xb9, 13, 0, 0xf4]);
    guest.write(u64::from(GP) * 4, &[0x00, 0x01, 0x00, 0x09]);
    guest.halt();
    assert_eq!(
        guest.vcpu.state().unwrap().regs.gpr[state::RCX] & 0xffff,
        13
    );
}

/// The way a kernel's trampoline goes: real, protected, long mode.
pub fn a_trampoline_reaches_long_mode(bench: &Bench<'_>) {
    const TABLE: u64 = 0x9800;
    const PROTECTED: u64 = 0x9400;
    let mut guest = real_mode(bench, |a| {
        a.cli()?;
        a.db(&[0x66])?;
        a.lgdt(ptr(0x9800))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // jmp far 0x70:0x9400 with a 32-bit offset
        a.db(&[0x66, 0xea])?;
        a.dd(&[u32::try_from(PROTECTED).unwrap()])?;
        a.dw(&[layout::KERNEL_CODE32])
    });
    guest.write(TABLE, &layout::GDT_LIMIT.to_le_bytes());
    guest.write(
        TABLE + 2,
        &u32::try_from(layout::GDT).unwrap().to_le_bytes(),
    );
    let mut a = CodeAssembler::new(32).unwrap();
    to_long_mode(&mut a).unwrap();
    guest.write(PROTECTED, &a.assemble(PROTECTED).unwrap());
    // mov rax, imm64; hlt
    let mut long = vec![0x48, 0xb8];
    long.extend(0x1122_3344_5566_7788_u64.to_le_bytes());
    long.push(0xf4);
    guest.write(layout::CODE, &long);
    guest.halt();
    let state = guest.vcpu.state().unwrap();
    assert_eq!(state.regs.gpr[state::RAX], 0x1122_3344_5566_7788);
    assert_eq!(state.sregs.efer & paging::EFER_LMA, paging::EFER_LMA);
    assert_eq!(
        state.sregs.segments[state::CS].selector,
        layout::KERNEL_CODE
    );
}

fn to_long_mode(a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, i32::from(layout::KERNEL_DATA))?;
    a.mov(ds, eax)?;
    a.mov(ss, eax)?;
    a.mov(esp, u32::try_from(layout::STACK).unwrap())?;
    a.mov(eax, u32::try_from(paging::CR4_PAE).unwrap())?;
    a.mov(cr4, eax)?;
    a.mov(eax, u32::try_from(layout::PML4).unwrap())?;
    a.mov(cr3, eax)?;
    a.mov(ecx, msr::EFER)?;
    a.rdmsr()?;
    a.or(eax, 0x900)?;
    a.wrmsr()?;
    a.mov(eax, cr0)?;
    a.or(eax, 0x8000_0000_u32)?;
    a.mov(cr0, eax)?;
    a.db(&[0xea])?;
    a.dd(&[u32::try_from(layout::CODE).unwrap()])?;
    a.dw(&[layout::KERNEL_CODE])
}

/// 32-bit paging without PAE: two levels, 4 KiB and 4 MiB pages.
pub fn two_level_paging_translates(bench: &Bench<'_>) {
    const DIRECTORY: u64 = layout::SPARE_TABLES;
    const PAGES: u64 = layout::SPARE_TABLES + 0x1000;
    let mut guest = real_mode(bench, |a| a.hlt());
    let entry = |value: u64| u32::try_from(value).unwrap().to_le_bytes();
    guest.write(DIRECTORY, &entry(PTE_P | PTE_W | PTE_PS));
    guest.write(DIRECTORY + 4, &entry(PAGES | PTE_P | PTE_W));
    guest.write(PAGES + 8, &entry(layout::FRAMES | PTE_P | PTE_W));
    let mut a = CodeAssembler::new(32).unwrap();
    a.mov(ebx, 0x40_2010).unwrap();
    a.mov(dword_ptr(ebx), 0x7777).unwrap();
    a.mov(eax, dword_ptr(ebx)).unwrap();
    a.hlt().unwrap();
    guest.write(START, &a.assemble(START).unwrap());
    let mut state = guest.vcpu.state().unwrap();
    let flat = |selector, access| state::Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    };
    state.sregs.segments = [flat(layout::KERNEL_DATA, 0xc093); 6];
    state.sregs.segments[state::CS] = flat(layout::KERNEL_CODE32, 0xc09b);
    state.sregs.cr0 = paging::CR0_ET | paging::CR0_PE | paging::CR0_PG;
    state.sregs.cr3 = DIRECTORY;
    state.sregs.cr4 = paging::CR4_PSE;
    guest.vcpu.set_state(&state).unwrap();
    assert_eq!(
        guest.vcpu.translate(0x40_2010).unwrap(),
        Some(layout::FRAMES + 0x10)
    );
    guest.halt();
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 0x7777);
    assert_eq!(guest.peek(layout::FRAMES + 0x10), 0x7777);
    assert_eq!(guest.peek(PAGES + 8) & (PTE_A | PTE_D), PTE_A | PTE_D);
}

/// Runs 32-bit code with ES a segment of base 3 MiB and limit 0xfff, and reports RAX.
fn in_compatibility_mode(bench: &Bench<'_>, faults: &[Expected], code: &[u8]) -> Vec<u64> {
    const SPARE: u64 = layout::GDT + layout::SPARE_SELECTOR as u64;
    let mut guest = Guest::new(bench);
    guest.poke(SPARE, 0x0040_9330_0000_0fff);
    guest.poke(layout::FRAMES + 0x20, 0xabcd);
    guest.run_expecting(faults, |a| {
        let mut narrow = a.create_label();
        let mut back = a.create_label();
        a.mov(ecx, i32::from(layout::SPARE_SELECTOR))?;
        a.mov(es, ecx)?;
        a.resume_at(back)?;
        a.push(i32::from(layout::KERNEL_CODE32))?;
        a.lea(rax, ptr(narrow))?;
        a.push(rax)?;
        a.far_return()?;
        a.set_label(&mut narrow)?;
        a.db(code)?;
        a.set_label(&mut back)?;
        // 32-bit: call next; next: pop edi; add edi, 8; push 8; push edi; retf.
        a.db(&[0xe8, 0, 0, 0, 0])?;
        a.db(&[0x5f, 0x83, 0xc7, 0x08, 0x6a, 0x08, 0x57, 0xcb])?;
        // 64-bit again.
        let resume = a.shared(layout::RESUME);
        a.mov(qword_ptr(resume), 0)?;
        a.report(rax)
    })
}

/// In compatibility mode data segments have bases again.
pub fn compatibility_mode_has_segment_bases(bench: &Bench<'_>) {
    // mov eax, es:[0x20]
    let values = in_compatibility_mode(bench, &[], &[0x26, 0xa1, 0x20, 0, 0, 0]);
    assert_eq!(values, [0xabcd]);
}

/// In compatibility mode data segments have limits again.
pub fn compatibility_mode_has_segment_limits(bench: &Bench<'_>) {
    // mov eax, 5; mov eax, es:[0x1000]
    let code = [0xb8, 5, 0, 0, 0, 0x26, 0xa1, 0x00, 0x10, 0, 0];
    let values = in_compatibility_mode(bench, &[fault(GP)], &code);
    assert_eq!(values, [5]);
}

/// What 64-bit code doesn't have works in compatibility mode.
pub fn compatibility_mode_has_instructions_of_its_own(bench: &Bench<'_>) {
    let cases: [(&str, &[u8], u64); 8] = [
        (
            "stc; pushfd; pop eax; and eax, 1",
            &[0xf9, 0x9c, 0x58, 0x83, 0xe0, 1],
            1,
        ),
        (
            "push 3; popfd; mov eax, 0; setc al",
            &[0x6a, 3, 0x9d, 0xb8, 0, 0, 0, 0, 0x0f, 0x92, 0xc0],
            1,
        ),
        (
            "mov eax, 5; pushad; inc eax; popad",
            &[0xb8, 5, 0, 0, 0, 0x60, 0x40, 0x61],
            5,
        ),
        (
            "mov eax, 5; pusha; inc eax; popa",
            &[0xb8, 5, 0, 0, 0, 0x66, 0x60, 0x40, 0x66, 0x61],
            5,
        ),
        (
            "mov eax, 0x19; add al, 0x28; daa",
            &[0xb8, 0x19, 0, 0, 0, 4, 0x28, 0x27],
            0x47,
        ),
        ("mov eax, 37; aam", &[0xb8, 37, 0, 0, 0, 0xd4, 10], 0x307),
        (
            "mov eax, 5; add al, 2 (82)",
            &[0xb8, 5, 0, 0, 0, 0x82, 0xc0, 2],
            7,
        ),
        (
            "mov eax, 9; push ss; pop eax; and eax, 3",
            &[0xb8, 9, 0, 0, 0, 0x16, 0x58, 0x83, 0xe0, 3],
            0,
        ),
    ];
    for (text, code, expected) in cases {
        assert_eq!(
            in_compatibility_mode(bench, &[], code),
            [expected],
            "{text}"
        );
    }
}
