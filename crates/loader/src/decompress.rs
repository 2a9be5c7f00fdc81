//! The seven compressions that a bzImage's payload may have (Linux scripts/Makefile.lib).
//!
//! Every format ends with the decompressed size in four little-endian bytes: gzip by its own
//! trailer, the others because the kernel's build appends it. That size is checked against the
//! limit before anything is decompressed, and a decompressor that yields more is stopped.

mod lz4;
mod lzop;

use std::io;
use std::io::Read;

use crate::LoadError;

/// Most memory for a decompressor's dictionary or window. The kernel's build uses up to 128 MiB.
const WINDOW_LIMIT_BYTES: u32 = 128 << 20;

struct Format {
    name: &'static str,
    magic: &'static [u8],
    /// The stream itself holds the final size, so it isn't cut off.
    size_in_stream: bool,
    decode: fn(&[u8], &mut Vec<u8>, usize) -> io::Result<()>,
}

/// As lib/decompress.c of Linux tells them apart.
const FORMATS: [Format; 7] = [
    Format {
        name: "gzip",
        magic: &[0x1f, 0x8b],
        size_in_stream: true,
        decode: gzip,
    },
    Format {
        name: "bzip2",
        magic: b"BZh",
        size_in_stream: false,
        decode: bzip2,
    },
    Format {
        name: "lzma",
        magic: &[0x5d, 0, 0],
        size_in_stream: false,
        decode: lzma,
    },
    Format {
        name: "xz",
        magic: &[0xfd, b'7', b'z', b'X', b'Z', 0],
        size_in_stream: false,
        decode: xz,
    },
    Format {
        name: "lzo",
        magic: lzop::MAGIC,
        size_in_stream: false,
        decode: lzop::decode,
    },
    Format {
        name: "lz4",
        magic: lz4::MAGIC,
        size_in_stream: false,
        decode: lz4::decode,
    },
    Format {
        name: "zstd",
        magic: &[0x28, 0xb5, 0x2f, 0xfd],
        size_in_stream: false,
        decode: zstd,
    },
];

/// Decompresses a bzImage's payload of at most `limit_bytes`.
pub(crate) fn decompress(payload: &[u8], limit_bytes: u64) -> Result<Vec<u8>, LoadError> {
    let format = FORMATS
        .iter()
        .find(|format| payload.starts_with(format.magic))
        .ok_or(LoadError::Unsupported("its compression is not known"))?;
    let (stream, size) = payload
        .split_last_chunk::<4>()
        .ok_or(LoadError::Damaged("the compressed kernel is empty"))?;
    let size_bytes = u64::from(u32::from_le_bytes(*size));
    if size_bytes > limit_bytes {
        return Err(LoadError::TooLarge {
            size_bytes,
            limit_bytes,
        });
    }
    let stream = if format.size_in_stream {
        payload
    } else {
        stream
    };
    let size = u32::from_le_bytes(*size) as usize;
    let mut out = Vec::with_capacity(size);
    (format.decode)(stream, &mut out, size).map_err(|source| LoadError::Decompress {
        format: format.name,
        source,
    })?;
    if out.len() != size {
        return Err(LoadError::Damaged(
            "its decompressed size is not the size that it declares",
        ));
    }
    Ok(out)
}

/// Reads at most one byte more than `size`, so that a longer stream is noticed and not followed.
fn read_bounded(reader: impl Read, out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    reader.take(size as u64 + 1).read_to_end(out).map(drop)
}

fn gzip(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    read_bounded(flate2::read::GzDecoder::new(stream), out, size)
}

fn bzip2(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    read_bounded(bzip2::read::BzDecoder::new(stream), out, size)
}

fn lzma(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    let reader = lzma_rust2::LzmaReader::new_mem_limit(stream, window_limit_kib(), None)?;
    read_bounded(reader, out, size)
}

fn xz(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    let reader = lzma_rust2::XzReader::new_mem_limit(stream, false, window_limit_kib());
    read_bounded(reader, out, size)
}

fn zstd(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    let reader = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
        stream,
        u64::from(WINDOW_LIMIT_BYTES),
    )
    .map_err(io::Error::other)?;
    read_bounded(reader, out, size)
}

/// The LZMA reader counts its tables beside the dictionary: allow those.
fn window_limit_kib() -> u32 {
    WINDOW_LIMIT_BYTES / 1024 + 1024
}

fn truncated() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the compressed stream ends early",
    )
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
