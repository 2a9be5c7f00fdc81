//! Four-level paging: permissions, error codes, accessed and dirty bits (SDM 3A §4.5 to §4.8).

use crate::prelude::*;

const PAGE: u64 = layout::TEST;

/// A read, a write and a fetch of a page that isn't there.
pub fn absent_pages_fault_with_the_access(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(
        &[
            page_fault(PAGE + 0x123, 0),
            page_fault(PAGE + 0x456, PF_W),
            page_fault(PAGE + 0x1000, PF_I),
        ],
        |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rcx, PAGE + 0x1000)?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx + 0x123)))?;
            a.faulting(|a| a.mov(byte_ptr(rbx + 0x456), al))?;
            a.faulting(|a| a.jmp(rcx))
        },
    );
}

/// Read-only pages stop ring 0 while CR0.WP is set, ring 3 always.
pub fn read_only_pages_stop_writes(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_U);
    guest.run_expecting(
        &[
            page_fault(PAGE + 8, PF_P | PF_W),
            page_fault(PAGE + 24, PF_P | PF_W | PF_U),
        ],
        |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.faulting(|a| a.mov(qword_ptr(rbx + 8), rax))?;
            a.change_cr0(paging::CR0_WP, 0)?;
            a.mov(rax, 7_u64)?;
            a.mov(qword_ptr(rbx + 16), rax)?;
            a.enter_user()?;
            a.faulting(|a| a.mov(qword_ptr(rbx + 24), rax))?;
            a.user_done()
        },
    );
    assert_eq!(
        guest.peek(layout::FRAMES + 16),
        7,
        "without WP ring 0 writes"
    );
    assert_eq!(guest.peek(layout::FRAMES + 8), 0);
}

/// Supervisor pages stop ring 3, for reads, writes and fetches.
pub fn supervisor_pages_stop_user_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.run_expecting(
        &[
            page_fault(PAGE, PF_P | PF_U),
            page_fault(PAGE, PF_P | PF_U | PF_W),
            page_fault(PAGE, PF_P | PF_U | PF_I),
        ],
        |a| {
            a.mov(rbx, PAGE)?;
            a.enter_user()?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx)))?;
            a.faulting(|a| a.mov(byte_ptr(rbx), al))?;
            a.faulting(|a| a.jmp(rbx))?;
            a.user_done()
        },
    );
}

/// NX stops fetches alone, on the page or on a table above it.
pub fn nx_stops_fetches_at_every_level(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.write(layout::FRAMES, &[0xc3]);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W | PTE_NX);
    guest.map(1, layout::FRAMES, PTE_P | PTE_W);
    guest.run_expecting(
        &[
            page_fault(PAGE, PF_P | PF_I),
            page_fault(PAGE + 0x1000, PF_P | PF_I),
        ],
        |a| {
            a.mov(rbx, PAGE)?;
            a.mov(rcx, PAGE + 0x1000)?;
            a.mov(rbp, rsp)?;
            a.mov(al, byte_ptr(rbx))?;
            a.faulting(|a| a.call(rbx))?;
            a.mov(rsp, rbp)?;
            a.call(rcx)?;
            a.mov(rdx, layout::PD_TEST)?;
            a.bts(qword_ptr(rdx), 63)?;
            a.invlpg(byte_ptr(rcx))?;
            a.faulting(|a| a.call(rcx))?;
            a.mov(rsp, rbp)
        },
    );
}

/// A table's missing W or U bit takes the right away from all below it.
pub fn rights_are_the_and_of_all_levels(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W | PTE_U);
    guest.poke(layout::PD_TEST, layout::PT_TEST | PTE_P | PTE_U);
    guest.run_expecting(
        &[page_fault(PAGE, PF_P | PF_W), page_fault(PAGE, PF_P | PF_U)],
        |a| {
            a.mov(rbx, PAGE)?;
            a.faulting(|a| a.mov(byte_ptr(rbx), al))?;
            a.mov(rdx, layout::PD_TEST)?;
            a.btr(qword_ptr(rdx), 2)?;
            a.invlpg(byte_ptr(rbx))?;
            a.enter_user()?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx)))?;
            a.user_done()
        },
    );
}

