//! System instructions: control, debug and model-specific registers, descriptor tables, I/O.

use iced_x86::Code;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::Register;
use ringfence_x86::paging::CR0_PE;
use ringfence_x86::paging::CR0_TS;
use ringfence_x86::paging::CR4_FSGSBASE;
use ringfence_x86::paging::CR4_OSXSAVE;
use ringfence_x86::paging::CR4_TSD;
use ringfence_x86::paging::CR4_UMIP;
use ringfence_x86::state::Activity;
use ringfence_x86::state::DescriptorTable;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;

use crate::core::Core;
use crate::core::flag;
use crate::core::is_canonical;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::step::Flow;
use crate::step::segment_index;
use crate::walk::Access;

const ZF: u64 = 1 << 6;

impl Core {
    /// Executes a system instruction; `None` when `instruction` isn't one.
    pub(super) fn execute_system(
        &mut self,
        instruction: &Instruction,
        next: u64,
    ) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Cli | M::Sti => self.change_if(instruction.mnemonic() == M::Sti)?,
            M::Cld => self.set_direction(false),
            M::Std => self.set_direction(true),
            M::Clac | M::Stac => return Err(Fault::undefined().into()),
            M::Hlt => return self.halt(next).map(Some),
            M::In => self.execute_in(instruction)?,
            M::Out => self.execute_out(instruction)?,
            M::Mov => return self.execute_mov(instruction),
            M::Cpuid => self.execute_cpuid(),
            M::Rdtsc => self.read_tsc(false)?,
            M::Rdtscp => self.read_tsc(true)?,
            M::Rdpid => {
                let value = self.hot().tsc_aux;
                self.write_register(instruction.op0_register(), value);
            }
            M::Rdpmc => return Err(Fault::general(0).into()),
            M::Rdmsr => self.execute_rdmsr()?,
            M::Wrmsr => self.execute_wrmsr()?,
            M::Xgetbv => self.execute_xgetbv()?,
            M::Xsetbv => self.execute_xsetbv()?,
            M::Swapgs => self.swap_gs()?,
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => {
                self.execute_segment_base(instruction)?;
            }
            M::Invlpg | M::Invpcid | M::Wbinvd | M::Wbnoinvd | M::Invd => {
                self.execute_invalidate(instruction)?;
            }
            M::Clts => {
                self.require_supervisor()?;
                self.sys.cr0 &= !CR0_TS;
                self.mode_changed();
            }
            M::Vmcall | M::Vmmcall => self.hypercall()?,
            _ => return self.execute_tables(instruction),
        }
        Ok(Some(Flow::Next))
    }

    fn execute_tables(&mut self, instruction: &Instruction) -> Result<Option<Flow>, Stop> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Lgdt | M::Lidt => self.load_table(instruction)?,
            M::Sgdt | M::Sidt => self.store_table(instruction)?,
            M::Lldt | M::Ltr => {
                self.require_protected()?;
                self.require_supervisor()?;
                let selector = self.read_selector(instruction, 0)?;
                if instruction.mnemonic() == M::Ltr {
                    self.load_task_register(selector)?;
                } else {
                    self.load_ldt(selector)?;
                }
            }
            M::Sldt | M::Str => {
                self.require_protected()?;
                self.require_umip()?;
                let segment = if instruction.mnemonic() == M::Str {
                    self.sys.tr
                } else {
                    self.sys.ldtr
                };
                self.store_word(instruction, u64::from(segment.selector))?;
            }
            M::Smsw => {
                self.require_umip()?;
                self.store_word(instruction, self.sys.cr0)?;
            }
            M::Lmsw => {
                self.require_supervisor()?;
                let value = self.read_operand(instruction, 0, 2)?;
                let cr0 = self.sys.cr0 & !0xe | value & 0xf;
                self.write_cr0(cr0 | (self.sys.cr0 & CR0_PE))?;
            }
            M::Lar | M::Lsl => self.execute_visible(instruction)?,
            M::Verr | M::Verw => {
                self.require_protected()?;
                let selector = self.read_selector(instruction, 0)?;
                let allowed = self.verify_segment(selector, instruction.mnemonic() == M::Verw)?;
                self.set_zero_flag(allowed);
            }
            M::Arpl => self.execute_arpl(instruction)?,
            M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => self.load_far_pointer(instruction)?,
            M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx | M::Rsm | M::Getsec | M::Pconfig => {
                return Err(Fault::undefined().into());
            }
            _ => return Ok(None),
        }
        Ok(Some(Flow::Next))
    }

    fn set_zero_flag(&mut self, on: bool) {
        let flags = self.hot().flags;
        self.hot_mut().flags = if on { flags | ZF } else { flags & !ZF };
    }

    fn require_protected(&self) -> Result<(), Stop> {
        if self.is_real() || self.has(flag::VM) {
            return Err(Fault::undefined().into());
        }
        Ok(())
    }

    fn require_umip(&self) -> Result<(), Stop> {
        if self.sys.cr4 & CR4_UMIP != 0 {
            return self.require_supervisor();
        }
        Ok(())
    }

    fn change_if(&mut self, on: bool) -> Result<(), Stop> {
        if self.cpl > self.iopl() {
            return Err(Fault::general(0).into());
        }
        if on {
            self.shadow = !self.has(flag::IF);
            self.set(flag::IF, true);
            self.maybe_interrupt = true;
        } else {
            self.set(flag::IF, false);
        }
        Ok(())
    }

    fn set_direction(&mut self, backwards: bool) {
        if backwards {
            self.set(flag::DF, true);
        } else {
            self.set(flag::DF, false);
        }
    }

    fn halt(&mut self, next: u64) -> Result<Flow, Stop> {
        self.require_supervisor()?;
        self.remote.counters.halts.bump();
        self.rip = next;
        // Whoever was kicked before it halts has what it would wait for.
        if !std::mem::take(&mut self.unhalted) {
            self.activity = Activity::Halted;
        }
        Ok(Flow::Jumped)
    }

    /// #GP unless the I/O privilege or the TSS's bitmap allows `bytes` ports from `port` on.
    pub(super) fn check_port(&mut self, port: u16, bytes: usize) -> Result<(), Stop> {
        if self.is_real() || (self.cpl <= self.iopl() && !self.has(flag::VM)) {
            return Ok(());
        }
        let tr = self.sys.tr;
        let refused = || Stop::from(Fault::general(0));
        if tr.limit < 0x67 {
            return Err(refused());
        }
        let map = self.read_number(tr.base.wrapping_add(0x66), 2, false)?;
        let offset = map + u64::from(port / 8);
        if offset + 1 > u64::from(tr.limit) {
            return Err(refused());
        }
        let bits = self.read_number(tr.base.wrapping_add(offset), 2, false)?;
        let wanted = ((1_u64 << bytes) - 1) << (port % 8);
        if bits & wanted != 0 {
            return Err(refused());
        }
        Ok(())
    }

    fn port_operand(&self, instruction: &Instruction, operand: u32) -> u16 {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "ports are DX or an 8-bit immediate"
        )]
        match instruction.op_kind(operand) {
            OpKind::Register => self.gpr(2) as u16,
            _ => instruction.immediate(operand) as u16,
        }
    }

    fn execute_in(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = instruction.op0_register();
        let port = self.port_operand(instruction, 1);
        self.check_port(port, register.size())?;
        let mut data = [0; 8];
        self.read_port(port, &mut data[..register.size()])?;
        self.write_register(register, u64::from_le_bytes(data));
        Ok(())
    }

    fn execute_out(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = instruction.op1_register();
        let port = self.port_operand(instruction, 0);
        self.check_port(port, register.size())?;
        let value = self.gpr(0).to_le_bytes();
        self.write_port(port, &value[..register.size()])
    }

    /// MOV to or from control, debug and segment registers; `None` for ordinary ones.
    fn execute_mov(&mut self, instruction: &Instruction) -> Result<Option<Flow>, Stop> {
        let to = instruction.op0_register();
        let from = instruction.op1_register();
        if to.is_cr() {
            self.require_supervisor()?;
            let value = self.full_register(from);
            self.write_control(to.number(), value)?;
        } else if from.is_cr() {
            self.require_supervisor()?;
            let value = self.read_control(from.number())?;
            self.write_register(to, value);
        } else if to.is_dr() {
            self.require_supervisor()?;
            let value = self.full_register(from);
            self.write_debug(to.number(), value)?;
        } else if from.is_dr() {
            self.require_supervisor()?;
            let value = self.read_debug(from.number())?;
            self.write_register(to, value);
        } else if let Some(index) = segment_index(to) {
            if index == ringfence_x86::state::CS {
                return Err(Fault::undefined().into());
            }
            let selector = self.read_selector(instruction, 1)?;
            self.load_segment(index, selector)?;
            self.shadow = index == ringfence_x86::state::SS;
        } else if let Some(index) = segment_index(from) {
            let selector = u64::from(self.sys.segments[index].selector);
            self.store_word(instruction, selector)?;
        } else {
            return Ok(None);
        }
        Ok(Some(Flow::Next))
    }

    fn full_register(&self, register: Register) -> u64 {
        let value = self.gpr(register.full_register().number());
        if self.is_64bit() {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn read_selector(&mut self, instruction: &Instruction, operand: u32) -> Result<u16, Stop> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a selector is the low 16 bits"
        )]
        Ok(self.read_operand(instruction, operand, 2)? as u16)
    }

    /// Stores a word to memory, or zero-extended to a register of any width.
    fn store_word(&mut self, instruction: &Instruction, value: u64) -> Result<(), Stop> {
        let value = if instruction.mnemonic() == Mnemonic::Smsw {
            value
        } else {
            value & 0xffff
        };
        self.write_operand(instruction, 0, value, 2)
    }

    fn table_bytes(&self) -> usize {
        if self.is_64bit() { 8 } else { 4 }
    }

    fn load_table(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.require_supervisor()?;
        let bytes = self.table_bytes();
        let address = self.operand_address(instruction, 0, bytes + 2, Access::Read)?;
        let user = self.is_user();
        let limit = self.read_number(address, 2, user)?;
        let mut base = self.read_number(address.wrapping_add(2), bytes, user)?;
        if matches!(
            instruction.code(),
            Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
        ) {
            base &= 0xff_ffff;
        }
        if self.is_64bit() && !is_canonical(base) {
            return Err(Fault::general(0).into());
        }
        #[expect(clippy::cast_possible_truncation, reason = "two bytes were read")]
        let table = DescriptorTable {
            base,
            limit: limit as u16,
        };
        if instruction.mnemonic() == Mnemonic::Lgdt {
            self.sys.gdt = table;
        } else {
            self.sys.idt = table;
        }
        Ok(())
    }

    fn store_table(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.require_umip()?;
        let table = if instruction.mnemonic() == Mnemonic::Sgdt {
            self.sys.gdt
        } else {
            self.sys.idt
        };
        let bytes = self.table_bytes();
        let address = self.operand_address(instruction, 0, bytes + 2, Access::Write)?;
        let mut image = table.limit.to_le_bytes().to_vec();
        image.extend_from_slice(&table.base.to_le_bytes()[..bytes]);
        self.write_virtual(address, &image, self.is_user())
    }

    fn execute_visible(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        const LAR_TYPES: [u32; 8] = [1, 2, 3, 4, 5, 9, 0xb, 0xc];
        const LAR_TYPES_LONG: [u32; 4] = [2, 9, 0xb, 0xc];
        const LSL_TYPES: [u32; 5] = [1, 2, 3, 9, 0xb];
        const LSL_TYPES_LONG: [u32; 3] = [2, 9, 0xb];
        self.require_protected()?;
        let selector = self.read_selector(instruction, 1)?;
        let is_lar = instruction.mnemonic() == Mnemonic::Lar;
        let types: &[u32] = match (is_lar, self.is_long()) {
            (true, false) => &LAR_TYPES,
            (true, true) => &LAR_TYPES_LONG,
            (false, false) => &LSL_TYPES,
            (false, true) => &LSL_TYPES_LONG,
        };
        let found = self.visible_segment(selector, types)?;
        if let Some((segment, rights)) = found {
            let value = if is_lar { rights } else { segment.limit };
            self.write_register(instruction.op0_register(), u64::from(value));
        }
        self.set_zero_flag(found.is_some());
        Ok(())
    }

    fn execute_arpl(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.require_protected()?;
        let to = self.read_operand(instruction, 0, 2)?;
        let from = self.read_operand(instruction, 1, 2)?;
        let raise = to & 3 < from & 3;
        if raise {
            self.write_operand(instruction, 0, (to & !3) | (from & 3), 2)?;
        }
        self.set_zero_flag(raise);
        Ok(())
    }

    fn load_far_pointer(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let register = instruction.op0_register();
        let bytes = register.size();
        let address = self.operand_address(instruction, 1, bytes + 2, Access::Read)?;
        let user = self.is_user();
        let offset = self.read_number(address, bytes, user)?;
        let selector = self.read_number(address.wrapping_add(bytes as u64), 2, user)?;
        let index = match instruction.mnemonic() {
            Mnemonic::Lds => ringfence_x86::state::DS,
            Mnemonic::Les => ringfence_x86::state::ES,
            Mnemonic::Lfs => FS,
            Mnemonic::Lgs => GS,
            _ => ringfence_x86::state::SS,
        };
        #[expect(clippy::cast_possible_truncation, reason = "two bytes were read")]
        self.load_segment(index, selector as u16)?;
        self.write_register(register, offset);
        Ok(())
    }

    fn execute_cpuid(&mut self) {
        let result = self.cpuid_result();
        self.set_gpr(0, u64::from(result.eax));
        self.set_gpr(3, u64::from(result.ebx));
        self.set_gpr(1, u64::from(result.ecx));
        self.set_gpr(2, u64::from(result.edx));
    }

    /// Splits a 64-bit value over EDX:EAX.
    fn set_edx_eax(&mut self, value: u64) {
        self.set_gpr(0, value & 0xffff_ffff);
        self.set_gpr(2, value >> 32);
    }

    fn edx_eax(&self) -> u64 {
        (self.gpr(0) & 0xffff_ffff) | self.gpr(2) << 32
    }

    fn read_tsc(&mut self, with_aux: bool) -> Result<(), Stop> {
        if self.sys.cr4 & CR4_TSD != 0 && self.cpl != 0 {
            return Err(Fault::general(0).into());
        }
        let tsc = self.guest_tsc();
        self.set_edx_eax(tsc);
        if with_aux {
            let aux = self.hot().tsc_aux;
            self.set_gpr(1, aux);
        }
        Ok(())
    }

    fn execute_rdmsr(&mut self) -> Result<(), Stop> {
        self.require_supervisor()?;
        #[expect(clippy::cast_possible_truncation, reason = "ECX names the register")]
        let value = self.read_msr(self.gpr(1) as u32)?;
        self.set_edx_eax(value);
        Ok(())
    }

    fn execute_wrmsr(&mut self) -> Result<(), Stop> {
        self.require_supervisor()?;
        #[expect(clippy::cast_possible_truncation, reason = "ECX names the register")]
        let number = self.gpr(1) as u32;
        self.write_msr(number, self.edx_eax())
    }

    fn execute_xgetbv(&mut self) -> Result<(), Stop> {
        if self.sys.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::undefined().into());
        }
        // XGETBV 1 reports which components are in use; saying all enabled ones is allowed.
        if self.gpr(1) & 0xffff_ffff > 1 {
            return Err(Fault::general(0).into());
        }
        self.set_edx_eax(self.sys.xcr0);
        Ok(())
    }

    fn execute_xsetbv(&mut self) -> Result<(), Stop> {
        if self.sys.cr4 & CR4_OSXSAVE == 0 {
            return Err(Fault::undefined().into());
        }
        self.require_supervisor()?;
        let value = self.edx_eax();
        let possible = self.shared.host.guest_xcr0;
        let avx_without_sse = value & 0b110 == 0b100;
        let index = self.gpr(1) & 0xffff_ffff;
        if index != 0 || value & 1 == 0 || value & !possible != 0 || avx_without_sse {
            return Err(Fault::general(0).into());
        }
        self.sys.xcr0 = value;
        self.mode_changed();
        Ok(())
    }

    fn swap_gs(&mut self) -> Result<(), Stop> {
        if !self.is_64bit() {
            return Err(Fault::undefined().into());
        }
        self.require_supervisor()?;
        let outer = self.segment_base(GS);
        let inner = self.hot().kernel_gs_base;
        let hot = self.hot_mut();
        hot.seg_base[GS] = inner;
        hot.kernel_gs_base = outer;
        Ok(())
    }

    fn execute_segment_base(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        use Mnemonic as M;
        if self.sys.cr4 & CR4_FSGSBASE == 0 || !self.is_64bit() {
            return Err(Fault::undefined().into());
        }
        let index = match instruction.mnemonic() {
            M::Rdfsbase | M::Wrfsbase => FS,
            _ => GS,
        };
        let register = instruction.op0_register();
        if matches!(instruction.mnemonic(), M::Rdfsbase | M::Rdgsbase) {
            let base = self.segment_base(index);
            self.write_register(register, base);
            return Ok(());
        }
        let base = self.register_value(register).unwrap_or(0);
        if !is_canonical(base) {
            return Err(Fault::general(0).into());
        }
        self.hot_mut().seg_base[index] = base;
        Ok(())
    }

    fn execute_invalidate(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.require_supervisor()?;
        match instruction.mnemonic() {
            Mnemonic::Invlpg => {
                let address = instruction
                    .try_virtual_address(0, 0, |register, _, _| self.register_value(register))
                    .ok_or_else(Fault::undefined)?;
                if !self.is_64bit() || is_canonical(address) {
                    self.remote.counters.flushes.bump();
                    self.windows.flush_page(address);
                }
            }
            Mnemonic::Invpcid => self.execute_invpcid(instruction)?,
            // Caches are the host's affair.
            _ => {}
        }
        Ok(())
    }

    fn execute_invpcid(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let kind = self
            .register_value(instruction.op0_register())
            .unwrap_or(u64::MAX);
        let at = self.operand_address(instruction, 1, 16, Access::Read)?;
        let user = self.is_user();
        let pcid = self.read_number(at, 8, user)?;
        let address = self.read_number(at.wrapping_add(8), 8, user)?;
        let pcid_on = self.sys.cr4 & ringfence_x86::paging::CR4_PCIDE != 0;
        let bad = kind > 3
            || (kind < 2 && (pcid > 0xfff || (pcid != 0 && !pcid_on)))
            || (kind == 0 && !is_canonical(address));
        if bad {
            return Err(Fault::general(0).into());
        }
        self.remote.counters.flushes.bump();
        match kind {
            0 => self.windows.flush_page_of(pcid, address),
            1 => {
                self.windows.flush_tag(pcid);
                if pcid == self.current_tag() {
                    self.windows.flush_local();
                }
            }
            2 => self.windows.flush_everything(),
            _ => self.windows.flush_all_users(),
        }
        Ok(())
    }
}
