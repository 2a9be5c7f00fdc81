//! Rules of single instructions that decoding doesn't tell.

use iced_x86::CpuidFeature;
use iced_x86::EncodingKind;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::step::uses_fpu;

/// MXCSR.MM: AMD's misaligned exception mask (APM 1 §4.2.2).
const MISALIGNED_MASK: u32 = 1 << 17;

/// Instructions that do nothing on this processor: hints, and the shadow stack's RDSSP, which
/// programs execute to find out whether there is one (SDM 1 §17.2.3).
pub(crate) fn is_hint(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Rdsspd
            | Mnemonic::Rdsspq
            | Mnemonic::Prefetch
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetchwt1
            | Mnemonic::Prefetchit0
            | Mnemonic::Prefetchit1
    )
}

/// INT n and its short forms.
pub(super) fn is_interrupt(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Int | M::Int1 | M::Int3 | M::Into)
}

/// Stores of an x87 register.
pub(super) fn is_x87_store(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    )
}

/// x87 and MMX instructions that report an earlier x87 error before they do anything (SDM 1
/// §8.7.2).
pub(super) fn waits_for_x87(instruction: &Instruction) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let unit = instruction
        .cpuid_features()
        .iter()
        .any(|feature| matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::MMX));
    let mmx = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_mm()
    });
    let at_once = matches!(
        instruction.mnemonic(),
        M::Fnstcw | M::Fnstsw | M::Fnstenv | M::Fnsave | M::Fnclex | M::Fninit
    );
    (unit || mmx) && !at_once
}

/// Plain moves of a whole register to memory, of any alignment: they can't fault by themselves,
/// and they write every byte of their operand.
pub(crate) fn is_plain_store(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let named = matches!(
        instruction.mnemonic(),
        M::Mov
            | M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Movq
            | M::Movsd
            | M::Movlps
            | M::Movhps
            | M::Movlpd
            | M::Movhpd
            | M::Vmovups
            | M::Vmovupd
            | M::Vmovdqu
            | M::Vmovq
            | M::Vmovsd
            | M::Vmovlps
            | M::Vmovhps
            | M::Vmovlpd
            | M::Vmovhpd
            | M::Vextractf128
            | M::Vextracti128
    );
    named && !waits_for_x87(instruction)
}

/// Moves of the elements that a mask register chooses; the others aren't touched, not even to see
/// whether they are there.
pub(super) fn is_masked_move(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    )
}

/// Whether the processor surely executes `instruction` without an exception, when it has no memory
/// operand.
pub(crate) fn cannot_fault(instruction: &Instruction) -> bool {
    use CpuidFeature as F;
    let old = instruction.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL286_ONLY
                | F::INTEL386
                | F::INTEL386_ONLY
                | F::INTEL486
                | F::X64
                | F::CMOV
        )
    });
    let faulting = matches!(
        instruction.mnemonic(),
        Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Reservednop
    );
    old && !faulting && !uses_fpu(instruction)
}

/// The alignment that an instruction wants of its memory operand, 1 for any (SDM 1 §14.9; APM 2
/// §8.2.14).
fn alignment(instruction: &Instruction, amd: bool) -> u64 {
    use Mnemonic as M;
    let bytes = instruction.memory_size().size() as u64;
    if instruction.encoding() != EncodingKind::Legacy {
        let aligned = matches!(
            instruction.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        );
        return if aligned { bytes.max(1) } else { 1 };
    }
    let unaligned = matches!(
        instruction.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    );
    // What SHA's instructions want differs among AMD's: the processor decides.
    let sha = amd && instruction.cpuid_features().contains(&CpuidFeature::SHA);
    if bytes == 16 && !unaligned && !sha {
        16
    } else {
        1
    }
}

/// Whether MXCSR.MM lifts the wish for alignment: not for moves that are aligned by name.
fn can_be_lifted(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    instruction.encoding() == EncodingKind::Legacy
        && !matches!(
            instruction.mnemonic(),
            M::Movaps
                | M::Movapd
                | M::Movdqa
                | M::Movntps
                | M::Movntpd
                | M::Movntdq
                | M::Movntdqa
                | M::Cmpxchg16b
        )
}

impl Core {
    /// #GP(0) for a misaligned operand of an instruction that wants it aligned. It comes before
    /// a page fault.
    pub(super) fn check_vector_alignment(
        &self,
        instruction: &Instruction,
        address: u64,
    ) -> Result<(), Stop> {
        let aligned = address.is_multiple_of(alignment(instruction, self.shared.host.amd));
        let lifted = self.hot().mxcsr & MISALIGNED_MASK != 0 && can_be_lifted(instruction);
        if aligned || lifted {
            Ok(())
        } else {
            Err(Fault::general(0).into())
        }
    }
}
