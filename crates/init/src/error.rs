//! What can go wrong in a container's setup, told to the runtime as one line of JSON.

use std::io;

use serde_json::Error as JsonError;

/// Why the container's process couldn't be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    /// The command line isn't the runtime's.
    #[error("ringfence-init is started by Ringfence alone: {0}")]
    Usage(&'static str),
    /// The plan isn't of the form that this program knows.
    #[error("the plan is malformed at {place}: {reason}")]
    Plan {
        /// Path of the field.
        place: String,
        /// What the parser said.
        reason: String,
    },
    /// The kernel refused a step.
    #[error("{step}: {source}")]
    System {
        /// What was tried, with its object.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A step isn't safe to take.
    #[error("{0}")]
    Refused(String),
    /// The runtime went away or took the start back.
    #[error("the runtime ended while the container was being set up")]
    Abandoned,
}

impl InitError {
    /// The kernel's number, when it was the kernel that refused.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

impl From<serde_path_to_error::Error<JsonError>> for InitError {
    fn from(error: serde_path_to_error::Error<JsonError>) -> Self {
        Self::Plan {
            place: error.path().to_string(),
            reason: error.inner().to_string(),
        }
    }
}

/// Gives a failed call the name of its step.
pub(crate) trait Step<T> {
    /// The error as [`InitError::System`], with what was being done.
    fn step(self, name: impl FnOnce() -> String) -> Result<T, InitError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, name: impl FnOnce() -> String) -> Result<T, InitError> {
        self.map_err(|error| InitError::System {
            step: name(),
            source: error.into(),
        })
    }
}
