//! Interrupts to one processor: messages, lines, priorities, HLT (SDM 3A §6.8, §10).

use ringfence_bus::Gsi;
use ringfence_bus::MsiMessage;

use crate::prelude::*;

const VECTOR: u64 = 0x51;
/// A write sends the value as the vector of a message to processor 0.
const MESSAGE_PORT: u32 = 0x310;
/// A write of 1 or 0 drives input 5.
const LINE_PORT: u32 = 0x311;
const LINE: u32 = 5;

/// A guest whose ports raise interrupts.
fn guest(bench: &Bench<'_>) -> Guest {
    let guest = Guest::with_chips(bench);
    let controller = guest.controller.clone().expect("chips");
    let messages = controller.clone();
    let send = CallPort(move |vector| {
        messages.send_msi(MsiMessage {
            address: 0xfee0_0000,
            data: u32::try_from(vector).unwrap(),
        });
    });
    guest.place_port(MESSAGE_PORT.into(), 1, std::sync::Arc::new(send));
    let drive = CallPort(move |level| controller.set_line(Gsi(LINE), level != 0));
    guest.place_port(LINE_PORT.into(), 1, std::sync::Arc::new(drive));
    guest
}

fn out(a: &mut Asm, port: u32, value: u64) -> Assembled {
    a.mov(edx, port)?;
    a.mov(eax, u32::try_from(value).unwrap())?;
    a.out(dx, al)
}

fn send(a: &mut Asm, vector: u64) -> Assembled {
    out(a, MESSAGE_PORT, vector)
}

/// Waits until `vector` came `times` times.
fn wait_for(a: &mut Asm, vector: u64, times: i32) -> Assembled {
    a.wait_for(layout::IRQ_COUNTS + vector * 8, times)
}

/// A message becomes an interrupt with its vector.
pub fn a_message_is_delivered(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.sti()?;
        send(a, VECTOR)?;
        wait_for(a, VECTOR, 1)
    });
    assert_eq!(guest.interrupts(), [VECTOR]);
}

/// With IF clear an interrupt waits; it is pending in the IRR.
pub fn an_interrupt_waits_for_if(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        send(a, VECTOR)?;
        a.spin(1000)?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + VECTOR * 8))?;
        a.report(rax)?;
        // The IRR's word for vectors 0x40 to 0x5f.
        a.read_apic(0x220)?;
        a.report(rax)?;
        a.sti()?;
        wait_for(a, VECTOR, 1)
    });
    assert_eq!(values, [0, 1 << (VECTOR & 0x1f)]);
}

/// STI takes effect behind the next instruction: STI and CLI let nothing in between.
pub fn sti_and_cli_let_nothing_in_between(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        send(a, VECTOR)?;
        a.sti()?;
        a.cli()?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + VECTOR * 8))?;
        a.report(rax)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + VECTOR * 8))?;
        a.report(rax)
    });
    assert_eq!(values, [0, 1]);
}

/// STI and HLT wake for an interrupt that was pending.
pub fn hlt_wakes_for_a_pending_interrupt(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        send(a, VECTOR)?;
        a.sti()?;
        a.hlt()?;
        a.cli()
    });
    assert_eq!(guest.interrupts(), [VECTOR]);
}

/// HLT wakes for an interrupt from another thread.
pub fn hlt_wakes_for_an_interrupt_from_another_thread(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let (going, goes) = std::sync::mpsc::channel();
    let port = CallPort(move |_| going.send(()).unwrap());
    guest.place_port(0x320, 1, std::sync::Arc::new(port));
    let controller = guest.controller.clone().unwrap();
    let sender = std::thread::spawn(move || {
        for _ in 0..20 {
            goes.recv().unwrap();
            controller.send_msi(MsiMessage {
                address: 0xfee0_0000,
                data: 0x51,
            });
        }
    });
    guest.run(|a| {
        let mut again = a.create_label();
        a.enable_apic()?;
        a.mov(ebx, 20)?;
        a.set_label(&mut again)?;
        out(a, 0x320, 0)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.dec(ebx)?;
        a.jnz(again)
    });
    sender.join().unwrap();
    assert_eq!(guest.interrupt_count(0x51), 20);
}

