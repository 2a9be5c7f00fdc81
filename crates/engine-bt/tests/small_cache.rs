//! The suite once more, with so little room for translated code that it is emptied all the time.

mod board;

use ringfence_engine_bt::BtEngine;

/// The routines that all code shares, and some blocks.
const CODE_BYTES: u32 = 32 << 10;

ringfence_conformance::suite!(
    BtEngine::new()
        .expect("a usable host")
        .with_code_limit(CODE_BYTES),
    Some(&board::Pc),
    &[],
);
