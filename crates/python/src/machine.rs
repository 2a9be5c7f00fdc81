//! A bare machine in this process.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ringfence_bus::MmioBus;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioBus;
use ringfence_bus::PioDevice;
use ringfence_bus::Range;
use ringfence_engine::Engine;
use ringfence_engine::Interrupts;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_engine_bt::BtEngine;
use ringfence_engine_kvm::KvmEngine;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_x86::cpuid::CpuidTable;

use crate::detach::detach_native;
use crate::device::DeviceFailure;
use crate::device::PyDevice;
use crate::error::NativeError;
use crate::vcpu::Vcpu;

const ENGINES: [&str; 2] = ["kvm", "bt"];

/// The engines that a machine can be made of.
#[pyfunction]
pub(crate) fn engines() -> [&'static str; ENGINES.len()] {
    ENGINES
}

fn engine(name: &str) -> Result<Box<dyn Engine>, NativeError> {
    match name {
        "kvm" => Ok(Box::new(KvmEngine::open()?)),
        "bt" => Ok(Box::new(BtEngine::new()?)),
        other => Err(NativeError::config(format!(
            "there is no engine {other:?} for machines in this process; there is: {}",
            ENGINES.join(", ")
        ))),
    }
}

/// RAM, buses and vCPUs without interrupt chips: the caller drives everything.
#[pyclass(frozen, module = "ringfence._native.lowlevel")]
pub(crate) struct Machine {
    vm: Box<dyn Vm>,
    ram: GuestRam,
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
    cpuid: CpuidTable,
    failure: DeviceFailure,
}

#[pymethods]
impl Machine {
    #[new]
    fn new(
        py: Python<'_>,
        engine_name: &str,
        memory_bytes: u64,
        vcpus: u32,
        exit_on_unclaimed: bool,
    ) -> PyResult<Self> {
        detach_native(py, || {
            let engine = engine(engine_name)?;
            let ram = GuestRam::new(memory_bytes, HugePages::Off)
                .map_err(|error| NativeError::config(error.to_string()))?;
            let pio = Arc::new(PioBus::default());
            let mmio = Arc::new(MmioBus::default());
            let vm = engine.create_vm(VmSetup {
                ram: ram.clone(),
                pio: Arc::clone(&pio),
                mmio: Arc::clone(&mmio),
                vcpus,
                interrupts: Interrupts::None,
                unclaimed: if exit_on_unclaimed {
                    Unclaimed::Exit
                } else {
                    Unclaimed::Float
                },
            })?;
            let mut cpuid = engine.supported_cpuid()?;
            cpuid.hide_local_apic();
            Ok(Self {
                vm,
                ram,
                pio,
                mmio,
                cpuid,
                failure: DeviceFailure::default(),
            })
        })
    }

    fn vcpu(&self, py: Python<'_>, index: u32) -> PyResult<Vcpu> {
        detach_native(py, || {
            let vcpu = self.vm.create_vcpu(index, self.cpuid.clone())?;
            Ok(Vcpu::new(vcpu, self.failure.clone()))
        })
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        address: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = detach_native(py, || {
            if length as u64 > self.ram.size_bytes() {
                return Err(outside(address, length));
            }
            let mut bytes = vec![0; length];
            self.ram
                .memory()
                .read_slice(&mut bytes, GuestAddress(address))
                .map_err(|_| outside(address, length))?;
            Ok(bytes)
        })?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn write(&self, py: Python<'_>, address: u64, data: &[u8]) -> PyResult<()> {
        detach_native(py, || {
            self.ram
                .memory()
                .write_slice(data, GuestAddress(address))
                .map_err(|_| outside(address, data.len()))
        })
    }

    fn place_memory_device(&self, start: u64, length: u64, device: Py<PyAny>) -> PyResult<()> {
        let device: Arc<dyn MmioDevice> = Arc::new(PyDevice::new(device, self.failure.clone()));
        let range = Range { start, len: length };
        self.mmio
            .insert(range, device)
            .map_err(|error| NativeError::config(error.to_string()).into())
    }

    fn place_port_device(&self, start: u16, length: u16, device: Py<PyAny>) -> PyResult<()> {
        let device: Arc<dyn PioDevice> = Arc::new(PyDevice::new(device, self.failure.clone()));
        let range = Range {
            start: start.into(),
            len: length.into(),
        };
        self.pio
            .insert(range, device)
            .map_err(|error| NativeError::config(error.to_string()).into())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.vm.counters()
    }
}

fn outside(address: u64, length: usize) -> NativeError {
    NativeError::config(format!(
        "{length} bytes at guest address {address:#x} are not all RAM"
    ))
}
