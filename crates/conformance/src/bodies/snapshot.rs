//! A state read from one processor continues on another.

use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;

use crate::prelude::*;

/// Setting the state that was read changes nothing.
pub fn a_state_survives_its_own_round_trip(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run(|a| {
        a.mov(rax, 0x1234_5678_9abc_def0_u64)?;
        a.movq(xmm3, rax)?;
        a.fld1()
    });
    let before = guest.vcpu.state().unwrap();
    guest.vcpu.set_state(&before).unwrap();
    let after = guest.vcpu.state().unwrap();
    assert_eq!(timeless(before), timeless(after));
}

/// A guest stopped half-way goes on in a new machine with the same memory and state.
pub fn a_guest_goes_on_in_another_machine(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(rax, 0x4010_0000_0000_0000_u64)?;
        a.movq(xmm7, rax)?;
        a.mov(ebx, 0x77)?;
        a.write_msr(msr::LSTAR, 0xffff_8000_0012_3000)?;
        a.fldpi()?;
        a.stc()?;
        a.hlt()?;
        a.report_flags()?;
        a.report(rbx)?;
        a.movq(rax, xmm7)?;
        a.report(rax)?;
        a.read_msr(msr::LSTAR)?;
        a.report(rax)?;
        a.fstp(qword_ptr(layout::supervisor(layout::SCRATCH)))?;
        a.hlt()
    });
    guest.halt();
    let state = guest.vcpu.state().unwrap();
    let mut other = Guest::new(bench);
    copy_memory(&guest, &other);
    other.load_values_of(&guest);
    other.vcpu.set_state(&state).unwrap();
    other.finish();
    let values = other.values();
    assert_eq!(values[0] & 1, 1, "CF");
    assert_eq!(
        values[1..],
        [0x77, 0x4010_0000_0000_0000, 0xffff_8000_0012_3000]
    );
    assert_eq!(
        f64::from_bits(other.peek(layout::SCRATCH)),
        std::f64::consts::PI
    );
}

/// The original may go on too: reading a state changes nothing.
pub fn reading_the_state_changes_nothing(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(ecx, 3)?;
        a.hlt()?;
        a.hlt()?;
        a.report(rcx)?;
        a.hlt()
    });
    for _ in 0..2 {
        guest.halt();
        let states = [(); 2].map(|()| timeless(guest.vcpu.state().unwrap()));
        assert_eq!(states[0], states[1]);
    }
    guest.finish();
    assert_eq!(guest.values(), [3]);
}

/// Time goes on while the guest is stopped.
fn timeless(mut state: state::VcpuState) -> state::VcpuState {
    state.msrs.retain(|&(index, _)| index != msr::IA32_TSC);
    state
}

/// A pending exception in a state is delivered first.
pub fn a_pending_exception_is_delivered_first(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        let mut after = a.create_label();
        a.resume_at(after)?;
        a.hlt()?;
        a.ud2()?;
        a.set_label(&mut after)?;
        a.mov(eax, 4)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.halt();
    let mut state = guest.vcpu.state().unwrap();
    state.events.exception = Some((GP, Some(0x58)));
    guest.vcpu.set_state(&state).unwrap();
    guest.finish();
    expect(&guest.faults(), &[fault_with(GP, 0x58)]);
    assert_eq!(guest.values(), [4]);
}

/// A pending interrupt in a state is delivered first, in a bare machine too.
pub fn a_pending_interrupt_is_delivered_first(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.sti()?;
        a.hlt()?;
        a.mov(eax, 4)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.halt();
    let mut state = guest.vcpu.state().unwrap();
    state.events.interrupt = Some(0x41);
    guest.vcpu.set_state(&state).unwrap();
    guest.finish();
    assert_eq!(guest.interrupts(), [0x41]);
    assert_eq!(guest.values(), [4]);
}

/// States that no processor can have are refused, and the guest still runs.
pub fn impossible_states_are_refused(bench: &Bench<'_>) {
    use ringfence_engine::ErrorKind::Config;
    let mut guest = Guest::new(bench);
    let good = guest.vcpu.state().unwrap();
    let mut long_mode_without_paging = good.clone();
    long_mode_without_paging.sregs.cr4 &= !paging::CR4_PAE;
    let mut short_xsave = good.clone();
    short_xsave.xsave = vec![0; 100];
    let mut bad_xcr0 = good.clone();
    bad_xcr0.sregs.xcr0 = 0b101;
    for (bad, what) in [
        (long_mode_without_paging, "long mode without PAE"),
        (short_xsave, "an XSAVE area of 100 bytes"),
        (bad_xcr0, "AVX without SSE in XCR0"),
    ] {
        match guest.vcpu.set_state(&bad) {
            Err(error) => assert_eq!(error.kind(), Config, "{what}: {error}"),
            Ok(()) => panic!("accepted: {what}"),
        }
    }
    guest.vcpu.set_state(&good).unwrap();
    guest.run(|a| a.nop());
}

fn copy_memory(from: &Guest, to: &Guest) {
    let mut bytes = vec![0; usize::try_from(layout::RAM_BYTES).unwrap()];
    from.ram
        .memory()
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    to.ram
        .memory()
        .write_slice(&bytes, GuestAddress(0))
        .unwrap();
}
