//! Boards and lifecycles, on an engine without a processor.

use std::io;
use std::io::Read;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use ringfence_bus::Gsi;
use ringfence_chipset::OutputLimits;
use ringfence_clock::Clock;
use ringfence_clock::FrequencySource;
use ringfence_clock::TscFrequency;
use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use ringfence_engine::VcpuExit;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::state::VcpuState;

use crate::Board;
use crate::BoardSetup;
use crate::Machine;
use crate::MachineEnd;
use crate::MachineEvent;
use crate::MachineState;
use crate::SerialSetup;
use crate::ThreadHook;
use crate::ThreadKind;
use crate::testing::Processor;
use crate::testing::ScriptEngine;

const LIMITS: OutputLimits = OutputLimits {
    bytes_per_s: 1 << 20,
    burst_bytes: 1 << 20,
    total_bytes: 1 << 20,
};

type Events = Arc<Mutex<Vec<MachineEvent>>>;

fn board(engine: &ScriptEngine, vcpus: u32, serial: Option<SerialSetup>) -> (Board, Events) {
    let events = Events::default();
    let seen = Arc::clone(&events);
    let setup = BoardSetup {
        engine,
        ram: GuestRam::new(64 << 20, HugePages::Off).expect("ram"),
        vcpus,
        clock: Arc::new(Clock::new(TscFrequency {
            hz: 1_000_000_000,
            source: FrequencySource::Cpuid,
        })),
        serial,
        observer: Box::new(move |event| seen.lock().expect("test").push(event)),
    };
    (Board::new(setup).expect("a board"), events)
}

fn no_hook() -> ThreadHook {
    Arc::new(|_| Ok(()))
}

fn start(engine: &ScriptEngine, vcpus: u32) -> (Machine, Events) {
    let (board, events) = board(engine, vcpus, None);
    let machine = Machine::start(board, &VcpuState::default(), no_hook());
    (machine.expect("starts"), events)
}

fn script(
    body: impl Fn(&Processor) -> Result<VcpuExit, EngineError> + Send + Sync + 'static,
) -> ScriptEngine {
    ScriptEngine::new(Arc::new(body))
}

/// A vCPU that does one thing to the machine and then waits.
fn once(act: impl Fn(&Processor) + Send + Sync + 'static) -> ScriptEngine {
    script(move |processor| {
        act(processor);
        Ok(processor.wait_for_kick())
    })
}

fn eventually(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it never happened");
        std::thread::yield_now();
    }
}

#[test]
fn guests_end_their_machine_in_every_way_that_a_pc_has() {
    let port =
        |port: u16, data: &'static [u8]| once(move |processor| processor.pio.write(port, data));
    for (engine, end) in [
        // SLP_TYP 5 and SLP_EN in PM1a control, 16 bits.
        (port(0x604, &[0, 0x34]), MachineEnd::PowerOff),
        (port(0xcf9, &[6]), MachineEnd::Reset),
        (port(0x64, &[0xfe]), MachineEnd::Reset),
        (port(0x505, &[1]), MachineEnd::Panic),
        (
            script(|_| Ok(VcpuExit::Shutdown)),
            MachineEnd::Crash { vcpu: 0 },
        ),
    ] {
        let (machine, events) = start(&engine, 1);
        assert_eq!(machine.wait(), end);
        assert_eq!(machine.state(), MachineState::Ended);
        assert_eq!(*events.lock().expect("test"), [MachineEvent::Ended(end)]);
    }
}

#[test]
fn the_first_end_counts_and_ends_all_processors() {
    let engine = script(|processor| {
        if processor.index == 2 {
            processor.pio.write(0xcf9, &[6]);
            processor.pio.write(0x604, &[0, 0x34]);
        }
        Ok(processor.wait_for_kick())
    });
    let (machine, events) = start(&engine, 4);
    assert_eq!(machine.wait(), MachineEnd::Reset);
    assert_eq!(events.lock().expect("test").len(), 1);
}

#[test]
fn a_crash_kernel_is_told_and_goes_on() {
    let engine = once(|processor| processor.pio.write(0x505, &[2]));
    let (machine, events) = start(&engine, 1);
    eventually(|| events.lock().expect("test").len() == 1);
    assert_eq!(*events.lock().expect("test"), [MachineEvent::CrashKernel]);
    assert_eq!(machine.state(), MachineState::Running);
    machine.stop();
    assert_eq!(machine.wait(), MachineEnd::Stopped);
}

