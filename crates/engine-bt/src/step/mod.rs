//! One guest instruction, executed by the monitor.
//!
//! This is the engine's general path: it knows every instruction that the translator doesn't
//! copy, and runs any other one by itself in a scratch block with its memory operand bounced
//! through the monitor. It is precise in every mode; the translator is an optimisation of it.

mod decimal;
mod exec;
mod flow;
mod rules;
mod stack;
mod strings;
mod system;
mod xsave;

use iced_x86::Decoder;
use iced_x86::DecoderError;
use iced_x86::DecoderOptions;
use iced_x86::Instruction;
use iced_x86::OpKind;
use iced_x86::Register;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::CS;
use ringfence_x86::state::DS;
use ringfence_x86::state::ES;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;
use ringfence_x86::state::SS;

use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::ram::read_raw;
use crate::translate::PAGE_BYTES;
use crate::walk::Access;

/// Longest instruction.
const MAX_BYTES: usize = 15;

/// What follows an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// The next one.
    Next,
    /// RIP was set.
    Jumped,
}

/// How guests' instructions are decoded. AMD and Intel differ in a few corners; copied
/// instructions follow the host, so decoding does too.
pub(crate) fn decoder_options(amd: bool) -> u32 {
    if amd {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    }
}

impl Core {
    /// Executes the instruction at RIP. A fault leaves the state as before the instruction.
    pub(crate) fn step(&mut self) -> Result<(), Stop> {
        self.remote.counters.steps.bump();
        let linear = self.linear_rip(self.rip);
        let mut bytes = [0; MAX_BYTES];
        let fetched = self.fetch(linear, &mut bytes)?;
        self.step_bytes(linear, &bytes[..fetched])
    }

    /// As [`Self::step`] for code that was translated: it is known to lie in the page at `gpa`.
    pub(crate) fn step_in(&mut self, gpa: u64) -> Result<(), Stop> {
        let linear = self.linear_rip(self.rip);
        let inside = linear % PAGE_BYTES as u64;
        let whole = inside + MAX_BYTES as u64 <= PAGE_BYTES as u64;
        let host = self.shared.ram.host(gpa + inside, MAX_BYTES as u64);
        let Some(host) = host.filter(|_| whole) else {
            return self.step();
        };
        self.remote.counters.steps.bump();
        let mut bytes = [0; MAX_BYTES];
        // SAFETY: bytes of RAM.
        #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
        unsafe {
            read_raw(host, &mut bytes);
        }
        self.step_bytes(linear, &bytes)
    }