/// Of two that wait, the higher vector comes first.
pub fn the_higher_vector_comes_first(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        for vector in [0x45, 0x91, 0x72] {
            send(a, vector)?;
        }
        a.sti()?;
        wait_for(a, 0x45, 1)
    });
    assert_eq!(guest.interrupts(), [0x91, 0x72, 0x45]);
}

/// The same vector twice while it waits is one interrupt.
pub fn a_waiting_vector_is_one_interrupt(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        send(a, VECTOR)?;
        send(a, VECTOR)?;
        a.sti()?;
        a.spin(1000)
    });
    assert_eq!(guest.interrupts(), [VECTOR]);
}

/// CR8 holds off vectors of its class and below.
pub fn cr8_holds_lower_vectors_off(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.mov(eax, 6)?;
        a.mov(cr8, rax)?;
        a.sti()?;
        send(a, 0x6f)?;
        send(a, 0x71)?;
        wait_for(a, 0x71, 1)?;
        a.spin(1000)?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + 0x6f * 8))?;
        a.report(rax)?;
        // The APIC's task priority is CR8's.
        a.read_apic(0x80)?;
        a.report(rax)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        wait_for(a, 0x6f, 1)
    });
    assert_eq!(values, [0, 0x60]);
    assert_eq!(guest.interrupts(), [0x71, 0x6f]);
}

/// Until its end is said, an interrupt holds off its class and below.
pub fn an_interrupt_in_service_holds_lower_ones_off(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        a.set_eoi(layout::Eoi::None)?;
        a.sti()?;
        send(a, 0x75)?;
        wait_for(a, 0x75, 1)?;
        send(a, 0x71)?;
        send(a, 0x81)?;
        wait_for(a, 0x81, 1)?;
        a.spin(1000)?;
        a.mov(rax, qword_ptr(layout::IRQ_COUNTS + 0x71 * 8))?;
        a.report(rax)?;
        a.write_apic(0xb0, 0)?;
        a.write_apic(0xb0, 0)?;
        wait_for(a, 0x71, 1)?;
        a.write_apic(0xb0, 0)
    });
    assert_eq!(values, [0]);
    assert_eq!(guest.interrupts(), [0x75, 0x81, 0x71]);
}

/// A disabled APIC takes no messages.
pub fn a_disabled_apic_takes_no_messages(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.write_apic(0xf0, 0xff)?;
        a.sti()?;
        send(a, VECTOR)?;
        a.spin(1000)?;
        a.cli()
    });
    assert!(guest.interrupts().is_empty());
}

/// A processor can interrupt itself.
pub fn a_processor_can_interrupt_itself(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.sti()?;
        a.write_apic(0x300, 0x0004_0000 | 0x55)?;
        wait_for(a, 0x55, 1)
    });
    assert_eq!(guest.interrupts(), [0x55]);
}

/// An NMI ignores IF.
pub fn an_nmi_ignores_if(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.cli()?;
        a.write_apic(0x310, 0)?;
        // To processor 0 by its id: NMI has no shorthand to oneself.
        a.write_apic(0x300, 0x0000_4400)?;
        wait_for(a, 2, 1)
    });
    assert_eq!(guest.interrupts(), [2]);
}

/// A user program is interrupted too, on the stack for ring 0.
pub fn user_code_is_interrupted(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    let values = guest.run(|a| {
        a.enable_apic()?;
        send(a, VECTOR)?;
        a.enter_user_with(0x202)?;
        a.nop()?;
        a.report(rsp)?;
        a.user_done()
    });
    assert_eq!(guest.interrupts(), [VECTOR]);
    assert_eq!(values, [layout::USER_STACK]);
}

