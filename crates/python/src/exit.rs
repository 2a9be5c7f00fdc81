//! Why a vCPU came back, as one flat object; Python makes its own classes of it.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ringfence_engine::DebugStop;
use ringfence_engine::IoDirection;
use ringfence_engine::IoSpace;
use ringfence_engine::VcpuExit;

/// `kind` says which of the other fields are set.
#[pyclass(frozen, get_all, module = "ringfence._native.lowlevel")]
pub(crate) struct Exit {
    kind: &'static str,
    space: Option<&'static str>,
    address: Option<u64>,
    length: Option<usize>,
    data: Option<Py<PyBytes>>,
}

impl Exit {
    fn plain(kind: &'static str) -> Self {
        Self {
            kind,
            space: None,
            address: None,
            length: None,
            data: None,
        }
    }

    pub(crate) fn new(py: Python<'_>, exit: VcpuExit) -> Self {
        match exit {
            VcpuExit::Halt => Self::plain("halt"),
            VcpuExit::Shutdown => Self::plain("shutdown"),
            VcpuExit::Kicked => Self::plain("kicked"),
            VcpuExit::Debug(DebugStop::Step) => Self::plain("step"),
            VcpuExit::Debug(DebugStop::Breakpoint(address)) => Self {
                address: Some(address),
                ..Self::plain("breakpoint")
            },
            VcpuExit::Io(access) => {
                let (kind, length, data) = match access.direction {
                    IoDirection::Read(length) => ("read", length, None),
                    IoDirection::Write(data) => {
                        ("write", data.len(), Some(PyBytes::new(py, &data).unbind()))
                    }
                };
                Self {
                    kind,
                    space: Some(match access.space {
                        IoSpace::Pio => "port",
                        IoSpace::Mmio => "memory",
                    }),
                    address: Some(access.address),
                    length: Some(length),
                    data,
                }
            }
        }
    }
}
