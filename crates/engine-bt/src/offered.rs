//! Which instructions guests may execute: those that are copied or emulated, as far as the host's
//! processor has them. The others raise #UD, before they touch any memory.

use iced_x86::CpuidFeature;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use ringfence_x86::cpuid::CpuidResult;

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offered([u64; 4]);

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Leaf1Ecx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub1Eax,
    Leaf7Sub1Edx,
    LeafDSub1Eax,
    ExtendedEcx,
    ExtendedEdx,
}

impl Word {
    fn read(self, cpuid: impl Fn(u32, u32) -> CpuidResult) -> u32 {
        match self {
            Self::Leaf1Ecx => cpuid(1, 0).ecx,
            Self::Leaf7Ebx => cpuid(7, 0).ebx,
            Self::Leaf7Ecx => cpuid(7, 0).ecx,
            Self::Leaf7Edx => cpuid(7, 0).edx,
            Self::Leaf7Sub1Eax => cpuid(7, 1).eax,
            Self::Leaf7Sub1Edx => cpuid(7, 1).edx,
            Self::LeafDSub1Eax => cpuid(0xd, 1).eax,
            Self::ExtendedEcx => cpuid(0x8000_0001, 0).ecx,
            Self::ExtendedEdx => cpuid(0x8000_0001, 0).edx,
        }
    }
}

/// What every processor of this architecture has, what does nothing where it isn't known, and what
/// is emulated. LZCNT is BSR where it isn't known.
const ALWAYS: &[CpuidFeature] = {
    use CpuidFeature as F;
    &[
        F::INTEL8086,
        F::INTEL8086_ONLY,
        F::INTEL186,
        F::INTEL286,
        F::INTEL286_ONLY,
        F::INTEL386,
        F::INTEL386_ONLY,
        F::INTEL486,
        F::X64,
        F::CET_IBT,
        F::CLDEMOTE,
        F::CLFSH,
        F::CMOV,
        F::CPUID,
        F::CX8,
        F::FPU,
        F::FPU287,
        F::FPU387,
        F::FSGSBASE,
        F::FXSR,
        F::INVPCID,
        F::LZCNT,
        F::MMX,
        F::MSR,
        F::MULTIBYTENOP,
        F::PAUSE,
        F::PREFETCHW,
        F::PREFETCHWT1,
        F::RDPID,
        F::SEP,
        F::SSE,
        F::SSE2,
        F::SYSCALL,
        F::TSC,
        F::WBNOINVD,
    ]
};

/// What the host's processor decides (SDM 2A, CPUID; APM 3 appendix E).
const BY_HOST: &[(CpuidFeature, Word, u32)] = {
    use CpuidFeature as F;
    &[
        (F::SSE3, Word::Leaf1Ecx, 0),
        (F::PCLMULQDQ, Word::Leaf1Ecx, 1),
        (F::SSSE3, Word::Leaf1Ecx, 9),
        (F::CMPXCHG16B, Word::Leaf1Ecx, 13),
        (F::SSE4_1, Word::Leaf1Ecx, 19),
        (F::SSE4_2, Word::Leaf1Ecx, 20),
        (F::MOVBE, Word::Leaf1Ecx, 22),
        (F::POPCNT, Word::Leaf1Ecx, 23),
        (F::AES, Word::Leaf1Ecx, 25),
        (F::XSAVE, Word::Leaf1Ecx, 26),
        (F::RDRAND, Word::Leaf1Ecx, 30),
        (F::BMI1, Word::Leaf7Ebx, 3),
        (F::BMI2, Word::Leaf7Ebx, 8),
        (F::RDSEED, Word::Leaf7Ebx, 18),
        (F::ADX, Word::Leaf7Ebx, 19),
        (F::CLFLUSHOPT, Word::Leaf7Ebx, 23),
        (F::CLWB, Word::Leaf7Ebx, 24),
        (F::SHA, Word::Leaf7Ebx, 29),
        (F::GFNI, Word::Leaf7Ecx, 8),
        (F::MOVDIRI, Word::Leaf7Ecx, 27),
        (F::SERIALIZE, Word::Leaf7Edx, 14),
        (F::XSAVEOPT, Word::LeafDSub1Eax, 0),
        (F::XSAVEC, Word::LeafDSub1Eax, 1),
        (F::SSE4A, Word::ExtendedEcx, 6),
        (F::RDTSCP, Word::ExtendedEdx, 27),
    ]
};