/// Selects register `index` of the IOAPIC and writes it.
fn write_ioapic(a: &mut Asm, index: u32, value: u32) -> Assembled {
    a.mov(ebx, 0xfec0_0000_u32)?;
    a.mov(dword_ptr(rbx), i32::try_from(index).unwrap())?;
    a.mov(eax, value)?;
    a.mov(dword_ptr(rbx + 0x10), eax)
}

fn route_line(a: &mut Asm, low: u32) -> Assembled {
    write_ioapic(a, 0x11 + LINE * 2, 0)?;
    write_ioapic(a, 0x10 + LINE * 2, low)
}

/// An edge on an IOAPIC input is one interrupt.
pub fn an_edge_is_one_interrupt(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        route_line(a, 0x61)?;
        a.sti()?;
        out(a, LINE_PORT, 1)?;
        wait_for(a, 0x61, 1)?;
        a.spin(1000)?;
        out(a, LINE_PORT, 0)?;
        out(a, LINE_PORT, 1)?;
        wait_for(a, 0x61, 2)?;
        out(a, LINE_PORT, 0)
    });
    assert_eq!(guest.interrupts(), [0x61, 0x61]);
}

/// A masked input stays silent.
pub fn a_masked_input_stays_silent(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        route_line(a, 0x1_0061)?;
        a.sti()?;
        out(a, LINE_PORT, 1)?;
        a.spin(1000)?;
        out(a, LINE_PORT, 0)
    });
    assert!(guest.interrupts().is_empty());
}

/// A level-triggered input interrupts again and again while it is high.
pub fn a_level_interrupts_until_it_is_low(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        let mut again = a.create_label();
        a.enable_apic()?;
        route_line(a, 0x8061)?;
        a.sti()?;
        out(a, LINE_PORT, 1)?;
        a.set_label(&mut again)?;
        a.pause()?;
        a.cmp(qword_ptr(layout::IRQ_COUNTS + 0x61 * 8), 3)?;
        a.jb(again)?;
        out(a, LINE_PORT, 0)?;
        a.spin(1000)?;
        a.mov(rcx, qword_ptr(layout::IRQ_COUNTS + 0x61 * 8))?;
        a.spin(1000)
    });
    assert!(guest.interrupt_count(0x61) >= 3);
}

/// The PICs reach the processor through LINT0 (virtual wire mode).
pub fn the_pics_reach_the_processor(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        a.write_apic(0x350, 0x700)?;
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 1),
            (0xa1, 0xff),
            (0x21, 0xff ^ 1 << LINE),
        ] {
            out(a, port, value)?;
        }
        a.sti()?;
        out(a, LINE_PORT, 1)?;
        wait_for(a, 0x25, 1)?;
        out(a, LINE_PORT, 0)?;
        out(a, 0x20, 0x20)?;
        out(a, LINE_PORT, 1)?;
        wait_for(a, 0x25, 2)?;
        out(a, LINE_PORT, 0)?;
        out(a, 0x20, 0x20)
    });
    assert_eq!(guest.interrupts(), [0x25, 0x25]);
}

/// The interval timer's line is IOAPIC pin 2.
pub fn the_interval_timer_interrupts(bench: &Bench<'_>) {
    let mut guest = guest(bench);
    guest.run(|a| {
        a.enable_apic()?;
        write_ioapic(a, 0x15, 0)?;
        write_ioapic(a, 0x14, 0x62)?;
        // Channel 0, rate generator, 1000 times a second.
        out(a, 0x43, 0x34)?;
        out(a, 0x40, 0xa9)?;
        out(a, 0x40, 0x04)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.pause()?;
        a.cmp(qword_ptr(layout::IRQ_COUNTS + 0x62 * 8), 3)?;
        a.jb(again)?;
        a.cli()
    });
    assert!(guest.interrupt_count(0x62) >= 3);
}
