//! x87, SSE and AVX state.

use crate::prelude::*;

/// The registers survive exits.
pub fn vector_registers_survive_exits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(0x300, 4, device);
    let registers = [
        xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13,
        xmm14, xmm15,
    ];
    let values = guest.run(|a| {
        for (value, register) in (1_u64..).zip(registers) {
            a.mov(rax, value * 0x0101_0101_0101)?;
            a.movq(register, rax)?;
        }
        a.mov(edx, 0x300)?;
        a.in_(al, dx)?;
        a.cpuid()?;
        for register in registers {
            a.movq(rax, register)?;
            a.report(rax)?;
        }
        Ok(())
    });
    let wanted: Vec<u64> = (1..=16).map(|value| value * 0x0101_0101_0101).collect();
    assert_eq!(values, wanted);
}

/// Other code on the host's thread between two runs doesn't show.
pub fn vector_registers_survive_the_hosts_own_use(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(eax, 3)?;
        a.cvtsi2sd(xmm5, eax)?;
        a.fldpi()?;
        a.hlt()?;
        a.movq(rax, xmm5)?;
        a.report(rax)?;
        let scratch = a.shared(layout::SCRATCH);
        a.fstp(qword_ptr(scratch))?;
        a.hlt()
    });
    guest.halt();
    let noise: f64 = (1..1000).map(|n| f64::from(n).sqrt()).sum();
    assert!(noise > 0.0);
    guest.finish();
    assert_eq!(f64::from_bits(guest.values()[0]), 3.0);
    assert_eq!(
        f64::from_bits(guest.peek(layout::SCRATCH)),
        std::f64::consts::PI
    );
}

/// The guest's rounding mode is its own.
pub fn mxcsr_is_the_guests_own(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        let scratch = a.shared(layout::SCRATCH);
        // Round up.
        a.mov(dword_ptr(scratch), 0x5f80)?;
        a.ldmxcsr(dword_ptr(scratch))?;
        a.hlt()?;
        a.mov(eax, 1)?;
        a.mov(ecx, 3)?;
        a.cvtsi2sd(xmm0, eax)?;
        a.cvtsi2sd(xmm1, ecx)?;
        a.divsd(xmm0, xmm1)?;
        a.movq(rax, xmm0)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.halt();
    let third: f64 = std::hint::black_box(1.0) / std::hint::black_box(3.0);
    guest.finish();
    assert_eq!(guest.values(), [third.to_bits() + 1], "a third, rounded up");
}

/// FXSAVE and FXRSTOR move the legacy state.
pub fn fxsave_and_fxrstor_move_the_state(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.mov(eax, 0x55)?;
        a.movq(xmm9, rax)?;
        a.fxsave64(ptr(rbx))?;
        a.pxor(xmm9, xmm9)?;
        a.fxrstor64(ptr(rbx))?;
        a.movq(rax, xmm9)?;
        a.report(rax)
    });
    assert_eq!(values, [0x55]);
    assert_eq!(guest.peek(layout::FRAMES + 160 + 9 * 16), 0x55);
}

/// SSE needs CR4.OSFXSR.
pub fn sse_needs_osfxsr(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(UD)], |a| {
        a.mov(rax, cr4)?;
        a.btr(rax, 9)?;
        a.mov(cr4, rax)?;
        a.faulting(|a| a.pxor(xmm0, xmm0))
    });
}

/// AVX works once XCR0 allows it; XSAVE and XRSTOR keep the upper halves.
pub fn avx_state_is_saved_and_restored(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(AVX) {
        guest.run_expecting(&[fault(UD)], |a| a.faulting(|a| a.vzeroupper()));
        return;
    }
    let values = guest.run_expecting(&[fault(UD)], |a| {
        a.clear_cr4(paging::CR4_OSXSAVE)?;
        a.faulting(|a| a.vpxor(xmm0, xmm0, xmm0))?;
        a.set_cr4(paging::CR4_OSXSAVE)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        // XCR0 has to survive an exit.
        a.cpuid()?;
        a.mov(rbx, layout::FRAMES)?;
        a.mov(rax, 0x1234_u64)?;
        a.mov(qword_ptr(rbx + 0x18), rax)?;
        a.vmovups(ymm3, ymmword_ptr(rbx))?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsave(ptr(rbx + 0x1000))?;
        a.vzeroall()?;
        a.mov(eax, 7)?;
        a.xrstor(ptr(rbx + 0x1000))?;
        a.vmovups(ymmword_ptr(rbx + 0x100), ymm3)?;
        a.mov(rax, qword_ptr(rbx + 0x118))?;
        a.report(rax)
    });
    assert_eq!(values, [0x1234]);
}

/// Upper halves of AVX registers travel in the state.
pub fn avx_state_travels_in_the_state(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(AVX) {
        assert_eq!(guest.vcpu.state().unwrap().sregs.xcr0 & 4, 0);
        return;
    }
    guest.load(|a| {
        a.set_cr4(paging::CR4_OSXSAVE)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        a.cpuid()?;
        a.mov(rbx, layout::FRAMES)?;
        a.vmovups(ymm12, ymmword_ptr(rbx))?;
        a.hlt()?;
        a.vmovups(ymmword_ptr(rbx + 0x100), ymm12)?;
        a.hlt()
    });
    guest.poke(layout::FRAMES + 0x10, 0xcafe);
    guest.halt();
    let state = guest.vcpu.state().unwrap();
    assert_eq!(state.sregs.xcr0, 7);
    let mut wiped = state.clone();
    wiped.xsave.iter_mut().skip(512).for_each(|byte| *byte = 0);
    guest.vcpu.set_state(&wiped).unwrap();
    guest.vcpu.set_state(&state).unwrap();
    guest.finish();
    assert_eq!(guest.peek(layout::FRAMES + 0x110), 0xcafe);
}
