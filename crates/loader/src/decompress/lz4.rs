//! LZ4's legacy frame, as `lz4 -l` writes it: a magic number, then blocks of up to 8 MiB, each
//! after its compressed length.
//!
//! Spec: lz4's doc/lz4_Frame_format.md, "Legacy frame".

use std::io;

use super::damaged;
use super::truncated;

pub(super) const MAGIC: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const BLOCK_MAX_BYTES: usize = 8 << 20;

pub(super) fn decode(stream: &[u8], out: &mut Vec<u8>, size: usize) -> io::Result<()> {
    let mut rest = &stream[MAGIC.len()..];
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let block = after.get(..len).ok_or_else(truncated)?;
        rest = &after[len..];
        let start = out.len();
        let room = size.saturating_sub(start).min(BLOCK_MAX_BYTES);
        out.resize(start + room, 0);
        let written =
            lz4_flex::block::decompress_into(block, &mut out[start..]).map_err(io::Error::other)?;
        out.truncate(start + written);
    }
    if !rest.is_empty() {
        return Err(damaged("there are bytes after the last block"));
    }
    Ok(())
}
