//! What flushes translations, and the modes that guard pages (SDM 3A §4.6, §4.10).

use crate::prelude::*;

const PAGE: u64 = layout::TEST;

/// More rights in an entry are seen without a flush, after the fault at the latest (§4.10.4.3).
pub fn more_rights_need_no_flush(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P);
    guest.run(|a| {
        let mut done = a.create_label();
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(al, byte_ptr(rbx))?;
        a.or(qword_ptr(rdx), 2)?;
        a.mov(byte_ptr(rbx), 0x66)?;
        a.set_label(&mut done)?;
        a.nop()
    });
    assert_eq!(guest.peek(layout::FRAMES) & 0xff, 0x66);
}

/// INVLPG makes a new mapping seen.
pub fn invlpg_makes_a_new_mapping_seen(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, 1);
    guest.poke(layout::FRAMES + 0x1000, 2);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    let values = guest.run(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.add(qword_ptr(rdx), 0x1000)?;
        a.invlpg(byte_ptr(rbx))?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)
    });
    assert_eq!(values, [1, 2]);
}

/// INVLPG of a large page's any address drops it.
pub fn invlpg_drops_a_whole_large_page(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let entry = layout::PD_TEST + 8;
    guest.poke(entry, 0x40_0000 | PTE_P | PTE_W | PTE_PS);
    guest.poke(0x40_0000, 1);
    guest.poke(0x60_0000, 2);
    let values = guest.run(|a| {
        a.mov(rbx, PAGE + (2 << 20))?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rdx, entry)?;
        a.add(qword_ptr(rdx), 0x20_0000)?;
        a.invlpg(byte_ptr(rbx + 0x1f_f000))?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)
    });
    assert_eq!(values, [1, 2]);
}

/// A load of CR3 makes new mappings seen, but for global pages, which CR4.PGE flushes.
pub fn cr3_flushes_and_global_pages_stay(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.poke(layout::FRAMES, 1);
    guest.poke(layout::FRAMES + 0x1000, 2);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.map(1, layout::FRAMES, PTE_P | PTE_W | PTE_G);
    let values = guest.run(|a| {
        a.set_cr4(paging::CR4_PGE)?;
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(rax, qword_ptr(rbx + 0x1000))?;
        a.add(qword_ptr(rdx), 0x1000)?;
        a.add(qword_ptr(rdx + 8), 0x1000)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rax, cr4)?;
        a.btr(rax, 7)?;
        a.mov(cr4, rax)?;
        a.mov(rax, qword_ptr(rbx + 0x1000))?;
        a.report(rax)
    });
    // Whether a global page is still the old one before PGE changes is the processor's choice.
    assert_eq!(values, [2, 2]);
}

/// A second set of tables shows other pages at the same address.
pub fn another_cr3_shows_other_pages(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let [pml4, pdpt, pd, pt] = [0, 1, 2, 3].map(|n| layout::SPARE_TABLES + n * 0x1000);
    let table = PTE_P | PTE_W | PTE_U;
    guest.poke(pml4, pdpt | table);
    for entry in 0..4 {
        guest.poke(pdpt + entry * 8, guest.peek(layout::PDPT + entry * 8));
    }
    guest.poke(pdpt + 16, pd | table);
    guest.poke(pd, pt | table);
    guest.poke(pt, (layout::FRAMES + 0x1000) | PTE_P | PTE_W);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.poke(layout::FRAMES, 0xa);
    guest.poke(layout::FRAMES + 0x1000, 0xb);
    let values = guest.run(|a| {
        a.mov(rbx, PAGE)?;
        a.mov(rcx, cr3)?;
        a.mov(rdx, pml4)?;
        for _ in 0..3 {
            a.mov(rax, qword_ptr(rbx))?;
            a.report(rax)?;
            a.mov(cr3, rdx)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.report(rax)?;
            a.mov(cr3, rcx)?;
        }
        Ok(())
    });
    assert_eq!(values, [0xa, 0xb, 0xa, 0xb, 0xa, 0xb]);
}

