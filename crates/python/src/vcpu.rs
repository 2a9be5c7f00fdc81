//! One virtual CPU of a bare machine.

#![expect(
    clippy::needless_pass_by_value,
    reason = "Python's lists and dicts arrive as owned values"
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::TryLockError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use pyo3::prelude::*;
use ringfence_engine::VcpuExit;
use ringfence_engine::VcpuWaker;

use crate::convert;
use crate::convert::SegmentTuple;
use crate::detach::detach_native;
use crate::device::DeviceFailure;
use crate::error::NativeError;
use crate::exit::Exit;
use crate::ticker::Ticker;

type EngineVcpu = Box<dyn ringfence_engine::Vcpu>;

/// A vCPU. Any thread may use it, one at a time; only `kick` may come while it runs.
#[pyclass(frozen, module = "ringfence._native.lowlevel")]
pub(crate) struct Vcpu {
    vcpu: Mutex<EngineVcpu>,
    waker: Arc<dyn VcpuWaker>,
    ticker: Ticker,
    /// A kick of the caller's, apart from the ticker's.
    stop: AtomicBool,
    failure: DeviceFailure,
}

impl Vcpu {
    pub(crate) fn new(vcpu: EngineVcpu, failure: DeviceFailure) -> Self {
        let waker = vcpu.waker();
        Self {
            ticker: Ticker::new(Arc::clone(&waker)),
            vcpu: Mutex::new(vcpu),
            waker,
            stop: AtomicBool::new(false),
            failure,
        }
    }

    /// The vCPU, unless it runs: waiting for it would wait for the guest.
    fn idle(&self) -> Result<MutexGuard<'_, EngineVcpu>, NativeError> {
        self.vcpu.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => {
                NativeError::state("the vCPU is running: kick it and wait for its exit first")
            }
            TryLockError::Poisoned(_) => NativeError::state(
                "the vCPU is lost to a bug in Ringfence that was reported before",
            ),
        })
    }

    /// Runs until an exit, or until the ticker wants signals looked at (`None`).
    fn run_once(&self) -> Result<Option<VcpuExit>, NativeError> {
        let mut vcpu = self.idle()?;
        let running = self.ticker.running();
        let exit = vcpu.run()?;
        drop(running);
        if exit == VcpuExit::Kicked && !self.stop.swap(false, Ordering::SeqCst) {
            return Ok(None);
        }
        Ok(Some(exit))
    }
}

#[pymethods]
impl Vcpu {
    fn run(&self, py: Python<'_>) -> PyResult<Exit> {
        loop {
            let exit = detach_native(py, || self.run_once())?;
            if let Some(error) = self.failure.take() {
                return Err(error);
            }
            if let Some(exit) = exit {
                return Ok(Exit::new(py, exit));
            }
            py.check_signals()?;
        }
    }

    fn kick(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.kick();
    }

    fn complete_read(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        detach_native(py, || Ok(self.idle()?.complete_read(data)?))
    }

    fn registers(&self, py: Python<'_>) -> PyResult<BTreeMap<&'static str, u64>> {
        detach_native(py, || Ok(convert::registers(self.idle()?.state()?)))
    }

    fn segments(&self, py: Python<'_>) -> PyResult<BTreeMap<&'static str, SegmentTuple>> {
        detach_native(py, || Ok(convert::segment_tuples(self.idle()?.state()?)))
    }

    fn set(
        &self,
        py: Python<'_>,
        registers: BTreeMap<String, u64>,
        segments: BTreeMap<String, SegmentTuple>,
    ) -> PyResult<()> {
        detach_native(py, || {
            let mut vcpu = self.idle()?;
            let mut state = vcpu.state()?;
            // What isn't named here stays as it is.
            state.msrs.clear();
            state.xsave.clear();
            state.lapic.clear();
            convert::set_registers(&mut state, &registers)?;
            convert::set_segments(&mut state, &segments)?;
            Ok(vcpu.set_state(&state)?)
        })
    }

    fn read_msrs(&self, py: Python<'_>) -> PyResult<BTreeMap<u32, u64>> {
        detach_native(py, || Ok(self.idle()?.state()?.msrs.into_iter().collect()))
    }

    fn set_debug(&self, py: Python<'_>, single_step: bool, breakpoints: Vec<u64>) -> PyResult<()> {
        detach_native(py, || {
            Ok(self.idle()?.set_debug(single_step, &breakpoints)?)
        })
    }

    fn translate(&self, py: Python<'_>, address: u64) -> PyResult<Option<u64>> {
        detach_native(py, || Ok(self.idle()?.translate(address)?))
    }
}
