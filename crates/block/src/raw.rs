//! Raw images: a file or block device, byte for byte.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;
use ringfence_memory::vectored::Wait;
use rustix::fs::FallocateFlags;
use rustix::fs::SeekFrom;
use rustix::fs::fallocate;
use rustix::fs::fdatasync;
use rustix::fs::seek;
use rustix::io::Errno;

use crate::Disk;
use crate::DiskError;
use crate::Geometry;
use crate::disk::check_range;
use crate::disk::total_len;

/// Bytes of a sector: sizes are whole sectors.
const SECTOR: u64 = 512;
/// Zeros written at once where the file system can't make them.
const ZERO_PIECE: usize = 64 << 10;

/// A raw disk.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    /// Whole sectors; the last may reach past the end of the file and reads as zeros there.
    size_bytes: u64,
    read_only: bool,
    physical_block_bytes: u32,
    /// Its file system keeps everything in memory: reading never waits, and it may not know the
    /// flag that says so.
    in_memory: bool,
}

impl RawDisk {
    /// The disk in `file`, a regular file or block device.
    ///
    /// # Errors
    /// [`DiskError::Host`] when the descriptor has no size; [`DiskError::Config`] when it is empty.
    pub fn new(file: File, read_only: bool) -> Result<Self, DiskError> {
        let end = seek(&file, SeekFrom::End(0)).map_err(|error| DiskError::Host {
            action: "find the size of",
            source: error.into(),
        })?;
        if end == 0 {
            return Err(DiskError::Config("a raw disk image is empty".to_owned()));
        }
        let stat = rustix::fs::fstat(&file).map_err(|error| DiskError::Host {
            action: "examine",
            source: error.into(),
        })?;
        let block = u32::try_from(stat.st_blksize).unwrap_or(0);
        Ok(Self {
            size_bytes: end.div_ceil(SECTOR).saturating_mul(SECTOR),
            read_only,
            physical_block_bytes: if block.is_power_of_two() {
                block.clamp(512, 4096)
            } else {
                4096
            },
            in_memory: is_in_memory(&file),
            file,
        })
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        check_range(self.size_bytes, offset, len)
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.check(offset, len)
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let zeros = [0; ZERO_PIECE];
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let piece = usize::try_from(end - at)
                .unwrap_or(ZERO_PIECE)
                .min(ZERO_PIECE);
            self.file.write_all_at(&zeros[..piece], at)?;
            at += piece as u64;
        }
        Ok(())
    }
}

fn is_in_memory(file: &File) -> bool {
    /// `TMPFS_MAGIC`, `RAMFS_MAGIC` (`linux/magic.h`).
    const KINDS: [i64; 2] = [0x0102_1994, 0x8584_58f6];
    rustix::fs::fstatfs(file).is_ok_and(|stat| KINDS.contains(&stat.f_type))
}

/// The slices behind the first `done` bytes.
fn rest<'m>(slices: &[GuestSlice<'m>], done: usize) -> Vec<GuestSlice<'m>> {
    let mut skip = done;
    let mut left = Vec::with_capacity(slices.len());
    for slice in slices {
        if skip >= slice.len() {
            skip -= slice.len();
        } else if let Ok(tail) = slice.offset(skip) {
            left.push(tail);
            skip = 0;
        }
    }
    left
}

/// Zeros behind the end of the file, in its last sector.
fn fill_zeros(slices: &[GuestSlice<'_>]) {
    for slice in slices {
        slice.copy_from(&vec![0_u8; slice.len()]);
    }
}

impl Disk for RawDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            physical_block_bytes: self.physical_block_bytes,
            discard_bytes: self.physical_block_bytes,
        }
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total_len(slices);
        self.check(offset, len)?;
        let mut done = 0;
        while (done as u64) < len {
            let left = rest(slices, done);
            let at = offset + done as u64;
            match vectored::read_at(self.file.as_fd(), &left, at, Wait::Allowed) {
                Ok(0) => {
                    fill_zeros(&left);
                    return Ok(());
                }
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DiskError::host("read")(error)),
            }
        }
        Ok(())
    }

    fn try_read(&self, slices: &[GuestSlice<'_>], offset: u64) -> bool {
        let len = total_len(slices);
        if self.check(offset, len).is_err() {
            return false;
        }
        let wait = if self.in_memory {
            Wait::Allowed
        } else {
            Wait::Never
        };
        // A part may be cached; then all of it is read again, which does no harm.
        vectored::read_at(self.file.as_fd(), slices, offset, wait)
            .is_ok_and(|done| done as u64 == len)
    }

    fn write(&self, slices: &[GuestSlice<'_>], offset: u64) -> Result<(), DiskError> {
        let len = total_len(slices);
        self.check_write(offset, len)?;
        let mut done = 0;
        while (done as u64) < len {
            let left = rest(slices, done);
            match vectored::write_at(self.file.as_fd(), &left, offset + done as u64) {
                Ok(0) => return Err(DiskError::host("write")(io::ErrorKind::WriteZero.into())),
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DiskError::host("write")(error)),
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        fdatasync(&self.file).map_err(|error| DiskError::host("flush")(error.into()))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_write(offset, len)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            // A hint that the file system can't take is still taken.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(error) => Err(DiskError::host("discard part of")(error.into())),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), DiskError> {
        self.check_write(offset, len)?;
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        match fallocate(&self.file, how, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => self
                .write_zero_bytes(offset, len)
                .map_err(DiskError::host("write zeros to")),
            Err(error) => Err(DiskError::host("write zeros to")(error.into())),
        }
    }
}
