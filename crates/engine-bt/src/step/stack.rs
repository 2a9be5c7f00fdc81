//! Stack instructions.

use iced_x86::Code;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::Register;
use ringfence_x86::state::SS;

use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::step::Flow;
use crate::step::segment_index;
use crate::walk::Access;

impl Core {
    fn stack_mask(&self) -> u64 {
        u64::MAX >> (64 - self.stack_bits())
    }

    /// Linear address of stack offset `pointer`, checked.
    fn stack_address(&mut self, pointer: u64, bytes: usize, access: Access) -> Result<u64, Stop> {
        let pointer = pointer & self.stack_mask();
        let base = if self.is_64bit() {
            0
        } else {
            self.segment_base(SS)
        };
        self.check_segment(SS, base.wrapping_add(pointer), bytes, access)
    }

    /// Adds to the stack pointer within its width.
    pub(super) fn move_stack(&mut self, by: u64) {
        let mask = self.stack_mask();
        let rsp = self.gpr(4);
        let kept = if mask == 0xffff { rsp & !mask } else { 0 };
        self.set_gpr(4, kept | (rsp.wrapping_add(by) & mask));
    }

    /// Pushes `bytes` bytes of `value`.
    pub(crate) fn push(&mut self, value: u64, bytes: usize) -> Result<(), Stop> {
        let pointer = self.gpr(4).wrapping_sub(bytes as u64);
        let address = self.stack_address(pointer, bytes, Access::Write)?;
        self.write_number(address, value, bytes, self.is_user())?;
        self.move_stack((bytes as u64).wrapping_neg());
        Ok(())
    }

    /// Word `index` from the top of the stack.
    pub(super) fn peek(&mut self, index: u64, bytes: usize) -> Result<u64, Stop> {
        self.peek_at(index * bytes as u64, bytes)
    }

    /// The word `offset` bytes above the top of the stack.
    pub(super) fn peek_at(&mut self, offset: u64, bytes: usize) -> Result<u64, Stop> {
        let pointer = self.gpr(4).wrapping_add(offset);
        let address = self.stack_address(pointer, bytes, Access::Read)?;
        self.read_number(address, bytes, self.is_user())
    }

