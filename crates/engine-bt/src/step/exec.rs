//! An ordinary instruction, run by the host processor in a scratch block.
//!
//! The instruction keeps its registers and flags; its memory operand, if it has one, is replaced
//! by the bounce buffer, which the monitor fills before and writes back after. That makes any
//! operand possible: across pages, in devices, over translated code. The scratch blocks are kept, so
//! the second execution of the same instruction costs no encoding.

use iced_x86::CpuidFeature;
use iced_x86::Encoder;
use iced_x86::Instruction;
use iced_x86::InstructionInfoOptions;
use iced_x86::Mnemonic;
use iced_x86::OpAccess;
use iced_x86::OpKind;
use iced_x86::Register;
use ringfence_x86::paging::CR0_EM;
use ringfence_x86::paging::CR0_MP;
use ringfence_x86::paging::CR0_TS;

use crate::block::NewBlock;
use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::hot::BOUNCE_BYTES;
use crate::hot::Gate;
use crate::hot::Hot;
use crate::hot::hot;
use crate::step::is_high_byte;
use crate::step::is_hint;
use crate::step::rules::is_masked_move;
use crate::step::rules::is_x87_store;
use crate::step::rules::waits_for_x87;
use crate::translate::asm::Asm;
use crate::translate::asm::Mem;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::rename::rename;
use crate::walk::Access;

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryUse {
    pub bytes: usize,
    pub reads: bool,
    pub writes: bool,
}

impl Core {
    /// #UD for what the guest wasn't promised, #NM for x87 and vector instructions while they
    /// trap.
    pub(crate) fn check_available(&self, instruction: &Instruction) -> Result<(), Stop> {
        if !self.shared.host.offered.allows(instruction) {
            return Err(Fault::undefined().into());
        }
        let avx = is_avx(instruction);
        let sse = is_sse(instruction);
        if (avx && self.mode.no_avx()) || (sse && self.mode.no_sse()) {
            return Err(Fault::undefined().into());
        }
        if !self.mode.fpu_traps() || !uses_fpu(instruction) {
            return Ok(());
        }
        let (task_switched, emulated) = (self.sys.cr0 & CR0_TS != 0, self.sys.cr0 & CR0_EM != 0);
        let vector_code = sse || instruction.cpuid_features().contains(&CpuidFeature::MMX);
        if emulated && vector_code {
            return Err(Fault::undefined().into());
        }
        let wait = instruction.mnemonic() == Mnemonic::Wait;
        let trapped = if wait {
            task_switched && self.sys.cr0 & CR0_MP != 0
        } else {
            task_switched || (emulated && !avx)
        };
        if trapped {
            return Err(Fault::bare(vector::DEVICE_NOT_AVAILABLE).into());
        }
        Ok(())
    }

    /// How `instruction` uses its memory operand; `None` without one.
    pub(crate) fn memory_use(&mut self, instruction: &Instruction) -> Option<MemoryUse> {
        let info = self
            .info
            .info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
        let memory = info.used_memory().first()?;
        let access = memory.access();
        Some(MemoryUse {
            bytes: memory.memory_size().size(),
            // With its exception unmasked, an x87 store leaves memory as it was.
            reads: !matches!(access, OpAccess::Write | OpAccess::NoMemAccess)
                || is_x87_store(instruction),
            writes: matches!(
                access,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            ),
        })
    }

    pub(super) fn execute_natively(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        if is_hint(instruction) {
            return Ok(());
        }
        self.check_available(instruction)?;
        if instruction.is_vsib() {
            return self.execute_gather(instruction);
        }
        if is_masked_move(instruction) {
            return self.execute_masked_move(instruction);
        }
        match instruction.mnemonic() {
            Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq => {
                return self.execute_masked_store(instruction);
            }
            Mnemonic::Lea => return self.execute_lea(instruction),
            _ => {}
        }
        let operand = (0..instruction.op_count())
            .find(|&operand| instruction.op_kind(operand) == OpKind::Memory);
        match operand {
            None => self.run_scratch(instruction, None),
            Some(operand) => self.execute_bounced(instruction, operand),
        }
    }