    fn step_bytes(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let options = decoder_options(self.shared.host.amd);
        let mut decoder = Decoder::with_ip(self.mode.bits(), bytes, self.rip, options);
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            let truncated = decoder.last_error() == DecoderError::NoMoreBytes;
            if truncated && bytes.len() < MAX_BYTES {
                // The rest lies on a page that can't be fetched: that fault is the answer.
                self.locate(
                    linear.wrapping_add(bytes.len() as u64),
                    Access::Fetch,
                    self.is_user(),
                )?;
            }
            return Err(if truncated {
                Fault::general(0)
            } else {
                Fault::undefined()
            }
            .into());
        }
        self.step_decoded(&instruction)
    }

    /// Executes `instruction`, which lies at RIP.
    pub(crate) fn step_decoded(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let trap = self.has(flag::TF);
        let was_shadowed = self.shadow;
        self.shadow = false;
        let next = self.wrap_rip(self.rip.wrapping_add(instruction.len() as u64));
        let flow = match self.execute(instruction, next) {
            Ok(flow) => flow,
            Err(stop) => {
                self.shadow = was_shadowed;
                return Err(stop);
            }
        };
        if flow == Flow::Next {
            self.rip = next;
        }
        self.set(flag::RF, false);
        self.end_replay();
        // An interrupt gate has cleared TF: nothing of the handler is stepped.
        let interrupted = flow == Flow::Jumped && rules::is_interrupt(instruction);
        if trap && !self.shadow && !interrupted {
            const DR6_SINGLE_STEP: u64 = 1 << 14;
            self.sys.dr6 |= DR6_SINGLE_STEP | self.take_data_hits();
            self.raise_trap(vector::DEBUG)?;
        }
        Ok(())
    }

    /// Raises a trap: the instruction is complete, RF isn't pushed.
    fn raise_trap(&mut self, number: u8) -> Result<(), Stop> {
        self.remote.counters.exceptions.bump();
        self.interrupt(number, crate::event::Source::External)
    }

    fn execute(&mut self, instruction: &Instruction, next: u64) -> Result<Flow, Stop> {
        if let Some(flow) = self.execute_flow(instruction, next)? {
            return Ok(flow);
        }
        if let Some(flow) = self.execute_stack(instruction)? {
            return Ok(flow);
        }
        if instruction.is_string_instruction()
            || instruction.mnemonic() == iced_x86::Mnemonic::Xlatb
        {
            return self.execute_string(instruction);
        }
        if let Some(flow) = self.execute_system(instruction, next)? {
            return Ok(flow);
        }
        if let Some(flow) = self.execute_decimal(instruction)? {
            return Ok(flow);
        }
        if self.execute_xsave(instruction)? {
            return Ok(Flow::Next);
        }
        self.execute_natively(instruction)?;
        Ok(Flow::Next)
    }

    /// The value of a register, as iced-x86's address computation asks for it.
    pub(crate) fn register_value(&self, register: Register) -> Option<u64> {
        if let Some(segment) = segment_index(register) {
            return Some(if self.is_64bit() && segment < FS {
                0
            } else {
                self.segment_base(segment)
            });
        }
        if register.is_gpr() {
            let full = self.gpr(register.full_register().number());
            return Some(match register.size() {
                8 => full,
                4 => full & 0xffff_ffff,
                2 => full & 0xffff,
                _ if is_high_byte(register) => (self.gpr(register.number() - 4) >> 8) & 0xff,
                _ => full & 0xff,
            });
        }
        None
    }

    /// Writes a general register of any width: 32-bit writes clear the upper half.
    pub(crate) fn write_register(&mut self, register: Register, value: u64) {
        if is_high_byte(register) {
            let index = register.number() - 4;
            let kept = self.gpr(index) & !0xff00;
            self.set_gpr(index, kept | (value & 0xff) << 8);
            return;
        }
        let index = register.full_register().number();
        let merged = match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => (self.gpr(index) & !0xffff) | (value & 0xffff),
            _ => (self.gpr(index) & !0xff) | (value & 0xff),
        };
        self.set_gpr(index, merged);
    }

    /// Linear address of memory operand `operand`, `len` bytes long, after segment checks.
    pub(crate) fn operand_address(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        len: usize,
        access: Access,
    ) -> Result<u64, Stop> {
        let address = self.raw_operand_address(instruction, operand)?;
        let segment = self.operand_segment(instruction);
        self.check_segment(segment, address, len, access)
    }

    /// The linear address of a memory operand, not yet checked.
    fn raw_operand_address(&self, instruction: &Instruction, operand: u32) -> Result<u64, Stop> {
        instruction
            .try_virtual_address(operand, 0, |register, _, _| self.register_value(register))
            .ok_or_else(|| Fault::undefined().into())
    }

    /// The segment of a memory operand. 64-bit code has no prefixes for ES, CS, SS and DS: there
    /// the base register chooses between SS and DS (SDM 1 §3.7.4; APM 2 §4.5.3).
    pub(crate) fn operand_segment(&self, instruction: &Instruction) -> usize {
        let named = segment_index(instruction.memory_segment()).unwrap_or(DS);
        if !self.is_64bit() || named >= FS {
            return named;
        }
        match instruction.memory_base().full_register() {
            Register::RSP | Register::RBP => SS,
            _ => DS,
        }
    }

    /// Segment rights and limits (SDM 3A §5.3 to §5.5) for a linear address that includes the
    /// base; returns the address cut to the mode's width.
    pub(crate) fn check_segment(
        &mut self,
        index: usize,
        address: u64,
        len: usize,
        access: Access,
    ) -> Result<u64, Stop> {
        let fault = if index == SS {
            Fault::stack
        } else {
            Fault::general
        };
        self.check_alignment(address, len)?;
        self.touch(address, len, access == Access::Write);
        if self.is_64bit() {
            let last = address.wrapping_add(len as u64).wrapping_sub(1);
            if crate::core::is_canonical(address) && crate::core::is_canonical(last) {
                return Ok(address);
            }
            return Err(fault(0).into());
        }
        let segment = self.sys.segments[index];
        if self.is_real() {
            let offset = address.wrapping_sub(segment.base) & 0xffff_ffff;
            if offset + len as u64 > u64::from(segment.limit) + 1 {
                return Err(fault(0).into());
            }
            return Ok(address & 0xffff_ffff);
        }
        const CODE: u32 = 8;
        const EXPAND_DOWN: u32 = 4;
        const READ_WRITE: u32 = 2;
        let is_code = segment.access & CODE != 0;
        let refused = segment.access & ACCESS_UNUSABLE != 0
            || (access == Access::Write && (is_code || segment.access & READ_WRITE == 0))
            || (access == Access::Read && is_code && segment.access & READ_WRITE == 0);
        let offset = address.wrapping_sub(segment.base) & 0xffff_ffff;
        let last = offset + (len as u64).max(1) - 1;
        let limit = u64::from(segment.limit);
        let outside = if !is_code && segment.access & EXPAND_DOWN != 0 {
            offset <= limit || last > 0xffff_ffff
        } else {
            last > limit
        };
        if refused || outside {
            return Err(fault(0).into());
        }
        Ok(address & 0xffff_ffff)
    }

    /// #AC for a misaligned operand of user code that asked for it (SDM 3A §6.15, interrupt 17).
    fn check_alignment(&self, address: u64, len: usize) -> Result<(), Stop> {
        let checked = self.cpl == 3
            && self.has(flag::AC)
            && self.sys.cr0 & ringfence_x86::paging::CR0_AM != 0;
        if checked && matches!(len, 2 | 4 | 8) && !address.is_multiple_of(len as u64) {
            return Err(Stop::Fault(Fault {
                vector: vector::ALIGNMENT,
                error: Some(0),
                address: 0,
            }));
        }
        Ok(())
    }

    /// Reads operand `operand`, a general register, an immediate or memory, of `len` bytes.
    pub(crate) fn read_operand(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        len: usize,
    ) -> Result<u64, Stop> {
        match instruction.op_kind(operand) {
            OpKind::Register => self
                .register_value(instruction.op_register(operand))
                .ok_or_else(|| Fault::undefined().into()),
            OpKind::Memory => {
                let address = self.operand_address(instruction, operand, len, Access::Read)?;
                self.read_number(address, len, self.is_user())
            }
            _ => Ok(instruction.immediate(operand)),
        }
    }

    /// Writes operand `operand`, a general register or memory, of `len` bytes.
    pub(crate) fn write_operand(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        value: u64,
        len: usize,
    ) -> Result<(), Stop> {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                self.write_register(instruction.op_register(operand), value);
                Ok(())
            }
            _ => {
                let address = self.operand_address(instruction, operand, len, Access::Write)?;
                self.write_number(address, value, len, self.is_user())
            }
        }
    }

    /// #GP(0) unless at privilege level 0.
    pub(crate) fn require_supervisor(&self) -> Result<(), Stop> {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(Fault::general(0).into())
        }
    }
}

