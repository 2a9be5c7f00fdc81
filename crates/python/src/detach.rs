//! The one way out of Python: every call that may block or take long runs detached, so that other
//! Python threads go on, and a panic comes back as an exception.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use pyo3::marker::Ungil;
use pyo3::prelude::*;

use crate::error::NativeError;

/// Runs `call` detached from Python. Locks are taken inside it.
pub(crate) fn detach_native<T, F>(py: Python<'_>, call: F) -> PyResult<T>
where
    F: FnOnce() -> Result<T, NativeError> + Ungil + Send,
    T: Ungil + Send,
{
    // Unwind safety: the objects behind a panicked call refuse further use by their poisoned
    // locks.
    match py.detach(|| catch_unwind(AssertUnwindSafe(call))) {
        Ok(result) => Ok(result?),
        Err(panic) => Err(NativeError::internal(format!(
            "a bug in Ringfence, please report it: {}",
            panic_text(panic.as_ref())
        ))
        .into()),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}
