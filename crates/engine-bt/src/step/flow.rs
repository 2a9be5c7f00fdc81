//! Control transfers.

use iced_x86::Code;
use iced_x86::ConditionCode;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use ringfence_x86::paging::EFER_SCE;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::CS;
use ringfence_x86::state::SS;
use ringfence_x86::state::Segment;

use crate::core::Core;
use crate::core::flag;
use crate::core::is_canonical;
use crate::event::Source;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::step::Flow;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
/// RFLAGS that SYSRET and a 64-bit IRET may load: all but reserved ones.
const LOADABLE: u64 = 0x003f_7fd5;

impl Core {
    /// Executes a control transfer; `None` when `instruction` isn't one.
    pub(super) fn execute_flow(
        &mut self,
        instruction: &Instruction,
        next: u64,
    ) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Jmp | M::Call => self.jump_or_call(instruction, next)?,
            M::Ret => self.return_near(instruction)?,
            M::Retf => self.return_far(instruction)?,
            M::Iret | M::Iretd | M::Iretq => self.iret(instruction)?,
            M::Int => {
                #[expect(clippy::cast_possible_truncation, reason = "INT has an 8-bit operand")]
                let number = instruction.immediate(0) as u8;
                self.software_interrupt(number, next)?;
            }
            M::Int3 => self.software_interrupt(vector::BREAKPOINT, next)?,
            M::Int1 => self.debug_interrupt(next)?,
            M::Ud0 | M::Ud1 | M::Ud2 => return Err(Fault::undefined().into()),
            M::Into => {
                if self.rflags() & OF == 0 {
                    return Ok(Some(Flow::Next));
                }
                self.software_interrupt(vector::OVERFLOW, next)?;
            }
            M::Syscall => self.syscall(next)?,
            M::Sysret | M::Sysretq => self.sysret(instruction)?,
            M::Sysenter => self.sysenter()?,
            M::Sysexit | M::Sysexitq => self.sysexit(instruction)?,
            _ => return self.execute_conditional(instruction, next),
        }
        Ok(Some(Flow::Jumped))
    }

    fn execute_conditional(
        &mut self,
        instruction: &Instruction,
        next: u64,
    ) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        let taken = match instruction.mnemonic() {
            M::Loop | M::Loope | M::Loopne => self.count_down(instruction),
            M::Jrcxz => self.gpr(1) == 0,
            M::Jecxz => self.gpr(1) & 0xffff_ffff == 0,
            M::Jcxz => self.gpr(1) & 0xffff == 0,
            _ if instruction.flow_control() == FlowControl::ConditionalBranch => {
                self.holds(instruction.condition_code())
            }
            _ => return Ok(None),
        };
        if !taken {
            return Ok(Some(Flow::Next));
        }
        // LOOP's count is written only when the jump can be made.
        let target = instruction.near_branch_target();
        self.check_target(target)?;
        self.finish_loop(instruction);
        self.rip = self.wrap_rip(target);
        let _ = next;
        Ok(Some(Flow::Jumped))
    }

    fn loop_width(instruction: &Instruction) -> u32 {
        match instruction.code() {
            Code::Loop_rel8_16_CX
            | Code::Loop_rel8_32_CX
            | Code::Loope_rel8_16_CX
            | Code::Loope_rel8_32_CX
            | Code::Loopne_rel8_16_CX
            | Code::Loopne_rel8_32_CX => 16,
            Code::Loop_rel8_16_ECX
            | Code::Loop_rel8_32_ECX
            | Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_16_ECX
            | Code::Loope_rel8_32_ECX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_16_ECX
            | Code::Loopne_rel8_32_ECX
            | Code::Loopne_rel8_64_ECX => 32,
            _ => 64,
        }
    }

    /// Whether a LOOP jumps. Decrements the counter when it doesn't.
    fn count_down(&mut self, instruction: &Instruction) -> bool {
        let bits = Self::loop_width(instruction);
        let mask = u64::MAX >> (64 - bits);
        let count = self.gpr(1).wrapping_sub(1) & mask;
        let condition = match instruction.mnemonic() {
            Mnemonic::Loope => self.rflags() & ZF != 0,
            Mnemonic::Loopne => self.rflags() & ZF == 0,
            _ => true,
        };
        let taken = count != 0 && condition;
        if !taken {
            self.write_counter(bits, count);
        }
        taken
    }

    fn finish_loop(&mut self, instruction: &Instruction) {
        use Mnemonic as M;
        if matches!(instruction.mnemonic(), M::Loop | M::Loope | M::Loopne) {
            let bits = Self::loop_width(instruction);
            let mask = u64::MAX >> (64 - bits);
            let count = self.gpr(1).wrapping_sub(1) & mask;
            self.write_counter(bits, count);
        }
    }

    /// Writes CX, ECX (clearing the upper half) or RCX.
    pub(super) fn write_counter(&mut self, bits: u32, count: u64) {
        let merged = if bits == 16 {
            (self.gpr(1) & !0xffff) | (count & 0xffff)
        } else {
            count
        };
        self.set_gpr(1, merged);
    }

    fn holds(&self, condition: ConditionCode) -> bool {
        use ConditionCode as C;
        let flags = self.rflags();
        let set = |bit| flags & bit != 0;
        let less = set(SF) != set(OF);
        match condition {
            C::None => true,
            C::o => set(OF),
            C::no => !set(OF),
            C::b => set(CF),
            C::ae => !set(CF),
            C::e => set(ZF),
            C::ne => !set(ZF),
            C::be => set(CF) || set(ZF),
            C::a => !set(CF) && !set(ZF),
            C::s => set(SF),
            C::ns => !set(SF),
            C::p => set(PF),
            C::np => !set(PF),
            C::l => less,
            C::ge => !less,
            C::le => less || set(ZF),
            C::g => !less && !set(ZF),
        }
    }

    /// #GP unless code may continue at `target`.
    fn check_target(&self, target: u64) -> Result<(), Stop> {
        let fits = if self.is_64bit() {
            is_canonical(target)
        } else {
            self.wrap_rip(target) <= u64::from(self.sys.segments[CS].limit)
        };
        if fits {
            Ok(())
        } else {
            Err(Fault::general(0).into())
        }
    }

    fn jump_or_call(&mut self, instruction: &Instruction, next: u64) -> Result<(), Stop> {
        let is_call = instruction.mnemonic() == Mnemonic::Call;
        let target = match instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                instruction.near_branch_target()
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let offset = u64::from(instruction.far_branch32());
                let offset = if instruction.op0_kind() == OpKind::FarBranch16 {
                    u64::from(instruction.far_branch16())
                } else {
                    offset
                };
                let bytes = if instruction.op0_kind() == OpKind::FarBranch16 {
                    2
                } else {
                    4
                };
                let selector = instruction.far_branch_selector();
                return self.far_transfer(selector, offset, is_call.then_some((next, bytes)));
            }
            _ if is_far_memory(instruction.code()) => {
                return self.far_transfer_memory(instruction, is_call.then_some(next));
            }
            _ => {
                let bytes = operand_bytes(instruction);
                self.read_operand(instruction, 0, bytes)?
            }
        };
        self.check_target(target)?;
        if is_call {
            let bytes = match instruction.op0_kind() {
                OpKind::NearBranch16 => 2,
                OpKind::NearBranch32 => 4,
                OpKind::NearBranch64 => 8,
                _ => operand_bytes(instruction),
            };
            self.push(next, bytes)?;
        }
        self.rip = self.wrap_rip(target);
        Ok(())
    }

    fn far_transfer_memory(
        &mut self,
        instruction: &Instruction,
        call_next: Option<u64>,
    ) -> Result<(), Stop> {
        use crate::walk::Access;
        let bytes = match instruction.code() {
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1632 | Code::Call_m1632 => 4,
            _ => 8,
        };
        let address = self.operand_address(instruction, 0, bytes + 2, Access::Read)?;
        let user = self.is_user();
        let offset = self.read_number(address, bytes, user)?;
        let selector = self.read_number(address.wrapping_add(bytes as u64), 2, user)?;
        #[expect(clippy::cast_possible_truncation, reason = "two bytes were read")]
        let selector = selector as u16;
        self.far_transfer(selector, offset, call_next.map(|next| (next, bytes)))
    }

    /// Far JMP or CALL to a code segment. Gates and tasks are not modelled: #GP.
    fn far_transfer(
        &mut self,
        selector: u16,
        offset: u64,
        call: Option<(u64, usize)>,
    ) -> Result<(), Stop> {
        if self.is_real() || self.has(flag::VM) {
            if let Some((next, bytes)) = call {
                let cs = u64::from(self.sys.segments[CS].selector);
                self.push(cs, bytes)?;
                self.push(next, bytes)?;
            }
            self.load_real_segment(CS, selector);
            self.rip = self.wrap_rip(offset);
            return Ok(());
        }
        let segment = self.check_code_segment(selector, false)?;
        let long = self.is_long() && segment.access & ACCESS_L != 0;
        let inside = if long {
            is_canonical(offset)
        } else {
            offset <= u64::from(segment.limit)
        };
        if !inside {
            return Err(Fault::general(0).into());
        }
        if let Some((next, bytes)) = call {
            let cs = u64::from(self.sys.segments[CS].selector);
            let rsp = self.gpr(4);
            self.push(cs, bytes)?;
            if let Err(stop) = self.push(next, bytes) {
                self.set_gpr(4, rsp);
                return Err(stop);
            }
        }
        self.enter_code_segment(segment);
        self.rip = self.wrap_rip(offset);
        Ok(())
    }

    fn return_near(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = match instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let target = self.peek(0, bytes)?;
        self.check_target(target)?;
        let released = if instruction.op_count() == 1 {
            instruction.immediate(0)
        } else {
            0
        };
        self.move_stack(bytes as u64 + released);
        self.rip = self.wrap_rip(target);
        Ok(())
    }

    fn return_far(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = match instruction.code() {
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            _ => 8,
        };
        let released = if instruction.op_count() == 1 {
            instruction.immediate(0)
        } else {
            0
        };
        let rip = self.peek(0, bytes)?;
        let selector = self.peek_selector(1, bytes)?;
        if self.is_real() || self.has(flag::VM) {
            self.move_stack(2 * bytes as u64 + released);
            self.load_real_segment(CS, selector);
            self.rip = self.wrap_rip(rip);
            return Ok(());
        }
        let code = self.check_code_segment(selector, true)?;
        let level = (code.selector & 3) as u8;
        if level == self.cpl {
            self.check_return_target(&code, rip)?;
            self.move_stack(2 * bytes as u64 + released);
            self.enter_code_segment(code);
            self.rip = self.wrap_rip(rip);
            return Ok(());
        }
        let skip = 2 * bytes as u64 + released;
        let rsp = self.peek_at(skip, bytes)?;
        let stack_selector = low16(self.peek_at(skip + bytes as u64, bytes)?);
        self.return_outward(code, rip, rsp, stack_selector)?;
        self.move_stack(released);
        Ok(())
    }

    fn check_return_target(&self, code: &Segment, rip: u64) -> Result<(), Stop> {
        let long = self.is_long() && code.access & ACCESS_L != 0;
        let inside = if long {
            is_canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if inside {
            Ok(())
        } else {
            Err(Fault::general(0).into())
        }
    }

    /// Returns to an outer level with a new stack.
    fn return_outward(
        &mut self,
        code: Segment,
        rip: u64,
        rsp: u64,
        stack_selector: u16,
    ) -> Result<(), Stop> {
        let level = (code.selector & 3) as u8;
        let to_long = self.is_long() && code.access & ACCESS_L != 0;
        let null_allowed = to_long && level != 3;
        let stack = if stack_selector & 0xfffc == 0 && null_allowed && self.is_long() {
            crate::segment::null_segment(stack_selector)
        } else {
            self.check_stack_segment(stack_selector, level, Fault::general)?
        };
        self.check_return_target(&code, rip)?;
        self.enter_code_segment(code);
        self.set_segment(SS, stack);
        let width = if to_long {
            u64::MAX
        } else if stack.access & ringfence_x86::state::ACCESS_DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        let kept = if width == 0xffff {
            self.gpr(4) & !0xffff
        } else {
            0
        };
        self.set_gpr(4, kept | (rsp & width));
        self.drop_privileged_segments();
        self.rip = self.wrap_rip(rip);
        Ok(())
    }

    fn iret(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let bytes = match instruction.mnemonic() {
            Mnemonic::Iret => 2,
            Mnemonic::Iretd => 4,
            _ => 8,
        };
        let rip = self.peek(0, bytes)?;
        let selector = self.peek_selector(1, bytes)?;
        let flags = self.peek(2, bytes)?;
        if self.is_real() {
            self.move_stack(3 * bytes as u64);
            self.load_real_segment(CS, selector);
            self.rip = self.wrap_rip(rip);
            self.load_flags(flags, bytes);
            self.nmi_masked = false;
            return Ok(());
        }
        if self.has(flag::NT) {
            // Task return; in 64-bit mode always a fault, and tasks aren't modelled otherwise.
            return Err(Fault::general(0).into());
        }
        if flags & flag::VM != 0 && self.cpl == 0 && !self.is_long() {
            return self.iret_to_v86(rip, selector, flags);
        }
        let code = self.check_code_segment(selector, true)?;
        let level = (code.selector & 3) as u8;
        let old_level = self.cpl;
        // In 64-bit mode the stack is popped in any case.
        if level != self.cpl || self.is_64bit() {
            let rsp = self.peek(3, bytes)?;
            let stack_selector = self.peek_selector(4, bytes)?;
            if level == old_level {
                self.return_same_level(code, rip, rsp, stack_selector)?;
            } else {
                self.return_outward(code, rip, rsp, stack_selector)?;
            }
        } else {
            self.check_return_target(&code, rip)?;
            self.move_stack(3 * bytes as u64);
            self.enter_code_segment(code);
            self.rip = self.wrap_rip(rip);
        }
        self.load_flags_at(flags, bytes, old_level);
        self.nmi_masked = false;
        // A line that is never let go must not keep what it interrupts from going on for ever: one
        // instruction runs between two interrupts.
        self.shadow = self.maybe_interrupt;
        Ok(())
    }

    fn return_same_level(
        &mut self,
        code: Segment,
        rip: u64,
        rsp: u64,
        stack_selector: u16,
    ) -> Result<(), Stop> {
        let level = self.cpl;
        let to_long = code.access & ACCESS_L != 0;
        let stack = if stack_selector & 0xfffc == 0 && to_long && level != 3 {
            if (stack_selector & 3) as u8 != level {
                return Err(Fault::general(0).into());
            }
            crate::segment::null_segment(stack_selector)
        } else {
            self.check_stack_segment(stack_selector, level, Fault::general)?
        };
        self.check_return_target(&code, rip)?;
        self.enter_code_segment(code);
        self.set_segment(SS, stack);
        self.set_gpr(4, if to_long { rsp } else { rsp & 0xffff_ffff });
        self.rip = self.wrap_rip(rip);
        Ok(())
    }

    fn iret_to_v86(&mut self, rip: u64, selector: u16, flags: u64) -> Result<(), Stop> {
        use ringfence_x86::state::{DS, ES, FS, GS};
        let mut words = [0; 6];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.peek(3 + index as u64, 4)?;
        }
        self.set_rflags(flags & LOADABLE | flag::VM);
        let order = [(CS, selector), (SS, low16(words[1])), (ES, low16(words[2]))];
        let rest = [
            (DS, low16(words[3])),
            (FS, low16(words[4])),
            (GS, low16(words[5])),
        ];
        for (index, selector) in order.into_iter().chain(rest) {
            let segment = Segment {
                selector,
                base: u64::from(selector) << 4,
                limit: 0xffff,
                access: 0xf3,
            };
            self.set_segment(index, segment);
        }
        self.set_cpl(3);
        self.set_gpr(4, words[0] & 0xffff_ffff);
        self.rip = rip & 0xffff;
        self.nmi_masked = false;
        Ok(())
    }

    /// POPF or IRET at the current level.
    pub(super) fn load_flags(&mut self, flags: u64, bytes: usize) {
        self.load_flags_at(flags, bytes, self.cpl);
    }

    /// Loads the flags that level `cpl` may change.
    fn load_flags_at(&mut self, flags: u64, bytes: usize, cpl: u8) {
        let mut changed = LOADABLE & !(flag::VM | flag::VIF | flag::VIP);
        if bytes == 2 {
            changed &= 0xffff;
        }
        if cpl != 0 {
            changed &= !flag::IOPL;
        }
        if cpl > self.iopl() {
            changed &= !flag::IF;
        }
        let merged = (self.rflags() & !changed) | (flags & changed);
        self.set_rflags(merged);
        self.maybe_interrupt |= merged & flag::IF != 0;
    }

    fn software_interrupt(&mut self, number: u8, next: u64) -> Result<(), Stop> {
        if self.has(flag::VM) && self.iopl() < 3 {
            return Err(Fault::general(0).into());
        }
        let before = self.rip;
        self.rip = next;
        let delivered = self.interrupt(number, Source::Software);
        if delivered.is_err() {
            self.rip = before;
        }
        delivered
    }

    /// INT1: a trap whose gate any level may use, unlike INT 1's (SDM 2A, INT n).
    fn debug_interrupt(&mut self, next: u64) -> Result<(), Stop> {
        let before = self.rip;
        self.rip = next;
        let delivered = self.interrupt(vector::DEBUG, Source::External);
        if delivered.is_err() {
            self.rip = before;
        }
        delivered
    }

    fn syscall(&mut self, next: u64) -> Result<(), Stop> {
        if self.sys.efer & EFER_SCE == 0 || !self.is_long() {
            return Err(Fault::undefined().into());
        }
        let target = if self.is_64bit() {
            self.msrs.lstar
        } else {
            self.msrs.cstar
        };
        self.set_gpr(1, next);
        self.set_gpr(11, self.rflags() & !flag::RF);
        let flags = self.rflags() & !self.msrs.sfmask & !flag::RF;
        self.enter_syscall_segments();
        self.set_rflags(flags);
        self.rip = target;
        Ok(())
    }

    /// CS, SS and privilege level after SYSCALL.
    pub(crate) fn enter_syscall_segments(&mut self) {
        let selector = low16(self.msrs.star >> 32);
        self.set_segment(SS, flat_data(selector.wrapping_add(8) & 0xfffc, 0));
        self.enter_code_segment(flat_code(selector & 0xfffc, 0, true));
    }

    /// CS, SS and privilege level after SYSRET.
    pub(crate) fn enter_sysret_segments(&mut self, to_long: bool) {
        let base = low16(self.msrs.star >> 48);
        let code = if to_long { base.wrapping_add(16) } else { base };
        self.enter_code_segment(flat_code(code | 3, 3, to_long));
        self.set_segment(SS, flat_data(base.wrapping_add(8) | 3, 3));
    }

    fn sysret(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        if self.sys.efer & EFER_SCE == 0 || !self.is_long() {
            return Err(Fault::undefined().into());
        }
        self.require_supervisor()?;
        let to_long = instruction.mnemonic() == Mnemonic::Sysretq;
        let target = self.gpr(1);
        // Intel faults here, before the level changes; AMD faults at the target. The former is
        // what guests are written for.
        if to_long && !is_canonical(target) {
            return Err(Fault::general(0).into());
        }
        let flags = self.gpr(11) & LOADABLE & !(flag::RF | flag::VM);
        self.enter_sysret_segments(to_long);
        self.set_rflags(flags);
        self.maybe_interrupt |= flags & flag::IF != 0;
        self.rip = if to_long {
            target
        } else {
            target & 0xffff_ffff
        };
        Ok(())
    }

    fn sysenter(&mut self) -> Result<(), Stop> {
        if self.is_real() || self.msrs.sysenter_cs & 0xfffc == 0 {
            return Err(Fault::general(0).into());
        }
        let long = self.is_long();
        let selector = low16(self.msrs.sysenter_cs) & 0xfffc;
        let flags = self.rflags() & !(flag::VM | flag::IF | flag::RF);
        self.enter_code_segment(flat_code(selector, 0, long));
        self.set_segment(SS, flat_data(selector.wrapping_add(8), 0));
        self.set_rflags(flags);
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.set_gpr(4, self.msrs.sysenter_esp & mask);
        self.rip = self.msrs.sysenter_eip & mask;
        Ok(())
    }

    fn sysexit(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        if self.is_real() || self.msrs.sysenter_cs & 0xfffc == 0 {
            return Err(Fault::general(0).into());
        }
        self.require_supervisor()?;
        let long = instruction.mnemonic() == Mnemonic::Sysexitq;
        let (target, stack) = (self.gpr(2), self.gpr(1));
        if long && !(is_canonical(target) && is_canonical(stack)) {
            return Err(Fault::general(0).into());
        }
        let base = low16(self.msrs.sysenter_cs);
        let code = base.wrapping_add(if long { 32 } else { 16 }) | 3;
        self.enter_code_segment(flat_code(code, 3, long));
        self.set_segment(SS, flat_data(code.wrapping_add(8), 3));
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.set_gpr(4, stack & mask);
        self.rip = target & mask;
        Ok(())
    }
}

fn low16(value: u64) -> u16 {
    (value & 0xffff) as u16
}

/// The code segment that SYSCALL and its relatives load, whatever the table says.
fn flat_code(selector: u16, dpl: u32, long: bool) -> Segment {
    let size = if long { 0x2000 } else { 0x4000 };
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: 0x809b | dpl << 5 | size,
    }
}

fn flat_data(selector: u16, dpl: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: 0xc093 | dpl << 5,
    }
}

fn is_far_memory(code: Code) -> bool {
    matches!(
        code,
        Code::Jmp_m1616
            | Code::Jmp_m1632
            | Code::Jmp_m1664
            | Code::Call_m1616
            | Code::Call_m1632
            | Code::Call_m1664
    )
}

/// Width of an indirect near JMP or CALL's operand.
fn operand_bytes(instruction: &Instruction) -> usize {
    match instruction.code() {
        Code::Jmp_rm16 | Code::Call_rm16 => 2,
        Code::Jmp_rm32 | Code::Call_rm32 => 4,
        _ => 8,
    }
}
