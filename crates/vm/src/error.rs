//! Why the VM process could not start its machine.

use std::io;

use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use ringfence_loader::LoadError;
use ringfence_machine::MachineError;
use ringfence_memory::MemoryError;

use crate::config::ConfigError;

/// Why the VM process could not start its machine.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It was called wrongly.
    #[error("usage: ringfence-vm --config-fd N")]
    Usage,
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The RAM could not be made.
    #[error("cannot make the machine's memory")]
    Memory(#[from] MemoryError),
    /// The kernel could not be read.
    #[error("cannot open the kernel")]
    Kernel(#[source] LoadError),
    /// The engine could not be opened.
    #[error("cannot open the engine {name}")]
    Engine {
        /// Which one.
        name: String,
        /// Why.
        source: EngineError,
    },
    /// The machine could not be made.
    #[error("cannot make the machine")]
    Machine(#[from] MachineError),
    /// A device could not be made.
    #[error("cannot make devices[{index}] ({kind})")]
    Device {
        /// Its place in the document.
        index: usize,
        /// Its type.
        kind: &'static str,
        /// Whose fault it is.
        fault: ErrorKind,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A layer of the jail that the document requires doesn't hold.
    #[error("the jail's layer {layer} is required and can't be had: {why}")]
    Jail {
        /// Which one.
        layer: &'static str,
        /// Why not.
        why: String,
    },
    /// A host call failed.
    #[error("cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl VmError {
    /// Wraps a failed host call.
    pub(crate) fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host {
            action,
            source: source.into(),
        }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage | Self::Config(_) => ErrorKind::Config,
            Self::Memory(MemoryError::Empty | MemoryError::TooLarge(_)) => ErrorKind::Config,
            Self::Memory(_) | Self::Host { .. } => ErrorKind::Host,
            Self::Kernel(error) => error.kind(),
            Self::Engine { source, .. } => source.kind(),
            Self::Machine(error) => error.kind(),
            Self::Device { fault, .. } => *fault,
            Self::Jail { .. } => ErrorKind::Unsupported,
        }
    }

    /// The message with every cause behind it.
    #[must_use]
    pub fn full_message(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }
}

/// The name of a kind, as the control protocol and Python's classes have it.
pub(crate) fn kind_name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Config => "config",
        ErrorKind::State => "state",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Host => "host",
        ErrorKind::Guest => "guest",
        ErrorKind::Format => "format",
        ErrorKind::Internal => "internal",
    }
}
