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

/// Data that lies among user code and looks like an instruction is read as it is, while that code runs.
pub fn data_among_user_code_is_read_as_it_is(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        let mut data = a.create_label();
        let mut start = a.create_label();
        let mut again = a.create_label();
        a.enter_user()?;
        a.jmp(start)?;
        a.set_label(&mut data)?;
        a.db(&CPUID_AMONG_NOPS)?;
        a.set_label(&mut start)?;
        a.lea(rbx, ptr(data))?;
        a.mov(ecx, 200)?;
        a.xor(edx, edx)?;
        a.set_label(&mut again)?;
        a.movzx(eax, word_ptr(rbx + 128))?;
        a.add(edx, eax)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.report(rdx)?;
        a.user_done()
    });
    assert_eq!(values, [200 * 0xa20f]);
}

const CPUID_AMONG_NOPS: [u8; 256] = {
    let mut code = [0x90; 256];
    code[128] = 0x0f;
    code[129] = 0xa2;
    code
};

/// So is a table in a page that user code can't write, and a true CPUID in another such page answers.
pub fn a_table_in_a_page_of_user_code_is_read_as_it_is(bench: &Bench<'_>) {
    const TABLE: u64 = 0x1400;
    const MIDDLE: usize = 0x200;
    const ENTRY: u64 = TABLE + 0x200;
    let mut guest = Guest::new(bench);
    let wanted = guest.cpuid.get(0, 0).unwrap().ebx;
    for index in 0..2 {
        guest.map(index, layout::FRAMES + 0x1000 * index, PTE_P | PTE_U);
    }
    // xor eax, eax; xor ecx, ecx; cpuid; mov eax, ebx; ret
    let ask = [0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2, 0x89, 0xd8, 0xc3];
    guest.write(layout::FRAMES, &ask);
    guest.write(layout::FRAMES + 0x1000, &[0xc3]);
    let mut random = 5_u32;
    let mut table: Vec<u8> = std::iter::repeat_with(|| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random.to_be_bytes()[0]
    })
    .take(2 * MIDDLE)
    .collect();
    table[MIDDLE..MIDDLE + 2].copy_from_slice(&[0x0f, 0xa2]);
    guest.write(layout::FRAMES + TABLE, &table);
    let values = guest.run(|a| {
        let mut again = a.create_label();
        a.enter_user()?;
        a.xor(r8d, r8d)?;
        a.xor(r9d, r9d)?;
        a.mov(r12, layout::TEST + 0x1000)?;
        a.mov(r13, layout::TEST)?;
        a.mov(r14, layout::TEST + ENTRY)?;
        a.mov(r15d, 16)?;
        a.set_label(&mut again)?;
        a.call(r12)?;
        a.movzx(eax, word_ptr(r14))?;
        a.add(r8d, eax)?;
        a.call(r13)?;
        a.add(r9, rax)?;
        a.dec(r15d)?;
        a.jnz(again)?;
        a.report(r8)?;
        a.report(r9)?;
        a.user_done()
    });
    assert_eq!(values, [16 * 0xa20f, 16 * u64::from(wanted)]);
}
