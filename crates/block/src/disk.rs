//! What a disk does, seen from the device in front of it.

use std::io;

use ringfence_engine::ErrorKind;
use ringfence_memory::vectored::GuestSlice;

/// Why a request or an image failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Past the end of the disk.
    #[error("{len} bytes at {offset} lie outside the disk")]
    Range {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// The disk can't be written.
    #[error("the disk is read only")]
    ReadOnly,
    /// The image breaks the rules of its format.
    #[error("the {format} image is damaged or not one: {why}")]
    Corrupt {
        /// The stated format.
        format: &'static str,
        /// Which rule.
        why: String,
    },
    /// A valid image that this program doesn't take.
    #[error("the {format} image cannot be used: {why}")]
    Unsupported {
        /// The stated format.
        format: &'static str,
        /// What it has that isn't taken, and what to do.
        why: String,
    },
    /// The caller's images don't fit together.
    #[error("{0}")]
    Config(String),
    /// The host refused.
    #[error("cannot {action} the disk image")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// What the kernel, or the format's library, said.
        source: io::Error,
    },
}

impl DiskError {
    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Range { .. } | Self::ReadOnly => ErrorKind::Guest,
            Self::Corrupt { .. } => ErrorKind::Format,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Config(_) => ErrorKind::Config,
            Self::Host { .. } => ErrorKind::Host,
        }
    }

    pub(crate) fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

/// Sizes that a driver should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// Writes of less cost a read too (a power of two, 512 or more).
    pub physical_block_bytes: u32,
    /// Discards of less free nothing.
    pub discard_bytes: u32,
}

/// A disk. Every call may come from any thread; calls may overlap.
///
/// Offsets and lengths are in bytes; any alignment is allowed.
pub trait Disk: Send + Sync {
    /// Its sizes.
    fn geometry(&self) -> Geometry;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Fills `slices` from `offset` on.
    ///
    /// # Errors
    /// [`DiskError`].
    fn read(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError>;

    /// Fills `slices` if that needs no waiting; `false` when it would, with `slices` half filled at
    /// worst.
    fn try_read(&self, slices: &[GuestSlice<'_>], offset: u64) -> bool {
        let _ = (slices, offset);
        false
    }

    /// Writes `slices` from `offset` on.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// [`DiskError::Host`].
    fn flush(&self) -> Result<(), DiskError>;

    /// The bytes don't matter any more; what they read as is undefined. May do nothing.
    ///
    /// # Errors
    /// [`DiskError`].
    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError>;

    /// The bytes read as zero from now on; `unmap` allows to free their space.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError>;
}

/// Refuses ranges past the end of a disk of `size` bytes.
pub(crate) fn check_range(size: u64, offset: u64, len: u64) -> Result<(), DiskError> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(DiskError::Range { offset, len }),
    }
}

pub(crate) fn total_len(slices: &[GuestSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}
