//! `ringfence-gateway`: one user-space network, in a process of its own, jailed.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence_gateway::main()
}
