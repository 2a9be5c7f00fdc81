//! Two processors (SDM 3A §8.4, §10.6; §8.2 for memory order).

use ringfence_x86::state::Activity;

use crate::prelude::*;

const FLAG: u64 = layout::SCRATCH;
const ACK: u64 = layout::SCRATCH + 8;

fn two(bench: &Bench<'_>) -> Guest {
    Guest::with(
        bench,
        Setup {
            chips: true,
            vcpus: 2,
            ..Setup::default()
        },
    )
}

/// Runs `second` on processor 1 and `first`, once that is started, on processor 0, to its end.
fn run(
    guest: &mut Guest,
    second: impl FnOnce(&mut Asm) -> Assembled,
    first: impl FnOnce(&mut Asm) -> Assembled,
) -> Vec<u64> {
    guest.run(|a| {
        let mut entry = a.create_label();
        let mut start = a.create_label();
        let mut rest = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut entry)?;
        second(a)?;
        a.set_label(&mut rest)?;
        a.pause()?;
        a.jmp(rest)?;
        a.set_label(&mut start)?;
        a.start_processors(entry)?;
        first(a)
    })
}

/// Writes `value` to the quadword at `address`, when what came before is done.
fn signal(a: &mut Asm, address: u64, value: i32) -> Assembled {
    a.mov(qword_ptr(address), value)
}

/// A second processor waits until INIT and SIPI start it at the vector's page.
pub fn init_and_sipi_start_a_processor(bench: &Bench<'_>) {
    let mut guest = two(bench);
    let before = guest.others[0].state().unwrap().activity;
    assert!(
        matches!(before, Activity::Uninitialized | Activity::WaitForSipi),
        "{before:?}"
    );
    run(&mut guest, |a| signal(a, FLAG, 1), |a| a.wait_for(FLAG, 1));
}

/// Each processor has its own APIC id, in CPUID too.
pub fn each_processor_has_its_own_id(bench: &Bench<'_>) {
    let mut guest = two(bench);
    let values = run(
        &mut guest,
        |a| {
            a.read_apic(0x20)?;
            a.shr(eax, 24)?;
            a.report(rax)?;
            a.mov(eax, 1)?;
            a.cpuid()?;
            a.shr(ebx, 24)?;
            a.report(rbx)?;
            a.read_msr(msr::IA32_APIC_BASE)?;
            a.report(rax)?;
            signal(a, FLAG, 1)
        },
        |a| a.wait_for(FLAG, 1),
    );
    assert_eq!(values[..2], [1, 1]);
    assert_eq!(values[2] & 1 << 8, 0, "not the boot processor");
}

/// Locked additions of both add up.
pub fn locked_additions_add_up(bench: &Bench<'_>) {
    const COUNTER: u64 = layout::FRAMES;
    const TURNS: u32 = 20_000;
    fn add(a: &mut Asm) -> Assembled {
        let mut again = a.create_label();
        a.mov(ecx, TURNS)?;
        a.set_label(&mut again)?;
        a.lock().add(qword_ptr(COUNTER), 1)?;
        a.dec(ecx)?;
        a.jnz(again)
    }
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| {
            add(a)?;
            signal(a, FLAG, 1)
        },
        |a| {
            add(a)?;
            a.wait_for(FLAG, 1)
        },
    );
    assert_eq!(guest.peek(COUNTER), 2 * u64::from(TURNS));
}

/// Stores are seen in order: who sees the flag sees the data (§8.2.3.2).
pub fn stores_are_seen_in_order(bench: &Bench<'_>) {
    const DATA: u64 = layout::FRAMES;
    const ROUNDS: i32 = 2000;
    let mut guest = two(bench);
    let values = run(
        &mut guest,
        |a| {
            let mut again = a.create_label();
            a.xor(ecx, ecx)?;
            a.set_label(&mut again)?;
            a.inc(ecx)?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.mov(qword_ptr(DATA + 0x1000), rcx)?;
            a.cmp(ecx, ROUNDS)?;
            a.jne(again)
        },
        |a| {
            let mut again = a.create_label();
            let mut fine = a.create_label();
            a.xor(edi, edi)?;
            a.set_label(&mut again)?;
            a.mov(rax, qword_ptr(DATA + 0x1000))?;
            a.mov(rbx, qword_ptr(DATA))?;
            a.cmp(rbx, rax)?;
            a.jae(fine)?;
            a.inc(edi)?;
            a.set_label(&mut fine)?;
            a.cmp(eax, ROUNDS)?;
            a.jne(again)?;
            a.report(rdi)
        },
    );
    assert_eq!(values, [0], "times that the flag was ahead of the data");
}