#[test]
fn an_engine_that_fails_ends_the_machine_with_its_words() {
    let engine = script(|_| {
        Err(EngineError::Host {
            action: "run a vCPU",
            source: io::Error::other("the host is out of luck"),
        })
    });
    let (machine, _) = start(&engine, 1);
    let MachineEnd::Failed { why, .. } = machine.wait() else {
        panic!("it failed");
    };
    assert_eq!(why, "vCPU 0: cannot run a vCPU: the host is out of luck");
    let (machine, _) = start(&script(|_| Ok(VcpuExit::Halt)), 1);
    assert!(matches!(machine.wait(), MachineEnd::Failed { .. }));
}

#[test]
fn a_bug_in_an_engine_is_reported_with_the_guests_state() {
    for (engine, words) in [
        (
            script(|_| Err(EngineError::Internal("two and two".to_owned()))),
            "vCPU 0: engine bug: two and two",
        ),
        (
            script(|_| panic!("five")),
            "vCPU 0: engine bug: the monitor panicked: five",
        ),
    ] {
        let (machine, _) = start(&engine, 1);
        let MachineEnd::Failed { why, report } = machine.wait() else {
            panic!("it failed");
        };
        assert_eq!(why, words);
        let report = report.expect("the state can be read");
        assert!(report.contains("rip 0x0 rflags 0x2 Running"), "{report}");
        assert!(report.contains("cr0 0x10"), "{report}");
        assert!(report.contains("code "), "{report}");
    }
}

#[test]
fn a_paused_machine_does_not_enter_the_guest_until_it_is_resumed() {
    let entries = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&entries);
    let engine = script(move |processor| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(processor.wait_for_kick())
    });
    let (machine, _) = start(&engine, 3);
    eventually(|| entries.load(Ordering::SeqCst) == 3);
    for round in 1..4 {
        machine.pause().expect("runs");
        assert_eq!(machine.state(), MachineState::Paused);
        assert_eq!(entries.load(Ordering::SeqCst), 3 * round);
        machine.pause().expect("pausing twice is harmless");
        machine.resume().expect("is paused");
        eventually(|| entries.load(Ordering::SeqCst) == 3 * (round + 1));
    }
    machine.resume().expect("resuming twice is harmless");
}

#[test]
fn a_paused_machines_processors_can_be_looked_into() {
    let (machine, _) = start(&ScriptEngine::idle(), 2);
    let refused = machine.with_vcpu(0, |_| ()).expect_err("it runs");
    assert_eq!(refused.kind(), ErrorKind::State);
    machine.pause().expect("runs");
    for index in 0..2 {
        let state = machine
            .with_vcpu(index, |vcpu| vcpu.state())
            .expect("is paused");
        assert_eq!(state.expect("a state").regs.rflags, 2);
    }
    let refused = machine.with_vcpu(2, |_| ()).expect_err("there are two");
    assert_eq!(refused.kind(), ErrorKind::Config);
}

#[test]
fn an_ended_machine_refuses_everything() {
    let (machine, _) = start(&ScriptEngine::idle(), 1);
    machine.stop();
    machine.stop();
    assert_eq!(machine.wait(), MachineEnd::Stopped);
    for refused in [
        machine.pause(),
        machine.resume(),
        machine.with_vcpu(0, |_| ()),
    ] {
        let error = refused.expect_err("it has ended");
        assert!(error.to_string().contains("ended"), "{error}");
    }
}

#[test]
fn a_machine_that_ends_while_it_is_paused_lets_its_callers_go() {
    let (machine, _) = start(&ScriptEngine::idle(), 2);
    machine.pause().expect("runs");
    machine.stop();
    assert_eq!(machine.wait(), MachineEnd::Stopped);
}

#[test]
fn every_thread_is_shown_to_the_hook_before_it_works() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let hook: ThreadHook = {
        let seen = Arc::clone(&seen);
        Arc::new(move |kind| {
            let name = std::thread::current().name().map(str::to_owned);
            seen.lock().expect("test").push((kind, name));
            Ok(())
        })
    };
    let (board, _) = board(&ScriptEngine::idle(), 2, None);
    let machine = Machine::start(board, &VcpuState::default(), hook).expect("starts");
    let mut names: Vec<_> = seen
        .lock()
        .expect("test")
        .iter()
        .filter_map(|(_, name)| name.clone())
        .collect();
    names.sort();
    assert_eq!(names, ["devices", "timers", "vcpu0", "vcpu1"]);
    drop(machine);
}

