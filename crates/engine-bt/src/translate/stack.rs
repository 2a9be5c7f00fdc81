//! PUSH, POP and LEAVE.

use iced_x86::OpKind;
use iced_x86::Register;

use crate::hot::hot;
use crate::translate::asm::Mem;
use crate::translate::asm::RSP;
use crate::translate::asm::Reg;
use crate::translate::asm::T0;
use crate::translate::asm::T1;
use crate::translate::decode::Item;
use crate::translate::emit::Emitter;
use crate::translate::memory::Across;
use crate::translate::memory::Address;
use crate::translate::memory::Opening;
use crate::translate::memory::Spot;

/// The frame pointer.
const RBP: Reg = Reg(5);

impl Emitter<'_> {
    /// Bytes of a stack word.
    pub(crate) fn word(&self) -> i32 {
        if self.is_wide() { 8 } else { 4 }
    }

    fn word_bytes(&self) -> u16 {
        if self.is_wide() { 8 } else { 4 }
    }

    /// Opens the word that a push writes.
    pub(crate) fn open_push(&mut self, offset: u16, which: usize) -> (Spot, usize) {
        self.open(Opening {
            address: Address::Register(RSP, -self.word()),
            bytes: self.word_bytes(),
            write: true,
            which,
            offset,
            crossing: Across::Monitor,
        })
    }

    /// Opens the word on top of the stack.
    pub(crate) fn open_pop(&mut self, offset: u16) -> (Spot, usize) {
        self.open(Opening {
            address: Address::Register(RSP, 0),
            bytes: self.word_bytes(),
            write: false,
            which: 0,
            offset,
            crossing: Across::Monitor,
        })
    }

    /// Opens a memory operand of a word, to be read.
    pub(crate) fn open_word(&mut self, item: &Item) -> (Spot, usize) {
        self.open(Opening {
            address: Address::Operand(&item.instruction),
            bytes: self.word_bytes(),
            write: false,
            which: 0,
            offset: item.offset,
            crossing: Across::Monitor,
        })
    }

    /// Loads a word.
    pub(crate) fn load_word(&mut self, to: Reg, mem: Mem) {
        if self.is_wide() {
            self.asm.load(to, mem);
        } else {
            self.asm.load32(to, mem);
        }
    }

    /// Stores a word.
    pub(crate) fn store_word(&mut self, mem: Mem, from: Reg) {
        if self.is_wide() {
            self.asm.store(mem, from);
        } else {
            self.asm.store32(mem, from);
        }
    }

    /// Adds to the stack pointer.
    pub(crate) fn move_stack(&mut self, by: i32) {
        if self.is_wide() {
            self.asm.lea(RSP, Mem::at(RSP, by));
        } else {
            self.asm.lea32(RSP, Mem::at(RSP, by));
        }
    }

    /// Stores T0 to the word that a push opened. The spot must not use T0.
    pub(crate) fn spot_without_t0(&mut self, spot: Spot) -> Spot {
        if spot.base != T0 && spot.index != Some(T0) {
            return spot;
        }
        self.asm.lea(T1, spot.mem());
        Spot {
            base: T1,
            index: None,
            disp: 0,
        }
    }

    pub(crate) fn push(&mut self, item: &Item) {
        let instruction = &item.instruction;
        match instruction.op0_kind() {
            OpKind::Register => self.push_register(item),
            OpKind::Memory => self.push_memory(item),
            _ => {
                let (spot, site) = self.open_push(item.offset, 0);
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "PUSH has immediates of 32 bits at most, sign-extended"
                )]
                let value = instruction.immediate(0) as i32;
                if self.is_wide() {
                    self.asm.store_imm(spot.mem(), value);
                } else {
                    self.asm.store_imm32(spot.mem(), value);
                }
                self.move_stack(-self.word());
                self.close_site(site);
            }
        }
    }

    fn push_register(&mut self, item: &Item) {
        let number = item.instruction.op0_register().number();
        let (spot, site) = self.open_push(item.offset, 0);
        if number == 10 || number == 11 {
            let spot = self.spot_without_t0(spot);
            self.asm.load(T0, Mem::gs(hot!(gpr, number)));
            self.store_word(spot.mem(), T0);
        } else {
            self.store_word(spot.mem(), Reg(u8::try_from(number).unwrap_or(0)));
        }
        self.move_stack(-self.word());
        self.close_site(site);
    }

    fn push_memory(&mut self, item: &Item) {
        let (source, site) = self.open_word(item);
        self.load_word(T0, source.mem());
        self.asm.store(Mem::gs(hot!(spill, 2)), T0);
        self.close_site(site);
        let (spot, site) = self.open_push(item.offset, 1);
        let spot = self.spot_without_t0(spot);
        self.asm.load(T0, Mem::gs(hot!(spill, 2)));
        self.store_word(spot.mem(), T0);
        self.move_stack(-self.word());
        self.close_site(site);
    }

    pub(crate) fn pop(&mut self, item: &Item) {
        let register = item.instruction.op0_register();
        let (spot, site) = self.open_pop(item.offset);
        let number = register.number();
        if register.full_register() == Register::RSP {
            self.load_word(RSP, spot.mem());
        } else if number == 10 || number == 11 {
            self.load_word(T0, spot.mem());
            self.asm.store(Mem::gs(hot!(gpr, number)), T0);
            self.move_stack(self.word());
        } else {
            let to = Reg(u8::try_from(number).unwrap_or(0));
            self.load_word(to, spot.mem());
            self.move_stack(self.word());
        }
        self.close_site(site);
    }

    /// LEAVE: the stack pointer becomes the frame pointer plus a word, the frame pointer what
    /// lay there.
    pub(crate) fn leave(&mut self, item: &Item) {
        let (spot, site) = self.open(Opening {
            address: Address::Register(RBP, 0),
            bytes: self.word_bytes(),
            write: false,
            which: 0,
            offset: item.offset,
            crossing: Across::Monitor,
        });
        // The load may fault: nothing is changed before.
        self.load_word(T0, spot.mem());
        if self.is_wide() {
            self.asm.lea(RSP, Mem::at(RBP, self.word()));
        } else {
            self.asm.lea32(RSP, Mem::at(RBP, self.word()));
        }
        self.asm.mov(RBP, T0);
        self.close_site(site);
    }
}