/// Address-space tags: bit 63 of a CR3 load keeps, its absence drops what the tag had cached; both
/// show each space's own pages.
pub fn tagged_address_spaces_keep_apart(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(PCID) {
        return refused_cr4(&mut guest, paging::CR4_PCIDE);
    }
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.poke(layout::FRAMES, 1);
    guest.poke(layout::FRAMES + 0x1000, 2);
    let values = guest.run(|a| {
        a.set_cr4(paging::CR4_PCIDE)?;
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(rax, layout::PML4 | 5)?;
        a.mov(cr3, rax)?;
        a.mov(rcx, cr3)?;
        a.report(rcx)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rax, layout::PML4 | 6 | 1 << 63)?;
        a.mov(cr3, rax)?;
        a.add(qword_ptr(rdx), 0x1000)?;
        a.mov(rax, layout::PML4 | 5)?;
        a.mov(cr3, rax)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)?;
        a.mov(rax, layout::PML4)?;
        a.mov(cr3, rax)?;
        a.mov(rax, cr4)?;
        a.btr(rax, 17)?;
        a.mov(cr4, rax)
    });
    assert_eq!(values, [layout::PML4 | 5, 1, 2]);
}

/// CR4.PCIDE can't be set while CR3 holds a tag.
pub fn pcide_needs_tag_zero(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.run_expecting(&[fault(GP)], |a| {
        // Bits 3 and 4 are cache bits without PCIDE, and part of the tag with it.
        a.mov(rax, layout::PML4 | 8)?;
        a.mov(cr3, rax)?;
        a.faulting(|a| a.set_cr4(paging::CR4_PCIDE))?;
        a.mov(rax, layout::PML4)?;
        a.mov(cr3, rax)
    });
}

/// INVPCID of one address, and of everything.
pub fn invpcid_makes_new_mappings_seen(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(INVPCID) {
        guest.run_expecting(&[fault(UD)], |a| {
            a.xor(eax, eax)?;
            a.faulting(|a| a.invpcid(rax, xmmword_ptr(rsp)))
        });
        return;
    }
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    for frame in 0..3 {
        guest.poke(layout::FRAMES + frame * 0x1000, frame);
    }
    guest.poke(layout::FRAMES + 0x8008, PAGE);
    let values = guest.run_expecting(&[fault(GP)], |a| {
        a.mov(rbx, PAGE)?;
        a.mov(rdx, layout::PT_TEST)?;
        a.mov(rsi, layout::FRAMES + 0x8000)?;
        for kind in [0, 2] {
            a.mov(rax, qword_ptr(rbx))?;
            a.add(qword_ptr(rdx), 0x1000)?;
            a.mov(eax, kind)?;
            a.invpcid(rax, xmmword_ptr(rsi))?;
            a.mov(rax, qword_ptr(rbx))?;
            a.report(rax)?;
        }
        a.mov(eax, 4)?;
        a.faulting(|a| a.invpcid(rax, xmmword_ptr(rsi)))
    });
    assert_eq!(values, [1, 2]);
}

/// SMEP: ring 0 doesn't run user pages.
pub fn smep_stops_supervisor_fetches_of_user_pages(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(SMEP) {
        return refused_cr4(&mut guest, paging::CR4_SMEP);
    }
    guest.map(0, layout::FRAMES, PTE_P | PTE_U);
    guest.write(layout::FRAMES, &[0xc3]);
    guest.run_expecting(&[page_fault(PAGE, PF_P | PF_I)], |a| {
        a.mov(rbx, PAGE)?;
        a.mov(rbp, rsp)?;
        a.call(rbx)?;
        a.set_cr4(paging::CR4_SMEP)?;
        a.mov(al, byte_ptr(rbx))?;
        a.faulting(|a| a.call(rbx))?;
        a.mov(rsp, rbp)
    });
}

/// SMAP: ring 0 doesn't touch user pages unless RFLAGS.AC is set.
pub fn smap_stops_supervisor_accesses_to_user_pages(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(SMAP) {
        return refused_cr4(&mut guest, paging::CR4_SMAP);
    }
    guest.map(0, layout::FRAMES, PTE_P | PTE_W | PTE_U);
    guest.run_expecting(
        &[
            page_fault(PAGE, PF_P),
            page_fault(PAGE + 8, PF_P | PF_W),
            page_fault(PAGE, PF_P),
        ],
        |a| {
            a.mov(rbx, PAGE)?;
            a.mov(al, byte_ptr(rbx))?;
            a.set_cr4(paging::CR4_SMAP)?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx)))?;
            a.faulting(|a| a.mov(byte_ptr(rbx + 8), al))?;
            a.stac()?;
            a.mov(byte_ptr(rbx + 16), 1)?;
            a.clac()?;
            a.faulting(|a| a.mov(al, byte_ptr(rbx)))
        },
    );
    assert_eq!(guest.peek(layout::FRAMES + 16), 1);
}

fn refused_cr4(guest: &mut Guest, bit: u64) {
    guest.run_expecting(&[fault(GP)], |a| a.faulting(|a| a.set_cr4(bit)));
}
