//! Port and memory accesses to devices.

use crate::prelude::*;

const PORT: u64 = 0x300;

fn with_port(bench: &Bench<'_>) -> (Guest, std::sync::Arc<Recorder>) {
    let guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(PORT, 0x20, device.clone());
    (guest, device)
}

fn with_memory(bench: &Bench<'_>) -> (Guest, std::sync::Arc<Recorder>) {
    let guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place(layout::DEVICE, 0x1000, device.clone());
    (guest, device)
}

/// IN in each width changes just that width of RAX, and reaches the device with its offset.
pub fn port_reads_have_each_width(bench: &Bench<'_>) {
    let (mut guest, device) = with_port(bench);
    let values = guest.run(|a| {
        for width in [1, 2, 4] {
            a.mov(rax, u64::MAX)?;
            a.mov(edx, 0x304)?;
            match width {
                1 => a.in_(al, dx)?,
                2 => a.in_(ax, dx)?,
                _ => a.in_(eax, dx)?,
            }
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(
        values,
        [0xffff_ffff_ffff_ff05, 0xffff_ffff_ffff_0605, 0x0807_0605]
    );
    assert_eq!(
        device.take(),
        [Seen::Read(4, 1), Seen::Read(4, 2), Seen::Read(4, 4)]
    );
}

/// OUT in each width, with the port in DX.
pub fn port_writes_have_each_width(bench: &Bench<'_>) {
    let (mut guest, device) = with_port(bench);
    guest.run(|a| {
        a.mov(eax, 0x4433_2211)?;
        a.mov(edx, 0x308)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)
    });
    assert_eq!(
        device.take(),
        [
            Seen::Write(8, vec![0x11]),
            Seen::Write(8, vec![0x11, 0x22]),
            Seen::Write(8, vec![0x11, 0x22, 0x33, 0x44]),
        ]
    );
}

/// IN and OUT with the port in the instruction.
pub fn immediate_ports_reach_low_ports(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let device = Recorder::new();
    guest.place_port(0xe0, 8, device.clone());
    let values = guest.run(|a| {
        a.mov(eax, 0x7f)?;
        a.out(0xe2, al)?;
        a.in_(al, 0xe3)?;
        a.report(rax)
    });
    assert_eq!(values, [4]);
    assert_eq!(
        device.take(),
        [Seen::Write(2, vec![0x7f]), Seen::Read(3, 1)]
    );
}

/// REP OUTS is one access an element, in order.
pub fn string_output_is_one_access_an_element(bench: &Bench<'_>) {
    let (mut guest, device) = with_port(bench);
    guest.write(layout::FRAMES, b"abcdefgh");
    let values = guest.run(|a| {
        a.mov(rsi, layout::FRAMES)?;
        a.mov(edx, 0x300)?;
        a.mov(ecx, 3)?;
        a.rep().outsb()?;
        a.mov(ecx, 2)?;
        a.rep().outsw()?;
        a.report(rsi)?;
        a.report(rcx)
    });
    assert_eq!(values, [layout::FRAMES + 7, 0]);
    let writes = [&b"a"[..], b"b", b"c", b"de", b"fg"].map(|data| Seen::Write(0, data.to_vec()));
    assert_eq!(device.take(), writes);
}

/// REP INS stores each element, backwards when the direction flag says so.
pub fn string_input_stores_each_element(bench: &Bench<'_>) {
    let (mut guest, device) = with_port(bench);
    let values = guest.run(|a| {
        a.mov(rdi, layout::FRAMES)?;
        a.mov(edx, 0x310)?;
        a.mov(ecx, 3)?;
        a.rep().insb()?;
        a.report(rdi)?;
        a.std()?;
        a.mov(rdi, layout::FRAMES + 0x14)?;
        a.mov(ecx, 2)?;
        a.rep().insd()?;
        a.cld()?;
        a.report(rdi)
    });
    assert_eq!(values, [layout::FRAMES + 3, layout::FRAMES + 0xc]);
    assert_eq!(guest.peek(layout::FRAMES), 0x11_1111);
    assert_eq!(guest.peek(layout::FRAMES + 0x10), 0x1413_1211_1413_1211);
    let reads: Vec<usize> = device
        .take()
        .iter()
        .map(|seen| match seen {
            Seen::Read(0x10, len) => *len,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(reads, [1, 1, 1, 4, 4]);
}

/// Ports and addresses that nobody claims read as ones and swallow writes.
pub fn unclaimed_accesses_float(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        a.mov(eax, 0)?;
        a.mov(edx, 0x500)?;
        a.out(dx, eax)?;
        a.in_(ax, dx)?;
        a.report(rax)?;
        a.mov(rbx, layout::DEVICE)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.movzx(eax, byte_ptr(rbx + 3))?;
        a.report(rax)
    });
    assert_eq!(values, [0xffff, u64::MAX, 0xff]);
}

/// Loads from device memory in each width, sign- and zero-extended.
pub fn device_loads_have_each_width(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    let values = guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.movzx(eax, byte_ptr(rbx + 0x10))?;
        a.report(rax)?;
        a.movsx(rax, word_ptr(rbx + 0xf0))?;
        a.report(rax)?;
        a.mov(eax, dword_ptr(rbx + 0x20))?;
        a.report(rax)?;
        a.mov(rax, qword_ptr(rbx + 0x30))?;
        a.report(rax)
    });
    assert_eq!(
        values,
        [
            0x11,
            0xffff_ffff_ffff_f2f1,
            0x2423_2221,
            0x3837_3635_3433_3231
        ]
    );
    assert_eq!(
        device.take(),
        [
            Seen::Read(0x10, 1),
            Seen::Read(0xf0, 2),
            Seen::Read(0x20, 4),
            Seen::Read(0x30, 8)
        ]
    );
}

