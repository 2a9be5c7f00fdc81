//! The time-stamp counter and the machine clock.

use crate::prelude::*;

/// RDTSC never goes back, across exits too.
pub fn rdtsc_never_goes_back(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.place_port(0x300, 4, Recorder::new());
    let values = guest.run(|a| {
        let mut again = a.create_label();
        let mut fine = a.create_label();
        a.xor(esi, esi)?;
        a.xor(edi, edi)?;
        a.mov(ebx, 200)?;
        a.set_label(&mut again)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.cmp(rax, rsi)?;
        a.ja(fine)?;
        a.inc(edi)?;
        a.set_label(&mut fine)?;
        a.mov(rsi, rax)?;
        a.mov(edx, 0x300)?;
        a.out(dx, al)?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.report(rdi)
    });
    assert_eq!(values, [0], "times that it did not advance");
}

/// CR4.TSD keeps RDTSC from ring 3.
pub fn tsd_keeps_the_counter_from_user_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        a.set_cr4(paging::CR4_TSD)?;
        a.rdtsc()?;
        a.enter_user()?;
        a.faulting(|a| a.rdtsc())?;
        a.user_done()
    });
}

/// RDTSCP returns TSC_AUX too. Where it isn't announced it raises #UD or works all the same.
pub fn rdtscp_returns_tsc_aux(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(RDTSCP) {
        let values = guest.run_or_undefined(|a| {
            a.mov(ecx, 0x5678)?;
            a.faulting(|a| a.rdtscp())?;
            a.report(rcx)
        });
        assert!([0, 0x5678].contains(&values[0]), "{values:x?}");
        return;
    }
    let values = guest.run(|a| {
        a.write_msr(msr::TSC_AUX, 0x1234)?;
        a.xor(ecx, ecx)?;
        a.rdtscp()?;
        a.report(rcx)
    });
    assert_eq!(values, [0x1234]);
}

/// Writing the counter moves it.
pub fn the_counter_can_be_written(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.write_msr(msr::IA32_TSC, 1 << 50)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.report(rax)
    });
    let since = values[0].checked_sub(1 << 50);
    assert!(
        since.is_some_and(|since| since < 1 << 40),
        "{:#x}",
        values[0]
    );
}

/// The machine clock runs and can be set.
pub fn the_machine_clock_runs_and_can_be_set(bench: &Bench<'_>) {
    let guest = Guest::new(bench);
    let first = guest.vm.clock_ns().unwrap();
    let second = guest.vm.clock_ns().unwrap();
    assert!(second >= first, "{first} then {second}");
    let hour = 3_600_000_000_000;
    guest.vm.set_clock_ns(hour).unwrap();
    let set = guest.vm.clock_ns().unwrap();
    assert!((hour..hour + 10_000_000_000).contains(&set), "{set}");
}

/// KVM's paravirtual clock: a page with an even version, a multiplier, and a time that advances.
pub fn the_paravirtual_clock_advances(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let features = guest.cpuid.get(0x4000_0001, 0).map_or(0, |leaf| leaf.eax);
    assert!(features & 1 << 3 != 0, "the clock (feature 3) is offered");
    let page = layout::FRAMES;
    let read = |guest: &mut Guest| {
        guest.run(|a| {
            a.write_msr(msr::KVM_SYSTEM_TIME_NEW, page | 1)?;
            a.mov(rbx, page)?;
            for offset in [0, 8, 16, 24] {
                a.mov(rax, qword_ptr(rbx + offset))?;
                a.report(rax)?;
            }
            Ok(())
        })
    };
    let first = read(&mut guest);
    assert_eq!(first[0] & 1, 0, "version is even");
    assert_ne!(first[1], 0, "tsc_timestamp");
    assert_ne!(first[3] & 0xffff_ffff, 0, "multiplier");
    let second = read(&mut guest);
    assert!(
        second[2] >= first[2],
        "system_time: {} then {}",
        first[2],
        second[2]
    );
}
