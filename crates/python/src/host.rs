//! What this host can do, as measured.

use pyo3::prelude::*;
use ringfence_engine_kvm::KvmVerdict;

use crate::detach::detach_native;

/// What the probe of `/dev/kvm` found.
#[pyclass(frozen, get_all, module = "ringfence._native.host")]
pub(crate) struct KvmProbe {
    verdict: &'static str,
    summary: String,
    remedy: &'static str,
    mips: Option<f64>,
    took_s: f64,
}

/// Times a small loop in a throw-away guest.
#[pyfunction]
pub(crate) fn probe_kvm(py: Python<'_>) -> PyResult<KvmProbe> {
    let probe = detach_native(py, || Ok(ringfence_engine_kvm::probe()))?;
    Ok(KvmProbe {
        verdict: match probe.verdict {
            KvmVerdict::Missing => "missing",
            KvmVerdict::NotPermitted => "not_permitted",
            KvmVerdict::Broken(_) => "broken",
            KvmVerdict::Emulating => "emulating",
            KvmVerdict::Usable => "usable",
        },
        summary: probe.summary(),
        remedy: probe.remedy(),
        mips: probe.mips,
        took_s: probe.took.as_secs_f64(),
    })
}
