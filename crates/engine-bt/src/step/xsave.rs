//! Instructions whose memory operand has no fixed size or shape: XSAVE and its relatives, x87
//! environments, gathers and masked stores.

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::Register;
use ringfence_x86::paging::CR4_OSXSAVE;

use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::hot::BOUNCE_BYTES;
use crate::hot::Hot;
use crate::walk::Access;

const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const COMPACTED: u64 = 1 << 63;

impl Core {
    /// Executes XSAVE, XRSTOR and their relatives; false when `instruction` isn't one.
    pub(super) fn execute_xsave(&mut self, instruction: &Instruction) -> Result<bool, Stop> {
        use Mnemonic as M;
        let (bytes, reads, writes, masked) = match instruction.mnemonic() {
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
                (self.shared.host.xsave_len, true, true, true)
            }
            M::Xrstor | M::Xrstor64 => (self.shared.host.xsave_len, true, false, true),
            M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => {
                return Err(Fault::undefined().into());
            }
            M::Fxsave | M::Fxsave64 => (512, true, true, false),
            M::Fxrstor | M::Fxrstor64 => (512, true, false, false),
            _ => return Ok(false),
        };
        if masked && self.sys.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::undefined().into());
        }
        if self.mode.fpu_traps() {
            return Err(Fault::bare(vector::DEVICE_NOT_AVAILABLE).into());
        }
        self.check_available(instruction)?;
        let access = if writes { Access::Write } else { Access::Read };
        let address = self.operand_address(instruction, 0, bytes, access)?;
        let alignment = if masked { 64 } else { 16 };
        if !address.is_multiple_of(alignment) {
            return Err(Fault::general(0).into());
        }
        self.run_area(instruction, address, bytes, (reads, writes), masked)?;
        Ok(true)
    }

    fn run_area(
        &mut self,
        instruction: &Instruction,
        address: u64,
        bytes: usize,
        (reads, writes): (bool, bool),
        masked: bool,
    ) -> Result<(), Stop> {
        let access = if writes { Access::Write } else { Access::Read };
        let span = self.span(address, bytes, access, self.is_user())?;
        let mut data = [0; BOUNCE_BYTES];
        if reads {
            self.read_span(&span, &mut data[..bytes])?;
        }
        if masked && !writes {
            self.check_xsave_header(&data)?;
        }
        self.hot_mut().bounce.0[..bytes].copy_from_slice(&data[..bytes]);
        let bounce =
            std::ptr::from_ref::<Hot>(self.hot()) as u64 + std::mem::offset_of!(Hot, bounce) as u64;
        let saved = (self.gpr(0), self.gpr(2));
        // XSAVEOPT leaves out what hasn't changed since an XRSTOR from the same address, which the
        // buffer's always is.
        let instruction = &without_optimisation(instruction);
        if masked {
            // The host's own components must not be saved into the guest's memory or changed.
            let mask = self.sys.xcr0;
            self.set_gpr(0, saved.0 & mask);
            self.set_gpr(2, 0);
        }
        let result = self.run_scratch(instruction, Some(bounce));
        if masked {
            self.set_gpr(0, saved.0);
            self.set_gpr(2, saved.1);
        }
        result?;
        if writes {
            data[..bytes].copy_from_slice(&self.hot().bounce.0[..bytes]);
            self.write_span(&span, &data[..bytes])?;
        }
        Ok(())
    }

    /// What XRSTOR checks against the guest's XCR0, which the host's exceeds (SDM 1 §13.8).
    fn check_xsave_header(&self, area: &[u8; BOUNCE_BYTES]) -> Result<(), Stop> {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&area[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let components = word(XSTATE_BV);
        let format = word(XCOMP_BV);
        let foreign = components & !self.sys.xcr0 != 0
            || (format & COMPACTED != 0 && format & !COMPACTED & !self.sys.xcr0 != 0);
        if foreign {
            return Err(Fault::general(0).into());
        }
        Ok(())
    }

    /// x87 environments, whose size depends on the mode.
    pub(super) fn execute_odd_size(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        let writes = matches!(instruction.mnemonic(), M::Fnstenv | M::Fnsave);
        let known = writes || matches!(instruction.mnemonic(), M::Fldenv | M::Frstor);
        if !known {
            return Err(crate::dispatch::bug(format!(
                "no operand size for {:?}",
                instruction.code()
            )));
        }
        let short = matches!(
            instruction.memory_size(),
            iced_x86::MemorySize::FpuEnv14 | iced_x86::MemorySize::FpuState94
        );
        let environment = matches!(instruction.mnemonic(), M::Fnstenv | M::Fldenv);
        let bytes = match (environment, short) {
            (true, true) => 14,
            (true, false) => 28,
            (false, true) => 94,
            (false, false) => 108,
        };
        let access = if writes { Access::Write } else { Access::Read };
        let address = self.operand_address(instruction, 0, bytes, access)?;
        self.run_area(instruction, address, bytes, (!writes, writes), false)
    }

    /// VGATHER and VPGATHER: element by element, restartable (SDM 2C, VGATHERDPS).
    pub(super) fn execute_gather(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        let (element, index_bytes) = match instruction.mnemonic() {
            M::Vgatherdps | M::Vpgatherdd => (4, 4),
            M::Vgatherqps | M::Vpgatherqd => (4, 8),
            M::Vgatherdpd | M::Vpgatherdq => (8, 4),
            M::Vgatherqpd | M::Vpgatherqq => (8, 8),
            _ => return Err(Fault::undefined().into()),
        };
        let to = instruction.op0_register().number();
        let mask = instruction.op2_register().number();
        let index = instruction.memory_index().number();
        if to == mask || to == index || mask == index {
            return Err(Fault::undefined().into());
        }
        let wide = instruction.op0_register().is_ymm() || instruction.memory_index().is_ymm();
        let vector = if wide { 32 } else { 16 };
        let elements = vector / usize::max(element, index_bytes);
        let segment = self.operand_segment(instruction);
        for number in 0..elements {
            if self.vector_bytes(mask, number * element, element) >> (8 * element - 1) == 0 {
                continue;
            }
            let offset = self.vector_bytes(index, number * index_bytes, index_bytes);
            let address = instruction
                .try_virtual_address(1, number, |register, _, _| {
                    if register.is_vector_register() {
                        Some(sign_extend(offset, index_bytes))
                    } else {
                        self.register_value(register)
                    }
                })
                .ok_or_else(Fault::undefined)?;
            let address = self.check_segment(segment, address, element, Access::Read)?;
            let value = self.read_number(address, element, self.is_user())?;
            self.set_vector_bytes(to, number * element, element, value);
            self.set_vector_bytes(mask, number * element, element, 0);
        }
        for byte in elements * element..32 {
            self.set_vector_bytes(to, byte, 1, 0);
        }
        for byte in 0..32 {
            self.set_vector_bytes(mask, byte, 1, 0);
        }
        Ok(())
    }

    /// VMASKMOV and VPMASKMOV: only the chosen elements are read or written.
    pub(super) fn execute_masked_move(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        let element = match instruction.mnemonic() {
            M::Vmaskmovps | M::Vpmaskmovd => 4,
            _ => 8,
        };
        let stores = !instruction.op0_register().is_vector_register();
        let (operand, access) = if stores {
            (0, Access::Write)
        } else {
            (2, Access::Read)
        };
        let mask = instruction.op1_register();
        let bytes = mask.size();
        let base = instruction
            .try_virtual_address(operand, 0, |register, _, _| self.register_value(register))
            .ok_or_else(Fault::undefined)?;
        let segment = self.operand_segment(instruction);
        let user = self.is_user();
        let mut spans = Vec::new();
        for at in (0..bytes).step_by(element) {
            if self.vector_bytes(mask.number(), at, element) >> (8 * element - 1) == 0 {
                continue;
            }
            let address = base.wrapping_add(at as u64);
            let address = self.check_segment(segment, address, element, access)?;
            spans.push((at, self.span(address, element, access, user)?));
        }
        let mut data = [0; 32];
        if !stores {
            for (at, span) in &spans {
                self.read_span(span, &mut data[*at..at + element])?;
            }
        }
        self.hot_mut().bounce.0[..32].copy_from_slice(&data);
        let bounce =
            std::ptr::from_ref::<Hot>(self.hot()) as u64 + std::mem::offset_of!(Hot, bounce) as u64;
        self.run_scratch(instruction, Some(bounce))?;
        if stores {
            let data = self.hot().bounce.0;
            for (at, span) in &spans {
                self.write_span(span, &data[*at..at + element])?;
            }
        }
        Ok(())
    }

    fn vector_bytes(&self, register: usize, at: usize, len: usize) -> u64 {
        let words = self.hot().ymm[register & 15];
        let shifted = words[at / 8] >> (8 * (at % 8));
        shifted & (u64::MAX >> (64 - 8 * len))
    }

    fn set_vector_bytes(&mut self, register: usize, at: usize, len: usize, value: u64) {
        self.hot_mut().upper = 1;
        let word = &mut self.hot_mut().ymm[register & 15][at / 8];
        let mask = (u64::MAX >> (64 - 8 * len)) << (8 * (at % 8));
        *word = (*word & !mask) | (value << (8 * (at % 8)) & mask);
    }

    /// MASKMOVDQU and MASKMOVQ: the bytes whose mask byte is negative go to DS:RDI.
    pub(super) fn execute_masked_store(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        if instruction.mnemonic() == Mnemonic::Maskmovq {
            return self.execute_masked_store_mmx(instruction);
        }
        let source = instruction.op1_register().number();
        let mask = instruction.op2_register().number();
        let mut bytes = [0; 16];
        let mut chosen = [false; 16];
        for at in 0..16 {
            bytes[at] = self.vector_bytes(source, at, 1).to_le_bytes()[0];
            chosen[at] = self.vector_bytes(mask, at, 1) & 0x80 != 0;
        }
        self.store_chosen(instruction, &bytes, &chosen)
    }

    fn store_chosen(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8],
        chosen: &[bool],
    ) -> Result<(), Stop> {
        let base = instruction
            .try_virtual_address(0, 0, |register, _, _| self.register_value(register))
            .ok_or_else(Fault::undefined)?;
        let segment = self.operand_segment(instruction);
        let user = self.is_user();
        // All pages are checked before the first byte is written.
        let mut places = Vec::new();
        for at in (0..bytes.len()).filter(|&at| chosen[at]) {
            let address = base.wrapping_add(at as u64);
            let address = self.check_segment(segment, address, 1, Access::Write)?;
            places.push((self.span(address, 1, Access::Write, user)?, bytes[at]));
        }
        for (span, byte) in places {
            self.write_span(&span, &[byte])?;
        }
        Ok(())
    }

    /// The MMX form: its registers are in the x87 unit, so they are stored to be read.
    fn execute_masked_store_mmx(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let mut values = [[0; 8]; 2];
        let registers = [instruction.op1_register(), instruction.op2_register()];
        for (value, register) in values.iter_mut().zip(registers) {
            let store = Instruction::with2(
                iced_x86::Code::Movq_mmm64_mm,
                iced_x86::MemoryOperand::with_base(Register::RAX),
                register,
            )
            .map_err(|error| crate::dispatch::bug(error.to_string()))?;
            let bounce = std::ptr::from_ref::<Hot>(self.hot()) as u64
                + std::mem::offset_of!(Hot, bounce) as u64;
            self.run_scratch(&store, Some(bounce))?;
            value.copy_from_slice(&self.hot().bounce.0[..8]);
        }
        let chosen = values[1].map(|byte| byte & 0x80 != 0);
        self.store_chosen(instruction, &values[0], &chosen)
    }
}

/// XSAVEOPT as XSAVE; any other instruction as it is.
fn without_optimisation(instruction: &Instruction) -> Instruction {
    let mut plain = *instruction;
    match instruction.mnemonic() {
        Mnemonic::Xsaveopt => plain.set_code(iced_x86::Code::Xsave_mem),
        Mnemonic::Xsaveopt64 => plain.set_code(iced_x86::Code::Xsave64_mem),
        _ => {}
    }
    plain
}

fn sign_extend(value: u64, bytes: usize) -> u64 {
    let shift = 64 - 8 * bytes;
    ((value << shift).cast_signed() >> shift).cast_unsigned()
}