/// With MFENCE between, two processors' stores and loads are not both late (§8.2.3.4).
pub fn fences_keep_stores_before_loads(bench: &Bench<'_>) {
    const X: u64 = layout::FRAMES;
    const Y: u64 = layout::FRAMES + 0x1000;
    const SEEN: u64 = layout::FRAMES + 0x2000;
    const ROUNDS: i32 = 500;
    let mut guest = two(bench);
    let values = run(
        &mut guest,
        |a| {
            let mut again = a.create_label();
            let mut go = a.create_label();
            a.xor(ecx, ecx)?;
            a.set_label(&mut again)?;
            a.inc(ecx)?;
            a.set_label(&mut go)?;
            a.pause()?;
            a.cmp(dword_ptr(FLAG), ecx)?;
            a.jne(go)?;
            a.mov(qword_ptr(Y), 1)?;
            a.mfence()?;
            a.mov(rax, qword_ptr(X))?;
            a.mov(qword_ptr(SEEN), rax)?;
            a.mov(dword_ptr(ACK), ecx)?;
            a.cmp(ecx, ROUNDS)?;
            a.jne(again)
        },
        |a| {
            let mut again = a.create_label();
            let mut wait = a.create_label();
            let mut fine = a.create_label();
            a.xor(ecx, ecx)?;
            a.xor(edi, edi)?;
            a.set_label(&mut again)?;
            a.inc(ecx)?;
            a.mov(qword_ptr(X), 0)?;
            a.mov(qword_ptr(Y), 0)?;
            a.mfence()?;
            a.mov(dword_ptr(FLAG), ecx)?;
            a.mov(qword_ptr(X), 1)?;
            a.mfence()?;
            a.mov(rbx, qword_ptr(Y))?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(ACK), ecx)?;
            a.jne(wait)?;
            a.or(rbx, qword_ptr(SEEN))?;
            a.jnz(fine)?;
            a.inc(edi)?;
            a.set_label(&mut fine)?;
            a.cmp(ecx, ROUNDS)?;
            a.jne(again)?;
            a.report(rdi)
        },
    );
    assert_eq!(values, [0], "times that both loads came before both stores");
}

/// An interrupt goes to the processor that it is for.
pub fn an_ipi_goes_to_its_processor(bench: &Bench<'_>) {
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| {
            a.enable_apic()?;
            a.sti()?;
            signal(a, FLAG, 1)
        },
        |a| {
            a.wait_for(FLAG, 1)?;
            a.cli()?;
            a.write_apic(0x310, 1 << 24)?;
            a.write_apic(0x300, 0x59)?;
            a.wait_for(layout::IRQ_COUNTS + 0x59 * 8, 1)
        },
    );
    assert_eq!(guest.interrupts(), [0x59]);
}

/// A broadcast reaches the others, or everyone.
pub fn broadcasts_reach_whom_they_name(bench: &Bench<'_>) {
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| {
            a.enable_apic()?;
            a.sti()?;
            signal(a, FLAG, 1)
        },
        |a| {
            a.wait_for(FLAG, 1)?;
            a.sti()?;
            a.write_apic(0x300, 0x000c_0000 | 0x59)?;
            a.wait_for(layout::IRQ_COUNTS + 0x59 * 8, 1)?;
            a.write_apic(0x300, 0x0008_0000 | 0x5a)?;
            a.wait_for(layout::IRQ_COUNTS + 0x5a * 8, 2)?;
            a.spin(10_000)
        },
    );
    assert_eq!(guest.interrupt_count(0x59), 1, "all but the sender");
    assert_eq!(guest.interrupt_count(0x5a), 2, "all");
}

/// A halted processor wakes for an interrupt from the other, a hundred times.
pub fn a_halted_processor_wakes_for_an_ipi(bench: &Bench<'_>) {
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| {
            let mut again = a.create_label();
            a.enable_apic()?;
            signal(a, FLAG, 1)?;
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.cli()?;
            a.lock().inc(qword_ptr(ACK))?;
            a.jmp(again)
        },
        |a| {
            let mut again = a.create_label();
            let mut wait = a.create_label();
            a.wait_for(FLAG, 1)?;
            a.write_apic(0x310, 1 << 24)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut again)?;
            a.inc(ebx)?;
            a.write_apic(0x300, 0x59)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(ACK), ebx)?;
            a.jb(wait)?;
            a.cmp(ebx, 100)?;
            a.jne(again)
        },
    );
    assert_eq!(guest.interrupt_count(0x59), 100);
}

