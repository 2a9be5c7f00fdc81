//! A descriptor chain: what the driver lent the device for one request.
//!
//! Read from guest memory once, checked whole, then kept in host memory, so that the guest can't
//! change it between check and use. The buffers themselves stay the guest's and may change.

use std::io;

use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemory;
use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::vectored::GuestSlice;
use smallvec::SmallVec;
use vm_memory::Bytes;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

/// Most buffers in a chain. The standard allows a chain as long as the queue (virtio 1.2
/// §2.7.5.3.1); this bounds what one request costs the host whatever an indirect table says.
pub const MAX_BUFFERS: usize = 1024;

/// One buffer of a chain, known to lie in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
}

pub(crate) type Buffers = SmallVec<[Buffer; 8]>;

/// One request: buffers to read, then buffers to write (§2.7.4.2).
#[derive(Clone, Debug)]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
}

fn total(buffers: &[Buffer]) -> usize {
    buffers.iter().map(|buffer| buffer.len as usize).sum()
}

impl Chain {
    /// Index of its first descriptor: what the used ring calls it.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the driver wrote for the device.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        total(&self.readable)
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        total(&self.writable)
    }

    /// Reads what the driver wrote.
    #[must_use]
    pub fn reader<'a>(&'a self, memory: &'a GuestMemory) -> ChainReader<'a> {
        ChainReader(Cursor::new(memory, &self.readable))
    }

    /// Writes what the driver shall read.
    #[must_use]
    pub fn writer<'a>(&'a self, memory: &'a GuestMemory) -> ChainWriter<'a> {
        ChainWriter {
            cursor: Cursor::new(memory, &self.writable),
            written: 0,
        }
    }
}

/// A position in a run of buffers.
#[derive(Clone, Debug)]
struct Cursor<'a> {
    memory: &'a GuestMemory,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are behind us.
    offset: u32,
    /// Bytes ahead.
    remaining: usize,
}

impl<'a> Cursor<'a> {
    fn new(memory: &'a GuestMemory, buffers: &'a [Buffer]) -> Self {
        Self {
            memory,
            buffers,
            offset: 0,
            remaining: total(buffers),
        }
    }

    /// The next run of at most `limit` bytes in one buffer, and moves past it.
    fn take(&mut self, limit: usize) -> Option<(GuestAddress, usize)> {
        let limit = limit.min(self.remaining);
        if limit == 0 {
            return None;
        }
        loop {
            let (first, rest) = self.buffers.split_first()?;
            let left = first.len - self.offset;
            if left == 0 {
                (self.buffers, self.offset) = (rest, 0);
                continue;
            }
            let len = limit.min(left as usize);
            // Checked when the chain was read: the whole buffer lies in memory.
            let address = GuestAddress(first.address.0 + u64::from(self.offset));
            self.offset += u32::try_from(len).unwrap_or(left);
            self.remaining -= len;
            return Some((address, len));
        }
    }

    fn slice(&mut self, limit: usize) -> Option<GuestSlice<'a>> {
        let (address, len) = self.take(limit)?;
        self.memory.get_slice(address, len).ok()
    }

    /// The next `len` bytes as slices for vectored I/O; doesn't move.
    fn slices(&self, len: usize) -> Vec<GuestSlice<'a>> {
        let mut ahead = self.clone();
        let mut rest = len;
        let mut slices = Vec::with_capacity(self.buffers.len());
        while let Some(slice) = ahead.slice(rest) {
            rest -= slice.len();
            slices.push(slice);
        }
        slices
    }

    fn skip(&mut self, len: usize) {
        let mut rest = len;
        while let Some((_, part)) = self.take(rest) {
            rest -= part;
        }
    }

    fn limit(&mut self, len: usize) {
        self.remaining = self.remaining.min(len);
    }
}

fn too_short() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

/// Reads the device-readable part of a chain from front to back.
#[derive(Clone, Debug)]
pub struct ChainReader<'a>(Cursor<'a>);

impl<'a> ChainReader<'a> {
    /// Bytes ahead.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Reads a plain value.
    ///
    /// # Errors
    /// `UnexpectedEof` when fewer bytes are left.
    pub fn read_value<T: FromBytes + IntoBytes>(&mut self) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Fills `data`.
    ///
    /// # Errors
    /// `UnexpectedEof` when fewer bytes are left.
    pub fn read_exact(&mut self, data: &mut [u8]) -> io::Result<()> {
        if data.len() > self.0.remaining {
            return Err(too_short());
        }
        let mut rest = data;
        while let Some((address, len)) = self.0.take(rest.len()) {
            let (part, tail) = rest.split_at_mut(len);
            self.0
                .memory
                .read_slice(part, address)
                .map_err(io::Error::other)?;
            rest = tail;
        }
        Ok(())
    }

    /// Reads all that is left, which the caller has bounded.
    ///
    /// # Errors
    /// As [`Self::read_exact`].
    pub fn read_rest(&mut self) -> io::Result<Vec<u8>> {
        let mut data = vec![0; self.0.remaining];
        self.read_exact(&mut data)?;
        Ok(data)
    }

    /// Hides all but the next `len` bytes.
    pub fn limit(&mut self, len: usize) {
        self.0.limit(len);
    }

    /// Moves past `len` bytes.
    pub fn skip(&mut self, len: usize) {
        self.0.skip(len);
    }

