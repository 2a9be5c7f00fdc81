//! From descriptors and stated formats to a disk.

use std::fs::File;

use crate::Disk;
use crate::DiskError;
use crate::RawDisk;
use crate::qcow2::Qcow2Disk;

/// Longest chain of backing images.
const MAX_BACKING: usize = 16;

/// An image's format, as its user states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// As configuration, headers and `qemu-img` write it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An image file.
#[derive(Debug)]
pub struct Image {
    /// Its descriptor, opened for writing if the disk is to be written.
    pub file: File,
    /// Its format.
    pub format: Format,
}

/// Opens a disk: `image`, and below it `backing`, nearest first.
///
/// # Errors
/// [`DiskError`] when an image isn't of its stated format, is damaged, or has another backing image
/// than the one given.
pub fn open(
    image: Image,
    backing: Vec<Image>,
    read_only: bool,
) -> Result<Box<dyn Disk>, DiskError> {
    if backing.len() > MAX_BACKING {
        return Err(DiskError::Config(format!(
            "a disk can have at most {MAX_BACKING} backing images"
        )));
    }
    match image.format {
        Format::Raw if backing.is_empty() => Ok(Box::new(RawDisk::new(image.file, read_only)?)),
        Format::Raw => Err(DiskError::Config(
            "a raw image has no backing image: use qcow2 for the upper one".to_owned(),
        )),
        Format::Qcow2 => Ok(Box::new(Qcow2Disk::open(image.file, backing, read_only)?)),
    }
}
