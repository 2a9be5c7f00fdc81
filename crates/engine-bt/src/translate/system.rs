//! System instructions that are too frequent to call the monitor for: SYSCALL and SYSRET, CLI and
//! STI, CLD and STD, PUSHF, SWAPGS, RDTSC, and what a page fault's handler asks first, CR2.
//!
//! What they change lies in [`crate::hot::Hot`]. SYSCALL and SYSRET leave a note there of what they did to
//! the segment registers and the privilege level, which the monitor applies before it looks at
//! either; whether they may go this way at all is the monitor's decision
//! ([`crate::core::Core::refresh_fast_paths`]).

use iced_x86::Mnemonic;

use crate::block::SiteKind;
use crate::core::flag;
use crate::hot::Transition;
use crate::hot::hot;
use crate::translate::asm::Mem;
use crate::translate::asm::NZ;
use crate::translate::asm::RAX;
use crate::translate::asm::RCX;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::asm::Z;
use crate::translate::cold::Cold;
use crate::translate::decode::Item;
use crate::translate::emit::Emitter;

/// Flags that SYSRET may bring back the fast way.
const SYSRET_FLAGS: u64 = crate::gate::ARITHMETIC_FLAGS | flag::IF | flag::ONE;

impl Emitter<'_> {
    /// Emits one of the instructions of this module.
    pub(crate) fn system(&mut self, item: &Item) {
        match item.instruction.mnemonic() {
            Mnemonic::Cli => self.asm.store_imm(Mem::gs(hot!(interrupt_flag)), 0),
            Mnemonic::Sti => self.sti(item),
            Mnemonic::Pushfq => self.pushf(item),
            Mnemonic::Swapgs => self.swapgs(),
            Mnemonic::Syscall => self.syscall(item),
            Mnemonic::Sysretq => self.sysret(item),
            Mnemonic::Cld => self.asm.store_imm(Mem::gs(hot!(direction_flag)), 0),
            Mnemonic::Std => self.std(),
            Mnemonic::Mov => self.read_cr2(item),
            Mnemonic::Rdtsc => self.rdtsc(),
            _ => self.rdtscp(),
        }
    }

    /// Touches the word that is closed while an interrupt waits for IF: then the monitor executes
    /// the instruction.
    fn check_interrupts(&mut self) {
        self.asm.load(T1, Mem::gs(hot!(if_poll)));
        self.asm.load(T1, Mem::at(T1, 0));
    }

    fn sti(&mut self, item: &Item) {
        let site = self.open_site(SiteKind::Copied, item.offset);
        self.check_interrupts();
        let on = i32::try_from(flag::IF).unwrap_or(0);
        self.asm.store_imm(Mem::gs(hot!(interrupt_flag)), on);
        self.close_site(site);
    }

    fn swapgs(&mut self) {
        let base = Mem::gs(hot!(seg_base, 5));
        let other = Mem::gs(hot!(kernel_gs_base));
        self.asm.load(T0, base);
        self.asm.load(T1, other);
        self.asm.store(base, T1);
        self.asm.store(other, T0);
    }

    fn std(&mut self) {
        let down = i32::try_from(flag::DF).unwrap_or(0);
        self.asm.store_imm(Mem::gs(hot!(direction_flag)), down);
    }

    fn read_cr2(&mut self, item: &Item) {
        let number = item.instruction.op0_register().number();
        let to = Reg(u8::try_from(number).unwrap_or(0));
        self.asm.load(to, Mem::gs(hot!(cr2)));
    }

    fn rdtsc(&mut self) {
        self.asm.bytes(&[0x0f, 0x31]);
    }

    /// RDTSCP waits for what is before it; its ECX is the guest's.
    fn rdtscp(&mut self) {
        self.asm.bytes(&[0x0f, 0xae, 0xe8]);
        self.rdtsc();
        self.asm.load32(RCX, Mem::gs(hot!(tsc_aux)));
    }

    /// RFLAGS as PUSHF and SYSCALL see them, into T0. The flags are parked in RAX already.
    fn compose_flags(&mut self) {
        const OVERFLOW_BIT: u8 = 11;
        self.asm.mov32(T0, RAX);
        self.asm.movzx8(T1, RAX);
        self.asm.shl(T1, OVERFLOW_BIT);
        self.asm.shr(T0, 8);
        self.asm.movzx8(T0, T0);
        self.asm.or(T0, T1);
        self.asm.or_mem(T0, Mem::gs(hot!(interrupt_flag)));
        self.asm.or_mem(T0, Mem::gs(hot!(direction_flag)));
        self.asm.or_mem(T0, Mem::gs(hot!(other_flags)));
    }

    fn pushf(&mut self, item: &Item) {
        self.park_flags();
        self.compose_flags();
        self.give_back_flags();
        self.asm.store(Mem::gs(hot!(spill, 2)), T0);
        let (spot, site) = self.open_push(item.offset, 0);
        let spot = self.spot_without_t0(spot);
        self.asm.load(T0, Mem::gs(hot!(spill, 2)));
        self.asm.store(spot.mem(), T0);
        self.move_stack(-8);
        self.close_site(site);
    }

    fn syscall(&mut self, item: &Item) {
        let site = self.open_site(SiteKind::Step, item.offset);
        self.park_flags();
        self.asm.cmp_mem8(Mem::gs(hot!(fast_syscall)), 0);
        let slow = self.asm.jcc(Z);
        self.cold.push(Cold::Monitor {
            from: vec![slow],
            site,
            flags_parked: true,
        });
        self.compose_flags();
        self.asm.store(Mem::gs(hot!(gpr, 11)), T0);
        self.asm.load(RAX, Mem::gs(hot!(spill, 1)));
        let next = i32::from(item.offset) + 2;
        self.asm.load(RCX, Mem::gs(hot!(pc_base)));
        self.asm.lea(RCX, Mem::at(RCX, next));
        self.asm.load(T1, Mem::gs(hot!(other_flags)));
        self.asm.and_mem(T1, Mem::gs(hot!(syscall_keep)));
        self.asm.store(Mem::gs(hot!(other_flags)), T1);
        self.asm.store_imm(Mem::gs(hot!(interrupt_flag)), 0);
        self.asm.store_imm(Mem::gs(hot!(direction_flag)), 0);
        self.asm
            .store_imm(Mem::gs(hot!(transition)), Transition::Syscall as i32);
        // 0 + 1 leaves all arithmetic flags clear.
        self.asm.clear_flags(T1);
        self.asm.load(T0, Mem::gs(hot!(lstar)));
        self.jump_t0_as(false);
        self.close_site(site);
    }

    fn sysret(&mut self, item: &Item) {
        const USER_BITS: u8 = 47;
        let site = self.open_site(SiteKind::Step, item.offset);
        self.check_interrupts();
        self.park_flags();
        self.asm.cmp_mem8(Mem::gs(hot!(fast_sysret)), 0);
        let forbidden = self.asm.jcc(Z);
        self.asm.mov(T0, RCX);
        self.asm.shr(T0, USER_BITS);
        let outside = self.asm.jcc(NZ);
        self.asm.load(T1, Mem::gs(hot!(gpr, 11)));
        #[expect(clippy::cast_possible_truncation, reason = "flags are 22 bits")]
        let unusual = !(SYSRET_FLAGS as i32);
        self.asm.test_imm32(T1, unusual);
        let flags = self.asm.jcc(NZ);
        self.cold.push(Cold::Monitor {
            from: vec![forbidden, outside, flags],
            site,
            flags_parked: true,
        });
        self.asm.mov32(T0, T1);
        self.asm.and_imm32(T0, i32::try_from(flag::IF).unwrap_or(0));
        self.asm.store(Mem::gs(hot!(interrupt_flag)), T0);
        self.asm.store_imm(Mem::gs(hot!(direction_flag)), 0);
        self.asm.store_imm(Mem::gs(hot!(other_flags)), 0);
        self.asm
            .store_imm(Mem::gs(hot!(transition)), Transition::Sysret as i32);
        // The flags for SAHF: low byte in AH, OF in AL.
        self.asm.movzx8(RAX, T1);
        self.asm.shl(RAX, 8);
        self.asm.shr(T1, 11);
        self.asm.and_imm8(T1, 1);
        self.asm.or(RAX, T1);
        self.give_back_flags();
        self.asm.mov(T0, RCX);
        self.jump_t0_as(true);
        self.close_site(site);
    }
}
