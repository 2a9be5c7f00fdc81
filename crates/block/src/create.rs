//! Making images.

use std::fs::File;
use std::io;

use imago::FormatCreateBuilder;
use imago::Storage;
use imago::StorageOpenOptions;
use imago::qcow2::Qcow2;

use crate::DiskError;
use crate::Format;

/// Largest disk: 64 TiB, what one level of tables reaches with the default clusters.
pub(crate) const MAX_SIZE: u64 = 64 << 40;

fn check_size(size_bytes: u64) -> Result<(), DiskError> {
    if size_bytes == 0 || size_bytes > MAX_SIZE || !size_bytes.is_multiple_of(512) {
        return Err(DiskError::Config(format!(
            "a disk of {size_bytes} bytes is not possible: it must be a multiple of 512 up to {MAX_SIZE}"
        )));
    }
    Ok(())
}

/// Makes `file` a raw image of `size_bytes` zeros that take no space.
///
/// # Errors
/// [`DiskError::Config`] for an impossible size; [`DiskError::Host`].
pub fn create_raw(file: &File, size_bytes: u64) -> Result<(), DiskError> {
    check_size(size_bytes)?;
    file.set_len(0).map_err(DiskError::host("empty"))?;
    file.set_len(size_bytes).map_err(DiskError::host("size"))
}

/// Makes the empty `file` a qcow2 image of `size_bytes`. `backing` is the name that its header
/// shall give for the image below it, for other programs to find, and that image's format.
///
/// # Errors
/// [`DiskError::Config`] for an impossible size; [`DiskError::Host`].
pub fn create_qcow2(
    file: File,
    size_bytes: u64,
    backing: Option<(&str, Format)>,
) -> Result<(), DiskError> {
    check_size(size_bytes)?;
    file.set_len(0).map_err(DiskError::host("empty"))?;
    let storage = writable_storage(file).map_err(DiskError::host("open"))?;
    let mut builder = Qcow2::<imago::file::File>::create_builder(storage).size(size_bytes);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_owned(), format.name().to_owned());
    }
    builder.create().map_err(DiskError::host("create"))
}

fn writable_storage(file: File) -> io::Result<imago::file::File> {
    let options = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(file, options)?;
    debug_assert!(storage.req_align() >= 1);
    Ok(storage)
}