    /// LEA: only the offset counts, no segment and no access.
    fn execute_lea(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let mut unsegmented = *instruction;
        unsegmented.set_segment_prefix(Register::None);
        let segment = unsegmented.memory_segment();
        let address = unsegmented
            .try_virtual_address(1, 0, |register, _, _| {
                if register == segment {
                    Some(0)
                } else {
                    self.register_value(register)
                }
            })
            .ok_or_else(Fault::undefined)?;
        self.write_register(instruction.op0_register(), address);
        Ok(())
    }

    fn execute_bounced(&mut self, instruction: &Instruction, operand: u32) -> Result<(), Stop> {
        let Some(usage) = self.memory_use(instruction) else {
            // NOP, PREFETCH and their like name memory without touching it.
            return Ok(());
        };
        if usage.bytes == 0 || usage.bytes > BOUNCE_BYTES / 2 {
            return self.execute_odd_size(instruction);
        }
        if waits_for_x87(instruction) && crate::fpu::exception_waits() {
            return Err(Fault::bare(vector::X87).into());
        }
        let access = if usage.writes {
            Access::Write
        } else {
            Access::Read
        };
        let (address, bitwise) = self.bit_string_address(instruction, usage.bytes, access)?;
        let address = match address {
            Some(address) => address,
            None => {
                let address = self.raw_operand_address(instruction, operand)?;
                self.check_vector_alignment(instruction, address)?;
                let segment = self.operand_segment(instruction);
                self.check_segment(segment, address, usage.bytes, access)?
            }
        };
        let user = self.is_user();
        let span = self.span(address, usage.bytes, access, user)?;
        // Before the lock: others may wait for it while this vCPU waits for them to make room.
        let code = self.scratch_code(instruction, true)?;
        let shared = std::sync::Arc::clone(&self.shared);
        let _guard = usage.writes.then(|| shared.lock_slow_writes());
        // The operand keeps its alignment: some instructions fault on a wrong one.
        let at = usize::try_from(address % 64).unwrap_or(0);
        let mut data = [0; BOUNCE_BYTES];
        if usage.reads {
            self.read_span(&span, &mut data[..usage.bytes])?;
        }
        self.hot_mut().bounce.0[at..at + usage.bytes].copy_from_slice(&data[..usage.bytes]);
        let bounce = self.bounce_address() + at as u64;
        self.run_scratch_at(instruction, code, bounce, bitwise)?;
        if usage.writes {
            data[..usage.bytes].copy_from_slice(&self.hot().bounce.0[at..at + usage.bytes]);
            self.write_span(&span, &data[..usage.bytes])?;
        }
        Ok(())
    }

    fn bounce_address(&self) -> u64 {
        std::ptr::from_ref::<Hot>(self.hot()) as u64 + std::mem::offset_of!(Hot, bounce) as u64
    }

    /// BT, BTS, BTR and BTC with a register: the bit offset reaches beyond the operand. Returns
    /// the address of the word that holds the bit, and the bit's number within it.
    fn bit_string_address(
        &mut self,
        instruction: &Instruction,
        bytes: usize,
        access: Access,
    ) -> Result<(Option<u64>, Option<u64>), Stop> {
        use Mnemonic as M;
        let is_bit_test = matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        if !is_bit_test || instruction.op1_kind() != OpKind::Register {
            return Ok((None, None));
        }
        let bits = 8 * bytes as u64;
        let raw = self.register_value(instruction.op1_register()).unwrap_or(0);
        let unused = 64 - bits;
        let offset = (raw << unused).cast_signed() >> unused;
        let step = offset.div_euclid(bits.cast_signed()) * (bits / 8).cast_signed();
        let base = self.raw_operand_address(instruction, 0)?;
        let address = if crate::step::has_short_address(instruction) {
            // The sum wraps at the address's width, before the segment's base comes to it.
            let segment = self
                .register_value(instruction.memory_segment())
                .unwrap_or(0);
            let width = if instruction.memory_base().is_gpr16() {
                0xffff
            } else {
                0xffff_ffff
            };
            let offset = base.wrapping_sub(segment).wrapping_add_signed(step) & width;
            segment.wrapping_add(offset)
        } else {
            base.wrapping_add_signed(step)
        };
        let segment = self.operand_segment(instruction);
        let address = self.check_segment(segment, address, bytes, access)?;
        Ok((Some(address), Some(raw & (bits - 1))))
    }