    /// The next `len` bytes in place.
    #[must_use]
    pub fn slices(&self, len: usize) -> Vec<GuestSlice<'a>> {
        self.0.slices(len)
    }
}

/// Writes the device-writable part of a chain from front to back.
#[derive(Clone, Debug)]
pub struct ChainWriter<'a> {
    cursor: Cursor<'a>,
    written: usize,
}

impl<'a> ChainWriter<'a> {
    /// Bytes of room ahead.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.cursor.remaining
    }

    /// Bytes written so far: what the used ring is told.
    #[must_use]
    pub fn written(&self) -> u32 {
        u32::try_from(self.written).unwrap_or(u32::MAX)
    }

    /// Writes a plain value.
    ///
    /// # Errors
    /// `UnexpectedEof` when it doesn't fit; nothing is written then.
    pub fn write_value<T: IntoBytes + Immutable>(&mut self, value: &T) -> io::Result<()> {
        self.write_all(value.as_bytes())
    }

    /// Writes `data`.
    ///
    /// # Errors
    /// `UnexpectedEof` when it doesn't fit; nothing is written then.
    pub fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        if data.len() > self.cursor.remaining {
            return Err(too_short());
        }
        let mut rest = data;
        while let Some((address, len)) = self.cursor.take(rest.len()) {
            let (part, tail) = rest.split_at(len);
            self.cursor
                .memory
                .write_slice(part, address)
                .map_err(io::Error::other)?;
            self.written += len;
            rest = tail;
        }
        Ok(())
    }

    /// Splits off the last `len` bytes: where a status byte or trailer goes.
    ///
    /// # Errors
    /// `UnexpectedEof` when there are fewer.
    pub fn split_tail(&mut self, len: usize) -> io::Result<Self> {
        let front = self
            .cursor
            .remaining
            .checked_sub(len)
            .ok_or_else(too_short)?;
        let mut tail = self.clone();
        tail.written = 0;
        tail.cursor.skip(front);
        self.cursor.limit(front);
        Ok(tail)
    }

    /// Hides all but the next `len` bytes.
    pub fn limit(&mut self, len: usize) {
        self.cursor.limit(len);
    }

    /// The next `len` bytes in place; follow with [`Self::advance`].
    #[must_use]
    pub fn slices(&self, len: usize) -> Vec<GuestSlice<'a>> {
        self.cursor.slices(len)
    }

    /// Counts `len` bytes, written in place, as written.
    pub fn advance(&mut self, len: usize) {
        let before = self.cursor.remaining;
        self.cursor.skip(len);
        self.written += before - self.cursor.remaining;
    }
}

#[cfg(test)]
mod tests {
    use ringfence_memory::GuestRam;
    use ringfence_memory::HugePages;

    use super::*;

    fn buffers(list: &[(u64, u32)]) -> Buffers {
        list.iter()
            .map(|&(address, len)| Buffer {
                address: GuestAddress(address),
                len,
            })
            .collect()
    }

    fn chain() -> Chain {
        Chain {
            head: 0,
            readable: buffers(&[(0x100, 3), (0x200, 0), (0x300, 5)]),
            writable: buffers(&[(0x1000, 4), (0x2000, 4)]),
        }
    }

    #[test]
    fn values_are_read_and_written_across_buffers() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let memory = ram.memory();
        memory
            .write_slice(b"abc", GuestAddress(0x100))
            .expect("ram");
        memory
            .write_slice(b"defgh", GuestAddress(0x300))
            .expect("ram");
        let chain = chain();
        let mut reader = chain.reader(memory);
        let mut text = [0; 8];
        reader.read_exact(&mut text).expect("enough");
        assert_eq!(&text, b"abcdefgh");
        assert_eq!(
            reader.read_value::<u8>().expect_err("empty").kind(),
            io::ErrorKind::UnexpectedEof
        );
        let mut writer = chain.writer(memory);
        writer
            .write_value(&0x0807_0605_0403_0201_u64)
            .expect("room");
        assert_eq!(writer.written(), 8);
        let high: u32 = memory.read_obj(GuestAddress(0x2000)).expect("ram");
        assert_eq!(high, 0x0807_0605);
    }

    #[test]
    fn the_tail_is_apart_from_the_front() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let chain = chain();
        let mut writer = chain.writer(ram.memory());
        let mut status = writer.split_tail(1).expect("room");
        assert_eq!(writer.remaining(), 7);
        status.write_all(&[9]).expect("room");
        writer.write_all(&[1; 8]).expect_err("one too many");
        writer.write_all(&[1; 7]).expect("fits");
        let last: u32 = ram.memory().read_obj(GuestAddress(0x2000)).expect("ram");
        assert_eq!(last, 0x0901_0101);
        chain
            .writer(ram.memory())
            .split_tail(9)
            .expect_err("one too many");
    }

    #[test]
    fn slices_show_what_is_ahead_without_moving() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let chain = chain();
        let mut reader = chain.reader(ram.memory());
        reader.skip(1);
        let lengths = |reader: &ChainReader<'_>, len| {
            let slices = reader.slices(len);
            slices.iter().map(GuestSlice::len).collect::<Vec<_>>()
        };
        assert_eq!(lengths(&reader, 100), [2, 5]);
        assert_eq!(lengths(&reader, 3), [2, 1]);
        assert_eq!(reader.remaining(), 7);
    }
}
