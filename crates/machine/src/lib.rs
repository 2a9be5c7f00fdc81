//! A machine: the board with its chips and firmware tables, and the vCPUs that run on it.
//!
//! ```text
//!   Board::new ──► devices are put on its PCI bus ──► boot ──► Machine::start
//!
//!   RAM ─┬─ buses ── chips, PCI root ── devices         timers thread ── Timers
//!        └─ engine's Vm ── one vCPU a thread            devices thread ── EventLoop
//! ```
//!
//! [`Board`] is the hardware and doesn't move; [`Machine`] is a board whose threads run, with the
//! lifecycle that [`MachineState`] draws. Neither knows which engine runs it.
//!
//! Sources: ACPI 6.5, PCI Firmware 3.3 §4.1 (MCFG), SDM 2A (CPUID), SDM 3A §9.9 (topology).

#![forbid(unsafe_code)]

mod acpi;
mod address_map;
mod board;
mod cpuid;
mod error;
mod input;
mod lifecycle;
mod machine;
mod report;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod vcpu;

pub use address_map::AddressMap;
pub use board::{Board, BoardSetup, Boot, SerialSetup};
pub use error::MachineError;
pub use lifecycle::{MachineEnd, MachineEvent, MachineState};
pub use machine::{Machine, ThreadHook, ThreadKind};