    /// Runs `instruction`, whose scratch block is at `code`, with its memory operand at host
    /// address `bounce`.
    fn run_scratch_at(
        &mut self,
        instruction: &Instruction,
        code: u64,
        bounce: u64,
        bit: Option<u64>,
    ) -> Result<(), Stop> {
        let Some(bit) = bit else {
            return self.enter_scratch(code, Some(bounce));
        };
        // The bit's number within the word stands in for the bit offset.
        let index = instruction.op1_register().full_register().number();
        let saved = self.gpr(index);
        self.set_gpr(index, bit);
        let result = self.enter_scratch(code, Some(bounce));
        self.set_gpr(index, saved);
        result
    }

    /// Runs `instruction` as it is, or with its memory operand at a host address.
    pub(super) fn run_scratch(
        &mut self,
        instruction: &Instruction,
        operand: Option<u64>,
    ) -> Result<(), Stop> {
        let code = self.scratch_code(instruction, operand.is_some())?;
        self.enter_scratch(code, operand)
    }

    fn enter_scratch(&mut self, code: u64, operand: Option<u64>) -> Result<(), Stop> {
        let before = (self.hot().gpr, self.hot().flags);
        let hot = self.hot_mut();
        match operand {
            Some(address) => {
                hot.t0 = address;
                hot.t1 = hot.gpr[10];
            }
            None => {
                hot.t0 = hot.gpr[11];
                hot.t1 = hot.gpr[10];
            }
        }
        self.scratch_fault = None;
        self.enter(code);
        if let Some(fault) = self.scratch_fault.take() {
            let hot = self.hot_mut();
            (hot.gpr, hot.flags) = before;
            return Err(fault);
        }
        Ok(())
    }

    fn scratch_code(&mut self, instruction: &Instruction, memory: bool) -> Result<u64, Stop> {
        let plan = ScratchPlan::new(instruction, memory)
            .ok_or_else(|| crate::dispatch::bug(format!("cannot run {instruction:?} alone")))?;
        let shared = std::sync::Arc::clone(&self.shared);
        match shared.code.scratch(&plan.code.code, || plan.build()) {
            Ok(code) => Ok(code),
            Err(crate::code::Full) => {
                self.empty_code_cache()?;
                shared
                    .code
                    .scratch(&plan.code.code, || plan.build())
                    .map_err(|_| crate::dispatch::bug("an empty code cache is full".to_owned()))
            }
        }
    }
}

/// How an instruction is run alone. The whole of its code is the key of its scratch block: the
/// instruction in the middle doesn't tell which of its registers stand in for others.
struct ScratchPlan {
    code: Asm,
    gate: usize,
}

impl ScratchPlan {
    fn new(instruction: &Instruction, memory: bool) -> Option<Self> {
        let mut alone = crate::translate::rename::general_form(instruction);
        let mut asm = Asm::default();
        let mut borrowed = Vec::new();
        if memory {
            let busy = crate::translate::rename::registers_used(instruction);
            let mut free = crate::translate::rename::free_registers(busy);
            let mut base = T0;
            // With AH and its like no REX prefix is possible: the address needs an old register.
            if has_high_byte(instruction) {
                base = free.old()?;
                borrowed.push((base, 0_usize));
            }
            if crate::translate::rename::mentions(instruction, Register::R11) {
                let stand_in = free.any()?;
                borrowed.push((stand_in, 1));
                rename(&mut alone, Register::R11, stand_in);
            }
            crate::translate::rename::set_memory(&mut alone, base, None, 0);
            for &(register, slot) in &borrowed {
                asm.store(Mem::gs(hot!(spill, slot)), register);
            }
            for &(register, slot) in &borrowed {
                if slot == 0 {
                    asm.mov(register, T0);
                } else {
                    asm.load(register, Mem::gs(hot!(gpr, 11)));
                }
            }
        }
        let mut encoder = Encoder::try_new(64).ok()?;
        encoder.encode(&alone, 0).ok()?;
        asm.bytes(&encoder.take_buffer());
        for &(register, slot) in &borrowed {
            if slot == 1 {
                asm.store(Mem::gs(hot!(gpr, 11)), register);
            }
            asm.load(register, Mem::gs(hot!(spill, slot)));
        }
        if !memory {
            asm.store(Mem::gs(hot!(gpr, 11)), T0);
        }
        asm.store(Mem::gs(hot!(gpr, 10)), T1);
        let gate = asm.jmp().0;
        Some(Self { code: asm, gate })
    }

