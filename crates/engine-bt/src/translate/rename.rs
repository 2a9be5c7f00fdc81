//! Registers of guest instructions: which are used, and how one is replaced by another.

use iced_x86::Instruction;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::translate::asm::Reg;

/// General registers by number, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegSet(pub u16);

impl RegSet {
    /// Adds a register of any width.
    fn add(&mut self, register: Register) {
        if register.is_gpr() {
            // The whole register's number: byte registers are counted in a row of twenty.
            self.0 |= 1 << register.full_register().number();
        }
    }

    /// Adds the registers that are operands by themselves.
    fn add_operands(&mut self, instruction: &Instruction) {
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) == OpKind::Register {
                self.add(instruction.op_register(operand));
            }
        }
    }

    /// Adds a host register.
    pub(crate) fn insert(&mut self, register: Reg) {
        self.0 |= 1 << register.0;
    }
}

/// Registers named by the operands, and RAX, RCX and RDX, which instructions use without naming.
pub(crate) fn registers_used(instruction: &Instruction) -> RegSet {
    let mut set = RegSet(0b111);
    set.add_operands(instruction);
    set.add(instruction.memory_base());
    set.add(instruction.memory_index());
    // CMPXCHG8B and 16B take RBX too.
    if matches!(
        instruction.mnemonic(),
        iced_x86::Mnemonic::Cmpxchg8b | iced_x86::Mnemonic::Cmpxchg16b
    ) {
        set.0 |= 1 << 3;
    }
    set
}

/// Registers whose values an instruction with a high byte and a memory operand needs beside its
/// address. Of those that no operand names, only CMPXCHG's accumulator is needed.
pub(crate) fn operands_with_high_byte(instruction: &Instruction) -> RegSet {
    let mut set = RegSet(0b1);
    set.add_operands(instruction);
    set
}

/// Registers that may be borrowed.
pub(crate) struct Free(RegSet);

/// All registers but `busy`, the stack pointer and the translator's own.
pub(crate) fn free_registers(busy: RegSet) -> Free {
    const NEVER: u16 = 1 << 4 | 1 << 10 | 1 << 11;
    Free(RegSet(!(busy.0 | NEVER)))
}

impl Free {
    fn take(&mut self, candidates: u16) -> Option<Reg> {
        let number = (self.0.0 & candidates).trailing_zeros();
        let number = u8::try_from(number).ok().filter(|&number| number < 16)?;
        self.0.0 &= !(1 << number);
        Some(Reg(number))
    }

    /// A register that needs no REX prefix as a base.
    pub(crate) fn old(&mut self) -> Option<Reg> {
        self.take(0xff)
    }

    /// Any register.
    pub(crate) fn any(&mut self) -> Option<Reg> {
        self.take(0xffff)
    }
}

/// Whether an operand (not an address) names `full` in any width.
pub(crate) fn mentions(instruction: &Instruction, full: Register) -> bool {
    (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand).full_register() == full
    })
}

/// Whether `full` is part of the address.
pub(crate) fn addresses(instruction: &Instruction, full: Register) -> bool {
    instruction.memory_base().full_register() == full
        || instruction.memory_index().full_register() == full
}

/// The 64-bit name of a host register.
pub(crate) fn name(register: Reg) -> Register {
    sized(register, 8)
}

/// The name of the `bytes` wide part of a host register.
fn sized(register: Reg, bytes: usize) -> Register {
    let first = match bytes {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        // AL, CL, DL, BL, then AH to BH, then SPL on.
        _ if register.0 < 4 => Register::AL,
        _ => return Register::SPL + u32::from(register.0 - 4),
    };
    first + u32::from(register.0)
}

/// Replaces `full`, in whatever width it is named by an operand, by `by`.
pub(crate) fn rename(instruction: &mut Instruction, full: Register, by: Reg) {
    for operand in 0..instruction.op_count() {
        if instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand).full_register() == full
        {
            let bytes = instruction.op_register(operand).size();
            instruction.set_op_register(operand, sized(by, bytes));
        }
    }
}

/// Makes the memory operand `[base + index + disp]`.
pub(crate) fn set_memory(instruction: &mut Instruction, base: Reg, index: Option<Reg>, disp: i32) {
    instruction.set_segment_prefix(Register::None);
    instruction.set_memory_base(name(base));
    instruction.set_memory_index(index.map_or(Register::None, name));
    instruction.set_memory_index_scale(1);
    instruction.set_memory_displacement64(i64::from(disp).cast_unsigned());
    // Any size but 0 lets the encoder choose the shortest form.
    instruction.set_memory_displ_size(if disp == 0 { 0 } else { 8 });
}

/// The same instruction in an encoding that 64-bit code has and that takes any operand.
pub(crate) fn general_form(instruction: &Instruction) -> Instruction {
    use iced_x86::Code as C;
    let code = match instruction.code() {
        C::Mov_AL_moffs8 => C::Mov_r8_rm8,
        C::Mov_AX_moffs16 => C::Mov_r16_rm16,
        C::Mov_EAX_moffs32 => C::Mov_r32_rm32,
        C::Mov_RAX_moffs64 => C::Mov_r64_rm64,
        C::Mov_moffs8_AL => C::Mov_rm8_r8,
        C::Mov_moffs16_AX => C::Mov_rm16_r16,
        C::Mov_moffs32_EAX => C::Mov_rm32_r32,
        C::Mov_moffs64_RAX => C::Mov_rm64_r64,
        C::Inc_r16 => C::Inc_rm16,
        C::Inc_r32 => C::Inc_rm32,
        C::Dec_r16 => C::Dec_rm16,
        C::Dec_r32 => C::Dec_rm32,
        C::Add_rm8_imm8_82 => C::Add_rm8_imm8,
        C::Or_rm8_imm8_82 => C::Or_rm8_imm8,
        C::Adc_rm8_imm8_82 => C::Adc_rm8_imm8,
        C::Sbb_rm8_imm8_82 => C::Sbb_rm8_imm8,
        C::And_rm8_imm8_82 => C::And_rm8_imm8,
        C::Sub_rm8_imm8_82 => C::Sub_rm8_imm8,
        C::Xor_rm8_imm8_82 => C::Xor_rm8_imm8,
        C::Cmp_rm8_imm8_82 => C::Cmp_rm8_imm8,
        other => other,
    };
    let mut general = *instruction;
    general.set_code(code);
    general.set_code_size(iced_x86::CodeSize::Code64);
    general
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_registers_count_as_the_registers_that_they_are_in() {
        for (register, number) in [
            (Register::BL, 3),
            (Register::AH, 0),
            (Register::BH, 3),
            (Register::SPL, 4),
            (Register::DIL, 7),
            (Register::R8L, 8),
            (Register::R15L, 15),
        ] {
            let mut set = RegSet(0);
            set.add(register);
            assert_eq!(set.0, 1 << number, "{register:?}");
        }
    }
}
