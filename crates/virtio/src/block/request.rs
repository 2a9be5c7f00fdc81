//! Block requests: parsing and execution (virtio 1.2 §5.2.6).

use ringfence_block::Disk;
use ringfence_block::DiskError;
use ringfence_memory::GuestMemory;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

use crate::ChainReader;
use crate::ChainWriter;
use crate::chain::Chain;

/// Bytes of a sector, whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the device ID string (§5.2.6.1).
pub(super) const SERIAL_BYTES: usize = 20;
/// Longest data of a request: many times what drivers send.
pub(super) const MAX_DATA: usize = 32 << 20;
/// Most segments of a discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Most sectors of such a segment: 1 GiB, so that one doesn't hold the worker for long.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Serial,
    Discard,
    WriteZeroes,
    Unknown,
}

impl Kind {
    fn of(code: u32) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            4 => Self::Flush,
            8 => Self::Serial,
            11 => Self::Discard,
            13 => Self::WriteZeroes,
            _ => Self::Unknown,
        }
    }
}

/// A parsed request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    offset: u64,
    chain: Chain,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Ok,
    Failed,
    Unsupported,
}

impl From<Result<(), DiskError>> for Ending {
    fn from(result: Result<(), DiskError>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(DiskError::Unsupported { .. }) => Self::Unsupported,
            Err(error) => {
                ringfence_device::warn_limited!(%error, "a disk request failed");
                Self::Failed
            }
        }
    }
}

impl Request {
    /// `None` for a chain that is no request: too short for a header and a status byte.
    pub(super) fn parse(memory: &GuestMemory, chain: Chain) -> Option<Self> {
        let header: Header = chain.reader(memory).read_value().ok()?;
        if chain.writable_len() == 0 {
            return None;
        }
        Some(Self {
            kind: Kind::of(header.kind),
            // Past the end of any disk, which the disk then says.
            offset: header.sector.saturating_mul(SECTOR),
            chain,
        })
    }

    pub(super) fn head(&self) -> u16 {
        self.chain.head()
    }

    /// Bytes that count against the rate.
    pub(super) fn data_len(&self) -> u64 {
        let len = match self.kind {
            Kind::Read => self.chain.writable_len().saturating_sub(1),
            Kind::Write => self
                .chain
                .readable_len()
                .saturating_sub(size_of::<Header>()),
            _ => 0,
        };
        len as u64
    }

    /// The data part: what follows the header, and what precedes the status.
    fn parts<'a>(
        &'a self,
        memory: &'a GuestMemory,
    ) -> Option<(ChainReader<'a>, ChainWriter<'a>, ChainWriter<'a>)> {
        let mut input = self.chain.reader(memory);
        input.skip(size_of::<Header>());
        let mut output = self.chain.writer(memory);
        let status = output.split_tail(1).ok()?;
        Some((input, output, status))
    }

    /// Does it if that needs no waiting; `None` when it's for a thread.
    pub(super) fn try_now(
        &self,
        memory: &GuestMemory,
        disk: &dyn Disk,
        serial: &[u8; SERIAL_BYTES],
    ) -> Option<u32> {
        match self.kind {
            Kind::Read => {
                let (_, output, status) = self.parts(memory)?;
                let len = output.remaining();
                let whole = len <= MAX_DATA && (len as u64).is_multiple_of(SECTOR);
                let slices = output.slices(len);
                (whole && disk.try_read(&slices, self.offset))
                    .then(|| finish(status, len, Ending::Ok))
            }
            Kind::Flush => None,
            _ => Some(self.run(memory, disk, serial)),
        }
    }

    /// Does it, however long it takes; returns the bytes written for the used ring.
    pub(super) fn run(
        &self,
        memory: &GuestMemory,
        disk: &dyn Disk,
        serial: &[u8; SERIAL_BYTES],
    ) -> u32 {
        let Some((mut input, mut output, status)) = self.parts(memory) else {
            return 0;
        };
        let (ending, written) = match self.kind {
            Kind::Read => read(disk, self.offset, &output),
            Kind::Write => (write(disk, self.offset, &input), 0),
            Kind::Flush => (disk.flush().into(), 0),
            Kind::Serial => match output.write_all(serial) {
                Ok(()) => (Ending::Ok, SERIAL_BYTES),
                Err(_) => (Ending::Failed, 0),
            },
            Kind::Discard | Kind::WriteZeroes => (self.segments(disk, &mut input), 0),
            Kind::Unknown => (Ending::Unsupported, 0),
        };
        finish(status, written, ending)
    }

    fn segments(&self, disk: &dyn Disk, input: &mut ChainReader<'_>) -> Ending {
        const UNMAP: u32 = 1;
        let count = input.remaining() / size_of::<Segment>();
        if count == 0 || count > MAX_SEGMENTS {
            return Ending::Failed;
        }
        for _ in 0..count {
            let Ok(segment) = input.read_value::<Segment>() else {
                return Ending::Failed;
            };
            // §5.2.6.2: unknown flags, and unmap in a discard, are unsupported.
            let allowed = if self.kind == Kind::WriteZeroes {
                UNMAP
            } else {
                0
            };
            if segment.flags & !allowed != 0 {
                return Ending::Unsupported;
            }
            if segment.sectors > MAX_SEGMENT_SECTORS {
                return Ending::Failed;
            }
            let offset = segment.sector.saturating_mul(SECTOR);
            let len = u64::from(segment.sectors) * SECTOR;
            let result = match self.kind {
                Kind::Discard => disk.discard(offset, len),
                _ => disk.write_zeroes(offset, len, segment.flags & UNMAP != 0),
            };
            let ending = Ending::from(result);
            if ending != Ending::Ok {
                return ending;
            }
        }
        Ending::Ok
    }
}

fn is_valid_len(len: usize) -> bool {
    len <= MAX_DATA && (len as u64).is_multiple_of(SECTOR)
}

fn read(disk: &dyn Disk, offset: u64, output: &ChainWriter<'_>) -> (Ending, usize) {
    let len = output.remaining();
    if !is_valid_len(len) {
        return (Ending::Failed, 0);
    }
    match Ending::from(disk.read(&output.slices(len), offset)) {
        Ending::Ok => (Ending::Ok, len),
        other => (other, 0),
    }
}

fn write(disk: &dyn Disk, offset: u64, input: &ChainReader<'_>) -> Ending {
    let len = input.remaining();
    if !is_valid_len(len) {
        return Ending::Failed;
    }
    disk.write(&input.slices(len), offset).into()
}

fn finish(mut status: ChainWriter<'_>, written: usize, ending: Ending) -> u32 {
    let code = match ending {
        Ending::Ok => STATUS_OK,
        Ending::Failed => STATUS_IO_ERROR,
        Ending::Unsupported => STATUS_UNSUPPORTED,
    };
    // One byte of room was checked when the request was parsed.
    let _ = status.write_all(&[code]);
    u32::try_from(written).unwrap_or(u32::MAX - 1) + 1
}
