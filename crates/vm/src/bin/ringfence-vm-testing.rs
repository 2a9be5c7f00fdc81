//! `ringfence-vm` with what tests need of it: see the crate's `testing` feature.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ringfence_vm::main()
}
