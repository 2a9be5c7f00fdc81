//! What this host can do, as measured.

use std::fs::File;
use std::path::PathBuf;

use pyo3::prelude::*;
use ringfence_engine::ErrorKind;
use ringfence_engine_kvm::KvmVerdict;
use ringfence_loader::Kernel;

use crate::detach::detach_native;
use crate::error::NativeError;

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

/// Writes the ELF image that is packed in a bzImage; returns whether the file was one.
#[pyfunction]
pub(crate) fn unpack_kernel(py: Python<'_>, source: PathBuf, target: PathBuf) -> PyResult<bool> {
    detach_native(py, move || {
        let refused = |what: &str, path: &PathBuf, error: std::io::Error| {
            let message = format!("cannot {what} {}: {error}", path.display());
            NativeError::new(ErrorKind::Host, message)
        };
        let file = File::open(&source).map_err(|error| refused("read", &source, error))?;
        let kernel = Kernel::open(file)
            .map_err(|error| NativeError::new(error.kind(), error.to_string()))?;
        let Some(image) = kernel.decompressed() else {
            return Ok(false);
        };
        std::fs::write(&target, image).map_err(|error| refused("write", &target, error))?;
        Ok(true)
    })
}