/// Instructions that only the monitor executes, whatever their operands.
pub(crate) fn is_emulated(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    if instruction.is_string_instruction() || instruction.is_vsib() {
        return true;
    }
    if instruction.mnemonic() == M::Mov {
        let special = |register: Register| {
            register.is_cr() || register.is_dr() || register.is_segment_register()
        };
        return special(instruction.op0_register()) || special(instruction.op1_register());
    }
    matches!(
        instruction.mnemonic(),
        M::Cli
            | M::Sti
            | M::Cld
            | M::Std
            | M::Clac
            | M::Stac
            | M::Hlt
            | M::In
            | M::Out
            | M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpmc
            | M::Rdmsr
            | M::Wrmsr
            | M::Xgetbv
            | M::Xsetbv
            | M::Swapgs
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Invlpg
            | M::Invpcid
            | M::Wbinvd
            | M::Wbnoinvd
            | M::Invd
            | M::Clts
            | M::Vmcall
            | M::Vmmcall
            | M::Lgdt
            | M::Lidt
            | M::Sgdt
            | M::Sidt
            | M::Lldt
            | M::Ltr
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lmsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Arpl
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Monitor
            | M::Mwait
            | M::Monitorx
            | M::Mwaitx
            | M::Rsm
            | M::Getsec
            | M::Pconfig
            // The monitor sees what others have written to code.
            | M::Serialize
            | M::Xlatb
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fnsave
            | M::Fldenv
            | M::Frstor
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Syscall
            | M::Sysret
            | M::Sysretq
            | M::Sysenter
            | M::Sysexit
            | M::Sysexitq
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::Bound
            | M::Aaa
            | M::Aas
            | M::Aam
            | M::Aad
            | M::Daa
            | M::Das
            | M::Salc
            | M::Xbegin
            | M::Xend
            | M::Xabort
            | M::Xtest
    )
}

pub(crate) use exec::has_high_byte;
pub(crate) use exec::is_avx;
pub(crate) use exec::is_sse;
pub(crate) use exec::uses_fpu;
pub(crate) use rules::cannot_fault;
pub(crate) use rules::is_hint;
pub(crate) use rules::is_plain_store;

/// AH, CH, DH or BH.
pub(crate) fn is_high_byte(register: Register) -> bool {
    matches!(
        register,
        Register::AH | Register::CH | Register::DH | Register::BH
    )
}

/// Whether a memory operand's address has 16 or 32 bits.
pub(crate) fn has_short_address(instruction: &Instruction) -> bool {
    let short = |register: Register| {
        register.is_gpr16() || register.is_gpr32() || register == Register::EIP
    };
    short(instruction.memory_base())
        || short(instruction.memory_index())
        || (instruction.memory_base() == Register::None
            && instruction.memory_index() == Register::None
            && instruction.memory_displ_size() < 8)
}

/// Index of a segment register in the saved state.
pub(crate) fn segment_index(register: Register) -> Option<usize> {
    Some(match register {
        Register::ES => ES,
        Register::CS => CS,
        Register::SS => SS,
        Register::DS => DS,
        Register::FS => FS,
        Register::GS => GS,
        _ => return None,
    })
}
