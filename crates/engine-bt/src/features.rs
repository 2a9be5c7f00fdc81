//! What guests are told of the processor, and what they may execute.
//!
//! A guest sees the host's processor less what can't be copied or isn't modelled: AVX-512 and
//! larger state, transactions, protection keys, SMAP, monitoring, performance counters, shadow
//! stacks, nested virtualization, enclaves, user interrupts, 64-byte direct stores, XSAVES. It is told that speculation needs no mitigation: the
//! translated guest has no way to another one's memory but through the host's kernel, which
//! mitigates for all its processes.

use ringfence_x86::cpuid::CpuidResult;
use ringfence_x86::cpuid::CpuidTable;

use crate::clock::tsc_khz;
use crate::host::Host;
use crate::host::cpuid;
use crate::walk::PHYSICAL_BITS;

const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < list.len() {
        mask |= 1 << list[index];
        index += 1;
    }
    mask
}

/// Leaf 1 ECX: SSE3 PCLMULQDQ SSSE3 FMA CX16 SSE4.1 SSE4.2 MOVBE POPCNT AES XSAVE AVX F16C
/// RDRAND.
const LEAF1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// PCID, x2APIC, TSC deadline, "a hypervisor is present": the engine's own.
const LEAF1_ECX_OWN: u32 = bits(&[17, 21, 24, 31]);
/// Leaf 1 EDX: FPU VME DE PSE TSC MSR PAE MCE CX8 APIC SEP MTRR PGE MCA CMOV PAT PSE36 CLFSH MMX
/// FXSR SSE SSE2.
const LEAF1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26,
]);
/// Leaf 7 EBX: BMI1 AVX2 BMI2 ERMS RDSEED ADX CLFLUSHOPT CLWB SHA.
const LEAF7_EBX: u32 = bits(&[3, 5, 8, 9, 18, 19, 23, 24, 29]);
/// FSGSBASE SMEP INVPCID: emulated, so the host needn't have them.
const LEAF7_EBX_OWN: u32 = bits(&[0, 7, 10]);
/// Leaf 7 ECX: GFNI VAES VPCLMULQDQ CLDEMOTE MOVDIRI.
const LEAF7_ECX: u32 = bits(&[8, 9, 10, 25, 27]);
/// UMIP RDPID: emulated.
const LEAF7_ECX_OWN: u32 = bits(&[2, 22]);
/// Leaf 7 EDX: FSRM SERIALIZE.
const LEAF7_EDX: u32 = bits(&[4, 14]);
/// IA32_ARCH_CAPABILITIES exists (Intel).
const LEAF7_EDX_ARCH_CAPABILITIES: u32 = bits(&[29]);
/// Leaf 7.1 EAX: SHA512 SM3 SM4 AVX-VNNI AVX-IFMA, all of them on AVX state; FZRM FSRS FSRC.
const LEAF7_1_EAX_AVX: u32 = bits(&[0, 1, 2, 4, 23]);
const LEAF7_1_EAX: u32 = bits(&[10, 11, 12]);
/// Leaf 7.1 EDX: AVX-VNNI-INT8 AVX-NE-CONVERT AVX-VNNI-INT16.
const LEAF7_1_EDX_AVX: u32 = bits(&[4, 5, 10]);
/// Leaf 0xd.1 EAX: XSAVEOPT XSAVEC XGETBV1.
const LEAFD_1_EAX: u32 = bits(&[0, 1, 2]);
/// Leaf 0x8000_0001 ECX: LAHF ABM SSE4A MISALIGNSSE 3DNOWPREFETCH.
const EXT1_ECX: u32 = bits(&[0, 5, 6, 7, 8]);
/// Leaf 0x8000_0001 EDX: SYSCALL NX MMXEXT FXSR_OPT LM, and AMD's copies of leaf 1. Not RDTSCP, which
/// works for whoever tries it: Linux would read the clock by it, and it tells of the host's
/// processor, so that code that runs directly has to trap at it.
const EXT1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 29,
]);
/// 1 GiB pages: emulated.
const EXT1_EDX_OWN: u32 = bits(&[26]);
/// Leaf 0x8000_0007 EDX: invariant TSC.
const EXT7_EDX: u32 = bits(&[8]);
/// Leaf 0x8000_0021 EAX: LFENCE serialises, null selectors clear the base, automatic IBRS.
const EXT21_EAX_OWN: u32 = bits(&[2, 6, 8]);
/// KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid): NOP_IO_DELAY, CLOCKSOURCE2,
/// PV_UNHALT, PV_TLB_FLUSH is not, PV_SEND_IPI, CLOCKSOURCE_STABLE.
const KVM_FEATURES: u32 = bits(&[1, 3, 7, 11, 24]);
const KVM_BASE: u32 = 0x4000_0000;
/// Highest basic leaf shown.
const MAX_BASIC: u32 = 0x16;
const MAX_EXTENDED: u32 = 0x8000_0021;

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL, MDS_NO, PSCHANGE_NO, TAA_NO, SBDR_NO,
/// FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO (SDM 4).
pub(crate) const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 0b111 << 13
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27;

/// The leaves a guest of this engine may be shown.
pub(crate) fn guest_cpuid(host: &Host) -> CpuidTable {
    let mut table = CpuidTable::default();
    basic_leaves(&mut table, host);
    extended_leaves(&mut table);
    paravirtual_leaves(&mut table);
    table
}

