//! The local APIC's registers, timer and x2APIC mode (SDM 3A §11.4, §11.5, §11.12).

use crate::prelude::*;

const TIMER: u64 = 0x60;

fn wait_at_least(a: &mut Asm, times: i32) -> Assembled {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(qword_ptr(layout::IRQ_COUNTS + TIMER * 8), times)?;
    a.jb(again)
}

/// Id and version are a modern APIC's.
pub fn id_and_version_are_a_modern_apics(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let values = guest.run(|a| {
        a.read_apic(0x20)?;
        a.report(rax)?;
        a.read_apic(0x30)?;
        a.report(rax)
    });
    assert_eq!(values[0] >> 24, 0, "id");
    assert!(
        (0x10..=0x15).contains(&(values[1] & 0xff)),
        "version {:#x}",
        values[1]
    );
    assert!(
        (3..=7).contains(&(values[1] >> 16 & 0xff)),
        "entries of the vector table"
    );
}

/// The base register says: enabled, the boot processor, at the usual place.
pub fn the_base_register_is_as_after_reset(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let values = guest.run(|a| {
        a.read_msr(msr::IA32_APIC_BASE)?;
        a.report(rax)
    });
    assert_eq!(values, [layout::LAPIC | 1 << 11 | 1 << 8]);
}

/// One shot: one interrupt, then the count stays at zero.
pub fn the_timer_fires_once(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x3e0, 0xb)?;
        a.write_apic(0x320, 0x60)?;
        a.sti()?;
        a.write_apic(0x380, 10_000)?;
        wait_at_least(a, 1)?;
        a.spin(100_000)?;
        a.read_apic(0x390)?;
        a.report(rax)
    });
    assert_eq!(values, [0]);
    assert_eq!(guest.interrupt_count(0x60), 1);
}

/// Periodic: again and again until the count is zero.
pub fn the_timer_fires_periodically(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x3e0, 0xb)?;
        a.write_apic(0x320, 0x2_0060)?;
        a.sti()?;
        a.write_apic(0x380, 1_000_000)?;
        wait_at_least(a, 3)?;
        a.write_apic(0x380, 0)?;
        a.spin(1000)?;
        a.cli()?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + TIMER * 8))?;
        a.report(rax)?;
        a.sti()?;
        a.spin(100_000)?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + TIMER * 8))?;
        a.report(rax)
    });
    assert_eq!(values[0], values[1], "it stopped");
}

/// The current count goes down.
pub fn the_current_count_goes_down(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x3e0, 0xb)?;
        a.write_apic(0x320, 0x1_0060)?;
        a.write_apic(0x380, u32::MAX)?;
        for _ in 0..2 {
            a.spin(10_000)?;
            a.read_apic(0x390)?;
            a.report(rax)?;
        }
        a.write_apic(0x380, 0)
    });
    assert!(values[0] < u64::from(u32::MAX), "{values:x?}");
    assert!(values[1] < values[0], "{values:x?}");
}

/// A masked timer counts and stays silent.
pub fn a_masked_timer_is_silent(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x3e0, 0xb)?;
        a.write_apic(0x320, 0x1_0060)?;
        a.sti()?;
        a.write_apic(0x380, 1000)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.read_apic(0x390)?;
        a.test(eax, eax)?;
        a.jnz(again)?;
        a.spin(1000)
    });
    assert_eq!(guest.interrupt_count(0x60), 0);
}

