//! Disk images behind block devices: raw and qcow2, with backing files.
//!
//! The format is always stated by whoever opens an image, never guessed from its content: a guest
//! could write a qcow2 header into its raw disk and have it read as one the next time. Files come
//! as descriptors. A qcow2 header that names a backing file or an external data file opens nothing:
//! the backing image must be given, and its format must be the one that the header states.
//!
//! qcow2 is read and written by the `imago` crate; [`qcow2`] checks a header's sizes first, so that
//! a hostile image can't make the process allocate without bound.

#![forbid(unsafe_code)]

mod create;
mod disk;
mod open;
pub mod qcow2;
mod raw;

pub use create::{create_qcow2, create_raw};
pub use disk::{Disk, DiskError, Geometry};
pub use open::{Format, Image, open};
pub use raw::RawDisk;