fn basic_leaves(table: &mut CpuidTable, host: &Host) {
    let mut leaf0 = cpuid(0, 0);
    let host_max = leaf0.eax;
    leaf0.eax = MAX_BASIC;
    table.set(0, 0, leaf0);

    let mut leaf1 = cpuid(1, 0);
    // APIC id and processor count are the board's.
    leaf1.ebx &= 0x0000_ff00;
    leaf1.ecx = leaf1.ecx & LEAF1_ECX | LEAF1_ECX_OWN;
    leaf1.edx &= LEAF1_EDX;
    if !host.avx {
        leaf1.ecx &= !bits(&[12, 28, 29]);
    }
    table.set(1, 0, leaf1);

    for leaf in [2, 4] {
        copy_cache_leaves(table, leaf, host_max);
    }
    table.set(
        6,
        0,
        CpuidResult {
            eax: 1 << 2,
            ..CpuidResult::default()
        },
    );

    let mut leaf7 = if host_max >= 7 {
        cpuid(7, 0)
    } else {
        CpuidResult::default()
    };
    let subleaf = leaf7.eax >= 1;
    leaf7.eax = u32::from(subleaf);
    leaf7.ebx = leaf7.ebx & LEAF7_EBX | LEAF7_EBX_OWN;
    leaf7.ecx = leaf7.ecx & LEAF7_ECX | LEAF7_ECX_OWN;
    leaf7.edx &= LEAF7_EDX;
    if !host.avx {
        leaf7.ebx &= !bits(&[5]);
        leaf7.ecx &= !bits(&[9, 10]);
    }
    if !host.amd {
        leaf7.edx |= LEAF7_EDX_ARCH_CAPABILITIES;
    }
    table.set(7, 0, leaf7);
    if subleaf {
        table.set(7, 1, newer_features(host));
    }

    if leaf1.ecx & bits(&[26]) != 0 {
        xsave_leaves(table, host);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "TSC frequencies in kHz fit 32 bits"
    )]
    let khz = tsc_khz() as u32;
    // A crystal of 1 MHz makes the ratio the frequency in MHz, too coarse: use kHz over 1000.
    table.set(
        0x15,
        0,
        CpuidResult {
            eax: 1000,
            ebx: khz,
            ecx: 1_000_000,
            edx: 0,
        },
    );
    table.set(
        0x16,
        0,
        CpuidResult {
            eax: khz / 1000,
            ebx: khz / 1000,
            ecx: 100,
            edx: 0,
        },
    );
}

/// Leaf 7.1.
fn newer_features(host: &Host) -> CpuidResult {
    let found = cpuid(7, 1);
    let (mut eax, mut edx) = (LEAF7_1_EAX, 0);
    if host.avx {
        eax |= LEAF7_1_EAX_AVX;
        edx |= LEAF7_1_EDX_AVX;
    }
    CpuidResult {
        eax: found.eax & eax,
        edx: found.edx & edx,
        ..CpuidResult::default()
    }
}

/// Deterministic cache parameters, without the sharing that the host's topology says.
fn copy_cache_leaves(table: &mut CpuidTable, leaf: u32, host_max: u32) {
    if leaf > host_max {
        return;
    }
    for subleaf in 0..8 {
        let mut result = cpuid(leaf, subleaf);
        if leaf == 4 {
            result.eax &= 0x3fff;
        }
        table.set(leaf, subleaf, result);
        if leaf == 2 || result.eax & 0x1f == 0 {
            break;
        }
    }
}

fn xsave_leaves(table: &mut CpuidTable, host: &Host) {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "three components, below 4 KiB"
    )]
    let (components, len) = (host.guest_xcr0 as u32, host.xsave_len as u32);
    table.set(
        0xd,
        0,
        CpuidResult {
            eax: components,
            ebx: len,
            ecx: len,
            edx: 0,
        },
    );
    let mut one = cpuid(0xd, 1);
    one.eax &= LEAFD_1_EAX;
    one.ebx = len;
    one.ecx = 0;
    one.edx = 0;
    table.set(0xd, 1, one);
    if host.avx {
        table.set(0xd, 2, cpuid(0xd, 2));
    }
}

fn extended_leaves(table: &mut CpuidTable) {
    let host_max = cpuid(0x8000_0000, 0).eax;
    let mut leaf0 = cpuid(0x8000_0000, 0);
    leaf0.eax = MAX_EXTENDED;
    table.set(0x8000_0000, 0, leaf0);
    let mut leaf1 = cpuid(0x8000_0001, 0);
    leaf1.ecx &= EXT1_ECX;
    leaf1.edx = leaf1.edx & EXT1_EDX | EXT1_EDX_OWN;
    table.set(0x8000_0001, 0, leaf1);
    for leaf in 0x8000_0002..=0x8000_0006 {
        if leaf <= host_max {
            table.set(leaf, 0, cpuid(leaf, 0));
        }
    }
    let mut leaf7 = CpuidResult::default();
    if host_max >= 0x8000_0007 {
        leaf7.edx = cpuid(0x8000_0007, 0).edx & EXT7_EDX;
    }
    table.set(0x8000_0007, 0, leaf7);
    table.set(
        0x8000_0008,
        0,
        CpuidResult {
            eax: PHYSICAL_BITS | 48 << 8,
            ..CpuidResult::default()
        },
    );
    table.set(
        MAX_EXTENDED,
        0,
        CpuidResult {
            eax: EXT21_EAX_OWN,
            ..CpuidResult::default()
        },
    );
}

fn paravirtual_leaves(table: &mut CpuidTable) {
    let name = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&b"KVMKVMKVM\0\0\0"[at..at + 4]);
        u32::from_le_bytes(word)
    };
    table.set(
        KVM_BASE,
        0,
        CpuidResult {
            eax: KVM_BASE + 1,
            ebx: name(0),
            ecx: name(4),
            edx: name(8),
        },
    );
    table.set(
        KVM_BASE + 1,
        0,
        CpuidResult {
            eax: KVM_FEATURES,
            ..CpuidResult::default()
        },
    );
}
