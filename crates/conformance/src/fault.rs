//! Exceptions as the guest's handler logged them, and as a body expects them.

use crate::layout;

/// Divide error.
pub const DE: u8 = 0;
/// Debug.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint.
pub const BP: u8 = 3;
/// Invalid opcode.
pub const UD: u8 = 6;
/// Device not available.
pub const NM: u8 = 7;
/// Double fault.
pub const DF: u8 = 8;
/// Invalid task state segment.
pub const TS: u8 = 10;
/// Segment not present.
pub const NP: u8 = 11;
/// Stack fault.
pub const SS: u8 = 12;
/// General protection.
pub const GP: u8 = 13;
/// Page fault.
pub const PF: u8 = 14;
/// x87 floating-point error.
pub const MF: u8 = 16;
/// Alignment check.
pub const AC: u8 = 17;
/// SIMD floating-point error.
pub const XM: u8 = 19;

/// Exceptions that push an error code (SDM 3A table 6-1).
pub(crate) const WITH_ERROR_CODE: [u8; 9] = [DF, TS, NP, SS, GP, PF, AC, 21, 30];

/// Page-fault error code: the page was present.
pub const PF_P: u64 = 1 << 0;
/// The access was a write.
pub const PF_W: u64 = 1 << 1;
/// It came from ring 3.
pub const PF_U: u64 = 1 << 2;
/// A reserved bit was set.
pub const PF_RSVD: u64 = 1 << 3;
/// It was an instruction fetch.
pub const PF_I: u64 = 1 << 4;

/// One logged exception.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Vector.
    pub vector: u64,
    /// Error code; 0 for vectors without one.
    pub error: u64,
    /// Where.
    pub rip: u64,
    /// Code segment.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Stack segment.
    pub ss: u64,
    /// CR2 at that time.
    pub cr2: u64,
    /// The handler's own stack pointer at its entry, behind the frame.
    pub handler_rsp: u64,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "vector {} error {:#x} at {:#x}:{:#x} flags {:#x} stack {:#x}:{:#x} cr2 {:#x}",
            self.vector, self.error, self.cs, self.rip, self.rflags, self.ss, self.rsp, self.cr2
        )
    }
}

/// What a body expects of one exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Vector.
    pub vector: u8,
    /// Error code.
    pub error: u64,
    /// CR2, for page faults.
    pub cr2: Option<u64>,
}

/// An exception without an error code, or with error code 0.
#[must_use]
pub fn fault(vector: u8) -> Expected {
    fault_with(vector, 0)
}

/// An exception with this error code.
#[must_use]
pub fn fault_with(vector: u8, error: u64) -> Expected {
    Expected {
        vector,
        error,
        cr2: None,
    }
}

/// A page fault.
#[must_use]
pub fn page_fault(address: u64, error: u64) -> Expected {
    Expected {
        vector: PF,
        error,
        cr2: Some(address),
    }
}

impl Expected {
    fn matches(&self, fault: &Fault) -> bool {
        u64::from(self.vector) == fault.vector
            && self.error == fault.error
            && self.cr2.is_none_or(|cr2| cr2 == fault.cr2)
    }
}

/// Panics unless the logged exceptions are the expected ones, in order.
///
/// # Panics
/// When they differ.
pub fn expect(logged: &[Fault], expected: &[Expected]) {
    for fault in logged {
        // An error code pushed for a vector without one, or left out, shifts the frame.
        let selectors = [
            layout::KERNEL_CODE,
            layout::USER_CODE,
            layout::USER_CODE32,
            layout::KERNEL_CODE32,
            layout::KERNEL_CODE16,
        ];
        assert!(
            selectors.iter().any(|&cs| u64::from(cs) == fault.cs),
            "the exception frame is shifted (an error code too many or too few): {fault:?}"
        );
    }
    let same = logged.len() == expected.len()
        && logged
            .iter()
            .zip(expected)
            .all(|(fault, expected)| expected.matches(fault));
    assert!(
        same,
        "exceptions differ\n  expected: {expected:#x?}\n    logged: {logged:#?}"
    );
}