/// TSC deadline: fires when the counter has passed the value, and clears it.
pub fn the_timer_fires_at_a_deadline(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    if !guest.has(TSC_DEADLINE) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.write_msr(msr::IA32_TSC_DEADLINE, 1))
        });
        return;
    }
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x320, 0x4_0060)?;
        a.mfence()?;
        a.sti()?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.add(rax, 2_000_000)?;
        a.mov(rsi, rax)?;
        a.mov(rdx, rax)?;
        a.shr(rdx, 32)?;
        a.mov(ecx, msr::IA32_TSC_DEADLINE)?;
        a.wrmsr()?;
        wait_at_least(a, 1)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rsi)?;
        a.setae(al)?;
        a.movzx(eax, al)?;
        a.report(rax)?;
        a.read_msr(msr::IA32_TSC_DEADLINE)?;
        a.report(rax)
    });
    assert_eq!(values, [1, 0], "not early; disarmed");
    assert_eq!(guest.interrupt_count(0x60), 1);
}

/// A deadline in the past fires at once.
pub fn a_past_deadline_fires_at_once(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    if !guest.has(TSC_DEADLINE) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.write_msr(msr::IA32_TSC_DEADLINE, 1))
        });
        return;
    }
    guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x320, 0x4_0060)?;
        a.mfence()?;
        a.sti()?;
        a.write_msr(msr::IA32_TSC_DEADLINE, 1)?;
        wait_at_least(a, 1)
    });
}

/// x2APIC mode: registers are MSRs, and the way back leads through disabled.
pub fn x2apic_mode_has_msrs(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let base = layout::LAPIC | 1 << 11 | 1 << 8;
    if !guest.has(X2APIC) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.write_msr(msr::IA32_APIC_BASE, base | 1 << 10))
        });
        return;
    }
    let values = guest.run_expecting(&[fault(GP), fault(GP), fault(GP)], |a| {
        a.mov(ecx, 0x802)?;
        a.faulting(|a| a.rdmsr())?;
        a.write_msr(msr::IA32_APIC_BASE, base | 1 << 10)?;
        a.set_eoi(layout::Eoi::X2apic)?;
        a.read_msr(0x802)?;
        a.report(rax)?;
        a.write_msr(0x80f, 0x1ff)?;
        a.sti()?;
        // Self IPI.
        a.write_msr(0x83f, 0x77)?;
        a.wait_for(layout::IRQ_COUNTS + 0x77 * 8, 1)?;
        // Straight back to xAPIC is refused; so is a write of the read-only id.
        a.faulting(|a| a.write_msr(msr::IA32_APIC_BASE, base))?;
        a.faulting(|a| a.write_msr(0x802, 0))?;
        a.cli()
    });
    assert_eq!(values, [0]);
    assert_eq!(guest.interrupts(), [0x77]);
}

/// The timer works in x2APIC mode.
pub fn the_timer_works_in_x2apic_mode(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let base = layout::LAPIC | 1 << 11 | 1 << 8;
    if !guest.has(X2APIC) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.write_msr(msr::IA32_APIC_BASE, base | 1 << 10))
        });
        return;
    }
    guest.run(|a| {
        a.write_msr(msr::IA32_APIC_BASE, base | 1 << 10)?;
        a.set_eoi(layout::Eoi::X2apic)?;
        a.write_msr(0x80f, 0x1ff)?;
        a.write_msr(0x83e, 0xb)?;
        a.write_msr(0x832, 0x60)?;
        a.sti()?;
        a.write_msr(0x838, 10_000)?;
        wait_at_least(a, 1)
    });
    assert_eq!(guest.interrupt_count(0x60), 1);
}

/// The APIC's registers travel in the state.
pub fn the_registers_travel_in_the_state(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x80, 0x30)?;
        a.write_apic(0x320, 0x1_0077)
    });
    let state = guest.vcpu.state().unwrap();
    let register =
        |offset: usize| u32::from_le_bytes(state.lapic[offset..offset + 4].try_into().unwrap());
    assert_eq!(register(0x80), 0x30);
    assert_eq!(register(0xf0), 0x1ff);
    assert_eq!(register(0x320), 0x1_0077);
    guest.vcpu.set_state(&state).unwrap();
    let values = guest.run(|a| {
        a.read_apic(0x320)?;
        a.report(rax)
    });
    assert_eq!(values, [0x1_0077]);
}
