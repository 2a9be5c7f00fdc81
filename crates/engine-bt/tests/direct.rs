//! The suite that every engine passes, with user code run directly wherever that is possible.

mod board;

use ringfence_engine_bt::BtEngine;
use ringfence_engine_bt::Direct;

ringfence_conformance::suite!(
    BtEngine::new()
        .expect("a usable host")
        .with_direct(Direct::Always),
    Some(&board::Pc),
    &[],
);