/// A reserved bit in an entry is a fault of its own kind.
pub fn reserved_bits_fault(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    // Bit 7 of a table that points to tables is reserved at the top level; a 2 MiB page's
    // address is aligned.
    guest.poke(layout::PD_TEST + 8, PTE_P | PTE_W | PTE_PS | 0x2000);
    guest.poke(layout::PML4 + 8, layout::PDPT | PTE_P | PTE_W | PTE_PS);
    let misaligned = PAGE + (2 << 20);
    let top = 1 << 39;
    guest.run_expecting(
        &[
            page_fault(misaligned, PF_P | PF_RSVD),
            page_fault(top, PF_P | PF_W | PF_RSVD),
        ],
        |a| {
            a.mov(rbx, misaligned)?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx)))?;
            a.mov(rbx, top)?;
            a.faulting(|a| a.mov(byte_ptr(rbx), al))
        },
    );
}

/// NX without EFER.NXE is a reserved bit.
pub fn nx_without_nxe_is_reserved(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W | PTE_NX);
    guest.run_expecting(&[page_fault(PAGE, PF_P | PF_RSVD)], |a| {
        a.read_msr(msr::EFER)?;
        a.btr(eax, 11)?;
        a.wrmsr()?;
        a.mov(rbx, PAGE)?;
        a.faulting(|a| a.mov(al, byte_ptr(rbx)))
    });
}

/// A read sets A at every level, D nowhere.
pub fn reads_set_accessed_at_every_level(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.map(1, layout::FRAMES, PTE_P | PTE_W);
    guest.run(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(al, byte_ptr(rbx))
    });
    assert_eq!(guest.mapping(0) & (PTE_A | PTE_D), PTE_A);
    assert_eq!(guest.peek(layout::PD_TEST) & PTE_A, PTE_A);
    assert_eq!(guest.peek(layout::PDPT + 16) & PTE_A, PTE_A);
    assert_eq!(guest.mapping(1) & (PTE_A | PTE_D), 0, "the neighbour");
}

/// A write sets D on the page, also when a read came before.
pub fn writes_set_dirty_after_a_read_too(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    let values = guest.run(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(al, byte_ptr(rbx))?;
        a.mov(rcx, qword_ptr(rdx))?;
        a.report(rcx)?;
        a.mov(byte_ptr(rbx), al)?;
        a.mov(rcx, qword_ptr(rdx))?;
        a.report(rcx)
    });
    assert_eq!(values[0] & (PTE_A | PTE_D), PTE_A);
    assert_eq!(values[1] & (PTE_A | PTE_D), PTE_A | PTE_D);
    assert_eq!(
        guest.peek(layout::PD_TEST) & PTE_D,
        0,
        "tables don't get dirty"
    );
}

/// After software clears A and D and flushes, the next accesses set them again.
pub fn cleared_bits_are_set_again_after_a_flush(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.run(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(byte_ptr(rbx), al)?;
        a.and(qword_ptr(rdx), !0x60)?;
        a.invlpg(byte_ptr(rbx))?;
        a.mov(byte_ptr(rbx), al)
    });
    assert_eq!(guest.mapping(0) & (PTE_A | PTE_D), PTE_A | PTE_D);
}

/// A write that faults sets neither D nor memory.
pub fn a_faulting_write_leaves_d_clear(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P);
    guest.run_expecting(&[page_fault(PAGE, PF_P | PF_W)], |a| {
        a.mov(rbx, PAGE)?;
        a.faulting(|a| a.mov(byte_ptr(rbx), 1))
    });
    assert_eq!(guest.mapping(0) & PTE_D, 0);
    assert_eq!(guest.peek(layout::FRAMES), 0);
}

