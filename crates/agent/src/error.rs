//! What the host is told when something fails.

use crate::link::LinkError;
use rustix::io::Errno;
use serde::Serialize;

/// By whose fault it is: the names are those of the VM process's control protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request is wrong.
    Config,
    /// It is right, but not now.
    State,
    /// The guest's kernel can't.
    Unsupported,
    /// The guest refused.
    Guest,
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{message}")]
pub struct AgentError {
    /// Whose fault.
    pub kind: ErrorKind,
    /// What failed and why.
    pub message: String,
    /// The kernel's error number, 0 when there is none.
    pub errno: i32,
}

impl AgentError {
    /// The guest refused, with a reason of ours.
    pub fn guest(message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Guest,
            message: message.into(),
            errno: 0,
        }
    }

    /// The request is wrong.
    pub fn config(message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Config,
            ..Self::guest(message)
        }
    }

    /// Right, but not now.
    pub fn state(message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::State,
            ..Self::guest(message)
        }
    }

    /// The guest's kernel refused `what`.
    pub fn io(what: impl Into<String>, error: &std::io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(0);
        let reason = if errno == 0 {
            error.to_string()
        } else {
            // Without the "(os error N)" that the field already says.
            let text = error.to_string();
            text.split(" (os error").next().unwrap_or("").to_owned()
        };
        Self {
            kind: ErrorKind::Guest,
            message: format!("{}: {reason}", what.into()),
            errno,
        }
    }

    /// The guest's kernel refused `what`.
    pub fn errno(what: impl Into<String>, errno: Errno) -> Self {
        Self::io(what, &errno.into())
    }
}

/// Adds what was tried to a system's refusal.
pub(crate) trait Tried<T> {
    /// `what` names the attempt.
    ///
    /// # Errors
    ///
    /// The attempt failed.
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, AgentError>;
}

impl<T> Tried<T> for Result<T, std::io::Error> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, AgentError> {
        self.map_err(|error| AgentError::io(what(), &error))
    }
}

impl<T> Tried<T> for Result<T, Errno> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, AgentError> {
        self.map_err(|error| AgentError::errno(what(), error))
    }
}

/// How serving a request ended badly.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The request failed; the connection goes on.
    #[error(transparent)]
    Failed(#[from] AgentError),
    /// The connection is of no more use.
    #[error(transparent)]
    Link(#[from] LinkError),
}
