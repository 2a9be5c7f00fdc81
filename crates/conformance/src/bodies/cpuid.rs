//! CPUID answers what the machine says.

use ringfence_x86::cpuid::CpuidResult;

use crate::prelude::*;

fn ask(a: &mut Asm, leaf: u32, subleaf: u32) -> Assembled {
    a.mov(eax, leaf)?;
    a.mov(ecx, subleaf)?;
    a.cpuid()?;
    a.report(rax)?;
    a.report(rbx)?;
    a.report(rcx)?;
    a.report(rdx)
}

fn result(values: &[u64]) -> CpuidResult {
    let word = |index: usize| u32::try_from(values[index]).expect("the upper half is cleared");
    CpuidResult {
        eax: word(0),
        ebx: word(1),
        ecx: word(2),
        edx: word(3),
    }
}

/// A leaf of the caller's comes back bit by bit, with the upper halves cleared.
pub fn a_given_leaf_comes_back(bench: &Bench<'_>) {
    const SIGNATURE: CpuidResult = CpuidResult {
        eax: 0x4000_0001,
        ebx: 0x1122_3344,
        ecx: 0x5566_7788,
        edx: 0x99aa_bbcc,
    };
    let mut cpuid = bench.engine.supported_cpuid().unwrap();
    cpuid.set(0x4000_0000, 0, SIGNATURE);
    let mut guest = Guest::with_cpuid(bench, Setup::default(), &cpuid);
    let values = guest.run(|a| {
        a.mov(rbx, u64::MAX)?;
        a.mov(rdx, u64::MAX)?;
        ask(a, 0x4000_0000, 0)
    });
    assert_eq!(result(&values), SIGNATURE);
}

/// Every leaf without state of its own is the machine's, not the host's.
pub fn all_leaves_are_the_machines(bench: &Bench<'_>) {
    // Leaf 1 and 7 show CR4, 0xd shows XCR0; the rest stands still.
    const LIVE: [u32; 3] = [1, 7, 0xd];
    let mut guest = Guest::new(bench);
    let leaves: Vec<_> = guest
        .cpuid
        .iter()
        .filter(|((leaf, _), _)| !LIVE.contains(leaf))
        .take(60)
        .collect();
    let values = guest.run(|a| {
        for ((leaf, subleaf), _) in &leaves {
            ask(a, *leaf, *subleaf)?;
        }
        Ok(())
    });
    for (index, ((leaf, subleaf), wanted)) in leaves.iter().enumerate() {
        assert_eq!(
            result(&values[index * 4..]),
            *wanted,
            "leaf {leaf:#x}.{subleaf}"
        );
    }
}

/// A leaf that the machine doesn't list, within the range, is zero.
pub fn an_unlisted_leaf_is_zero(bench: &Bench<'_>) {
    let mut cpuid = bench.engine.supported_cpuid().unwrap();
    cpuid.remove(2);
    cpuid.remove(5);
    let mut guest = Guest::with_cpuid(bench, Setup::default(), &cpuid);
    let values = guest.run(|a| {
        ask(a, 2, 0)?;
        ask(a, 5, 0)
    });
    assert_eq!(values, [0; 8]);
}

/// A subleaf past the listed ones is zero; ECX is ignored where a leaf has none.
pub fn subleaves_are_told_apart(bench: &Bench<'_>) {
    let word = |value| CpuidResult {
        eax: value,
        ..CpuidResult::default()
    };
    let mut cpuid = bench.engine.supported_cpuid().unwrap();
    cpuid.remove(4);
    cpuid.set(4, 0, word(0x21));
    cpuid.set(4, 1, word(0x42));
    cpuid.set(0x4000_0000, 0, word(0x4000_0001));
    let mut guest = Guest::with_cpuid(bench, Setup::default(), &cpuid);
    let values = guest.run(|a| {
        for (leaf, subleaf) in [(4, 0), (4, 1), (4, 2), (0x4000_0000, 7)] {
            a.mov(eax, leaf)?;
            a.mov(ecx, subleaf)?;
            a.cpuid()?;
            a.report(rax)?;
        }
        Ok(())
    });
    assert_eq!(values, [0x21, 0x42, 0, 0x4000_0001]);
}

/// OSXSAVE follows CR4.
pub fn osxsave_follows_cr4(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    if !guest.has(XSAVE) {
        guest.run_expecting(&[fault(GP)], |a| {
            a.faulting(|a| a.set_cr4(paging::CR4_OSXSAVE))
        });
        return;
    }
    let values = guest.run(|a| {
        a.clear_cr4(paging::CR4_OSXSAVE)?;
        ask(a, 1, 0)?;
        a.set_cr4(paging::CR4_OSXSAVE)?;
        ask(a, 1, 0)
    });
    assert_eq!(values[2] >> 27 & 1, 0);
    assert_eq!(values[6] >> 27 & 1, 1);
}

/// CPUID works in ring 3.
pub fn user_code_may_ask(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let wanted = *guest.cpuid.get(0, 0).unwrap();
    let values = guest.run(|a| {
        a.enter_user()?;
        // As in programs, no privileged code is around it.
        a.db(&[0x90; 256])?;
        ask(a, 0, 0)?;
        a.user_done()
    });
    assert_eq!(result(&values), wanted);
}

/// The hypervisor bit is set and the paravirtual leaves name their owner.
pub fn the_paravirtual_leaves_are_there(bench: &Bench<'_>) {
    let mut guest = Guest::new(bench);
    let values = guest.run(|a| {
        ask(a, 1, 0)?;
        ask(a, 0x4000_0000, 0)
    });
    assert_eq!(values[2] >> 31, 1, "hypervisor bit");
    let signature = result(&values[4..]);
    let name = [signature.ebx, signature.ecx, signature.edx]
        .map(u32::to_le_bytes)
        .concat();
    assert_eq!(name, b"KVMKVMKVM\0\0\0");
    assert!(signature.eax > 0x4000_0000);
}
