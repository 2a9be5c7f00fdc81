//! The `bt` engine against the host's processor.
//!
//! A *case* is a short piece of unprivileged code and the registers that it starts with. A batch
//! of cases runs twice from the same memory: natively, in a child process that takes a signal at
//! each end, and as ring 3 code of a small guest, whose ring 0 takes an exception at each end. Both
//! leave the same record: registers, flags, vector state, the exception with its error code and
//! address; and both leave the same memory, or one of the two is wrong.
//!
//! The guest runs a batch in several ways ([`guest::Manner`]): straight on, with pages that appear
//! on demand, with the vCPU kicked at random moments, and instruction by instruction.

pub mod case;
pub mod compare;
pub mod encodings;
pub mod every;
pub mod generate;
pub mod guest;
pub mod hostile;
mod idioms;
pub mod layout;
pub mod minimise;
pub mod native;
pub mod random;
mod recipes;
pub mod registers;
mod ring0;
pub mod session;
pub mod state;
