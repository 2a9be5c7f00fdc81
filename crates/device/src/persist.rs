//! Save and restore: versioned plain structs.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a device could not take a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state was written by a version that this one doesn't know.
    #[error("{what} state has version {found}, this program reads up to {known}")]
    Version {
        /// Whose state.
        what: &'static str,
        /// The version in the state.
        found: u32,
        /// The newest known version.
        known: u32,
    },
    /// The state doesn't fit the device: it comes from another configuration or is damaged.
    #[error("{what} state does not fit this device: {why}")]
    Mismatch {
        /// Whose state.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The state is not of the expected form at all.
    #[error("{what} state cannot be read")]
    Form {
        /// Whose state.
        what: &'static str,
        /// What the parser said.
        source: serde_json::Error,
    },
}

impl RestoreError {
    /// Refuses a state of a version other than `known`.
    ///
    /// # Errors
    /// [`Self::Version`].
    pub fn check_version(what: &'static str, found: u32, known: u32) -> Result<(), Self> {
        if found == known {
            Ok(())
        } else {
            Err(Self::Version { what, found, known })
        }
    }

    /// Reads a state of type `T` out of `value`.
    ///
    /// # Errors
    /// [`Self::Form`].
    pub fn parse<T: DeserializeOwned>(
        what: &'static str,
        value: serde_json::Value,
    ) -> Result<T, Self> {
        serde_json::from_value(value).map_err(|source| Self::Form { what, source })
    }
}

/// A device whose state goes into a snapshot.
///
/// The machine is paused: vCPUs are outside, workers are idle. `restore` is given to a freshly
/// made device of the same configuration.
pub trait Persist {
    /// The state: a plain struct with a version.
    type State: Serialize + DeserializeOwned;

    /// What this is, for error messages.
    const NAME: &'static str;

    /// Takes the state.
    fn save(&self) -> Self::State;

    /// Becomes what was saved.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is of another version or doesn't fit; the device must not
    /// be used then.
    fn restore(&self, state: Self::State) -> Result<(), RestoreError>;
}

/// [`Persist`] without its associated type, so that a machine can keep a list of them.
pub trait PersistValue {
    /// Takes the state.
    ///
    /// # Errors
    /// When the state can't be written as a value: a bug in the device.
    fn save_value(&self) -> Result<serde_json::Value, RestoreError>;

    /// Becomes what was saved.
    ///
    /// # Errors
    /// As [`Persist::restore`], and when the value has the wrong form.
    fn restore_value(&self, value: serde_json::Value) -> Result<(), RestoreError>;
}

impl<T: Persist> PersistValue for T {
    fn save_value(&self) -> Result<serde_json::Value, RestoreError> {
        serde_json::to_value(self.save()).map_err(|source| RestoreError::Form {
            what: T::NAME,
            source,
        })
    }

    fn restore_value(&self, value: serde_json::Value) -> Result<(), RestoreError> {
        self.restore(RestoreError::parse(T::NAME, value)?)
    }
}
