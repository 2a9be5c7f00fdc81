//! Guest memory, seen from both sides.

use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;

use crate::prelude::*;

/// What the host writes, the guest reads, in every width.
pub fn the_guest_reads_what_the_host_wrote(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, 0xf1e2_d3c4_b5a6_9788);
    let values = guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.movzx(eax, byte_ptr(rbx + 1))?;
        a.report(rax)?;
        a.movsx(rax, word_ptr(rbx + 6))?;
        a.report(rax)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        a.report(rax)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)
    });
    assert_eq!(
        values,
        [
            0x97,
            0xffff_ffff_ffff_f1e2,
            0xf1e2_d3c4,
            0xf1e2_d3c4_b5a6_9788
        ]
    );
}

/// What the guest writes, the host reads, in every width.
pub fn the_host_reads_what_the_guest_wrote(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.mov(rax, 0x1122_3344_5566_7788_u64)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.mov(dword_ptr(rbx + 8), eax)?;
        a.mov(word_ptr(rbx + 12), ax)?;
        a.mov(byte_ptr(rbx + 14), al)
    });
    assert_eq!(guest.peek(layout::FRAMES), 0x1122_3344_5566_7788);
    assert_eq!(guest.peek(layout::FRAMES + 8), 0x0088_7788_5566_7788);
}

/// Accesses may lie across a page boundary at every offset, on pages that aren't neighbours.
pub fn accesses_may_cross_pages(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES + 0x5000, PTE_P | PTE_W);
    guest.map(1, layout::FRAMES + 0x2000, PTE_P | PTE_W);
    let values = guest.run(|a| {
        a.mov(rbx, layout::TEST + 0x1000)?;
        for offset in 1..8 {
            a.mov(rax, 0x0807_0605_0403_0201_u64)?;
            a.mov(qword_ptr(rbx - offset), rax)?;
            a.mov(rax, 0_u64)?;
            a.mov(rax, qword_ptr(rbx - offset))?;
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(values, [0x0807_0605_0403_0201; 7]);
    assert_eq!(
        guest.peek(layout::FRAMES + 0x2000) & 0xff,
        8,
        "in the second frame"
    );
    assert_eq!(
        guest.peek(layout::FRAMES + 0x5ff8) >> 56,
        7,
        "in the first frame"
    );
}

/// RAM continues above the hole below 4 GiB, without being the RAM at 0.
pub fn ram_continues_above_the_hole(bench: &Bench<'_>) {
    let mut guest = Guest::with(
        bench,
        Setup {
            ram_bytes: (3 << 30) + (4 << 20),
            ..Setup::default()
        },
    );
    guest.poke(layout::HIGH + 0x10_0000, 0xa);
    let values = guest.run(|a| {
        a.mov(rbx, layout::HIGH + 0x10_0000)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rax, 0xb_u64)?;
        a.mov(qword_ptr(rbx + 8), rax)
    });
    assert_eq!(values, [0xa]);
    let high: u64 = guest
        .ram
        .memory()
        .read_obj(GuestAddress(layout::HIGH + 0x10_0008))
        .unwrap();
    assert_eq!(high, 0xb);
    assert_ne!(guest.peek(0x10_0008), 0xb);
}

/// String instructions move and compare, forwards and backwards.
pub fn string_instructions_move_and_compare(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.write(layout::FRAMES, b"a string of bytes that is long enough");
    let values = guest.run(|a| {
        a.mov(rsi, layout::FRAMES)?;
        a.mov(rdi, layout::FRAMES + 0x1000)?;
        a.mov(ecx, 37)?;
        a.rep().movsb()?;
        a.report(rcx)?;
        a.report(rsi)?;
        a.mov(rsi, layout::FRAMES)?;
        a.mov(rdi, layout::FRAMES + 0x1000)?;
        a.mov(byte_ptr(rdi + 20), 0)?;
        a.mov(ecx, 37)?;
        a.repe().cmpsb()?;
        a.report(rcx)?;
        a.std()?;
        a.mov(rdi, layout::FRAMES + 0x2018)?;
        a.mov(rax, 7_u64)?;
        a.mov(ecx, 4)?;
        a.rep().stosq()?;
        a.cld()?;
        a.report(rdi)
    });
    assert_eq!(
        values,
        [0, layout::FRAMES + 37, 16, layout::FRAMES + 0x1ff8]
    );
    assert_eq!(
        guest.peek(layout::FRAMES + 0x1000),
        guest.peek(layout::FRAMES)
    );
    assert_eq!(guest.peek(layout::FRAMES + 0x2000), 7);
    assert_eq!(guest.peek(layout::FRAMES + 0x2018), 7);
}

/// Locked operations and CMPXCHG16B work across a cache line.
pub fn locked_operations_work(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, 10);
    guest.poke(layout::FRAMES + 0x100, 1);
    guest.poke(layout::FRAMES + 0x108, 2);
    let values = guest.run(|a| {
        a.mov(rbp, layout::FRAMES)?;
        a.mov(eax, 5)?;
        a.lock().xadd(qword_ptr(rbp), rax)?;
        a.report(rax)?;
        a.mov(eax, 15)?;
        a.mov(ecx, 99)?;
        a.lock().cmpxchg(qword_ptr(rbp), rcx)?;
        a.lock().add(dword_ptr(rbp + 0x3e), 1)?;
        a.mov(eax, 1)?;
        a.mov(edx, 2)?;
        a.mov(ebx, 3)?;
        a.mov(ecx, 4)?;
        a.lock().cmpxchg16b(xmmword_ptr(rbp + 0x100))?;
        a.setz(al)?;
        a.movzx(eax, al)?;
        a.report(rax)
    });
    assert_eq!(values, [10, 1]);
    assert_eq!(guest.peek(layout::FRAMES), 99);
    assert_eq!(guest.peek(layout::FRAMES + 0x38) >> 48, 1);
    assert_eq!(guest.peek(layout::FRAMES + 0x100), 3);
    assert_eq!(guest.peek(layout::FRAMES + 0x108), 4);
}
