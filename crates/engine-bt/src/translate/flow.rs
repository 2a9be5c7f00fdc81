//! Control transfers.
//!
//! Within the page, a jump is linked to its target's block the first time it is taken. A jump to
//! another page, a return or an indirect jump goes by the code table and the target page's map:
//!
//! ```text
//!     mov  gs:[target], r11         (r11 is the guest address)
//!     pext r10, r11, gs:[mask]
//!     mov  r11, gs:[code table]
//!     mov  r10, [r11 + r10*8]       map of the page, less 4 times its address
//!     mov  r11, gs:[target]
//!     mov  r10d, [r10 + r11*4]      number of the block at that very address
//!     jmp  gs:[r10*8 + block table]
//! ```
//!
//! No instruction of it touches the flags.

use iced_x86::Mnemonic;
use iced_x86::OpKind;

use crate::block::SiteKind;
use crate::hot::hot;
use crate::translate::asm::Cond;
use crate::translate::asm::Fixup;
use crate::translate::asm::Mem;
use crate::translate::asm::RCX;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::cold::Cold;
use crate::translate::decode::Item;
use crate::translate::decode::target;
use crate::translate::emit::Emitter;
use crate::window::BLOCKS;

const PAGE: i64 = 4096;

impl Emitter<'_> {
    /// Goes to `target`, relative to the page.
    pub(crate) fn jump_to(&mut self, target: i64) {
        if (0..PAGE).contains(&target) {
            let from = self.asm.jmp_aligned();
            self.link(from, target);
        } else {
            self.far_jump(far_distance(target));
        }
    }

    /// Goes to another page, `distance` bytes from the start of this one.
    fn far_jump(&mut self, distance: i32) {
        self.asm.load(T0, Mem::gs(hot!(pc_base)));
        if self.is_wide() {
            self.asm.lea(T0, Mem::at(T0, distance));
        } else {
            self.asm.lea32(T0, Mem::at(T0, distance));
        }
        self.jump_t0();
    }

    /// Goes to the guest address in T0.
    fn jump_t0(&mut self) {
        self.jump_t0_as(self.request.mode.is_user());
    }

    /// Goes to the guest address in T0, in user or kernel mode.
    pub(crate) fn jump_t0_as(&mut self, user: bool) {
        let code = if user {
            hot!(code_user)
        } else {
            hot!(code_kernel)
        };
        let site = self.open_site(SiteKind::Jump, self.offset);
        self.asm.store(Mem::gs(hot!(spill, 3)), T0);
        self.page_number_kept_flags(user);
        self.asm.load(T0, Mem::gs(code));
        self.asm.load(T1, Mem::indexed(T0, T1, 3));
        self.asm.load(T0, Mem::gs(hot!(spill, 3)));
        self.asm.load32(T1, Mem::indexed(T1, T0, 2));
        self.asm.jmp_mem(Mem::gs_table(T1, BLOCKS));
        self.close_site(site);
    }

    /// Page number of T0 into T1, with the flags kept in any case.
    fn page_number_kept_flags(&mut self, user: bool) {
        if self.request.host.fast_pext {
            self.page_number_as(T1, T0, user);
            return;
        }
        self.park_flags();
        self.page_number_as(T1, T0, user);
        self.give_back_flags();
    }

    pub(crate) fn conditional(&mut self, item: &Item) {
        let cond = condition(item);
        let target = target(item);
        if (0..PAGE).contains(&target) && self.held.is_empty() {
            let from = self.asm.jcc_aligned(cond);
            self.link(from, target);
        } else {
            let from = self.asm.jcc(cond);
            self.exit(from, target);
        }
    }

    /// A branch out of the block by way of cold code.
    fn exit(&mut self, from: Fixup, target: i64) {
        self.cold.push(Cold::Exit {
            from,
            target,
            held: self.held.clone(),
        });
    }

    /// JRCXZ and LOOP: their own jump reaches 127 bytes, so it skips a longer one.
    pub(crate) fn counted(&mut self, item: &Item) {
        const LONG_JUMP: u8 = 5;
        let target = target(item);
        if item.instruction.mnemonic() == Mnemonic::Loop {
            self.asm.lea(RCX, Mem::at(RCX, -1));
            // Taken unless the count is zero.
            self.asm.jrcxz(LONG_JUMP);
            let from = self.asm.jmp();
            self.exit(from, target);
        } else {
            const SHORT_JUMP: u8 = 2;
            self.asm.jrcxz(SHORT_JUMP);
            self.asm.jmp_short(LONG_JUMP);
            let from = self.asm.jmp();
            self.exit(from, target);
        }
    }

    /// Pushes the address of the instruction after `item`.
    fn push_return_address(&mut self, item: &Item, which: usize) {
        let (spot, site) = self.open_push(item.offset, which);
        let next = i32::from(item.offset) + len(item);
        let spot = self.spot_without_t0(spot);
        self.asm.load(T0, Mem::gs(hot!(pc_base)));
        self.asm.lea(T0, Mem::at(T0, next));
        self.store_word(spot.mem(), T0);
        self.move_stack(-self.word());
        self.close_site(site);
        self.release();
    }

    pub(crate) fn call(&mut self, item: &Item) {
        self.push_return_address(item, 0);
        self.jump_to(target(item));
    }

    /// Loads an indirect transfer's target into T0.
    fn load_target(&mut self, item: &Item) {
        let instruction = &item.instruction;
        if instruction.op0_kind() == OpKind::Register {
            let number = instruction.op0_register().number();
            if number == 10 || number == 11 {
                self.asm.load(T0, Mem::gs(hot!(gpr, number)));
            } else if self.is_wide() {
                self.asm.mov(T0, Reg(u8::try_from(number).unwrap_or(0)));
            } else {
                self.asm.mov32(T0, Reg(u8::try_from(number).unwrap_or(0)));
            }
            return;
        }
        let (spot, site) = self.open_word(item);
        self.load_word(T0, spot.mem());
        self.close_site(site);
    }

    pub(crate) fn jump_indirect(&mut self, item: &Item) {
        self.load_target(item);
        self.release();
        self.jump_t0();
    }

    pub(crate) fn call_indirect(&mut self, item: &Item) {
        self.load_target(item);
        self.asm.store(Mem::gs(hot!(spill, 2)), T0);
        self.push_return_address(item, 1);
        self.asm.load(T0, Mem::gs(hot!(spill, 2)));
        self.jump_t0();
    }

    pub(crate) fn ret(&mut self, item: &Item) {
        let (spot, site) = self.open_pop(item.offset);
        self.load_word(T0, spot.mem());
        let released = if item.instruction.op_count() == 1 {
            i32::from(item.instruction.immediate16())
        } else {
            0
        };
        self.move_stack(self.word() + released);
        self.close_site(site);
        self.release();
        self.jump_t0();
    }
}

fn len(item: &Item) -> i32 {
    i32::try_from(item.instruction.len()).unwrap_or(0)
}

/// Jcc's condition in its encoding.
fn condition(item: &Item) -> Cond {
    use iced_x86::ConditionCode as C;
    Cond(match item.instruction.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e | C::None => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

fn far_distance(target: i64) -> i32 {
    i32::try_from(target).expect("a near branch reaches 2 GiB from inside a page")
}
