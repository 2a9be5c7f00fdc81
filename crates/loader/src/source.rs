//! Where an image's bytes are: in a file or, once decompressed, in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use object::ReadCacheOps;

use crate::LoadError;

/// The bytes of an image. Reads are by position: the file's own offset, which the caller may
/// share with others, is left alone.
#[derive(Debug)]
pub(crate) enum Source {
    /// A file of known length.
    File { file: File, len_bytes: u64 },
    /// Decompressed bytes.
    Bytes(Vec<u8>),
}

impl Source {
    pub(crate) fn file(file: File, what: &'static str) -> Result<Self, LoadError> {
        let read = |source| LoadError::Read { what, source };
        let meta = file.metadata().map_err(read)?;
        if !meta.is_file() {
            // A pipe has no length and no positions; a directory can be opened but not read.
            return Err(read(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )));
        }
        Ok(Self::File {
            file,
            len_bytes: meta.len(),
        })
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        match self {
            Self::File { len_bytes, .. } => *len_bytes,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.read_exact_at(buffer, offset),
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let found = start
                    .checked_add(buffer.len())
                    .and_then(|end| bytes.get(start..end))
                    .ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(found);
                Ok(())
            }
        }
    }

    /// Reads `len_bytes` at `offset`, checked against the length before anything is allocated.
    pub(crate) fn read_vec(
        &self,
        part: &'static str,
        offset: u64,
        len_bytes: u64,
    ) -> Result<Vec<u8>, LoadError> {
        let len = self.check(part, offset, len_bytes)?;
        let mut buffer = vec![0; len];
        self.read_at(&mut buffer, offset)
            .map_err(|source| LoadError::Read { what: part, source })?;
        Ok(buffer)
    }

    /// Checks that `len_bytes` at `offset` are in the image.
    pub(crate) fn check(
        &self,
        part: &'static str,
        offset: u64,
        len_bytes: u64,
    ) -> Result<usize, LoadError> {
        let needed_bytes = offset.saturating_add(len_bytes);
        if needed_bytes > self.len_bytes() {
            return Err(LoadError::Truncated {
                part,
                needed_bytes,
                len_bytes: self.len_bytes(),
            });
        }
        usize::try_from(len_bytes).map_err(|_| LoadError::Damaged("a length passes 64 bits"))
    }

    /// A reader for the `object` crate, which caches the few headers it looks at.
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        Cursor {
            source: self,
            offset: 0,
        }
    }
}

/// A read position in a [`Source`].
pub(crate) struct Cursor<'a> {
    source: &'a Source,
    offset: u64,
}

impl ReadCacheOps for Cursor<'_> {
    fn len(&mut self) -> Result<u64, ()> {
        Ok(self.source.len_bytes())
    }

    fn seek(&mut self, pos: u64) -> Result<u64, ()> {
        self.offset = pos;
        Ok(pos)
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, ()> {
        let left = self.source.len_bytes().saturating_sub(self.offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        self.read_exact(&mut buf[..len]).map(|()| len)
    }

    fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), ()> {
        self.source.read_at(buf, self.offset).map_err(|_| ())?;
        self.offset = self.offset.saturating_add(buf.len() as u64);
        Ok(())
    }
}
