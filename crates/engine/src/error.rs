//! Engine errors, by whose fault they are.

use std::any::Any;
use std::io;

/// Whose fault an error is: Python's exception classes follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller asked wrongly; nothing was started.
    Config,
    /// A right call at the wrong moment.
    State,
    /// This engine or host can't.
    Unsupported,
    /// The host refused.
    Host,
    /// The guest's doing.
    Guest,
    /// A file is corrupt or too new.
    Format,
    /// Our bug.
    Internal,
}

/// The words of a caught panic.
#[must_use]
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "it left no words",
    }
}

/// Why an engine call failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A setup that no engine or not this one takes.
    #[error("{0}")]
    Config(String),
    /// A call at the wrong moment.
    #[error("{0}")]
    State(&'static str),
    /// Something this engine doesn't do.
    #[error("this engine does not offer {0}")]
    Unsupported(&'static str),
    /// A host call failed.
    #[error("cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The guest did what this engine can't run. The text says where and what.
    #[error("{0}")]
    Guest(String),
    /// The engine caught itself in a contradiction. The text is for the report.
    #[error("engine bug: {0}")]
    Internal(String),
}

impl EngineError {
    /// [`Self::Unsupported`].
    #[must_use]
    pub fn unsupported(what: &'static str) -> Self {
        Self::Unsupported(what)
    }

    /// Wraps a failed host call.
    pub fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Config(_) => ErrorKind::Config,
            Self::State(_) => ErrorKind::State,
            Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::Host { .. } => ErrorKind::Host,
            Self::Guest(_) => ErrorKind::Guest,
            Self::Internal(_) => ErrorKind::Internal,
        }
    }
}
