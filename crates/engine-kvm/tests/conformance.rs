//! The conformance suite on this host's `/dev/kvm`.

mod emulated;

use ringfence_engine_kvm::KvmEngine;

ringfence_conformance::suite!(
    KvmEngine::open().expect("a usable /dev/kvm"),
    None,
    emulated::deviations(),
);
