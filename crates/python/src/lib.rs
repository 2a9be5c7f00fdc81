//! `ringfence._native`: the door between Python and the Rust crates. Wiring only: no defaults, no
//! parsing and no policy; what decides is Python.

#![forbid(unsafe_code)]

mod convert;
mod detach;
mod device;
mod error;
mod exit;
mod host;
mod machine;
mod ticker;
mod vcpu;

#[pyo3::pymodule(gil_used = false)]
mod _native {
    use pyo3::prelude::*;

    /// Submodules of an extension module are no files, so `import` finds them by name alone.
    #[pymodule_init]
    fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let modules = module.py().import("sys")?.getattr("modules")?;
        for name in ["host", "lowlevel"] {
            let submodule = module.getattr(name)?;
            modules.set_item(format!("ringfence._native.{name}"), submodule)?;
        }
        Ok(())
    }

    /// Machines in this process, for research.
    #[pymodule]
    mod lowlevel {
        #[pymodule_export]
        use crate::exit::Exit;
        #[pymodule_export]
        use crate::machine::Machine;
        #[pymodule_export]
        use crate::machine::engines;
        #[pymodule_export]
        use crate::vcpu::Vcpu;
    }

    /// What this host can do.
    #[pymodule]
    mod host {
        #[pymodule_export]
        use crate::host::KvmProbe;
        #[pymodule_export]
        use crate::host::probe_kvm;
        #[pymodule_export]
        use crate::host::unpack_kernel;
    }
}
