//! Instructions that 64-bit code doesn't have, so that none can stand in for them: decimal
//! arithmetic, SALC and BOUND (SDM 2A).

use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::step::Flow;
use crate::walk::Access;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;

impl Core {
    /// Executes one of these; `None` when `instruction` is another.
    pub(super) fn execute_decimal(
        &mut self,
        instruction: &Instruction,
    ) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Aaa => self.adjust_ascii(0x106),
            M::Aas => self.adjust_ascii(0x106_u16.wrapping_neg()),
            M::Aam => self.split_digits(instruction.immediate8())?,
            M::Aad => self.join_digits(instruction.immediate8()),
            M::Daa => self.adjust_packed(false),
            M::Das => self.adjust_packed(true),
            M::Salc => {
                let carry = self.rflags() & CF != 0;
                self.set_low(if carry { 0xff } else { 0 });
            }
            M::Bound => self.check_bound(instruction)?,
            _ => return Ok(None),
        }
        Ok(Some(Flow::Next))
    }

    fn low(&self) -> u8 {
        self.gpr(0).to_le_bytes()[0]
    }

    fn set_low(&mut self, value: u8) {
        let kept = self.gpr(0) & !0xff;
        self.set_gpr(0, kept | u64::from(value));
    }

    fn ax(&self) -> u16 {
        (self.gpr(0) & 0xffff) as u16
    }

    fn set_ax(&mut self, value: u16) {
        let kept = self.gpr(0) & !0xffff;
        self.set_gpr(0, kept | u64::from(value));
    }

    fn put_flags(&mut self, mask: u64, value: u64) {
        self.set_rflags(self.rflags() & !mask | value & mask);
    }

    /// SF, ZF and PF of a byte.
    fn put_result_flags(&mut self, value: u8) {
        let mut flags = 0;
        if value == 0 {
            flags |= ZF;
        }
        if value & 0x80 != 0 {
            flags |= SF;
        }
        if value.count_ones().is_multiple_of(2) {
            flags |= PF;
        }
        self.put_flags(SF | ZF | PF, flags);
    }

    fn low_digit_overflows(&self) -> bool {
        self.low() & 0xf > 9 || self.rflags() & AF != 0
    }

    /// AAA and AAS.
    fn adjust_ascii(&mut self, by: u16) {
        let adjusts = self.low_digit_overflows();
        if adjusts {
            self.set_ax(self.ax().wrapping_add(by));
        }
        self.set_low(self.low() & 0xf);
        self.put_flags(CF | AF, if adjusts { CF | AF } else { 0 });
    }

    /// AAM.
    fn split_digits(&mut self, base: u8) -> Result<(), Stop> {
        let value = self.low();
        let (Some(high), Some(low)) = (value.checked_div(base), value.checked_rem(base)) else {
            return Err(Fault::bare(vector::DIVIDE).into());
        };
        self.set_ax(u16::from(high) << 8 | u16::from(low));
        self.put_result_flags(low);
        Ok(())
    }

    /// AAD.
    fn join_digits(&mut self, base: u8) {
        let [low, high] = self.ax().to_le_bytes();
        let value = low.wrapping_add(high.wrapping_mul(base));
        self.set_ax(u16::from(value));
        self.put_result_flags(value);
    }

    /// DAA and DAS.
    fn adjust_packed(&mut self, subtracts: bool) {
        let before = self.low();
        let carried = self.rflags() & CF != 0;
        let mut value = before;
        let mut flags = 0;
        let step = |value: u8, by: u8| {
            if subtracts {
                value.overflowing_sub(by)
            } else {
                value.overflowing_add(by)
            }
        };
        if self.low_digit_overflows() {
            let (next, overflows) = step(value, 6);
            value = next;
            flags |= AF;
            if subtracts && (carried || overflows) {
                flags |= CF;
            }
        }
        if before > 0x99 || carried {
            value = step(value, 0x60).0;
            flags |= CF;
        }
        self.set_low(value);
        self.put_flags(CF | AF, flags);
        self.put_result_flags(value);
    }

    /// BOUND: #BR unless the index lies between the two words in memory.
    fn check_bound(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = instruction.op0_register();
        let bytes = register.size();
        let address = self.operand_address(instruction, 1, 2 * bytes, Access::Read)?;
        let user = self.is_user();
        let signed = |value: u64| {
            let unused = 64 - 8 * u32::try_from(bytes).unwrap_or(4);
            (value << unused).cast_signed() >> unused
        };
        let index = signed(self.register_value(register).unwrap_or(0));
        let lower = signed(self.read_number(address, bytes, user)?);
        let upper = signed(self.read_number(address.wrapping_add(bytes as u64), bytes, user)?);
        if index < lower || index > upper {
            return Err(Fault::bare(vector::BOUND).into());
        }
        Ok(())
    }
}