    fn build(&self) -> NewBlock {
        NewBlock {
            hot_len: self.code.code.len(),
            code: self.code.code.clone(),
            gate_places: vec![(self.gate, Gate::Done)],
            ..NewBlock::default()
        }
    }
}

/// Uses AH, BH, CH or DH.
pub(crate) fn has_high_byte(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && is_high_byte(instruction.op_register(operand))
    })
}

/// Needs AVX to be enabled.
pub(crate) fn is_avx(instruction: &Instruction) -> bool {
    instruction.encoding() == iced_x86::EncodingKind::VEX && !is_general_vex(instruction)
}

/// Needs SSE to be enabled: legacy-encoded instructions on XMM registers or MXCSR.
pub(crate) fn is_sse(instruction: &Instruction) -> bool {
    let legacy = instruction.encoding() == iced_x86::EncodingKind::Legacy;
    let state = matches!(
        instruction.mnemonic(),
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr
    );
    legacy
        && (state
            || (0..instruction.op_count()).any(|operand| {
                instruction.op_kind(operand) == OpKind::Register
                    && instruction.op_register(operand).is_xmm()
            }))
}

/// VEX-encoded instructions on general registers, which don't depend on OSXSAVE.
fn is_general_vex(instruction: &Instruction) -> bool {
    instruction
        .cpuid_features()
        .iter()
        .any(|feature| matches!(feature, CpuidFeature::BMI1 | CpuidFeature::BMI2))
}

/// Depends on CR0.TS and CR0.EM.
pub(crate) fn uses_fpu(instruction: &Instruction) -> bool {
    if instruction.mnemonic() == Mnemonic::Wait {
        return true;
    }
    instruction.cpuid_features().iter().any(|feature| {
        use CpuidFeature as F;
        matches!(
            feature,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::AES
                | F::PCLMULQDQ
                | F::VAES
                | F::VPCLMULQDQ
                | F::AVX_VNNI
                | F::AVX_VNNI_INT8
                | F::AVX_VNNI_INT16
                | F::AVX_IFMA
                | F::AVX_NE_CONVERT
                | F::SHA512
                | F::SM3
                | F::SM4
                | F::GFNI
                | F::SHA
                | F::XSAVE
                | F::FXSR
        )
    }) && !matches!(
        instruction.mnemonic(),
        Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchnta
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Movnti
            | Mnemonic::Clflush
            | Mnemonic::Pause
            | Mnemonic::Crc32
            | Mnemonic::Popcnt
            | Mnemonic::Xgetbv
            | Mnemonic::Xsetbv
    )
}

#[cfg(test)]
mod tests {
    use iced_x86::Code;
    use iced_x86::MemoryOperand;

    use super::*;

    #[test]
    fn a_stand_in_register_makes_another_scratch_block() {
        let load = |to| {
            let from = MemoryOperand::with_base(Register::RSI);
            let instruction = Instruction::with2(Code::Mov_r64_rm64, to, from).expect("valid");
            ScratchPlan::new(&instruction, true)
                .expect("encodes")
                .code
                .code
        };
        // R11 is loaded through RBX, whose own load looks the same in the middle.
        assert_ne!(load(Register::R11), load(Register::RBX));
    }
}
