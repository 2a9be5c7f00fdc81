//! The bodies, by subject.

pub mod debug;
pub mod exceptions;
pub mod io;
pub mod lifecycle;
pub mod memory;
pub mod paging_bits;
pub mod paging_modes;
pub mod registers;
pub mod snapshot;
pub mod unclaimed;