/// An NMI goes to the other processor whatever its IF.
pub fn an_nmi_goes_to_the_other_processor(bench: &Bench<'_>) {
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| {
            a.enable_apic()?;
            a.cli()?;
            signal(a, FLAG, 1)
        },
        |a| {
            a.wait_for(FLAG, 1)?;
            a.write_apic(0x310, 1 << 24)?;
            a.write_apic(0x300, 0x4400)?;
            a.wait_for(layout::IRQ_COUNTS + 2 * 8, 1)
        },
    );
    // Not the list: the handler adds to it after it has counted.
    assert_eq!(guest.interrupt_count(2), 1);
}

/// INIT stops a running processor, and SIPI starts it again.
pub fn init_restarts_a_running_processor(bench: &Bench<'_>) {
    let mut guest = two(bench);
    run(
        &mut guest,
        |a| a.lock().inc(qword_ptr(FLAG)),
        |a| {
            a.wait_for(FLAG, 1)?;
            a.write_apic(0x310, 1 << 24)?;
            a.write_apic(0x300, 0x4500)?;
            a.spin(10_000)?;
            a.write_apic(
                0x300,
                0x4600 | u32::try_from(layout::TRAMPOLINE >> 12).unwrap(),
            )?;
            a.wait_for(FLAG, 2)
        },
    );
}

/// TLB shoot-down: after the other processor's handler flushed, it sees the new page.
pub fn a_tlb_shoot_down_reaches_the_other_processor(bench: &Bench<'_>) {
    const ROUNDS: i32 = 20;
    let mut guest = two(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    for frame in 0..=20 {
        guest.poke(layout::FRAMES + frame * 0x1000, frame);
    }
    let values = run(
        &mut guest,
        |a| {
            let mut again = a.create_label();
            let mut handler = a.create_label();
            let mut begin = a.create_label();
            a.jmp(begin)?;
            a.set_label(&mut handler)?;
            a.push(rax)?;
            a.mov(rax, layout::TEST)?;
            a.invlpg(byte_ptr(rax))?;
            a.write_apic(0xb0, 0)?;
            a.lock().inc(qword_ptr(ACK))?;
            a.pop(rax)?;
            a.iretq()?;
            a.set_label(&mut begin)?;
            a.install_gate(0x5b, handler)?;
            a.enable_apic()?;
            a.mov(rbx, layout::TEST)?;
            a.sti()?;
            signal(a, FLAG, 1)?;
            // What it sees goes behind the count of flushes, so the pair can be compared.
            a.set_label(&mut again)?;
            a.mov(rcx, qword_ptr(ACK))?;
            a.mov(rdx, qword_ptr(rbx))?;
            a.cmp(rdx, rcx)?;
            a.jae(again)?;
            a.lock().inc(qword_ptr(layout::SCRATCH + 16))?;
            a.jmp(again)
        },
        |a| {
            let mut again = a.create_label();
            let mut wait = a.create_label();
            a.wait_for(FLAG, 1)?;
            a.write_apic(0x310, 1 << 24)?;
            a.xor(edi, edi)?;
            a.set_label(&mut again)?;
            a.inc(edi)?;
            a.mov(rdx, layout::PT_TEST)?;
            a.add(qword_ptr(rdx), 0x1000)?;
            a.write_apic(0x300, 0x5b)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(ACK), edi)?;
            a.jb(wait)?;
            a.spin(2000)?;
            a.cmp(edi, ROUNDS)?;
            a.jne(again)?;
            a.mov(rax, qword_ptr(layout::SCRATCH + 16))?;
            a.report(rax)
        },
    );
    assert_eq!(
        values,
        [0],
        "times that an old page was seen after its flush"
    );
}

/// A processor that was kicked before it halts, with interrupts off, doesn't; nor does it stay
/// halted when it is kicked then.
pub fn a_kick_ends_the_next_hlt_too(bench: &Bench<'_>) {
    const KICK_CPU: u32 = 5;
    const SECOND: u32 = 1;
    fn kick(a: &mut Asm) -> Assembled {
        a.mov(eax, KICK_CPU)?;
        a.xor(ebx, ebx)?;
        a.mov(ecx, SECOND)?;
        a.vmcall()
    }
    let mut guest = two(bench);
    if !guest.has(PV_UNHALT) {
        return;
    }
    run(
        &mut guest,
        |a| {
            a.cli()?;
            signal(a, FLAG, 1)?;
            a.wait_for(ACK, 1)?;
            // Long enough for the kick to be seen.
            a.spin(200_000)?;
            a.hlt()?;
            signal(a, FLAG, 2)?;
            a.hlt()?;
            signal(a, FLAG, 3)
        },
        |a| {
            a.wait_for(FLAG, 1)?;
            kick(a)?;
            signal(a, ACK, 1)?;
            a.wait_for(FLAG, 2)?;
            a.spin(200_000)?;
            kick(a)?;
            a.wait_for(FLAG, 3)
        },
    );
}

