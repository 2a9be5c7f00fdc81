//! The bodies, by subject.

pub mod debug;
pub mod io;
pub mod lifecycle;
pub mod memory;
pub mod registers;
pub mod snapshot;
pub mod unclaimed;
