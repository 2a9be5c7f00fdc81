//! What this host's processor and kernel let the translator use.

// UNSAFETY: asks the processor and the kernel.
#![expect(unsafe_code, reason = "intrinsics and getauxval")]

use core::arch::x86_64::__cpuid_count;
use core::arch::x86_64::_xgetbv;

use ringfence_x86::cpuid::CpuidResult;

use crate::offered::Offered;

/// Host abilities that shape the code the translator emits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    /// The processor is AMD's.
    pub amd: bool,
    /// PEXT in one operation: page numbers are extracted without touching flags.
    pub fast_pext: bool,
    /// The guest may use AVX (256-bit state must be kept across calls into Rust).
    pub avx: bool,
    /// `wrgsbase` works in user mode.
    pub fsgsbase: bool,
    /// Instructions that guests may execute.
    pub offered: Offered,
    /// XSAVE components that a guest may enable: x87, SSE and, when the host has it, AVX.
    pub guest_xcr0: u64,
    /// Bytes of the standard-format XSAVE area for those components.
    pub xsave_len: usize,
}

/// XCR0 bits: x87, SSE, AVX (SDM 1 §13.1).
const XCR0_X87_SSE_AVX: u64 = 0b111;
/// `AT_HWCAP2` bit that says the kernel enabled FSGSBASE (Documentation/x86/x86_64/fsgs).
const HWCAP2_FSGSBASE: u64 = 1 << 1;

/// CPUID of this processor.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let result = __cpuid_count(leaf, subleaf);
    CpuidResult {
        eax: result.eax,
        ebx: result.ebx,
        ecx: result.ecx,
        edx: result.edx,
    }
}

/// CPUID of this processor, nothing where it has no such leaf: it would answer with another one.
fn present_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let present =
        leaf <= cpuid(leaf & 0x8000_0000, 0).eax && (leaf != 7 || subleaf <= cpuid(7, 0).eax);
    if present {
        cpuid(leaf, subleaf)
    } else {
        CpuidResult::default()
    }
}

impl Host {
    /// Asks the processor.
    pub(crate) fn detect() -> Self {
        let features = cpuid(1, 0);
        let extended = cpuid(7, 0);
        let osxsave = features.ecx & (1 << 27) != 0;
        let host_xcr0 = if osxsave { read_xcr0() } else { 0b11 };
        let avx = osxsave && features.ecx & (1 << 28) != 0 && host_xcr0 & 0b100 != 0;
        let guest_xcr0 = host_xcr0 & XCR0_X87_SSE_AVX & if avx { 0b111 } else { 0b011 };
        Self {
            amd: is_amd(),
            fast_pext: extended.ebx & (1 << 8) != 0 && !has_microcoded_pext(),
            avx,
            fsgsbase: kernel_allows_fsgsbase(),
            offered: Offered::new(present_cpuid, avx),
            guest_xcr0,
            xsave_len: xsave_len(guest_xcr0),
        }
    }
}

/// Length of the standard-format area for `xcr0`: legacy region, header, then AVX at its offset.
fn xsave_len(xcr0: u64) -> usize {
    const LEGACY_AND_HEADER: usize = 576;
    if xcr0 & 0b100 == 0 {
        return LEGACY_AND_HEADER;
    }
    let avx = cpuid(0xd, 2);
    avx.eax as usize + avx.ebx as usize
}

/// Zen 1 and 2 run PEXT as microcode, some 20 to 300 cycles (AMD family 17h optimisation guide).
fn has_microcoded_pext() -> bool {
    let signature = cpuid(1, 0).eax;
    let family = ((signature >> 8) & 0xf) + ((signature >> 20) & 0xff);
    is_amd() && family < 0x19
}

fn is_amd() -> bool {
    cpuid(0, 0).ebx == u32::from_le_bytes(*b"Auth")
}

fn read_xcr0() -> u64 {
    // SAFETY: the caller has seen OSXSAVE, which is what XGETBV needs.
    unsafe { xgetbv0() }
}

#[target_feature(enable = "xsave")]
fn xgetbv0() -> u64 {
    // SAFETY: XCR0 exists wherever XSAVE is enabled.
    unsafe { _xgetbv(0) }
}

fn kernel_allows_fsgsbase() -> bool {
    // SAFETY: getauxval only reads the process's auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}
