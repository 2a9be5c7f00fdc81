//! What the translation of an instruction depends on besides its bytes.

use ringfence_x86::paging::CR0_EM;
use ringfence_x86::paging::CR0_TS;
use ringfence_x86::paging::CR4_OSFXSR;
use ringfence_x86::paging::CR4_OSXSAVE;

use crate::core::Core;
use crate::core::flag;

/// Part of a translation's key: code translated in one mode is never run in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Mode(u8);

const BITS_64: u8 = 0;
const BITS_32: u8 = 1;
const BITS_16: u8 = 2;
const BITS: u8 = 3;
const USER: u8 = 1 << 2;
/// Vector and x87 instructions raise #NM or #UD (CR0.TS or CR0.EM).
const FPU_TRAPS: u8 = 1 << 3;
/// AVX instructions raise #UD (CR4.OSXSAVE is clear).
const NO_AVX: u8 = 1 << 4;
/// SSE instructions raise #UD (CR4.OSFXSR is clear).
const NO_SSE: u8 = 1 << 6;
/// RDTSC is privileged (CR4.TSD).
const TRAPS_TSC: u8 = 1 << 7;
/// Every instruction goes through the monitor: single step, breakpoints, segments with bases,
/// alignment checks.
const STEP: u8 = 1 << 5;

impl Default for Mode {
    fn default() -> Self {
        Self(BITS_16 | STEP)
    }
}

impl Mode {
    /// Ordinary code of either width and privilege.
    pub(crate) fn plain(bits: u32, user: bool) -> Self {
        let width = if bits == 64 { BITS_64 } else { BITS_32 };
        Self(width | if user { USER } else { 0 })
    }

    /// The mode that `core` is in.
    pub(crate) fn of(core: &Core) -> Self {
        let mode = Self::of_level(core, core.code_bits(), core.is_user());
        let alignment_checked = core.is_user()
            && core.has(flag::AC)
            && core.sys.cr0 & ringfence_x86::paging::CR0_AM != 0;
        // Code at levels 1 and 2 is neither user code nor may it do all that the kernel may.
        let middle = matches!(core.cpl, 1 | 2);
        if alignment_checked || middle || core.has(flag::TF) {
            Self(mode.0 | STEP)
        } else {
            mode
        }
    }

    /// As [`Self::of`] for other code on the same processor: its width and privilege, with no
    /// flags set that matter.
    pub(crate) fn of_level(core: &Core, bits: u32, user: bool) -> Self {
        let mut mode = match bits {
            64 => BITS_64,
            32 => BITS_32,
            _ => BITS_16,
        };
        if user {
            mode |= USER;
        }
        if core.sys.cr0 & (CR0_TS | CR0_EM) != 0 {
            mode |= FPU_TRAPS;
        }
        if core.sys.cr4 & CR4_OSXSAVE == 0 || core.sys.xcr0 & 0b100 == 0 {
            mode |= NO_AVX;
        }
        if core.sys.cr4 & CR4_OSFXSR == 0 {
            mode |= NO_SSE;
        }
        if core.sys.cr4 & ringfence_x86::paging::CR4_TSD != 0 {
            mode |= TRAPS_TSC;
        }
        let breakpoints = core.sys.dr7 & 0xff != 0 || !core.breakpoints.is_empty();
        if bits == 16
            || breakpoints
            || core.single_step
            || (bits == 32 && !core.has_flat_segments())
        {
            mode |= STEP;
        }
        Self(mode)
    }

    /// Default operand and address size: 16, 32 or 64.
    pub(crate) fn bits(self) -> u32 {
        match self.0 & BITS {
            BITS_64 => 64,
            BITS_32 => 32,
            _ => 16,
        }
    }

    /// CPL 3.
    pub(crate) fn is_user(self) -> bool {
        self.0 & USER != 0
    }

    /// RDTSC is privileged.
    pub(crate) fn traps_tsc(self) -> bool {
        self.0 & TRAPS_TSC != 0
    }

    /// SSE instructions raise #UD.
    pub(crate) fn no_sse(self) -> bool {
        self.0 & NO_SSE != 0
    }

    /// x87 and vector instructions raise #NM or #UD.
    pub(crate) fn fpu_traps(self) -> bool {
        self.0 & FPU_TRAPS != 0
    }

    /// AVX instructions raise #UD.
    pub(crate) fn no_avx(self) -> bool {
        self.0 & NO_AVX != 0
    }

    /// Nothing is translated.
    pub(crate) fn is_stepped(self) -> bool {
        self.0 & STEP != 0
    }
}
