//! SYSCALL, SYSRET and IRET (SDM 2B; APM 3).

use crate::prelude::*;

const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const AC_FLAG: u64 = 1 << 18;
const RF: u64 = 1 << 16;
const NT: i32 = 1 << 14;

/// STAR as the harness's selectors want it: SYSCALL to 0x08 and 0x10, SYSRET from 0x18 on.
fn star() -> u64 {
    u64::from(layout::KERNEL_CODE) << 32 | u64::from(layout::USER_CODE32) << 48
}

/// The usual setting: SYSCALL goes to `entry` with IF, TF and AC masked.
fn allow_syscall(a: &mut Asm, entry: CodeLabel) -> Assembled {
    a.write_msr(msr::STAR, star())?;
    a.write_msr(msr::SFMASK, TF | IF | AC_FLAG)?;
    a.lea(rax, ptr(entry))?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.mov(ecx, msr::LSTAR)?;
    a.wrmsr()
}

/// SYSCALL enters ring 0 at LSTAR, keeps RSP, saves RIP and RFLAGS, and masks RFLAGS.
pub fn syscall_enters_ring_0(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut entry = a.create_label();
        let mut behind = a.create_label();
        allow_syscall(a, entry)?;
        a.enter_user_with(i32::try_from(AC_FLAG).unwrap() | 3)?;
        a.user_address(behind)?;
        a.report(r15)?;
        a.stc()?;
        a.syscall()?;
        a.set_label(&mut behind)?;
        a.ud2()?;
        a.set_label(&mut entry)?;
        a.ring0();
        a.report(rcx)?;
        a.report(r11)?;
        a.report(rsp)?;
        a.mov(rsp, layout::STACK)?;
        a.report_flags()?;
        a.report_segments()
    });
    assert_eq!(values[0], values[1], "RCX is the address behind");
    assert_eq!(values[2] & (AC_FLAG | 0xff), AC_FLAG | 3, "R11 is RFLAGS");
    assert_eq!(values[3], layout::USER_STACK, "RSP stays");
    assert_eq!(values[4] & (AC_FLAG | IF | TF), 0, "masked");
    assert_eq!(
        values[5..],
        [
            u64::from(layout::KERNEL_CODE),
            u64::from(layout::KERNEL_DATA)
        ]
    );
}

/// SYSCALL keeps the flags that SFMASK doesn't name.
pub fn syscall_keeps_the_unmasked_flags(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut entry = a.create_label();
        allow_syscall(a, entry)?;
        a.enter_user()?;
        a.stc()?;
        a.syscall()?;
        a.ud2()?;
        a.set_label(&mut entry)?;
        a.ring0();
        a.mov(rsp, layout::STACK)?;
        a.report_flags()
    });
    assert_eq!(values[0] & 1, 1, "CF");
}

/// SYSRET goes back to 64-bit ring 3 with RFLAGS from R11.
pub fn sysret_goes_back_to_64_bit_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut entry = a.create_label();
        let mut start = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut entry)?;
        // RF and reserved bits don't come back.
        a.or(r11, i32::try_from(RF | 1 << 15 | 1).unwrap())?;
        a.sysretq()?;
        a.set_label(&mut start)?;
        allow_syscall(a, entry)?;
        a.enter_user()?;
        a.syscall()?;
        a.report_flags()?;
        a.report_segments()?;
        a.user_done()
    });
    assert_eq!(values[0] & (RF | 1 << 15), 0);
    assert_eq!(values[0] & 3, 3);
    assert_eq!(
        values[1..],
        [u64::from(layout::USER_CODE), u64::from(layout::USER_DATA)]
    );
}

/// SYSRET without REX.W goes to 32-bit code.
pub fn sysret_goes_to_32_bit_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut target = a.create_label();
        let mut over = a.create_label();
        a.jmp(over)?;
        a.set_label(&mut target)?;
        // 32-bit: dec eax (48); mov [SCRATCH], eax; int 0x80.
        a.db(&[0x48, 0xa3])?;
        a.dd(&[u32::try_from(layout::SCRATCH).unwrap()])?;
        a.db(&[0xcd, layout::DONE_VECTOR])?;
        a.set_label(&mut over)?;
        a.write_msr(msr::STAR, star())?;
        a.user_address(target)?;
        a.mov(rcx, r15)?;
        a.mov(eax, 0x100)?;
        a.report(rax)?;
        a.mov(r11, 2_u64)?;
        a.sysret()
    });
    assert_eq!(values, [0x100]);
    assert_eq!(
        guest.peek(layout::SCRATCH) & 0xffff_ffff,
        0xff,
        "48 was DEC EAX"
    );
}

/// Without EFER.SCE both are #UD; SYSRET in ring 3 is #GP.
pub fn syscall_needs_sce(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.enter_user()?;
        a.faulting(|a| a.sysretq())?;
        a.user_done()
    });
    guest.run_expecting(&[fault(UD), fault(UD)], |a| {
        a.read_msr(msr::EFER)?;
        a.btr(eax, 0)?;
        a.wrmsr()?;
        a.faulting(|a| a.sysretq())?;
        a.enter_user()?;
        a.faulting(|a| a.syscall())?;
        a.user_done()
    });
}

