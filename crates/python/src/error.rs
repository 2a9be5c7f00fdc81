//! Rust's errors as the classes of `ringfence.errors`, by whose fault they are.

use std::error::Error;
use std::io;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::IntoPyDict;
use pyo3::types::PyType;
use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;

mod classes {
    use pyo3::import_exception;

    import_exception!(ringfence.errors, ConfigError);
    import_exception!(ringfence.errors, FormatError);
    import_exception!(ringfence.errors, GuestError);
    import_exception!(ringfence.errors, HostError);
    import_exception!(ringfence.errors, InternalError);
    import_exception!(ringfence.errors, StateError);
    import_exception!(ringfence.errors, UnsupportedError);
}

/// An error on its way to Python: its class, its message, and what caused it.
#[derive(Debug)]
pub(crate) struct NativeError {
    kind: ErrorKind,
    message: String,
    cause: Option<io::Error>,
}

impl NativeError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            cause: None,
        }
    }

    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config, message)
    }

    pub(crate) fn state(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::State, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Also says what the host's kernel said, as a cause with its number.
    fn because(mut self, cause: Option<io::Error>) -> Self {
        self.cause = cause;
        self
    }

    fn class<'py>(&self, py: Python<'py>) -> Bound<'py, PyType> {
        use pyo3::type_object::PyTypeInfo;
        match self.kind {
            ErrorKind::Config => classes::ConfigError::type_object(py),
            ErrorKind::State => classes::StateError::type_object(py),
            ErrorKind::Unsupported => classes::UnsupportedError::type_object(py),
            ErrorKind::Host => classes::HostError::type_object(py),
            ErrorKind::Guest => classes::GuestError::type_object(py),
            ErrorKind::Format => classes::FormatError::type_object(py),
            ErrorKind::Internal => classes::InternalError::type_object(py),
        }
    }

    fn build(&self, py: Python<'_>) -> PyResult<PyErr> {
        let errno = self.cause.as_ref().and_then(io::Error::raw_os_error);
        let keywords = match (self.kind, errno) {
            (ErrorKind::Host, Some(errno)) => Some([("errno", errno)].into_py_dict(py)?),
            _ => None,
        };
        let message = match &self.cause {
            Some(cause) => format!("{}: {cause}", self.message),
            None => self.message.clone(),
        };
        let value = self.class(py).call((message,), keywords.as_ref())?;
        let error = PyErr::from_value(value);
        if let Some(cause) = &self.cause {
            let number = errno.unwrap_or_default();
            error.set_cause(py, Some(PyOSError::new_err((number, cause.to_string()))));
        }
        Ok(error)
    }
}

impl From<EngineError> for NativeError {
    fn from(error: EngineError) -> Self {
        let new = Self::new(error.kind(), error.to_string());
        match error {
            EngineError::Host { source, .. } => new.because(Some(source)),
            other => {
                let cause = other
                    .source()
                    .map(|source| io::Error::other(source.to_string()));
                new.because(cause)
            }
        }
    }
}

impl From<NativeError> for PyErr {
    fn from(error: NativeError) -> Self {
        Python::attach(|py| error.build(py).unwrap_or_else(|broken| broken))
    }
}