#[test]
fn a_thread_that_cannot_be_prepared_keeps_the_machine_from_starting() {
    for bad in [ThreadKind::Vcpu(1), ThreadKind::Timers, ThreadKind::Devices] {
        let hook: ThreadHook = Arc::new(move |kind| match kind == bad {
            true => Err(io::Error::other("no filter")),
            false => Ok(()),
        });
        let (board, _) = board(&ScriptEngine::idle(), 2, None);
        let error = Machine::start(board, &VcpuState::default(), hook).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Host, "{bad:?}");
    }
}

#[test]
fn the_serial_port_carries_bytes_both_ways() {
    let (mut from_guest, output) = io::pipe().expect("a pipe");
    let (input, mut to_guest) = io::pipe().expect("a pipe");
    let finished = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&finished);
    // Echoes, as a guest's driver does by polling.
    let engine = script(move |processor| {
        let read = |port| {
            let mut byte = [0];
            processor.pio.read(port, &mut byte);
            byte[0]
        };
        while read(0x3fd) & 1 == 0 {
            if over.load(Ordering::Relaxed) {
                return Ok(VcpuExit::Kicked);
            }
            std::thread::yield_now();
        }
        processor.pio.write(0x3f8, &[read(0x3f8)]);
        Ok(VcpuExit::Kicked)
    });
    let serial = SerialSetup {
        input: Some(input.into()),
        output: Some(output.into()),
        limits: LIMITS,
    };
    let (board, _) = board(&engine, 1, Some(serial));
    let machine = Machine::start(board, &VcpuState::default(), no_hook()).expect("starts");
    // More than the port's buffer, so that it is refilled many times.
    let mut sent: Vec<u8> = (0..5000_u32).map(|i| b'a' + (i % 26) as u8).collect();
    sent.push(b'\n');
    std::thread::scope(|scope| {
        scope.spawn(|| io::Write::write_all(&mut to_guest, &sent).expect("written"));
        let mut received = vec![0; sent.len()];
        from_guest.read_exact(&mut received).expect("echoed");
        assert!(received == sent);
    });
    // The script waits for input that doesn't come.
    finished.store(true, Ordering::Relaxed);
    machine.stop();
}

#[test]
fn a_device_interrupt_wakes_a_halted_processor() {
    let engine = script(|processor| {
        // Software-enable, and input 16 to vector 0x41, level-triggered.
        processor.apic.write_page(0xf0, &0x1ff_u32.to_le_bytes());
        processor.mmio.write(0xfec0_0000, &[0x30]);
        processor.mmio.write(0xfec0_0010, &0x8041_u32.to_le_bytes());
        processor.halt();
        match processor.apic.acknowledge() {
            Some(0x41) => processor.pio.write(0x604, &[0, 0x34]),
            _ => return Ok(processor.wait_for_kick()),
        }
        Ok(processor.wait_for_kick())
    });
    let (machine, _) = start(&engine, 1);
    machine.board().interrupts().set_line(Gsi(16), true);
    assert_eq!(machine.wait(), MachineEnd::PowerOff);
}

#[test]
fn the_power_button_raises_the_control_interrupt() {
    let engine = script(|processor| {
        processor.apic.write_page(0xf0, &0x1ff_u32.to_le_bytes());
        processor.mmio.write(0xfec0_0000, &[0x10 + 2 * 9]);
        processor.mmio.write(0xfec0_0010, &0x8042_u32.to_le_bytes());
        // Enable the button's event.
        processor.pio.write(0x602, &0x100_u16.to_le_bytes());
        processor.halt();
        if processor.apic.acknowledge() == Some(0x42) {
            processor.pio.write(0x604, &[0, 0x34]);
        }
        Ok(processor.wait_for_kick())
    });
    let (machine, _) = start(&engine, 1);
    machine.board().press_power_button();
    assert_eq!(machine.wait(), MachineEnd::PowerOff);
}

#[test]
fn chips_save_and_restore_by_their_names() {
    let (one, _) = board(&ScriptEngine::idle(), 1, None);
    let (two, _) = board(&ScriptEngine::idle(), 1, None);
    let names: Vec<_> = one.persisted().map(|(name, _)| name).collect();
    assert_eq!(names, ["irqchip", "pit", "rtc", "i8042", "acpi"]);
    for ((name, from), (_, to)) in one.persisted().zip(two.persisted()) {
        let state = from.save_value().expect(name);
        to.restore_value(state).expect(name);
        to.restore_value(serde_json::json!({"version": 99}))
            .expect_err(name);
    }
}