/// Stores to device memory in each width, of registers and constants.
pub fn device_stores_have_each_width(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(rax, 0x8877_6655_4433_2211_u64)?;
        a.mov(byte_ptr(rbx), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), 0x1234_5678)?;
        a.mov(qword_ptr(rbx + 8), rax)
    });
    assert_eq!(
        device.take(),
        [
            Seen::Write(0, vec![0x11]),
            Seen::Write(2, vec![0x11, 0x22]),
            Seen::Write(4, vec![0x78, 0x56, 0x34, 0x12]),
            Seen::Write(8, vec![0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]),
        ]
    );
}

/// Instructions that read and write device memory do both, once each.
pub fn read_modify_write_reaches_the_device_twice(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    let values = guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(eax, 0x80)?;
        a.or(dword_ptr(rbx), eax)?;
        a.mov(ecx, 0x55)?;
        a.xchg(dword_ptr(rbx + 4), ecx)?;
        a.report(rcx)
    });
    assert_eq!(values, [0x0807_0605]);
    assert_eq!(
        device.take(),
        [
            Seen::Read(0, 4),
            Seen::Write(0, vec![0x81, 2, 3, 4]),
            Seen::Read(4, 4),
            Seen::Write(4, vec![0x55, 0, 0, 0]),
        ]
    );
}

/// Comparisons with device memory set flags and write nothing.
pub fn comparisons_only_read_the_device(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    let values = guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.cmp(dword_ptr(rbx), 0x0403_0201)?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)?;
        a.test(byte_ptr(rbx + 7), 8)?;
        a.setnz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)
    });
    assert_eq!(values, [1, 1]);
    assert_eq!(device.take(), [Seen::Read(0, 4), Seen::Read(7, 1)]);
}

/// A vector move to or from device memory reaches it whole, in one part or more.
pub fn vector_moves_reach_the_device_whole(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.movdqu(xmm0, xmmword_ptr(rbx + 0x10))?;
        a.mov(rax, layout::FRAMES)?;
        a.movdqu(xmmword_ptr(rax), xmm0)?;
        a.movdqu(xmmword_ptr(rbx + 0x20), xmm0)
    });
    let loaded: [u8; 16] = std::array::from_fn(|index| 0x11 + u8::try_from(index).unwrap());
    let mut written = Vec::new();
    for seen in device.take() {
        match seen {
            Seen::Write(offset, data) => {
                assert_eq!(offset, 0x20 + written.len() as u64, "parts are in order");
                written.extend(data);
            }
            Seen::Read(..) => assert!(written.is_empty(), "reads come first"),
        }
    }
    assert_eq!(written, loaded);
    assert_eq!(guest.peek(layout::FRAMES).to_le_bytes(), loaded[..8]);
    assert_eq!(guest.peek(layout::FRAMES + 8).to_le_bytes(), loaded[8..]);
}

/// REP MOVS between RAM and device memory, both ways.
pub fn string_moves_reach_the_device(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    guest.poke(layout::FRAMES, 0x4444_3333_2222_1111);
    let values = guest.run(|a| {
        a.mov(rsi, layout::FRAMES)?;
        a.mov(rdi, layout::DEVICE + 0x40)?;
        a.mov(ecx, 2)?;
        a.rep().movsd()?;
        a.mov(rsi, layout::DEVICE + 0x80)?;
        a.mov(rdi, layout::FRAMES + 8)?;
        a.mov(ecx, 2)?;
        a.rep().movsd()?;
        a.report(rcx)?;
        a.report(rsi)
    });
    assert_eq!(values, [0, layout::DEVICE + 0x88]);
    assert_eq!(guest.peek(layout::FRAMES + 8), 0x8887_8685_8483_8281);
    assert_eq!(
        device.take(),
        [
            Seen::Write(0x40, vec![0x11, 0x11, 0x22, 0x22]),
            Seen::Write(0x44, vec![0x33, 0x33, 0x44, 0x44]),
            Seen::Read(0x80, 4),
            Seen::Read(0x84, 4),
        ]
    );
}

/// A device may be moved while the guest runs: the next access goes to its new place.
pub fn a_moved_device_answers_at_its_new_place(bench: &Bench<'_>) {
    let (mut guest, device) = with_memory(bench);
    let bus = guest.mmio.clone();
    let moved = device.clone();
    let mover = CallPort(move |to| {
        bus.remove(layout::DEVICE).unwrap();
        let range = ringfence_bus::Range {
            start: to,
            len: 0x1000,
        };
        bus.insert(range, moved.clone()).unwrap();
    });
    guest.place_port(0x320, 4, std::sync::Arc::new(mover));
    let values = guest.run(|a| {
        a.mov(rbx, layout::DEVICE)?;
        a.mov(al, byte_ptr(rbx))?;
        a.mov(eax, u32::try_from(layout::DEVICE + 0x10_0000).unwrap())?;
        a.mov(edx, 0x320)?;
        a.out(dx, eax)?;
        a.movzx(eax, byte_ptr(rbx))?;
        a.report(rax)?;
        a.movzx(eax, byte_ptr(rbx + 0x10_0000))?;
        a.report(rax)
    });
    assert_eq!(values, [0xff, 1]);
    assert_eq!(device.take(), [Seen::Read(0, 1), Seen::Read(0, 1)]);
}
