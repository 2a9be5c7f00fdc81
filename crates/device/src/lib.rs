//! What every device offers its machine beside its registers: its state for a snapshot, its
//! counters for `inspect`, and log lines that a guest can't flood.

#![forbid(unsafe_code)]

mod counter;
mod log;
mod persist;

pub use counter::{Counter, Inspect};
pub use log::LogLimit;
pub use persist::{Persist, PersistValue, RestoreError};
pub use tracing;
