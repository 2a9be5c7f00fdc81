//! `Unclaimed::Exit`: the caller serves what no device claims.

use crate::prelude::*;

fn exiting(bench: &Bench<'_>) -> Guest {
    Guest::with(
        bench,
        Setup {
            unclaimed: Unclaimed::Exit,
            ..Setup::default()
        },
    )
}

fn io(space: IoSpace, address: u64, direction: IoDirection) -> VcpuExit {
    VcpuExit::Io(IoAccess {
        space,
        address,
        direction,
    })
}

/// A port write exits with its bytes, complete: RIP is behind it.
pub fn a_port_write_exits_complete(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(eax, 0xabcd)?;
        a.mov(edx, 0x600)?;
        a.out(dx, ax)?;
        a.hlt()
    });
    let written = IoDirection::Write(vec![0xcd, 0xab]);
    assert_eq!(guest.resume(), io(IoSpace::Pio, 0x600, written));
    let at_exit = guest.vcpu.state().unwrap().regs.rip;
    guest.finish();
    assert_eq!(
        guest.vcpu.state().unwrap().regs.rip,
        at_exit + 1,
        "the HLT is left"
    );
}

/// A port read exits and takes the caller's data.
pub fn a_port_read_takes_the_callers_data(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(rax, u64::MAX)?;
        a.mov(edx, 0x600)?;
        a.in_(al, dx)?;
        a.report(rax)?;
        a.hlt()
    });
    assert_eq!(
        guest.resume(),
        io(IoSpace::Pio, 0x600, IoDirection::Read(1))
    );
    guest.vcpu.complete_read(&[0x42]).unwrap();
    let done = guest.vcpu.state().unwrap().regs.gpr[state::RAX];
    assert_eq!(
        done, 0xffff_ffff_ffff_ff42,
        "complete_read completes the instruction"
    );
    guest.finish();
    assert_eq!(guest.values(), [0xffff_ffff_ffff_ff42]);
}

/// Memory accesses exit likewise.
pub fn memory_accesses_exit_likewise(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(dword_ptr(rbx + 4), 0x0403_0201)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.report(rax)?;
        a.hlt()
    });
    let written = IoDirection::Write(vec![1, 2, 3, 4]);
    assert_eq!(
        guest.resume(),
        io(IoSpace::Mmio, layout::DEVICE + 4, written)
    );
    assert_eq!(
        guest.resume(),
        io(IoSpace::Mmio, layout::DEVICE + 8, IoDirection::Read(8))
    );
    guest.vcpu.complete_read(&[8, 7, 6, 5, 4, 3, 2, 1]).unwrap();
    guest.finish();
    assert_eq!(guest.values(), [0x0102_0304_0506_0708]);
}

/// A string instruction exits once an element.
pub fn string_input_exits_once_an_element(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(rdi, layout::FRAMES)?;
        a.mov(edx, 0x600)?;
        a.mov(ecx, 3)?;
        a.rep().insb()?;
        a.report(rcx)?;
        a.hlt()
    });
    for byte in [5, 6, 7] {
        assert_eq!(
            guest.resume(),
            io(IoSpace::Pio, 0x600, IoDirection::Read(1))
        );
        guest.vcpu.complete_read(&[byte]).unwrap();
    }
    guest.finish();
    assert_eq!(guest.values(), [0]);
    assert_eq!(guest.peek(layout::FRAMES), 0x07_0605);
}

/// A read-modify-write exits twice and stores what it read, changed.
pub fn a_read_modify_write_exits_twice(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.add(dword_ptr(rbx), 1)?;
        a.hlt()
    });
    assert_eq!(
        guest.resume(),
        io(IoSpace::Mmio, layout::DEVICE, IoDirection::Read(4))
    );
    guest.vcpu.complete_read(&[0xff, 0, 0, 0]).unwrap();
    let written = IoDirection::Write(vec![0, 1, 0, 0]);
    assert_eq!(guest.resume(), io(IoSpace::Mmio, layout::DEVICE, written));
    guest.finish();
}

/// Devices on the bus are still served within the run.
pub fn claimed_accesses_do_not_exit(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    let device = Recorder::new();
    guest.place_port(0x600, 1, device.clone());
    guest.run(|a| {
        a.mov(edx, 0x600)?;
        a.out(dx, al)
    });
    assert_eq!(device.take(), [Seen::Write(0, vec![0])]);
}

/// A wrong moment or length is refused, and a read waits until it is completed.
pub fn wrong_completions_are_refused(bench: &Bench<'_>) {
    use ringfence_engine::ErrorKind::State;
    let mut guest = exiting(bench);
    let kind = |result: Result<(), ringfence_engine::EngineError>| result.unwrap_err().kind();
    assert_eq!(kind(guest.vcpu.complete_read(&[1])), State, "nothing waits");
    guest.load(|a| {
        a.mov(edx, 0x600)?;
        a.in_(ax, dx)?;
        a.report(rax)?;
        a.hlt()
    });
    assert_eq!(
        guest.resume(),
        io(IoSpace::Pio, 0x600, IoDirection::Read(2))
    );
    assert_eq!(kind(guest.vcpu.complete_read(&[1])), State, "too short");
    assert_eq!(
        guest.vcpu.run().unwrap_err().kind(),
        State,
        "the read waits"
    );
    guest.vcpu.complete_read(&[1, 2]).unwrap();
    assert_eq!(
        kind(guest.vcpu.complete_read(&[1, 2])),
        State,
        "completed already"
    );
    guest.finish();
    assert_eq!(guest.values(), [0x0201]);
}

/// Setting the state gives a waiting read up.
pub fn a_new_state_gives_a_waiting_read_up(bench: &Bench<'_>) {
    let mut guest = exiting(bench);
    guest.load(|a| {
        a.mov(edx, 0x600)?;
        a.in_(eax, dx)?;
        a.hlt()
    });
    assert_eq!(
        guest.resume(),
        io(IoSpace::Pio, 0x600, IoDirection::Read(4))
    );
    let values = guest.run(|a| {
        a.mov(eax, 7)?;
        a.report(rax)
    });
    assert_eq!(values, [7]);
}
