//! Code that changes while it runs (SDM 3A §12.1.3, §8.1.3).

use crate::prelude::*;

/// A store into the next instruction is seen after a jump.
pub fn a_change_ahead_is_seen_after_a_jump(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut place = a.create_label();
        let mut go = a.create_label();
        a.lea(rbx, ptr(place))?;
        a.mov(byte_ptr(rbx + 1), 0x22)?;
        a.jmp(go)?;
        a.set_label(&mut go)?;
        a.nop()?;
        a.set_label(&mut place)?;
        a.db(&[0xb8, 0x11, 0, 0, 0])?;
        a.report(rax)
    });
    assert_eq!(values, [0x22]);
}

/// Code that ran is changed and runs again, a hundred times, each time as it is now.
pub fn code_that_ran_can_be_changed_again_and_again(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut function = a.create_label();
        let mut start = a.create_label();
        let mut again = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut function)?;
        a.db(&[0xb8, 0, 0, 0, 0])?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.lea(rbx, ptr(function))?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.set_label(&mut again)?;
        a.inc(ecx)?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.call(function)?;
        a.add(edx, eax)?;
        a.cmp(ecx, 100)?;
        a.jne(again)?;
        a.report(rdx)
    });
    assert_eq!(values, [5050]);
}

/// A change through another mapping of the same memory is seen too.
pub fn a_change_through_an_alias_is_seen(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.map(1, layout::FRAMES, PTE_P | PTE_W);
    // mov eax, 1; ret
    guest.write(layout::FRAMES, &[0xb8, 1, 0, 0, 0, 0xc3]);
    let values = guest.run(|a| {
        a.mov(rbx, layout::TEST)?;
        a.call(rbx)?;
        a.report(rax)?;
        a.mov(byte_ptr(rbx + 0x1001), 2)?;
        a.call(rbx)?;
        a.report(rax)?;
        a.mov(rcx, layout::FRAMES)?;
        a.mov(byte_ptr(rcx + 1), 3)?;
        a.call(rbx)?;
        a.report(rax)
    });
    assert_eq!(values, [1, 2, 3]);
}

/// A change by the host while the guest is stopped is seen.
pub fn a_change_by_the_host_is_seen(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.write(layout::FRAMES, &[0xb8, 1, 0, 0, 0, 0xc3]);
    guest.load(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.call(rbx)?;
        a.report(rax)?;
        a.hlt()?;
        a.call(rbx)?;
        a.report(rax)?;
        a.hlt()
    });
    guest.halt();
    guest.write(layout::FRAMES + 1, &[9]);
    guest.finish();
    assert_eq!(guest.values(), [1, 9]);
}

/// A change by a device within the run is seen.
pub fn a_change_by_a_device_is_seen(bench: &Bench<'_>) {
    use ringfence_memory::Bytes;
    let mut guest = Guest::new(bench);
    guest.write(layout::FRAMES, &[0xb8, 1, 0, 0, 0, 0xc3]);
    let ram = guest.ram.clone();
    let writer = CallPort(move |value: u64| {
        let at = ringfence_memory::GuestAddress(layout::FRAMES + 1);
        ram.memory()
            .write_slice(&value.to_le_bytes()[..1], at)
            .unwrap();
    });
    guest.place_port(0x300, 1, std::sync::Arc::new(writer));
    let values = guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.call(rbx)?;
        a.report(rax)?;
        a.mov(eax, 0x44)?;
        a.mov(edx, 0x300)?;
        a.out(dx, al)?;
        a.call(rbx)?;
        a.report(rax)
    });
    assert_eq!(values, [1, 0x44]);
}

/// A string store over code is seen.
pub fn a_string_store_over_code_is_seen(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    // Sixteen times inc eax, then ret; the middle becomes nops.
    let mut code = [0xff, 0xc0].repeat(16);
    code.push(0xc3);
    guest.write(layout::FRAMES, &code);
    let values = guest.run(|a| {
        a.mov(rbx, layout::FRAMES)?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        a.report(rax)?;
        a.mov(eax, 0x90)?;
        a.mov(rdi, layout::FRAMES + 8)?;
        a.mov(ecx, 16)?;
        a.rep().stosb()?;
        a.xor(eax, eax)?;
        a.call(rbx)?;
        a.report(rax)
    });
    assert_eq!(values, [16, 8]);
}

/// Data beside code on one page can be written without harm to the code.
pub fn data_beside_code_can_be_written(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut data = a.create_label();
        let mut start = a.create_label();
        let mut again = a.create_label();
        a.jmp(start)?;
        a.set_label(&mut data)?;
        a.dq(&[0])?;
        a.set_label(&mut start)?;
        a.lea(rbx, ptr(data))?;
        a.mov(ecx, 10_000)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.report(rax)
    });
    assert_eq!(values, [10_000]);
}

/// The same virtual address runs other code after the mapping changed.
pub fn a_remapped_page_runs_its_new_code(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    guest.map(0, layout::FRAMES, PTE_P | PTE_W);
    guest.write(layout::FRAMES, &[0xb8, 1, 0, 0, 0, 0xc3]);
    guest.write(layout::FRAMES + 0x1000, &[0xb8, 2, 0, 0, 0, 0xc3]);
    let values = guest.run(|a| {
        a.mov(rbx, layout::TEST)?;
        a.mov(rdx, layout::PT_TEST)?;
        for change in [0x1000, -0x1000, 0x1000] {
            a.call(rbx)?;
            a.report(rax)?;
            a.add(qword_ptr(rdx), change)?;
            a.invlpg(byte_ptr(rbx))?;
        }
        a.call(rbx)?;
        a.report(rax)
    });
    assert_eq!(values, [1, 2, 1, 2]);
}
