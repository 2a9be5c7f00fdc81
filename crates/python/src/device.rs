//! Devices written in Python. Each access attaches to Python, calls a method and copies: some
//! microseconds, where a Rust device takes some nanoseconds.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioDevice;

/// The first exception of a machine's devices since the last run looked.
#[derive(Clone, Default)]
pub(crate) struct DeviceFailure(Arc<Mutex<Option<PyErr>>>);

impl DeviceFailure {
    fn set(&self, error: PyErr) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(error);
    }

    pub(crate) fn take(&self) -> Option<PyErr> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A Python object with `read(offset, length)` and `write(offset, data)`.
pub(crate) struct PyDevice {
    object: Py<PyAny>,
    failure: DeviceFailure,
}

impl PyDevice {
    pub(crate) fn new(object: Py<PyAny>, failure: DeviceFailure) -> Self {
        Self { object, failure }
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) {
        // A device that fails answers like one that isn't there.
        data.fill(0xff);
        let answer = Python::attach(|py| {
            let answer = self
                .object
                .bind(py)
                .call_method1("read", (offset, data.len()))?;
            answer.extract::<Vec<u8>>()
        });
        match answer {
            Ok(bytes) if bytes.len() == data.len() => data.copy_from_slice(&bytes),
            Ok(bytes) => self.failure.set(
                crate::error::NativeError::config(format!(
                    "a device was asked for {} bytes and returned {}",
                    data.len(),
                    bytes.len()
                ))
                .into(),
            ),
            Err(error) => self.failure.set(error),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) {
        let result = Python::attach(|py| {
            let bytes = PyBytes::new(py, data);
            self.object
                .bind(py)
                .call_method1("write", (offset, bytes))
                .map(|_| ())
        });
        if let Err(error) = result {
            self.failure.set(error);
        }
    }
}

impl MmioDevice for PyDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.read_at(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.write_at(offset, data);
    }
}

impl PioDevice for PyDevice {
    fn read(&self, offset: u16, data: &mut [u8]) {
        self.read_at(offset.into(), data);
    }
    fn write(&self, offset: u16, data: &[u8]) {
        self.write_at(offset.into(), data);
    }
}
