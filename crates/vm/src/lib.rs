//! The VM process: one machine, jailed.
//!
//! ```text
//!   ringfence-vm --config-fd N
//!
//!   read and check the document ─► close every other descriptor ─► namespaces
//!     ─► RAM, engine, board, devices ─► kernel loaded ─► Landlock, limits
//!     ─► threads start, each behind its own system call filter ─► control loop
//! ```
//! After that the process opens no path and starts no program. What it can reach is what it was
//! given: descriptors. It reports which layers of the jail hold, says how the machine ended in a
//! last control event and in its exit status ([`ExitStatus`]), and ends with its control socket's
//! other end, so that no machine is left behind by a caller that died.

mod assemble;
pub mod config;
mod control;
mod descriptors;
mod devices;
mod engines;
mod error;
mod exit;
mod heap;
mod jail;
mod log;
#[cfg(feature = "testing")]
mod misbehave;
mod run;

pub use error::VmError;
pub use exit::ExitStatus;
pub use run::main;
