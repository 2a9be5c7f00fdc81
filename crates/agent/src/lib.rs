//! The guest's first process: sets the guest up as the host says, runs commands, moves files, and
//! takes every orphan's end. It trusts the host, but no broken host side wedges it: frames, connections
//! and buffers are bounded, and each connection has a thread of its own.
//!
//! It models no service manager: nothing runs but what the host asks for.
//!
//! Spec: docs/reference/agent-protocol.md.

pub mod address;
mod archive;
pub mod boot;
mod disk;
pub mod error;
mod exec;
mod files;
pub mod frame;
mod guest;
mod link;
mod message;
mod modules;
mod names;
mod network;
mod place;
mod power;
mod privileges;
mod processes;
mod reaper;
mod root;
mod spawn;
mod stats;
mod users;

/// Whether the agent understands what a frame of the host says: a request, or the setup. It is what a
/// connection does with a payload before anything happens.
pub fn understands(kind: frame::Kind, payload: &[u8]) -> bool {
    match kind {
        frame::Kind::Request => serde_json::from_slice::<message::Request>(payload).is_ok(),
        frame::Kind::Setup => serde_json::from_slice::<message::Setup>(payload).is_ok(),
        _ => true,
    }
}
