//! Hosts whose processor itself is wrong: an engine that runs guests on it inherits that.

use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use crate::Bench;

/// A body that the host's processor is known to fail, with the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deviation {
    /// The body, as `subject::body`.
    pub body: &'static str,
    /// What the processor does in place of what the manuals say.
    pub reason: &'static str,
}

/// Runs a body. One that is listed among `deviations` has to fail: when it passes, the list is
/// out of date, and that is the failure.
///
/// # Panics
/// When the body fails, or is listed and doesn't.
pub fn run(name: &str, body: fn(&Bench<'_>), bench: &Bench<'_>, deviations: &[Deviation]) {
    let Some(known) = deviations.iter().find(|known| known.body == name) else {
        return body(bench);
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| body(bench)));
    assert!(
        outcome.is_err(),
        "{name} passes, but is listed as a deviation of this host: {}",
        known.reason
    );
}
