//! What is wrong with a document.

use std::io;

/// What is wrong with a document, and where.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The document could not be read.
    #[error("cannot read the configuration")]
    Read(#[source] io::Error),
    /// The document is longer than any real one.
    #[error("the configuration is longer than {0} bytes")]
    TooLong(usize),
    /// A field is wrong.
    #[error("configuration: {path}: {message}")]
    Field {
        /// Which one.
        path: String,
        /// What is wrong with it.
        message: String,
    },
}

impl ConfigError {
    /// A wrong field.
    pub(crate) fn field(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Field {
            path: path.into(),
            message: message.into(),
        }
    }

    /// The path of the wrong field.
    pub fn path(&self) -> Option<&str> {
        match self {
            Self::Field { path, .. } => Some(path),
            _ => None,
        }
    }
}
