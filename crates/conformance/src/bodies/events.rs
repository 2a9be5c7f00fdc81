//! Shortcuts between the guest and event descriptors, and the dirty log.

use ringfence_bus::MsiMessage;
use ringfence_engine::Doorbell;
use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::prelude::*;

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an event descriptor")
}

fn kind<T>(result: Result<T, EngineError>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

/// A doorbell in memory rings for its address and value alone, without a bus access.
pub fn a_doorbell_rings_for_its_value(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place(layout::DEVICE, 0x1000, device.clone());
    let bell = event();
    let doorbell = Doorbell {
        space: IoSpace::Mmio,
        address: layout::DEVICE + 0x10,
        width: 2,
        value: Some(3),
    };
    let added = guest.vm.add_doorbell(doorbell, &bell);
    if !bench.engine.caps().doorbells {
        assert_eq!(kind(added), Some(ErrorKind::Unsupported));
        return;
    }
    added.unwrap();
    guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(word_ptr(rbx + 0x10), 3)?;
        a.mov(word_ptr(rbx + 0x10), 3)?;
        a.mov(word_ptr(rbx + 0x10), 4)?;
        a.mov(word_ptr(rbx + 0x12), 3)
    });
    assert_eq!(bell.read().unwrap(), 2);
    assert_eq!(
        device.take(),
        [Seen::Write(0x10, vec![4, 0]), Seen::Write(0x12, vec![3, 0])]
    );
    guest.vm.remove_doorbell(doorbell, &bell).unwrap();
    guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(word_ptr(rbx + 0x10), 3)
    });
    assert_eq!(device.take(), [Seen::Write(0x10, vec![3, 0])], "it is gone");
}

/// A doorbell at a port, of any value.
pub fn a_doorbell_may_be_a_port(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let bell = event();
    let doorbell = Doorbell {
        space: IoSpace::Pio,
        address: 0x600,
        width: 1,
        value: None,
    };
    let added = guest.vm.add_doorbell(doorbell, &bell);
    if !bench.engine.caps().doorbells {
        assert_eq!(kind(added), Some(ErrorKind::Unsupported));
        return;
    }
    added.unwrap();
    guest.run(|a| {
        a.mov(edx, 0x600)?;
        for value in [1, 2, 3] {
            a.mov(eax, value)?;
            a.out(dx, al)?;
        }
        Ok(())
    });
    assert_eq!(bell.read().unwrap(), 3);
}

/// An event wired to a message interrupts; a new message replaces the old one.
pub fn an_event_becomes_an_interrupt(bench: &Bench<'_>) {
    let mut guest = Guest::with_chips(bench);
    let signal = event();
    let message = |vector| MsiMessage {
        address: 0xfee0_0000,
        data: vector,
    };
    let wired = guest.vm.set_irq_event(&signal, Some(message(0x52)));
    if !bench.engine.caps().irq_events {
        assert_eq!(kind(wired), Some(ErrorKind::Unsupported));
        return;
    }
    wired.unwrap();
    let wait = |guest: &mut Guest, vector: u64| {
        signal.write(1).unwrap();
        guest.run(|a| {
            a.enable_apic()?;
            a.sti()?;
            a.wait_for(layout::IRQ_COUNTS + vector * 8, 1)?;
            a.cli()
        });
    };
    // The APIC takes messages once it is enabled.
    guest.run(|a| a.enable_apic());
    wait(&mut guest, 0x52);
    guest
        .vm
        .set_irq_event(&signal, Some(message(0x53)))
        .unwrap();
    wait(&mut guest, 0x53);
    guest.vm.set_irq_event(&signal, None).unwrap();
    guest.vm.set_irq_event(&signal, None).unwrap();
    signal.write(1).unwrap();
    guest.run(|a| {
        a.sti()?;
        a.spin(1000)?;
        a.cli()
    });
    assert_eq!(guest.interrupts(), [0x52, 0x53]);
}

/// A bare machine can't wire events to interrupts.
pub fn a_bare_machine_refuses_interrupt_events(bench: &Bench<'_>) {
    let guest = Guest::new(bench);
    let refused = kind(
        guest
            .vm
            .set_irq_event(&event(), Some(MsiMessage::default())),
    );
    let expected = if bench.engine.caps().irq_events {
        ErrorKind::State
    } else {
        ErrorKind::Unsupported
    };
    assert_eq!(refused, Some(expected));
    assert!(guest.vm.interrupts().is_none());
}

/// The dirty log names the pages that the guest wrote, once.
pub fn the_dirty_log_names_written_pages_once(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !bench.engine.caps().dirty_log {
        assert_eq!(
            kind(guest.vm.set_dirty_log(true)),
            Some(ErrorKind::Unsupported)
        );
        return;
    }
    assert_eq!(
        kind(guest.vm.take_dirty(0, 1)),
        Some(ErrorKind::State),
        "it is off"
    );
    guest.load(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.mov(byte_ptr(rbx + 0x1000), 1)?;
        a.mov(qword_ptr(rbx + 0x4ffc), 0)?;
        a.hlt()
    });
    guest.vm.set_dirty_log(true).unwrap();
    guest.halt();
    let frames = |pages| guest.vm.take_dirty(layout::FRAMES, pages).unwrap();
    assert_eq!(frames(2), [0b10]);
    assert_eq!(frames(8), [0b11_0000], "page 1 was taken before");
    assert_eq!(frames(8), [0]);
    assert_eq!(
        guest.vm.take_dirty(1 << 40, 65).unwrap(),
        [0, 0],
        "no RAM there"
    );
    assert_eq!(kind(guest.vm.take_dirty(1, 1)), Some(ErrorKind::Config));
    guest.vm.set_dirty_log(false).unwrap();
    assert_eq!(kind(guest.vm.take_dirty(0, 1)), Some(ErrorKind::State));
}

/// A page that was written before the log is logged when it is written again.
pub fn pages_written_before_are_logged_again(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !bench.engine.caps().dirty_log {
        assert_eq!(
            kind(guest.vm.set_dirty_log(true)),
            Some(ErrorKind::Unsupported)
        );
        return;
    }
    let write = |guest: &mut Guest| {
        guest.run(|a| {
            a.mov(rbx, layout::FRAMES)?;
            a.inc(qword_ptr(rbx))
        });
    };
    write(&mut guest);
    guest.vm.set_dirty_log(true).unwrap();
    for _ in 0..3 {
        assert_eq!(guest.vm.take_dirty(layout::FRAMES, 1).unwrap(), [0]);
        write(&mut guest);
        assert_eq!(guest.vm.take_dirty(layout::FRAMES, 1).unwrap(), [1]);
    }
}
