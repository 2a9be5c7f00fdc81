//! The bodies, by subject.

pub mod apic;
pub mod code;
pub mod control;
pub mod cpuid;
pub mod debug;
pub mod events;
pub mod exceptions;
pub mod interrupts;
pub mod io;
pub mod lifecycle;
pub mod memory;
pub mod modes;
pub mod msrs;
pub mod paging_bits;
pub mod paging_modes;
pub mod registers;
pub mod segments;
pub mod smp;
pub mod snapshot;
pub mod syscalls;
pub mod time;
pub mod unclaimed;
pub mod vector;
