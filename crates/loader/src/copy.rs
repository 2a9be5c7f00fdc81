//! Copies files into guest RAM.
//!
//! The bytes go through the memfd and not through its mapping: a write into a memfd allocates its
//! pages without a page fault each, which halves the time of a kernel's load. Pages of zeros are
//! left alone, since fresh RAM is zero already. The page trackers see none of this: a load
//! happens before anyone could have derived something from the pages.

use std::io;
use std::os::unix::fs::FileExt;

use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;

use crate::LoadError;
use crate::source::Source;

/// Large enough to make calls rare, small enough to stay in the second-level cache.
const CHUNK_BYTES: usize = 256 << 10;
/// What is checked for zeros: the smallest page.
const PAGE_BYTES: usize = 4096;

/// A run of bytes to place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    /// For messages.
    pub(crate) what: &'static str,
    /// Where it starts in the image.
    pub(crate) file_offset: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Where it goes.
    pub(crate) guest_start: u64,
}

/// Copies a run. The caller has checked that all of it is low RAM (below the MMIO hole), where
/// guest addresses are offsets in the memfd.
pub(crate) fn into_low_ram(ram: &GuestRam, source: &Source, run: Run) -> Result<(), LoadError> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut done = 0;
    while done < run.len {
        let left = usize::try_from(run.len - done).unwrap_or(usize::MAX);
        let chunk = &mut buffer[..left.min(CHUNK_BYTES)];
        source
            .read_at(chunk, run.file_offset + done)
            .map_err(|source| LoadError::Read {
                what: run.what,
                source,
            })?;
        write_nonzero(ram, chunk, run.guest_start + done).map_err(|source| LoadError::Write {
            what: run.what,
            source,
        })?;
        done += chunk.len() as u64;
    }
    Ok(())
}

/// Writes the runs of pages that hold anything.
fn write_nonzero(ram: &GuestRam, chunk: &[u8], start: u64) -> io::Result<()> {
    let pages: Vec<(bool, &[u8])> = chunk
        .chunks(PAGE_BYTES)
        .map(|page| (is_zero(page), page))
        .collect();
    let mut at = 0;
    for run in pages.chunk_by(|(a, _), (b, _)| a == b) {
        let len = run.iter().map(|(_, page)| page.len()).sum::<usize>();
        if let Some((false, _)) = run.first() {
            write(ram, &chunk[at..at + len], start + at as u64)?;
        }
        at += len;
    }
    Ok(())
}

fn write(ram: &GuestRam, bytes: &[u8], start: u64) -> io::Result<()> {
    match ram.file().write_all_at(bytes, start) {
        // Memory files of reserved huge pages can be mapped but not written.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => ram
            .memory()
            .write_slice(bytes, GuestAddress(start))
            .map_err(io::Error::other),
        done => done,
    }
}

/// Whole words at a time: the early exit of a bytewise search keeps it from being vectorised.
fn is_zero(page: &[u8]) -> bool {
    let (blocks, rest) = page.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|&byte| byte == 0)
}
