//! The container that `lzop` writes: a header with flags, then blocks with their lengths and
//! checksums, ended by a zero length.
//!
//! Spec: lzop 1.04's src/conf.h and file header; lib/decompress_unlzo.c of Linux reads the same.
//! Block checksums are skipped: the payload's size and the ELF image inside are checked.

use std::io;

use super::damaged;
use super::truncated;

pub(super) const MAGIC: &[u8] = &[0x89, b'L', b'Z', b'O', 0, 0x0d, 0x0a, 0x1a, 0x0a];

const VERSION_WITH_LEVEL: u16 = 0x0940;
const FLAG_ADLER32_PLAIN: u32 = 1 << 0;
const FLAG_ADLER32_PACKED: u32 = 1 << 1;
const FLAG_CRC32_PLAIN: u32 = 1 << 8;
const FLAG_CRC32_PACKED: u32 = 1 << 9;
const FLAG_FILTER: u32 = 1 << 11;

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    fn chunk<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or_else(truncated)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.chunk().map(u32::from_be_bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.chunk().map(u16::from_be_bytes)
    }
}

pub(super) fn decode(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    let mut fields = Fields(&stream[MAGIC.len()..]);
    let flags = header(&mut fields)?;
    let checksums = |wanted: [u32; 2]| wanted.iter().filter(|&&flag| flags & flag != 0).count() * 4;
    let plain_checksums = checksums([FLAG_ADLER32_PLAIN, FLAG_CRC32_PLAIN]);
    let packed_checksums = checksums([FLAG_ADLER32_PACKED, FLAG_CRC32_PACKED]);
    loop {
        let plain_len = fields.u32()? as usize;
        if plain_len == 0 {
            return Ok(());
        }
        let packed_len = fields.u32()? as usize;
        fields.bytes(plain_checksums)?;
        if packed_len < plain_len {
            fields.bytes(packed_checksums)?;
        }
        let block = fields.bytes(packed_len)?;
        let start = out.len();
        let end = start
            .checked_add(plain_len)
            .filter(|&end| end <= size)
            .ok_or_else(|| damaged("the blocks hold more than the kernel"))?;
        if packed_len == plain_len {
            out.extend_from_slice(block);
            continue;
        }
        out.resize(end, 0);
        let written = lzokay::decompress::decompress(block, &mut out[start..])
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        if written != plain_len {
            return Err(damaged("a block is shorter than it declares"));
        }
    }
}

/// Reads the file header and returns its flags.
fn header(fields: &mut Fields<'_>) -> io::Result<u32> {
    let version = fields.u16()?;
    let _library_version = fields.u16()?;
    if version >= VERSION_WITH_LEVEL {
        let _needed_version = fields.u16()?;
    }
    let _method = fields.chunk::<1>()?;
    if version >= VERSION_WITH_LEVEL {
        let _level = fields.chunk::<1>()?;
    }
    let flags = fields.u32()?;
    if flags & FLAG_FILTER != 0 {
        let _filter = fields.u32()?;
    }
    let _mode = fields.u32()?;
    let _modified_low = fields.u32()?;
    if version >= VERSION_WITH_LEVEL {
        let _modified_high = fields.u32()?;
    }
    let [name_len] = fields.chunk::<1>()?;
    fields.bytes(usize::from(name_len))?;
    let _header_checksum = fields.u32()?;
    Ok(flags)
}
