//! The suite that every engine passes: small guests, each proving one rule of the processor or
//! of the engine traits against the manuals (SDM: Intel's, APM: AMD's).
//!
//! A body is a plain function of a [`Bench`]; it panics when the engine is wrong. An engine's
//! crate makes each a test of its own:
//!
//! ```text
//! ringfence_conformance::suite!(MyEngine::new(), None, &[]);
//! ```
//!
//! Bodies in [`bodies`] that need no interrupts run in bare machines. Those that do take the
//! engine's chips, or the board's through [`BoardChips`].

#![forbid(unsafe_code)]
#![expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a body panics to say that the engine is wrong"
)]

pub mod asm;
mod bench;
pub mod bodies;
mod deviation;
pub mod devices;
mod dump;
pub mod fault;
mod features;
mod guest;
mod handlers;
pub mod layout;
mod list;
pub mod prelude;
mod tables;
mod trampoline;
mod watchdog;

pub use bench::{Bench, BoardChips, Chips};
pub use deviation::{Deviation, run};
pub use guest::{Feature, Guest, Setup};

/// The low and high halves of a quadword.
#[must_use]
pub(crate) fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
