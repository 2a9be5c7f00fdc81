//! How a run ends, and goes on.

use std::sync::Arc;
use std::sync::mpsc;

use crate::prelude::*;

/// HLT in a bare machine exits, and the next run continues behind it.
pub fn hlt_exits_and_the_next_run_continues(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(eax, 1)?;
        a.hlt()?;
        a.add(eax, 1)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.halt();
    assert_eq!(guest.vcpu.state().unwrap().regs.gpr[state::RAX], 1);
    guest.halt();
    assert_eq!(guest.values(), [2]);
}

/// A fault whose handlers can't be reached is a triple fault: the processor shuts down.
pub fn a_triple_fault_shuts_down(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    for vector in 0..32 {
        guest.set_gate_to(vector, 0, 0, 0, 0);
    }
    guest.load(|a| a.ud2());
    assert_eq!(guest.resume(), VcpuExit::Shutdown);
}

/// An IDT without limit shuts down too.
pub fn a_fault_without_an_idt_shuts_down(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.lidt(ptr(rbx))?;
        a.int3()
    });
    assert_eq!(guest.resume(), VcpuExit::Shutdown);
}

/// After a shutdown, a state can be set and runs.
pub fn a_machine_runs_again_after_a_shutdown(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let first = guest.vcpu.state().unwrap();
    guest.load(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.lidt(ptr(rbx))?;
        a.ud2()
    });
    assert_eq!(guest.resume(), VcpuExit::Shutdown);
    guest.vcpu.set_state(&first).unwrap();
    let values = guest.run(|a| {
        a.mov(eax, 3)?;
        a.report(rax)
    });
    assert_eq!(values, [3]);
}

/// A kick before the run ends the run at once, and one kick ends one run.
pub fn a_kick_before_the_run_ends_it_at_once(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.load(|a| {
        a.mov(eax, 5)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.vcpu.waker().kick();
    guest.vcpu.waker().kick();
    assert_eq!(guest.resume(), VcpuExit::Kicked);
    assert_eq!(
        guest.vcpu.state().unwrap().regs.rip,
        layout::CODE,
        "nothing ran"
    );
    guest.finish();
    assert_eq!(guest.values(), [5]);
}

/// A kick from another thread ends an endless loop; the loop goes on where it was.
pub fn a_kick_from_another_thread_ends_a_loop(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let (started, starts) = mpsc::channel();
    let port = CallPort(move |value| started.send(value).unwrap());
    guest.place_port(0x700, 1, Arc::new(port));
    guest.load(|a| {
        let mut again = a.create_label();
        a.mov(rbx, layout::FRAMES)?;
        a.out(0x70, al)?;
        a.mov(edx, 0x700)?;
        a.out(dx, al)?;
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.cmp(qword_ptr(rbx), 0)?;
        a.je(again)?;
        a.report(rcx)?;
        a.hlt()
    });
    let waker = guest.vcpu.waker();
    let kicker = std::thread::spawn(move || {
        starts.recv().unwrap();
        waker.kick();
    });
    assert_eq!(guest.resume(), VcpuExit::Kicked);
    kicker.join().unwrap();
    let turns = guest.vcpu.state().unwrap().regs.gpr[state::RCX];
    guest.poke(layout::FRAMES, 1);
    guest.finish();
    assert!(guest.values()[0] >= turns, "the loop went on where it was");
}

/// A device may kick from within the run; the access is complete then.
pub fn a_device_may_kick_from_within_the_run(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let port = KickPort::new();
    port.add(guest.vcpu.waker());
    guest.place_port(0x700, 1, port);
    guest.load(|a| {
        a.mov(edx, 0x700)?;
        a.out(dx, al)?;
        a.report(rdx)?;
        a.hlt()
    });
    assert_eq!(guest.resume(), VcpuExit::Kicked);
    guest.finish();
    assert_eq!(guest.values(), [0x700]);
}

/// A kick at a device read leaves the read complete, with the device's data in the register.
pub fn a_kick_at_a_read_leaves_it_complete(bench: &Bench<'_>) {
    struct Kicking(Arc<dyn ringfence_engine::VcpuWaker>);
    impl ringfence_bus::MmioDevice for Kicking {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0x5a);
            self.0.kick();
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }
    let mut guest = Guest::new(bench);
    guest.place(layout::DEVICE, 16, Arc::new(Kicking(guest.vcpu.waker())));
    guest.load(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.report(rax)?;
        a.hlt()
    });
    assert_eq!(guest.resume(), VcpuExit::Kicked);
    let registers = guest.vcpu.state().unwrap().regs;
    let read_done = registers.gpr[state::RAX] == 0x5a5a_5a5a;
    assert!(
        read_done,
        "RAX is {:#x} at {:#x}",
        registers.gpr[state::RAX],
        registers.rip
    );
    guest.finish();
    assert_eq!(guest.values(), [0x5a5a_5a5a]);
}

/// Waking a vCPU that nothing waits for changes nothing.
pub fn a_wake_alone_does_not_end_the_run(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.vcpu.waker().wake();
    let values = guest.run(|a| {
        a.mov(eax, 9)?;
        a.report(rax)
    });
    assert_eq!(values, [9]);
}

/// A waker outlives its vCPU and does nothing then.
pub fn a_waker_outlives_its_vcpu(bench: &Bench<'_>) {
    let guest = Guest::new(bench);
    let waker = guest.vcpu.waker();
    drop(guest);
    waker.kick();
    waker.wake();
}

/// A machine has as many vCPUs as were asked for, each made once.
pub fn vcpu_numbers_are_checked(bench: &Bench<'_>) {
    use ringfence_engine::ErrorKind::Config;
    let guest = Guest::new(bench);
    let make = |index| guest.vm.create_vcpu(index, guest.cpuid.clone()).map(|_| ());
    assert_eq!(make(0).unwrap_err().kind(), Config, "made already");
    assert_eq!(
        make(1).unwrap_err().kind(),
        Config,
        "past the number asked for"
    );
}