/// Both processors run through hundreds of functions, each of which counts what they do together
/// in a locked quadword across two pages.
pub fn much_code_runs_on_both(bench: &Bench<'_>) {
    const FUNCTIONS: u32 = 512;
    const ROUNDS: u32 = 4;
    const STRIDE: u32 = 0x100;
    const PLACE: u64 = layout::FRAMES + 0x1_0000;
    const COUNTER: u64 = layout::FRAMES + 0xffc;
    fn call_all(a: &mut Asm) -> Assembled {
        let mut round = a.create_label();
        let mut next = a.create_label();
        a.mov(rsi, COUNTER)?;
        a.xor(eax, eax)?;
        a.mov(edi, ROUNDS)?;
        a.set_label(&mut round)?;
        a.mov(rbx, PLACE)?;
        a.mov(ecx, FUNCTIONS)?;
        a.set_label(&mut next)?;
        a.call(rbx)?;
        a.add(rbx, i32::try_from(STRIDE).unwrap())?;
        a.dec(ecx)?;
        a.jnz(next)?;
        a.dec(edi)?;
        a.jnz(round)
    }
    let mut guest = two(bench);
    for number in 0..FUNCTIONS {
        // add rax, number; lock inc qword ptr [rsi]; ret
        let mut code = vec![0x48, 0x05];
        code.extend(number.to_le_bytes());
        code.extend([0xf0, 0x48, 0xff, 0x06, 0xc3]);
        guest.write(PLACE + u64::from(number * STRIDE), &code);
    }
    let values = run(
        &mut guest,
        |a| {
            call_all(a)?;
            a.report(rax)?;
            signal(a, FLAG, 1)
        },
        |a| {
            call_all(a)?;
            a.wait_for(FLAG, 1)?;
            a.report(rax)
        },
    );
    let sum = u64::from(ROUNDS * FUNCTIONS * (FUNCTIONS - 1) / 2);
    assert_eq!(values, [sum, sum]);
    assert_eq!(guest.peek(COUNTER), u64::from(2 * ROUNDS * FUNCTIONS));
}

/// Code that one processor changes runs changed on the other, once that serialized (§8.1.3).
pub fn cross_modified_code_runs_changed(bench: &Bench<'_>) {
    const ROUNDS: i32 = 100;
    let mut guest = two(bench);
    // mov eax, imm32; ret
    guest.write(layout::FRAMES, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let values = run(
        &mut guest,
        |a| {
            let mut again = a.create_label();
            let mut wait = a.create_label();
            let mut fine = a.create_label();
            a.mov(rsi, layout::FRAMES)?;
            a.xor(edi, edi)?;
            a.xor(r12, r12)?;
            a.set_label(&mut again)?;
            a.inc(edi)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(FLAG), edi)?;
            a.jne(wait)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.call(rsi)?;
            a.cmp(eax, edi)?;
            a.je(fine)?;
            a.inc(r12)?;
            a.set_label(&mut fine)?;
            a.report(r12)?;
            a.mov(dword_ptr(ACK), edi)?;
            a.jmp(again)
        },
        |a| {
            let mut again = a.create_label();
            let mut wait = a.create_label();
            a.mov(rsi, layout::FRAMES)?;
            a.xor(edi, edi)?;
            a.set_label(&mut again)?;
            a.inc(edi)?;
            a.mov(dword_ptr(rsi + 1), edi)?;
            a.mov(dword_ptr(FLAG), edi)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(ACK), edi)?;
            a.jne(wait)?;
            a.cmp(edi, ROUNDS)?;
            a.jne(again)
        },
    );
    assert_eq!(values, [0], "times that old code ran");
}

/// A processor that waits to be started answers a kick.
pub fn a_waiting_processor_answers_a_kick(bench: &Bench<'_>) {
    let mut guest = two(bench);
    let mut second = guest.others.remove(0);
    let waker = second.waker();
    let runner = std::thread::spawn(move || second.run().map(|exit| (exit, second)));
    waker.kick();
    let (exit, second) = runner.join().unwrap().unwrap();
    assert_eq!(exit, VcpuExit::Kicked);
    let activity = second.state().unwrap().activity;
    assert_ne!(activity, Activity::Running);
}
