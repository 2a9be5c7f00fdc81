//! The debugger's view: single step and breakpoints.

use crate::prelude::*;

const STEP: VcpuExit = VcpuExit::Debug(DebugStop::Step);

fn at(address: u64) -> VcpuExit {
    VcpuExit::Debug(DebugStop::Breakpoint(address))
}

fn rip(guest: &Guest) -> u64 {
    guest.vcpu.state().unwrap().regs.rip
}

/// Single step stops after every instruction.
pub fn single_step_stops_after_every_instruction(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(eax, 1)?;
        a.add(eax, 2)?;
        a.push(rax)?;
        a.pop(rbx)?;
        a.hlt()
    });
    guest.vcpu.set_debug(true, &[]).unwrap();
    let mut places = Vec::new();
    for _ in 0..4 {
        assert_eq!(guest.resume(), STEP);
        places.push(rip(&guest) - layout::CODE);
    }
    assert_eq!(places, [5, 10, 11, 12]);
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RBX], 3);
    guest.vcpu.set_debug(false, &[]).unwrap();
    guest.finish();
}

/// Single step follows jumps, calls and returns.
pub fn single_step_follows_branches(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let mut target = None;
    let code = guest.load(|a| {
        let mut function = a.create_label();
        let mut over = a.create_label();
        a.call(function)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.hlt()?;
        target = Some((function, over));
        Ok(())
    });
    let (function, over) = target.unwrap();
    guest.vcpu.set_debug(true, &[]).unwrap();
    for place in [
        code.label_ip(&function).unwrap(),
        layout::CODE + 5,
        code.label_ip(&over).unwrap(),
    ] {
        assert_eq!(guest.resume(), STEP);
        assert_eq!(rip(&guest), place);
    }
}

/// The debugger's stepping leaves no trace in the flags that come back.
pub fn single_step_leaves_no_trace_in_the_flags(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.nop()?;
        a.nop()?;
        a.hlt()
    });
    guest.vcpu.set_debug(true, &[]).unwrap();
    assert_eq!(guest.resume(), STEP);
    let flags = guest.vcpu.state().unwrap().regs.rflags;
    assert_eq!(flags & 1 << 8, 0, "TF");
}

/// A device access is one step, and reaches the device once.
pub fn single_step_over_a_device_access(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(0x300, 4, device.clone());
    guest.load(|a| {
        a.mov(edx, 0x300)?;
        a.out(dx, al)?;
        a.nop()?;
        a.hlt()
    });
    guest.vcpu.set_debug(true, &[]).unwrap();
    assert_eq!(guest.resume(), STEP);
    assert!(device.take().is_empty());
    assert_eq!(guest.resume(), STEP);
    assert_eq!(device.take(), [Seen::Write(0, vec![0])]);
    assert_eq!(rip(&guest), layout::CODE + 6);
}

/// A breakpoint stops before its instruction; the next run executes it.
pub fn a_breakpoint_stops_before_its_instruction(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(eax, 1)?;
        a.mov(eax, 2)?;
        a.hlt()
    });
    let place = layout::CODE + 5;
    guest.vcpu.set_debug(false, &[place]).unwrap();
    assert_eq!(guest.resume(), at(place));
    assert_eq!(rip(&guest), place);
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 1);
    guest.halt();
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 2);
}

/// A breakpoint in a loop stops at each turn, and no longer once it is taken away.
pub fn a_breakpoint_in_a_loop_stops_each_turn(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let mut label = None;
    let code = guest.load(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        label = Some(again);
        a.hlt()
    });
    let place = code.label_ip(&label.unwrap()).unwrap();
    guest.vcpu.set_debug(false, &[place]).unwrap();
    for turn in 0..3 {
        assert_eq!(guest.resume(), at(place));
        assert_eq!(
            guest.vcpu.state().unwrap().regs.gpr[state::RCX],
            1000 - turn
        );
    }
    guest.vcpu.set_debug(false, &[]).unwrap();
    guest.finish();
}

/// Four breakpoints at once, hit in the order of execution.
pub fn four_breakpoints_work_at_once(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        for _ in 0..8 {
            a.nop()?;
        }
        a.hlt()
    });
    let places = [1, 3, 4, 7].map(|offset| layout::CODE + offset);
    guest.vcpu.set_debug(false, &places).unwrap();
    for place in places {
        assert_eq!(guest.resume(), at(place));
    }
    guest.halt();
}

/// Stepping onto a breakpoint says so, and the next step leaves it.
pub fn a_step_onto_a_breakpoint_says_so(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        for _ in 0..4 {
            a.nop()?;
        }
        a.hlt()
    });
    let place = layout::CODE + 2;
    guest.vcpu.set_debug(true, &[place]).unwrap();
    assert_eq!(guest.resume(), STEP);
    assert_eq!(guest.resume(), at(place));
    assert_eq!(guest.resume(), STEP);
    assert_eq!(rip(&guest), place + 1);
}

/// A breakpoint in user code stops there.
pub fn a_breakpoint_in_user_code_stops_there(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.ring3();
        a.mov(eax, 5)?;
        a.inc(eax)?;
        a.report(rax)?;
        a.user_done()
    });
    guest.start_in_user_mode();
    let place = (layout::CODE + 5) | layout::USER;
    guest.vcpu.set_debug(false, &[place]).unwrap();
    assert_eq!(guest.resume(), at(place));
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 5);
    guest.finish();
    assert_eq!(guest.values(), [6]);
}

/// The guest's own INT3 is its own: the debugger sees nothing.
pub fn the_guests_own_int3_is_its_own(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest
        .vcpu
        .set_debug(false, &[layout::CODE + 0x800])
        .unwrap();
    guest.run_expecting(&[fault(BP)], |a| a.faulting(|a| a.int3()));
}
