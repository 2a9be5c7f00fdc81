//! The part of a vCPU's state that generated code reaches, through the host's GS segment.
//!
//! The host's GS base points at the middle of the current address space's *window* (see
//! [`crate::window`]); this structure lies there, so every field is at a constant offset that an
//! instruction can name with a GS prefix and a displacement, in every window.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;

/// Bytes that a memory operand can have at most when it goes through the bounce buffer: an XSAVE
/// area of every component we let a guest enable, with room to spare.
pub(crate) const BOUNCE_BYTES: usize = 2048;

/// Why generated code called the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Gate {
    /// A memory site could not go the fast way; `t0` is the guest address.
    Memory = 0,
    /// An instruction that only the monitor runs.
    Step = 1,
    /// A direct jump within the page that has no target yet.
    Link = 2,
    /// An indirect transfer (or one to another page) whose target, in `t0`, isn't known.
    Miss = 3,
    /// A copied instruction raised a host signal; `fault_pc` says where.
    HostFault = 4,
    /// A scratch instruction is done.
    Done = 5,
    /// An access that crosses a page found a page without entry; [`Hot::cross_site`] names it.
    Crossing = 6,
}

/// Number of [`Gate`]s.
pub(crate) const GATES: usize = 7;

/// What SYSCALL or SYSRET did that the monitor doesn't know yet; 0 for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Transition {
    Syscall = 1,
    Sysret = 2,
}

/// State shared between generated code and Rust. Only the vCPU's own thread touches it, but for
/// [`Hot::poll`].
#[repr(C, align(4096))]
pub(crate) struct Hot {
    /// Guest general registers. R10 and R11 live here at all times; the others live in the
    /// processor while generated code runs and are here while Rust does.
    pub gpr: [u64; 16],
    /// Arithmetic flags as the last gate found them (CF PF AF ZF SF OF; other bits are noise).
    pub flags: u64,
    /// IF, in its own bit.
    pub interrupt_flag: u64,
    /// DF, in its own bit.
    pub direction_flag: u64,
    /// All other flags.
    pub other_flags: u64,
    /// Virtual address of the page whose code runs.
    pub pc_base: u64,
    /// Scratch registers as the last gate found them.
    pub t0: u64,
    pub t1: u64,
    /// Where an instruction's borrowed registers wait.
    pub spill: [u64; 8],
    /// PEXT masks: bits 12 to 46 for user code, 12 to 47 for kernel code.
    pub mask_user: u64,
    pub mask_kernel: u64,
    /// Dereferenced at every safe point: [`Hot::poll_word`]'s address, or an unmapped one when
    /// the monitor wants in.
    pub poll: AtomicU64,
    /// What an idle poll reads.
    pub poll_word: u64,
    /// The code tables of user and kernel mode.
    pub code_user: u64,
    pub code_kernel: u64,
    /// The map that pages without translated code have in them.
    pub miss_map: u64,
    /// [`Transition`], or 0.
    pub transition: u64,
    /// SYSCALL and SYSRET may be executed in place.
    pub fast_syscall: u64,
    pub fast_sysret: u64,
    pub lstar: u64,
    /// Other flags that SYSCALL keeps.
    pub syscall_keep: u64,
    /// As [`Hot::poll`], touched where IF is about to be set: closed while an interrupt waits.
    pub if_poll: u64,
    /// GS base that SWAPGS brings.
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    /// Host address of [`Hot::cross`].
    pub cross_address: u64,
    /// Registers of a crossing access: apart from [`Hot::spill`], where groups' registers wait
    /// while such an access is under way.
    pub cross_saved: [u64; 7],
    /// Site of the crossing access.
    pub cross_site: u64,
    /// Segment bases, in encoding order (ES CS SS DS FS GS).
    pub seg_base: [u64; 6],
    /// Stack of the Rust frame that entered generated code.
    pub host_rsp: u64,
    /// Where a gate's return jumps to.
    pub resume_pc: u64,
    /// The [`crate::core::Core`] that owns this, for the gates.
    pub core: u64,
    /// Addresses of the gates' entry points.
    pub gates: [u64; GATES],
    /// Control and status of SSE: the guest's while Rust runs, and Rust's own.
    pub mxcsr: u32,
    pub host_mxcsr: u32,
    /// An upper half of a vector register isn't zero.
    pub upper: u64,
    /// Where a host signal interrupted generated code, which one, and the address it named.
    pub fault_pc: u64,
    pub fault_signal: u64,
    pub fault_address: u64,
    pub cr2: u64,
    /// Guest vector registers while Rust runs.
    pub ymm: [[u64; 4]; 16],
    /// The end of one page beside the start of the next.
    pub cross: Cross,
    /// The memory operand of a scratch instruction.
    pub bounce: Bounce,
}

/// Two halves of 32 bytes.
#[repr(C, align(64))]
pub(crate) struct Cross(pub [u8; 64]);

/// Aligned for every instruction that wants it.
#[repr(C, align(64))]
pub(crate) struct Bounce(pub [u8; BOUNCE_BYTES]);

/// GS-relative displacement of a field.
macro_rules! hot {
    ($field:ident) => {
        crate::hot::displacement(std::mem::offset_of!(crate::hot::Hot, $field))
    };
    ($field:ident, $index:expr) => {
        hot!($field) + 8 * $crate::hot::displacement($index)
    };
}
pub(crate) use hot;

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "offsets within Hot and small indices are far below i32::MAX"
)]
pub(crate) const fn displacement(offset: usize) -> i32 {
    assert!(offset < 1 << 20);
    offset as i32
}

const _: () = assert!(offset_of!(Hot, gpr) == 0);
