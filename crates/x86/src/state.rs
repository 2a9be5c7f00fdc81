//! A processor's architectural state as plain data: what engines load, save and report.

use crate::paging::CR0_ET;

/// General registers, in encoding order, with RIP and RFLAGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; bit 1 is always set.
    pub rflags: u64,
}

/// Index of RAX in [`Registers::gpr`].
pub const RAX: usize = 0;
/// Index of RCX.
pub const RCX: usize = 1;
/// Index of RDX.
pub const RDX: usize = 2;
/// Index of RBX.
pub const RBX: usize = 3;
/// Index of RSP.
pub const RSP: usize = 4;
/// Index of RBP.
pub const RBP: usize = 5;
/// Index of RSI.
pub const RSI: usize = 6;
/// Index of RDI.
pub const RDI: usize = 7;

/// A segment register with its hidden part (SDM 3A §3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u32,
    /// Descriptor bits 40 to 55: type, S, DPL, P, (limit), AVL, L, D/B, G as in VMX access rights
    /// (SDM 3C §24.4.1). Bit 16 set means unusable.
    pub access: u32,
}

/// [`Segment::access`]: accessed, read/write, conforming/expand-down, executable.
pub const ACCESS_TYPE: u32 = 0xf;
/// [`Segment::access`]: code or data, not a system descriptor.
pub const ACCESS_S: u32 = 1 << 4;
/// [`Segment::access`]: present.
pub const ACCESS_P: u32 = 1 << 7;
/// [`Segment::access`]: 64-bit code.
pub const ACCESS_L: u32 = 1 << 13;
/// [`Segment::access`]: 32-bit default operand or stack size.
pub const ACCESS_DB: u32 = 1 << 14;
/// [`Segment::access`]: limit counts 4 KiB pages.
pub const ACCESS_G: u32 = 1 << 15;
/// [`Segment::access`]: the register holds a null selector.
pub const ACCESS_UNUSABLE: u32 = 1 << 16;

impl Segment {
    /// Privilege level of the descriptor.
    #[must_use]
    pub fn dpl(&self) -> u8 {
        ((self.access >> 5) & 3) as u8
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear address of the table.
    pub base: u64,
    /// Its last valid byte offset.
    pub limit: u16,
}

/// System registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemRegisters {
    /// ES, CS, SS, DS, FS, GS (encoding order).
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2, the last page fault's address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// Index of ES in [`SystemRegisters::segments`].
pub const ES: usize = 0;
/// Index of CS.
pub const CS: usize = 1;
/// Index of SS.
pub const SS: usize = 2;
/// Index of DS.
pub const DS: usize = 3;
/// Index of FS.
pub const FS: usize = 4;
/// Index of GS.
pub const GS: usize = 5;

/// What the processor is doing (KVM API §4.38; SDM 3A §9.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// Executing.
    #[default]
    Running,
    /// In HLT, waiting for an interrupt.
    Halted,
    /// An application processor before INIT.
    Uninitialized,
    /// After INIT, before SIPI.
    WaitForSipi,
}

/// Exceptions and interrupts on their way in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PendingEvents {
    /// An exception to deliver: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// An interrupt that was acknowledged but not yet delivered.
    pub interrupt: Option<u8>,
    /// Interrupts are held off for one instruction (after STI or MOV SS).
    pub shadow: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
}

/// The whole state of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// General registers.
    pub regs: Registers,
    /// System registers.
    pub sregs: SystemRegisters,
    /// The XSAVE area in standard (non-compacted) format, as long as XCR0 needs (SDM 1 §13.4).
    pub xsave: Vec<u8>,
    /// Model-specific registers that the engine saves, in the order to load them.
    pub msrs: Vec<(u32, u64)>,
    /// Exceptions and interrupts under way.
    pub events: PendingEvents,
    /// Running, halted or waiting.
    pub activity: Activity,
    /// The local APIC's register page, 4 bytes every 16 (SDM 3A §11.4.1); empty when the machine
    /// has none.
    pub lapic: Vec<u8>,
}

impl Default for VcpuState {
    /// The state after INIT in 64-bit-neutral terms: RFLAGS bit 1 and CR0.ET set, all else zero.
    fn default() -> Self {
        Self {
            regs: Registers {
                rflags: 2,
                ..Registers::default()
            },
            sregs: SystemRegisters {
                cr0: CR0_ET,
                xcr0: 1,
                ..SystemRegisters::default()
            },
            xsave: Vec::new(),
            msrs: Vec::new(),
            events: PendingEvents::default(),
            activity: Activity::Running,
            lapic: Vec::new(),
        }
    }
}
