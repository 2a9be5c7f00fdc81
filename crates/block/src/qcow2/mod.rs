//! qcow2 images (QEMU's `docs/interop/qcow2.txt`, versions 2 and 3).
//!
//! Memory per image: the L1 and refcount tables as large as [`header`] allows, and the library's
//! caches of 128 L2 tables and 32 refcount blocks, a cluster each: 10 MiB with the usual 64 KiB
//! clusters, 80 MiB with the largest that are taken.

mod header;

use std::fs::File;
use std::io;
use std::sync::PoisonError;
use std::sync::RwLock;
use std::sync::RwLockReadGuard;
use std::sync::RwLockWriteGuard;

use imago::DenyImplicitOpenGate;
use imago::FormatAccess;
use imago::FormatDriverBuilder;
use imago::StorageOpenOptions;
use imago::file::File as Storage;
use imago::io_buffers::IoVector;
use imago::io_buffers::IoVectorMut;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use ringfence_memory::vectored::GuestSlice;

use crate::Disk;
use crate::DiskError;
use crate::Format;
use crate::Geometry;
use crate::Image;
use crate::disk::check_range;
use crate::disk::total_len;

pub use header::Header;

type Access = FormatAccess<Storage>;

/// A qcow2 disk with what lies below it.
pub struct Qcow2Disk {
    /// Requests share it; discards, which move clusters about, have it alone.
    access: RwLock<Access>,
    size_bytes: u64,
    cluster_bytes: u32,
    read_only: bool,
}

impl std::fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Disk")
            .field("size_bytes", &self.size_bytes)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

/// The library's errors that speak of the image's content.
fn format_error(error: io::Error) -> DiskError {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => DiskError::Corrupt {
            format: "qcow2",
            why: error.to_string(),
        },
        io::ErrorKind::Unsupported => DiskError::Unsupported {
            format: "qcow2",
            why: error.to_string(),
        },
        _ => DiskError::Host {
            action: "open",
            source: error,
        },
    }
}

fn storage(file: File, writable: bool) -> Result<Storage, DiskError> {
    let options = StorageOpenOptions::new().write(writable);
    Storage::from_open_file(file, options).map_err(DiskError::host("open"))
}

/// Opens a chain from its lowest image up.
fn open_chain(image: Image, below: Vec<Image>, writable: bool) -> Result<Access, DiskError> {
    let mut below = below.into_iter();
    match image.format {
        Format::Raw => {
            if below.next().is_some() {
                return Err(DiskError::Config(
                    "a raw backing image has no backing image of its own".to_owned(),
                ));
            }
            let raw = Raw::builder(storage(image.file, writable)?)
                .write(writable)
                .open(DenyImplicitOpenGate::default())
                .map_err(format_error)?;
            Ok(FormatAccess::new(raw))
        }
        Format::Qcow2 => {
            let header = Header::read(&image.file)?;
            let next = below.next();
            header.check_backing(next.as_ref().map(|next| next.format))?;
            let backing = next
                .map(|next| open_chain(next, below.collect(), false))
                .transpose()?;
            let qcow2 = Qcow2::<Storage>::builder(storage(image.file, writable)?)
                .write(writable)
                .backing(backing)
                .data_file(None)
                .open(DenyImplicitOpenGate::default())
                .map_err(format_error)?;
            Ok(FormatAccess::new(qcow2))
        }
    }
}

impl Qcow2Disk {
    /// Opens the image in `file` over `backing`, nearest first.
    ///
    /// # Errors
    /// [`DiskError`] when an image is damaged, unsupported, or not over the given one.
    pub fn open(file: File, backing: Vec<Image>, read_only: bool) -> Result<Self, DiskError> {
        let header = Header::read(&file)?;
        let image = Image {
            file,
            format: Format::Qcow2,
        };
        let access = open_chain(image, backing, !read_only)?;
        Ok(Self {
            access: RwLock::new(access),
            size_bytes: header.size_bytes,
            cluster_bytes: header.cluster_bytes(),
            read_only,
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Access> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        check_range(self.size_bytes, offset, len)
    }
}

fn request_error(action: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    move |error| match error.kind() {
        io::ErrorKind::InvalidData => format_error(error),
        _ => DiskError::host(action)(error),
    }
}

impl Disk for Qcow2Disk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            physical_block_bytes: 4096,
            discard_bytes: self.cluster_bytes,
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, total_len(slices))?;
        let (vector, _guard) = IoVectorMut::from_volatile_slice(slices);
        self.shared()
            .readv(vector, offset)
            .map_err(request_error("read"))
    }

    fn write(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError> {
        self.check_write(offset, total_len(slices))?;
        let (vector, _guard) = IoVector::from_volatile_slice(slices);
        self.shared()
            .writev(vector, offset)
            .map_err(request_error("write"))
    }

    fn flush(&self) -> Result<(), DiskError> {
        let access = self.shared();
        if !self.read_only {
            access.flush().map_err(request_error("flush"))?;
        }
        access.sync().map_err(request_error("flush"))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_write(offset, len)?;
        self.alone()
            .discard_to_any(offset, len)
            .map_err(request_error("discard part of"))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.check_write(offset, len)?;
        let result = if unmap {
            self.alone().discard_to_zero(offset, len)
        } else {
            self.shared().write_zeroes(offset, len)
        };
        result.map_err(request_error("write zeros to"))
    }
}

#[cfg(test)]
mod tests;