/// What needs AVX state, too.
const BY_HOST_WITH_AVX: &[(CpuidFeature, Word, u32)] = {
    use CpuidFeature as F;
    &[
        (F::FMA, Word::Leaf1Ecx, 12),
        (F::AVX, Word::Leaf1Ecx, 28),
        (F::F16C, Word::Leaf1Ecx, 29),
        (F::AVX2, Word::Leaf7Ebx, 5),
        (F::VAES, Word::Leaf7Ecx, 9),
        (F::VPCLMULQDQ, Word::Leaf7Ecx, 10),
        (F::SHA512, Word::Leaf7Sub1Eax, 0),
        (F::SM3, Word::Leaf7Sub1Eax, 1),
        (F::SM4, Word::Leaf7Sub1Eax, 2),
        (F::AVX_VNNI, Word::Leaf7Sub1Eax, 4),
        (F::AVX_IFMA, Word::Leaf7Sub1Eax, 23),
        (F::AVX_VNNI_INT8, Word::Leaf7Sub1Edx, 4),
        (F::AVX_NE_CONVERT, Word::Leaf7Sub1Edx, 5),
        (F::AVX_VNNI_INT16, Word::Leaf7Sub1Edx, 10),
    ]
};

impl Offered {
    /// What a processor offers that answers `cpuid` so; `avx` says whether the host's kernel keeps
    /// AVX state.
    pub(crate) fn new(cpuid: impl Fn(u32, u32) -> CpuidResult, avx: bool) -> Self {
        let mut offered = Self::default();
        for &feature in ALWAYS {
            offered.add(feature);
        }
        let with_avx = BY_HOST_WITH_AVX.iter().filter(|_| avx);
        for &(feature, word, bit) in BY_HOST.iter().chain(with_avx) {
            if word.read(&cpuid) & (1 << bit) != 0 {
                offered.add(feature);
            }
        }
        offered
    }

    /// All that is copied or emulated.
    pub(crate) fn all() -> Self {
        let every = CpuidResult {
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        };
        Self::new(|_, _| every, true)
    }

    fn add(&mut self, feature: CpuidFeature) {
        let number = feature as usize;
        self.0[number / 64] |= 1 << (number % 64);
    }

    fn contains(&self, feature: CpuidFeature) -> bool {
        let number = feature as usize;
        self.0[number / 64] & (1 << (number % 64)) != 0
    }

    /// Whether a guest may execute `instruction`, whatever its operands.
    pub(crate) fn allows(&self, instruction: &Instruction) -> bool {
        // Without BMI1, TZCNT is BSF with a prefix that nobody looks at, and programs know.
        instruction.mnemonic() == Mnemonic::Tzcnt
            || instruction
                .cpuid_features()
                .iter()
                .all(|&feature| self.contains(feature))
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Code;
    use iced_x86::Register;

    use super::*;

    fn instruction(code: Code) -> Instruction {
        Instruction::with2(code, Register::RAX, Register::RCX).expect("valid")
    }

    #[test]
    fn a_processor_without_anything_still_offers_what_programs_use_unasked() {
        let none = Offered::new(|_, _| CpuidResult::default(), true);
        for code in [
            Code::Mov_r64_rm64,
            Code::Lzcnt_r64_rm64,
            Code::Tzcnt_r64_rm64,
        ] {
            assert!(none.allows(&instruction(code)), "{code:?}");
        }
        assert!(!none.allows(&instruction(Code::Popcnt_r64_rm64)));
    }

    #[test]
    fn avx_needs_the_hosts_kernel() {
        let every = CpuidResult {
            ecx: u32::MAX,
            ..CpuidResult::default()
        };
        let mut add = Instruction::with3(
            Code::VEX_Vaddps_xmm_xmm_xmmm128,
            Register::XMM0,
            Register::XMM1,
            Register::XMM2,
        )
        .expect("valid");
        assert!(Offered::new(|_, _| every, true).allows(&add));
        assert!(!Offered::new(|_, _| every, false).allows(&add));
        add = instruction(Code::Popcnt_r64_rm64);
        assert!(Offered::new(|_, _| every, false).allows(&add));
    }

    #[test]
    fn what_is_hidden_is_never_offered() {
        let mask = Instruction::with2(Code::VEX_Kmovq_kr_r64, Register::K1, Register::RAX);
        assert!(!Offered::all().allows(&mask.expect("valid")));
        let end = Instruction::with(Code::Xend);
        assert!(!Offered::all().allows(&end));
    }
}
