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
    /// there by [`Self::user_done`]. Interrupts are on there, as under every kernel.
    pub fn enter_user(&mut self) -> Assembled {
        self.enter_user_with(0x202)
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

    /// Clears bits of CR4 through RAX.
    pub fn clear_cr4(&mut self, bits: u64) -> Assembled {
        use iced_x86::code_asm::cr4;
        use iced_x86::code_asm::rax;
        self.mov(rax, cr4)?;
        self.mov(r15, !bits)?;
        self.and(rax, r15)?;
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

    /// Writes a register of the local APIC's page, through RAX and R15.
    pub fn write_apic(&mut self, register: u64, value: u32) -> Assembled {
        use iced_x86::code_asm::dword_ptr;
        self.mov(r15, layout::LAPIC + register)?;
        self.mov(eax, value)?;
        self.mov(dword_ptr(r15), eax)
    }

    /// Reads a register of the local APIC's page to EAX, through R15.
    pub fn read_apic(&mut self, register: u64) -> Assembled {
        use iced_x86::code_asm::dword_ptr;
        self.mov(r15, layout::LAPIC + register)?;
        self.mov(eax, dword_ptr(r15))
    }

    /// Enables the local APIC by software, with spurious vector 0xff, no priority held off, and
    /// the PICs (which nobody has set up) kept away.
    pub fn enable_apic(&mut self) -> Assembled {
        self.write_apic(0x350, 0x1_0000)?;
        self.write_apic(0xf0, 0x1ff)?;
        self.write_apic(0x80, 0)
    }

    /// How the interrupt handlers end an interrupt from now on.
    pub fn set_eoi(&mut self, eoi: layout::Eoi) -> Assembled {
        let mode = self.shared(layout::EOI_MODE);
        let value = match eoi {
            layout::Eoi::None => 0,
            layout::Eoi::Xapic => 1,
            layout::Eoi::X2apic => 2,
        };
        self.mov(qword_ptr(mode), value)
    }

    /// Makes `handler` the interrupt gate of `vector`, through RAX, RCX and RDX.
    pub fn install_gate(&mut self, vector: u8, handler: CodeLabel) -> Assembled {
        use iced_x86::code_asm::cx;
        use iced_x86::code_asm::rax;
        use iced_x86::code_asm::rcx;
        use iced_x86::code_asm::rdx;
        use iced_x86::code_asm::word_ptr;
        self.lea(rax, ptr(handler))?;
        self.mov(rdx, layout::IDT + u64::from(vector) * 16)?;
        self.mov(rcx, rax)?;
        self.mov(word_ptr(rdx), cx)?;
        self.mov(word_ptr(rdx + 2), i32::from(layout::KERNEL_CODE))?;
        self.mov(word_ptr(rdx + 4), 0x8e00)?;
        self.shr(rcx, 16)?;
        self.mov(word_ptr(rdx + 6), cx)?;
        self.mov(qword_ptr(rdx + 8), 0)
    }

    /// Starts the further processors at `entry`, in 64-bit mode with a stack of their own.
    pub fn start_processors(&mut self, entry: CodeLabel) -> Assembled {
        const ALL_BUT_SELF: u32 = 0x000c_0000;
        let page = u32::try_from(layout::TRAMPOLINE >> 12).unwrap_or_default();
        self.lea(r15, ptr(entry))?;
        let place = self.shared(layout::AP_ENTRY);
        self.mov(qword_ptr(place), r15)?;
        self.enable_apic()?;
        self.write_apic(0x300, ALL_BUT_SELF | 0x4500)?;
        self.spin(20_000)?;
        self.write_apic(0x300, ALL_BUT_SELF | 0x4600 | page)
    }
}
