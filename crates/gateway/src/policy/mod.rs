//! Who may be reached.
//!
//! A connection is looked at in this order: addresses that are closed (the host itself, link-local
//! and metadata addresses, groups) pass only by an allow rule whose range lies within what is
//! closed; a deny rule refuses; an allow rule admits; the default decides about the rest. A rule
//! for a domain holds for the addresses that our own name server answered for it ([`Pins`]), and
//! the name in the connection's first bytes, where it can be seen, must agree ([`first_name`]).

mod closed;
mod inspect;
mod pins;
mod rules;

pub(crate) use closed::unwrapped;
pub(crate) use inspect::{FirstName, MAX_FIRST_BYTES, first_name};
pub(crate) use pins::Pins;
pub use rules::{Action, PolicyConfig, PortRange, RuleConfig, RuleError, Transport};
pub(crate) use rules::{Inspect, Policy, Reason, Verdict};

#[cfg(test)]
pub(crate) use inspect::tests::client_hello;

#[cfg(test)]
mod tests;
