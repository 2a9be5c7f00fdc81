//! The suite that every engine passes, on this host's own processor.

mod board;

use ringfence_engine_bt::BtEngine;

ringfence_conformance::suite!(
    BtEngine::new().expect("a usable host"),
    Some(&board::Pc),
    &[],
);