    /// A selector in word `index` from the top of the stack.
    pub(super) fn peek_selector(&mut self, index: u64, bytes: usize) -> Result<u16, Stop> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a selector is the low 16 bits"
        )]
        Ok(self.peek(index, bytes)? as u16)
    }

    fn pop(&mut self, bytes: usize) -> Result<u64, Stop> {
        let value = self.peek(0, bytes)?;
        self.move_stack(bytes as u64);
        Ok(value)
    }

    /// Executes a stack instruction; `None` when `instruction` isn't one.
    pub(super) fn execute_stack(
        &mut self,
        instruction: &Instruction,
    ) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        let bytes =
            usize::try_from(instruction.stack_pointer_increment().unsigned_abs()).unwrap_or(8);
        match instruction.mnemonic() {
            M::Push => {
                let value = self.push_value(instruction, bytes)?;
                self.push(value, bytes)?;
            }
            M::Pop => self.execute_pop(instruction, bytes)?,
            M::Pushf | M::Pushfd | M::Pushfq => {
                self.require_v86_privilege()?;
                let flags = self.rflags() & !(flag::RF | flag::VM);
                self.push(flags, bytes)?;
            }
            M::Popf | M::Popfd | M::Popfq => {
                self.require_v86_privilege()?;
                let flags = self.pop(bytes)?;
                self.load_flags(flags & !flag::RF, bytes);
            }
            M::Pusha | M::Pushad => self.push_all(bytes / 8)?,
            M::Popa | M::Popad => self.pop_all(bytes / 8)?,
            M::Enter => self.enter_frame(instruction)?,
            M::Leave => self.leave_frame(instruction)?,
            _ => return Ok(None),
        }
        Ok(Some(Flow::Next))
    }

    fn require_v86_privilege(&self) -> Result<(), Stop> {
        if self.has(flag::VM) && self.iopl() < 3 {
            return Err(Fault::general(0).into());
        }
        Ok(())
    }

    fn push_value(&mut self, instruction: &Instruction, bytes: usize) -> Result<u64, Stop> {
        if instruction.op0_kind() == OpKind::Register
            && let Some(index) = segment_index(instruction.op0_register())
        {
            return Ok(u64::from(self.sys.segments[index].selector));
        }
        self.read_operand(instruction, 0, bytes)
    }

    fn execute_pop(&mut self, instruction: &Instruction, bytes: usize) -> Result<(), Stop> {
        let register = instruction.op0_register();
        if instruction.op0_kind() == OpKind::Register {
            if let Some(index) = segment_index(register) {
                let selector = self.peek_selector(0, bytes)?;
                self.load_segment(index, selector)?;
                self.move_stack(bytes as u64);
                self.shadow = index == SS;
                return Ok(());
            }
            let value = self.pop(bytes)?;
            self.write_register(register, value);
            return Ok(());
        }
        // A memory destination is addressed with RSP as it is after the pop.
        let value = self.pop(bytes)?;
        if let Err(stop) = self.write_operand(instruction, 0, value, bytes) {
            self.move_stack((bytes as u64).wrapping_neg());
            return Err(stop);
        }
        Ok(())
    }

    fn push_all(&mut self, bytes: usize) -> Result<(), Stop> {
        let before = self.gpr(4);
        for index in 0..8 {
            let value = if index == 4 { before } else { self.gpr(index) };
            if let Err(stop) = self.push(value, bytes) {
                self.set_gpr(4, before);
                return Err(stop);
            }
        }
        Ok(())
    }

    fn pop_all(&mut self, bytes: usize) -> Result<(), Stop> {
        let mut words = [0; 8];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.peek(index as u64, bytes)?;
        }
        self.move_stack(8 * bytes as u64);
        for (index, word) in words
            .into_iter()
            .enumerate()
            .filter(|&(index, _)| index != 3)
        {
            let register = if bytes == 2 { WORDS } else { DOUBLE_WORDS }[7 - index];
            self.write_register(register, word);
        }
        Ok(())
    }

    fn enter_frame(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = match instruction.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let size = u64::from(instruction.immediate16());
        let level = u64::from(instruction.immediate8_2nd()) & 31;
        let (before_sp, before_bp) = (self.gpr(4), self.gpr(5));
        let result = self.build_frame(bytes, size, level);
        if result.is_err() {
            self.set_gpr(4, before_sp);
            self.set_gpr(5, before_bp);
        }
        result
    }

    fn build_frame(&mut self, bytes: usize, size: u64, level: u64) -> Result<(), Stop> {
        self.push(self.gpr(5), bytes)?;
        let frame = self.gpr(4);
        for _ in 1..level {
            let pointer = self.gpr(5).wrapping_sub(bytes as u64);
            self.set_gpr(5, pointer);
            let address = self.stack_address(pointer, bytes, Access::Read)?;
            let value = self.read_number(address, bytes, self.is_user())?;
            self.push(value, bytes)?;
        }
        if level > 0 {
            self.push(frame, bytes)?;
        }
        self.write_frame_pointer(frame, bytes);
        self.move_stack(size.wrapping_neg());
        // The processor checks that the new top of the stack is writable.
        let address = self.stack_address(self.gpr(4), bytes, Access::Write)?;
        self.span(address, bytes, Access::Write, self.is_user())?;
        Ok(())
    }

    fn write_frame_pointer(&mut self, value: u64, bytes: usize) {
        let register = match bytes {
            2 => Register::BP,
            4 => Register::EBP,
            _ => Register::RBP,
        };
        self.write_register(register, value);
    }

    fn leave_frame(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = match instruction.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        let frame = self.gpr(5);
        let address = self.stack_address(frame, bytes, Access::Read)?;
        let value = self.read_number(address, bytes, self.is_user())?;
        let mask = self.stack_mask();
        let kept = if mask == 0xffff {
            self.gpr(4) & !mask
        } else {
            0
        };
        self.set_gpr(4, kept | (frame & mask));
        self.move_stack(bytes as u64);
        self.write_frame_pointer(value, bytes);
        Ok(())
    }
}

const WORDS: [Register; 8] = [
    Register::AX,
    Register::CX,
    Register::DX,
    Register::BX,
    Register::SP,
    Register::BP,
    Register::SI,
    Register::DI,
];

const DOUBLE_WORDS: [Register; 8] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::ESP,
    Register::EBP,
    Register::ESI,
    Register::EDI,
];
