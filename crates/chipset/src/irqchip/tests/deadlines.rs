//! The timers of the local APICs.

use super::*;

#[test]
fn a_passed_deadline_fires_at_once() {
    let bench = Bench::x2apic(1);
    let cpu = &*bench.cpus[0];
    cpu.write_msr(0x832, 2 << 17 | 0x40).expect("allowed");
    cpu.write_msr(IA32_TSC_DEADLINE, 1).expect("allowed");
    assert_eq!(cpu.acknowledge(), Some(0x40));
    assert_eq!(cpu.read_msr(IA32_TSC_DEADLINE), Ok(0));
}

#[test]
fn a_deadline_fires_when_a_halted_vcpu_looks() {
    let bench = Bench::x2apic(1);
    let cpu = &*bench.cpus[0];
    cpu.write_msr(0x832, 2 << 17 | 0x40).expect("allowed");
    // A counter that starts at zero: the clock's frequency is not the host's.
    bench.clock.set_guest_tsc(0);
    cpu.write_msr(IA32_TSC_DEADLINE, 3_000_000)
        .expect("allowed");
    assert!(cpu.timer_due_ns().expect("armed") > monotonic_ns() - MS);
    cpu.poll_timer();
    assert!(eventually(|| {
        cpu.poll_timer();
        cpu.has_interrupt()
    }));
    assert!(bench.clock.guest_tsc() >= 3_000_000);
    assert_eq!(cpu.timer_due_ns(), None);
    assert_eq!(bench.wakes(0), 0);
}

#[test]
fn zero_and_a_mode_change_disarm_the_deadline() {
    let bench = Bench::x2apic(1);
    let cpu = &*bench.cpus[0];
    cpu.write_msr(IA32_TSC_DEADLINE, u64::MAX).expect("ignored");
    assert_eq!(cpu.timer_due_ns(), None, "not in deadline mode");
    cpu.write_msr(0x832, 2 << 17 | 0x40).expect("allowed");
    cpu.write_msr(IA32_TSC_DEADLINE, u64::MAX).expect("allowed");
    assert!(cpu.timer_due_ns().is_some());
    cpu.write_msr(IA32_TSC_DEADLINE, 0).expect("allowed");
    assert_eq!(cpu.timer_due_ns(), None);
    cpu.write_msr(IA32_TSC_DEADLINE, u64::MAX).expect("allowed");
    cpu.write_msr(0x832, 0x40).expect("allowed");
    assert_eq!(cpu.timer_due_ns(), None);
}

// SDM 3A §11.5.4, figure 11-10.
#[test]
fn the_divisor_stretches_the_count() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    for (code, divisor) in [(0b1011, 1), (0b0000, 2), (0b0011, 16), (0b1010, 128)] {
        write(cpu, 0x3e0, code);
        write(cpu, 0x380, 1_000_000_000);
        let due_in = cpu.timer_due_ns().expect("armed") - monotonic_ns();
        let whole = 1_000_000_000 * divisor;
        assert!(
            due_in <= whole && due_in > whole - 500 * MS,
            "{code:#b}: {due_in}"
        );
        assert!(read(cpu, 0x390) <= 1_000_000_000);
    }
    write(cpu, 0x380, 0);
    assert_eq!((cpu.timer_due_ns(), read(cpu, 0x390)), (None, 0));
}

#[test]
fn the_timer_thread_fires_one_shot_and_periodic_timers() {
    let bench = Bench::new(2);
    let timers = bench.timers.clone();
    let thread = std::thread::spawn(move || timers.run());
    for cpu in &bench.cpus {
        write(&**cpu, 0x3e0, 0b1011);
    }
    write(&*bench.cpus[0], 0x320, 0x40);
    write(&*bench.cpus[1], 0x320, 1 << 17 | 0x41);
    for cpu in &bench.cpus {
        write(&**cpu, 0x380, 1_000_000);
    }
    assert!(eventually(|| bench.cpus[0].has_interrupt()));
    assert_eq!(bench.wakes(0), 1);
    for _ in 0..3 {
        assert!(eventually(|| bench.cpus[1].acknowledge() == Some(0x41)));
        write(&*bench.cpus[1], 0xb0, 0);
    }
    bench.timers.stop();
    thread.join().expect("no panic").expect("no error");
}

#[test]
fn a_masked_timer_expires_silently() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    write(cpu, 0x3e0, 0b1011);
    write(cpu, 0x320, 0x1_0040);
    write(cpu, 0x380, 1);
    assert!(eventually(|| {
        cpu.poll_timer();
        cpu.timer_due_ns().is_none()
    }));
    assert!(!cpu.has_interrupt());
}