/// SYSRET to a non-canonical address is #GP (in ring 0 on Intel, at the target on AMD).
pub fn sysret_to_a_non_canonical_address_is_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.write_msr(msr::STAR, star())?;
        a.mov(rcx, 0x0000_8000_0000_0000_u64)?;
        a.mov(r11, 2_u64)?;
        a.mov(rbp, rsp)?;
        let mut after = a.create_label();
        // In ring 3 after the fault or not: the user's view of the code runs in both.
        a.user_address(after)?;
        let resume = a.shared(layout::RESUME);
        a.mov(qword_ptr(resume), r15)?;
        a.sysretq()?;
        a.set_label(&mut after)?;
        a.user_done()
    });
}

/// IRET within ring 0 loads RSP and SS too, in 64-bit mode.
pub fn iret_within_ring_0_loads_the_stack(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut next = a.create_label();
        a.push(i32::from(layout::KERNEL_DATA))?;
        a.mov(rax, layout::STACK - 0x808)?;
        a.push(rax)?;
        a.push(0x202 | 1)?;
        a.push(i32::from(layout::KERNEL_CODE))?;
        a.lea(rax, ptr(next))?;
        a.push(rax)?;
        a.iretq()?;
        a.set_label(&mut next)?;
        a.report(rsp)?;
        a.report_flags()?;
        a.cli()
    });
    assert_eq!(values, [layout::STACK - 0x808, 0x203]);
}

/// IRET with NT set is #GP in long mode.
pub fn iret_with_nt_is_gp(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.push(NT | 2)?;
        a.popfq()?;
        a.faulting(|a| a.iretq())?;
        a.push(2)?;
        a.popfq()
    });
}

/// IRET to what can't be run faults before it leaves: RIP not canonical, CS null, CS of data.
pub fn iret_to_nowhere_faults(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(
        &[
            fault(GP),
            fault_with(GP, u64::from(layout::KERNEL_DATA)),
            fault_with(NP, u64::from(layout::ABSENT_CODE)),
        ],
        |a| {
            for selector in [0, layout::KERNEL_DATA, layout::ABSENT_CODE] {
                a.mov(rbp, rsp)?;
                a.push(i32::from(layout::KERNEL_DATA))?;
                a.push(rbp)?;
                a.push(2)?;
                a.push(i32::from(selector))?;
                a.push(rbp)?;
                a.faulting(|a| a.iretq())?;
                a.mov(rsp, rbp)?;
            }
            Ok(())
        },
    );
    assert!(
        guest
            .faults()
            .iter()
            .all(|fault| fault.cs == u64::from(layout::KERNEL_CODE))
    );
}

/// IRET to ring 3 with a null or ring-0 SS is #GP.
pub fn iret_to_user_checks_the_stack_segment(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(
        &[fault(GP), fault_with(GP, u64::from(layout::KERNEL_DATA))],
        |a| {
            for selector in [3, layout::KERNEL_DATA] {
                a.mov(rbp, rsp)?;
                a.push(i32::from(selector))?;
                a.push(rbp)?;
                a.push(2)?;
                a.push(i32::from(layout::USER_CODE))?;
                a.push(rbp)?;
                a.faulting(|a| a.iretq())?;
                a.mov(rsp, rbp)?;
            }
            Ok(())
        },
    );
}

/// IRET from ring 3 can't change IF or IOPL.
pub fn iret_in_user_mode_keeps_if_and_iopl(bench: &Bench<'_>) {
    for (before, given, after) in [(2, 0x3203, 3), (0x202, 0x3003, 0x203)] {
        let mut guest = Guest::new(bench);
        let values = guest.run(|a| {
            let mut next = a.create_label();
            a.enter_user_with(before)?;
            a.push(i32::from(layout::USER_DATA))?;
            a.push(rsp)?;
            a.push(given)?;
            a.push(i32::from(layout::USER_CODE))?;
            a.user_address(next)?;
            a.push(r15)?;
            a.iretq()?;
            a.set_label(&mut next)?;
            a.report_flags()?;
            a.user_done()
        });
        assert_eq!(values, [after]);
    }
}

/// A return to ring 3 clears null selectors whose lower bits are set.
pub fn a_return_to_ring_3_clears_null_selectors(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(ecx, 3)?;
        a.mov(es, ecx)?;
        a.mov(eax, es)?;
        a.report(rax)?;
        a.enter_user()?;
        a.mov(eax, es)?;
        a.report(rax)?;
        a.user_done()
    });
    assert_eq!(values, [3, 0]);
}

/// Ring 0 enters 32-bit code in ring 3, and an interrupt comes back to 64 bits.
pub fn iret_enters_32_bit_user_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run(|a| {
        let mut user = a.create_label();
        a.push(i32::from(layout::USER_DATA))?;
        a.mov(rax, layout::USER_STACK)?;
        a.push(rax)?;
        a.push(2)?;
        a.push(i32::from(layout::USER_CODE32))?;
        a.user_address(user)?;
        a.push(r15)?;
        // The kernel's own data segment would be nulled on the way out.
        a.mov(eax, u32::from(layout::USER_DATA))?;
        a.mov(ds, eax)?;
        a.mov(rax, 0xffff_ffff_0000_0001_u64)?;
        a.iretq()?;
        a.set_label(&mut user)?;
        // 32-bit: inc eax (40); push eax; pop [SCRATCH]; int 0x80.
        a.db(&[0x40, 0x50, 0x8f, 0x05])?;
        a.dd(&[u32::try_from(layout::SCRATCH).unwrap()])?;
        a.db(&[0xcd, layout::DONE_VECTOR])
    });
    assert_eq!(guest.peek(layout::SCRATCH), 2);
}
