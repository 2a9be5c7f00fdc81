//! Copies files into guest RAM.
//!
//! A kernel's load is the longest part of a machine's start, and what it costs is the host's
//! allocation of some seven thousand pages. A write into the memfd allocates them without a page
//! fault each. (A second thread that stores through the mapping at the same time was tried: it
//! makes the whole slower wherever the other processor isn't idle.) Pages of zeros are left alone,
//! since fresh RAM is zero already. The page trackers don't see what goes through the file: a load
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

impl Run {
    /// The run in pieces of at most [`CHUNK_BYTES`].
    fn chunks(self) -> impl Iterator<Item = Self> {
        let step = CHUNK_BYTES as u64;
        (0..self.len.div_ceil(step)).map(move |index| Self {
            file_offset: self.file_offset + index * step,
            len: step.min(self.len - index * step),
            guest_start: self.guest_start + index * step,
            ..self
        })
    }
}

/// Copies runs. The caller has checked that all of them are low RAM (below the MMIO hole), where
/// guest addresses are offsets in the memfd.
pub(crate) fn into_low_ram(ram: &GuestRam, source: &Source, runs: &[Run]) -> Result<(), LoadError> {
    let mut buffer = vec![0; CHUNK_BYTES];
    for chunk in runs.iter().flat_map(|run| run.chunks()) {
        copy(ram, source, &chunk, &mut buffer)?;
    }
    Ok(())
}

fn copy(ram: &GuestRam, source: &Source, chunk: &Run, buffer: &mut [u8]) -> Result<(), LoadError> {
    let len = usize::try_from(chunk.len).unwrap_or(usize::MAX);
    let bytes = &mut buffer[..len.min(CHUNK_BYTES)];
    let what = chunk.what;
    source
        .read_at(bytes, chunk.file_offset)
        .map_err(|source| LoadError::Read { what, source })?;
    write_nonzero(ram, bytes, chunk.guest_start).map_err(|source| LoadError::Write { what, source })
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
