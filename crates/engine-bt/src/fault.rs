//! What interrupts the normal course of an instruction.

use ringfence_engine::EngineError;
use ringfence_engine::VcpuExit;

/// Exception vectors (SDM 3A §6.15).
pub(crate) mod vector {
    pub(crate) const DIVIDE: u8 = 0;
    pub(crate) const DEBUG: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BREAKPOINT: u8 = 3;
    pub(crate) const OVERFLOW: u8 = 4;
    pub(crate) const BOUND: u8 = 5;
    pub(crate) const INVALID_OPCODE: u8 = 6;
    pub(crate) const DEVICE_NOT_AVAILABLE: u8 = 7;
    pub(crate) const DOUBLE_FAULT: u8 = 8;
    pub(crate) const INVALID_TSS: u8 = 10;
    pub(crate) const NOT_PRESENT: u8 = 11;
    pub(crate) const STACK: u8 = 12;
    pub(crate) const GENERAL_PROTECTION: u8 = 13;
    pub(crate) const PAGE: u8 = 14;
    pub(crate) const X87: u8 = 16;
    pub(crate) const ALIGNMENT: u8 = 17;
}

/// A guest exception, not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub vector: u8,
    pub error: Option<u32>,
    /// The address for CR2, with a page fault.
    pub address: u64,
}

impl Fault {
    fn plain(vector: u8, error: Option<u32>) -> Self {
        Self {
            vector,
            error,
            address: 0,
        }
    }

    /// #GP with an error code.
    pub(crate) fn general(error: u32) -> Self {
        Self::plain(vector::GENERAL_PROTECTION, Some(error))
    }

    /// #SS with an error code.
    pub(crate) fn stack(error: u32) -> Self {
        Self::plain(vector::STACK, Some(error))
    }

    /// #NP with an error code.
    pub(crate) fn not_present(error: u32) -> Self {
        Self::plain(vector::NOT_PRESENT, Some(error))
    }

    /// #TS with an error code.
    pub(crate) fn invalid_tss(error: u32) -> Self {
        Self::plain(vector::INVALID_TSS, Some(error))
    }

    /// #PF at `address`.
    pub(crate) fn page(address: u64, error: u32) -> Self {
        Self {
            vector: vector::PAGE,
            error: Some(error),
            address,
        }
    }

    /// An exception without an error code.
    pub(crate) fn bare(vector: u8) -> Self {
        Self::plain(vector, None)
    }

    /// #UD.
    pub(crate) fn undefined() -> Self {
        Self::bare(vector::INVALID_OPCODE)
    }

    /// Contributory exceptions, two of which make a double fault (SDM 3A table 6-5).
    pub(crate) fn is_contributory(self) -> bool {
        matches!(self.vector, 0 | 10..=13)
    }
}

/// Why an instruction didn't complete, or why nothing may follow it.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Raise an exception.
    Fault(Fault),
    /// Return to the monitor.
    Exit(VcpuExit),
    /// The engine can't go on.
    Error(EngineError),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Self::Error(error)
    }
}
