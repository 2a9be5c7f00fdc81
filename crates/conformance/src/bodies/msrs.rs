//! Model-specific registers.

use crate::prelude::*;

/// The system-call registers hold what is written.
pub fn system_call_registers_hold_what_is_written(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        for (register, value) in [
            (msr::STAR, 0x0023_0010_1234_5678),
            (msr::LSTAR, 0xffff_ffff_8100_0000),
            (msr::CSTAR, 0xffff_ffff_8200_0000),
            (msr::SFMASK, 0x4_7700),
            (msr::KERNEL_GS_BASE, 0xffff_8880_0000_0000),
        ] {
            a.write_msr(register, value)?;
            a.read_msr(register)?;
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(
        values,
        [
            0x0023_0010_1234_5678,
            0xffff_ffff_8100_0000,
            0xffff_ffff_8200_0000,
            0x4_7700,
            0xffff_8880_0000_0000
        ]
    );
}

/// FS_BASE and GS_BASE are the segments' bases.
pub fn base_registers_are_the_segments_bases(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES + 0x18, 0xfeed);
    let values = guest.run(|a| {
        a.write_msr(msr::FS_BASE, layout::FRAMES + 8)?;
        a.mov(rax, qword_ptr(0x10).fs())?;
        a.report(rax)?;
        // Loading the selector loads the descriptor's base (32 bits).
        a.mov(eax, i32::from(layout::KERNEL_DATA))?;
        a.mov(fs, eax)?;
        a.read_msr(msr::FS_BASE)?;
        a.report(rax)
    });
    assert_eq!(values, [0xfeed, 0]);
}

/// Non-canonical values in address registers are #GP and change nothing.
pub fn non_canonical_values_are_gp(bench: &Bench<'_>) {
    const REGISTERS: [u32; 4] = [msr::LSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE];
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP); 4], |a| {
        for register in REGISTERS {
            a.write_msr(register, 0x1000)?;
            a.faulting(|a| a.write_msr(register, 0x0000_8000_0000_0000))?;
            a.read_msr(register)?;
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(values, [0x1000; 4]);
}

/// A register that doesn't exist is #GP, for reads and writes.
pub fn unknown_registers_are_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP); 4], |a| {
        for register in [0x1234_5678_u32, 0x4b56_4dff] {
            a.mov(ecx, register)?;
            a.faulting(|a| a.rdmsr())?;
            a.faulting(|a| a.wrmsr())?;
        }
        Ok(())
    });
}

/// Ring 3 may neither read nor write.
pub fn user_code_may_not_touch_them(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.enter_user()?;
        a.mov(ecx, msr::EFER)?;
        a.faulting(|a| a.rdmsr())?;
        a.faulting(|a| a.wrmsr())?;
        a.user_done()
    });
}

/// EFER: LMA shows the mode, reserved bits and LME under paging are #GP.
pub fn efer_guards_its_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.read_msr(msr::EFER)?;
        a.report(rax)?;
        a.bts(rax, 1)?;
        a.faulting(|a| a.wrmsr())?;
        a.read_msr(msr::EFER)?;
        a.btr(rax, 8)?;
        a.faulting(|a| a.wrmsr())
    });
    let expected = paging::EFER_SCE | paging::EFER_LME | paging::EFER_LMA | paging::EFER_NXE;
    assert_eq!(values, [expected]);
}

/// PAT takes the known memory types alone.
pub fn pat_takes_known_types_alone(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run_expecting(&[fault(GP), fault(GP)], |a| {
        a.read_msr(msr::IA32_PAT)?;
        a.report(rax)?;
        a.write_msr(msr::IA32_PAT, 0x0005_0400_0007_0106)?;
        a.faulting(|a| a.write_msr(msr::IA32_PAT, 2))?;
        a.faulting(|a| a.write_msr(msr::IA32_PAT, 8 << 56))?;
        a.read_msr(msr::IA32_PAT)?;
        a.report(rax)
    });
    assert_eq!(values, [0x0007_0406_0007_0406, 0x0005_0400_0007_0106]);
}

/// The upper halves of RAX and RDX are cleared by RDMSR and ignored by WRMSR.
pub fn halves_are_32_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(rax, u64::MAX << 32 | 0x11)?;
        a.mov(rdx, u64::MAX << 32 | 0x22)?;
        a.mov(ecx, msr::STAR)?;
        a.wrmsr()?;
        a.mov(rax, u64::MAX)?;
        a.mov(rdx, u64::MAX)?;
        a.rdmsr()?;
        a.report(rax)?;
        a.report(rdx)
    });
    assert_eq!(values, [0x11, 0x22]);
}

/// The memory-type registers answer, since kernels ask.
pub fn memory_type_registers_answer(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.read_msr(msr::IA32_MTRRCAP)?;
        a.and(eax, 0xff)?;
        a.report(rax)?;
        a.write_msr(msr::IA32_MTRR_DEF_TYPE, 0x806)?;
        a.read_msr(msr::IA32_MTRR_DEF_TYPE)?;
        a.report(rax)
    });
    assert!(values[0] <= 16, "variable ranges: {}", values[0]);
    assert_eq!(values[1], 0x806);
}
