//! The assembler that bodies write in: iced's, with the harness's own idioms.
//!
//! R15 belongs to the idioms.

#![expect(
    clippy::missing_errors_doc,
    reason = "an idiom fails when iced can't encode it, which is a mistake in the body"
)]

use std::ops::Deref;
use std::ops::DerefMut;

use iced_x86::IcedError;
use iced_x86::code_asm::AsmRegister64;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::CodeLabel;
use iced_x86::code_asm::al;
use iced_x86::code_asm::eax;
use iced_x86::code_asm::ecx;
use iced_x86::code_asm::edx;
use iced_x86::code_asm::ptr;
use iced_x86::code_asm::qword_ptr;
use iced_x86::code_asm::r15;

use crate::layout;

/// What assembling returns; bodies pass it on with `?`.
pub type Assembled = Result<(), IcedError>;

/// See the module.
pub struct Asm {
    inner: CodeAssembler,
    values: usize,
    has_chips: bool,
    in_user: bool,
}

impl Deref for Asm {
    type Target = CodeAssembler;
    fn deref(&self) -> &CodeAssembler {
        &self.inner
    }
}

impl DerefMut for Asm {
    fn deref_mut(&mut self) -> &mut CodeAssembler {
        &mut self.inner
    }
}

impl Asm {
    pub(crate) fn new(bits: u32, has_chips: bool) -> Result<Self, IcedError> {
        Ok(Self {
            inner: CodeAssembler::new(bits)?,
            values: 0,
            has_chips,
            in_user: false,
        })
    }

    pub(crate) fn values(&self) -> usize {
        self.values
    }

    /// What follows runs in ring 0 (again).
    pub fn ring0(&mut self) {
        self.in_user = false;
    }

    /// What follows runs in ring 3.
    pub fn ring3(&mut self) {
        self.in_user = true;
    }

    /// The address of something in the shared page, for the ring that runs here.
    #[must_use]
    pub fn shared(&self, address: u64) -> u64 {
        if self.in_user {
            address
        } else {
            layout::supervisor(address)
        }
    }

    /// Reports `value` to the body: one store, no flags or registers change.
    pub fn report(&mut self, value: AsmRegister64) -> Assembled {
        let slot = layout::VALUES + 8 * self.values as u64;
        self.values += 1;
        assert!(self.values <= layout::MAX_VALUES, "too many reports");
        let slot = self.shared(slot);
        self.mov(qword_ptr(slot), value)
    }

    /// Reports RFLAGS.
    pub fn report_flags(&mut self) -> Assembled {
        self.pushfq()?;
        self.pop(r15)?;
        self.report(r15)
    }

    /// Reports CS and SS selectors.
    pub fn report_segments(&mut self) -> Assembled {
        self.mov(r15, iced_x86::code_asm::cs)?;
        self.report(r15)?;
        self.mov(r15, iced_x86::code_asm::ss)?;
        self.report(r15)
    }

    /// Runs `faulting`, whose first exception is logged and ends it.
    pub fn faulting(&mut self, faulting: impl FnOnce(&mut Self) -> Assembled) -> Assembled {
        let mut after = self.create_label();
        self.resume_at(after)?;
        faulting(self)?;
        self.set_label(&mut after)?;
        // Without a fault the way on is still open: close it, so that a later one is unexpected.
        let resume = self.shared(layout::RESUME);
        self.mov(qword_ptr(resume), 0)
    }

    /// The next exception is logged and continues at `label`, as the code here sees it.
    pub fn resume_at(&mut self, label: CodeLabel) -> Assembled {
        self.lea(r15, ptr(label))?;
        let resume = self.shared(layout::RESUME);
        self.mov(qword_ptr(resume), r15)
    }

    /// From here on exceptions are logged and continue where they came from.
    pub fn log_traps(&mut self) -> Assembled {
        let resume = self.shared(layout::RESUME);
        self.mov(qword_ptr(resume), 1)
    }

    /// Ends the guest, in ring 0.
    pub fn done(&mut self) -> Assembled {
        if self.has_chips {
            self.out(u32::from(layout::DONE_PORT), al)?;
        }
        self.cli()?;
        self.hlt()
    }

    /// Continues in ring 3, at the next instruction, with the user's stack; ends like [`Self::done`]
    /// there by [`Self::user_done`].
    pub fn enter_user(&mut self) -> Assembled {
        self.enter_user_with(2)
    }

    /// As [`Self::enter_user`] with these flags.
    pub fn enter_user_with(&mut self, rflags: i32) -> Assembled {
        let mut user = self.create_label();
        self.push(i32::from(layout::USER_DATA))?;
        self.mov(r15, layout::USER_STACK)?;
        self.push(r15)?;
        self.push(rflags)?;
        self.push(i32::from(layout::USER_CODE))?;
        self.user_address(user)?;
        self.push(r15)?;
        self.iretq()?;
        self.ring3();
        self.set_label(&mut user)
    }

    /// R15 becomes the user's address of `label`.
    pub fn user_address(&mut self, label: CodeLabel) -> Assembled {
        self.lea(r15, ptr(label))?;
        self.bts(r15, 30)
    }

    /// Ends the guest from ring 3.
    pub fn user_done(&mut self) -> Assembled {
        self.int(i32::from(layout::DONE_VECTOR))
    }

    /// A 64-bit far return (iced's has 32-bit operands).
    pub fn far_return(&mut self) -> Assembled {
        self.db(&[0x48, 0xcb])
    }

    /// WRMSR of a constant.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Assembled {
        let [low, high] = crate::halves(value);
        self.mov(ecx, msr)?;
        self.mov(eax, low)?;
        self.mov(edx, high)?;
        self.wrmsr()
    }

    /// RDMSR to RAX, whole.
    pub fn read_msr(&mut self, msr: u32) -> Assembled {
        use iced_x86::code_asm::rax;
        use iced_x86::code_asm::rdx;
        self.mov(ecx, msr)?;
        self.rdmsr()?;
        self.shl(rdx, 32)?;
        self.or(rax, rdx)
    }

    /// Sets bits of CR4 through RAX.
    pub fn set_cr4(&mut self, bits: u64) -> Assembled {
        use iced_x86::code_asm::cr4;
        use iced_x86::code_asm::rax;
        self.mov(rax, cr4)?;
        self.mov(r15, bits)?;
        self.or(rax, r15)?;
        self.mov(cr4, rax)
    }

    /// Clears and sets bits of CR0 through RAX.
    pub fn change_cr0(&mut self, clear: u64, set: u64) -> Assembled {
        use iced_x86::code_asm::cr0;
        use iced_x86::code_asm::rax;
        self.mov(rax, cr0)?;
        self.mov(r15, !clear)?;
        self.and(rax, r15)?;
        self.mov(r15, set)?;
        self.or(rax, r15)?;
        self.mov(cr0, rax)
    }

    /// Spins until the quadword at `address` is `value`.
    pub fn wait_for(&mut self, address: u64, value: i32) -> Assembled {
        let mut again = self.create_label();
        self.set_label(&mut again)?;
        self.pause()?;
        self.cmp(qword_ptr(address), value)?;
        self.jne(again)
    }

    /// A delay of `turns` loop turns through RCX.
    pub fn spin(&mut self, turns: u32) -> Assembled {
        let mut again = self.create_label();
        self.mov(ecx, turns)?;
        self.set_label(&mut again)?;
        self.sub(ecx, 1)?;
        self.jnz(again)
    }
}