/// A 2 MiB page has A and D of its own.
pub fn large_pages_have_their_own_bits(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let entry = layout::PD_TEST + 16;
    guest.poke(entry, 0x60_0000 | PTE_P | PTE_W | PTE_PS);
    let values = guest.run(|a| {
        a.mov(rbx, PAGE + (4 << 20))?;
        a.mov(al, byte_ptr(rbx + 0x12_3456))?;
        a.mov(rdx, entry)?;
        a.mov(rcx, qword_ptr(rdx))?;
        a.report(rcx)?;
        a.mov(byte_ptr(rbx + 0x12_3456), 0x77)
    });
    assert_eq!(values[0] & (PTE_A | PTE_D), PTE_A);
    assert_eq!(guest.peek(entry) & (PTE_A | PTE_D), PTE_A | PTE_D);
    assert_eq!(guest.peek(0x60_0000 + 0x12_3456) & 0xff, 0x77);
}

/// A 1 GiB page, where the processor has them.
pub fn gigabyte_pages_map_a_gigabyte(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let entry = layout::PDPT + 5 * 8;
    guest.poke(entry, PTE_P | PTE_W | PTE_PS);
    guest.poke(layout::FRAMES + 8, 0x1234);
    let address = (5 << 30) + layout::FRAMES + 8;
    if guest.has(HUGE_PAGES) {
        let values = guest.run(|a| {
            a.mov(rbx, address)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.report(rax)
        });
        assert_eq!(values, [0x1234]);
        assert_eq!(guest.peek(entry) & PTE_A, PTE_A);
    } else {
        guest.run_expecting(&[page_fault(address, PF_P | PF_RSVD)], |a| {
            a.mov(rbx, address)?;
            a.faulting(|a| a.mov(rax, qword_ptr(rbx)))
        });
    }
}

/// An access across two pages faults with the second page's address, and writes nothing.
pub fn a_fault_on_the_second_page_names_it(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.run_expecting(
        &[
            page_fault(PAGE + 0x1000, PF_W),
            page_fault(PAGE + 0x1000, 0),
        ],
        |a| {
            a.mov(rbx, PAGE + 0xffc)?;
            a.mov(rax, u64::MAX)?;
            a.faulting(|a| a.mov(qword_ptr(rbx), rax))?;
            a.faulting(|a| a.mov(rax, qword_ptr(rbx)))
        },
    );
    assert_eq!(
        guest.peek(layout::FRAMES + 0xff8),
        0,
        "the first part isn't written"
    );
}

/// A string move that faults half-way has moved what came before, and can be repeated.
pub fn a_string_move_faults_with_its_progress(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    let values = guest.run_expecting(&[page_fault(PAGE + 0x1000, PF_W)], |a| {
        a.mov(rdi, PAGE + 0xff0)?;
        a.mov(rax, 0x5555_5555_5555_5555_u64)?;
        a.mov(ecx, 4)?;
        let mut again = a.create_label();
        a.faulting(|a| {
            a.set_label(&mut again)?;
            a.rep().stosq()
        })?;
        a.report(rcx)?;
        a.report(rdi)?;
        a.mov(rdx, layout::PT_TEST + 8)?;
        a.mov(rbx, (layout::FRAMES + 0x1000) | PTE_P | PTE_W)?;
        a.mov(qword_ptr(rdx), rbx)?;
        a.rep().stosq()?;
        a.report(rcx)
    });
    assert_eq!(values, [2, PAGE + 0x1000, 0]);
    assert_eq!(guest.peek(layout::FRAMES + 0x1008), 0x5555_5555_5555_5555);
}

/// An instruction that crosses into an absent page faults there, as a fetch.
pub fn a_fetch_across_pages_faults_on_the_second(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    // The first two bytes of a five-byte MOV EAX, imm32.
    guest.write(layout::FRAMES + 0xffe, &[0xb8, 1]);
    guest.run_expecting(&[page_fault(PAGE + 0x1000, PF_I)], |a| {
        a.mov(rbx, PAGE + 0xffe)?;
        a.faulting(|a| a.jmp(rbx))
    });
    assert_eq!(
        guest.faults()[0].rip,
        PAGE + 0xffe,
        "RIP is the instruction's start"
    );
}
