//! A qcow2 header, checked before anything is allocated by it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::DiskError;
use crate::Format;
use crate::create::MAX_SIZE;

const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// Bytes of a version 2 header; version 3 goes on to 104.
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// Cluster sizes that are taken: 512 bytes to 512 KiB. The format goes to 2 MiB; each cached table
/// takes a cluster.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=19;
/// Most bytes of the two tables that stay in memory (QEMU's own limits).
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Longest backing file name (the format's own limit).
const MAX_BACKING_NAME: u32 = 1023;

/// Incompatible feature bits that are understood: dirty refcounts, corrupt, compression type.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// The header extension that names the backing image's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Most header extensions looked at.
const MAX_EXTENSIONS: usize = 32;

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// The name of the image below, if there is one.
    pub backing_name: Option<String>,
    /// That image's format, if stated.
    pub backing_format: Option<String>,
    cluster_bits: u32,
}

fn corrupt(why: impl Into<String>) -> DiskError {
    DiskError::Corrupt {
        format: "qcow2",
        why: why.into(),
    }
}

fn unsupported(why: &str) -> DiskError {
    DiskError::Unsupported {
        format: "qcow2",
        why: why.to_owned(),
    }
}

/// The fixed part, by offset.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn word(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        if let Some(field) = self.0.get(at..at + 4) {
            bytes.copy_from_slice(field);
        }
        u32::from_be_bytes(bytes)
    }

    fn quad(&self, at: usize) -> u64 {
        u64::from(self.word(at)) << 32 | u64::from(self.word(at + 4))
    }
}

impl Header {
    /// Reads and checks the header of `file`.
    ///
    /// # Errors
    /// [`DiskError::Corrupt`] or [`DiskError::Unsupported`], saying which rule is broken.
    pub fn read(file: &File) -> Result<Self, DiskError> {
        let mut bytes = vec![0; V3_BYTES];
        let len = read_start(file, &mut bytes)?;
        bytes.truncate(len);
        let fields = Fields(&bytes);
        if len < V2_BYTES || fields.word(0) != MAGIC {
            return Err(corrupt(
                "it does not start with a qcow2 header; if it is a raw image, say so",
            ));
        }
        let version = fields.word(4);
        match version {
            2 => {}
            3 if len >= V3_BYTES => check_features(fields.quad(72))?,
            3 => return Err(corrupt("the header is cut short")),
            _ => return Err(unsupported("its version is neither 2 nor 3")),
        }
        let cluster_bits = fields.word(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(unsupported(
                "its cluster size is not between 512 bytes and 512 KiB; convert it with qemu-img",
            ));
        }
        let file_bytes = file.metadata().map_err(DiskError::host("examine"))?.len();
        check_tables(&fields, cluster_bits, file_bytes)?;
        let header_bytes = if version == 2 { 72 } else { fields.word(100) };
        let (backing_name, backing_format) =
            read_backing(file, &fields, header_bytes, 1 << cluster_bits)?;
        Ok(Self {
            size_bytes: fields.quad(24),
            backing_name,
            backing_format,
            cluster_bits,
        })
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_bytes(&self) -> u32 {
        1 << self.cluster_bits
    }

    /// Whether `given` is what the header says lies below.
    ///
    /// # Errors
    /// [`DiskError::Config`] when it isn't.
    pub(crate) fn check_backing(&self, given: Option<Format>) -> Result<(), DiskError> {
        match (&self.backing_name, given) {
            (None, None) => Ok(()),
            (None, Some(_)) => Err(DiskError::Config(
                "a backing image was given for a qcow2 image that has none".to_owned(),
            )),
            (Some(name), None) => Err(DiskError::Config(format!(
                "the qcow2 image needs its backing image {name:?}, which was not given"
            ))),
            (Some(_), Some(format)) => match self.backing_format.as_deref() {
                Some(stated) if stated != format.name() => Err(DiskError::Config(format!(
                    "the qcow2 image says that its backing image is {stated:?}, not {:?}",
                    format.name()
                ))),
                _ => Ok(()),
            },
        }
    }
}

fn read_start(file: &File, bytes: &mut [u8]) -> Result<usize, DiskError> {
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(DiskError::host("read")(error)),
        }
    }
    Ok(len)
}

fn check_features(incompatible: u64) -> Result<(), DiskError> {
    if incompatible & CORRUPT != 0 {
        return Err(corrupt(
            "it is marked corrupt; repair it with qemu-img check -r all",
        ));
    }
    if incompatible & DIRTY != 0 {
        return Err(corrupt(
            "it was not closed cleanly; repair it with qemu-img check -r leaks",
        ));
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return Err(unsupported("its data lies in another file"));
    }
    if incompatible & EXTENDED_L2 != 0 {
        return Err(unsupported("it has extended L2 entries"));
    }
    if incompatible & !COMPRESSION_TYPE != 0 {
        return Err(unsupported("it has features that are not known here"));
    }
    Ok(())
}

/// Sizes and places of the tables, against the limits and the file.
fn check_tables(fields: &Fields<'_>, cluster_bits: u32, file_bytes: u64) -> Result<(), DiskError> {
    if fields.word(32) != 0 {
        return Err(unsupported("it is encrypted"));
    }
    let size = fields.quad(24);
    if size == 0 || size > MAX_SIZE {
        return Err(unsupported("its disk size is zero or above 64 TiB"));
    }
    let l1_bytes = u64::from(fields.word(36)) * 8;
    // An L2 table of one cluster has cluster/8 entries of one cluster each.
    let reach = 1_u64 << (2 * cluster_bits - 3);
    if l1_bytes > MAX_L1_BYTES || (l1_bytes / 8).saturating_mul(reach) < size {
        return Err(corrupt("its L1 table is too large or too small"));
    }
    let refcount_bytes = u64::from(fields.word(56)) << cluster_bits;
    if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Err(corrupt("its refcount table is too large or empty"));
    }
    let cluster = 1_u64 << cluster_bits;
    for (offset, len, what) in [
        (fields.quad(40), l1_bytes, "L1 table"),
        (fields.quad(48), refcount_bytes, "refcount table"),
    ] {
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= file_bytes.next_multiple_of(cluster));
        if offset == 0 || !offset.is_multiple_of(cluster) || !inside {
            return Err(corrupt(format!(
                "its {what} lies outside the file: the image is cut short or damaged"
            )));
        }
    }
    Ok(())
}

type Backing = (Option<String>, Option<String>);

fn read_backing(
    file: &File,
    fields: &Fields<'_>,
    header_bytes: u32,
    cluster: u32,
) -> Result<Backing, DiskError> {
    let (offset, len) = (fields.quad(8), fields.word(16));
    if header_bytes < 72 || header_bytes > cluster || !header_bytes.is_multiple_of(8) {
        return Err(corrupt("its header length is not possible"));
    }
    let backing_format = read_backing_format(file, header_bytes)?;
    if offset == 0 {
        return Ok((None, backing_format));
    }
    let inside = offset
        .checked_add(u64::from(len))
        .is_some_and(|end| end <= u64::from(cluster));
    if len == 0 || len > MAX_BACKING_NAME || !inside {
        return Err(corrupt("its backing file name is not in the first cluster"));
    }
    let mut name = vec![0; len as usize];
    file.read_exact_at(&mut name, offset)
        .map_err(|_| corrupt("its backing file name is cut short"))?;
    let name = String::from_utf8_lossy(&name).into_owned();
    Ok((Some(name), backing_format))
}

fn read_backing_format(file: &File, header_bytes: u32) -> Result<Option<String>, DiskError> {
    let mut at = u64::from(header_bytes);
    for _ in 0..MAX_EXTENSIONS {
        let mut head = [0; 8];
        if file.read_exact_at(&mut head, at).is_err() {
            return Ok(None);
        }
        let fields = Fields(&head);
        let (kind, len) = (fields.word(0), fields.word(4));
        match kind {
            0 => return Ok(None),
            BACKING_FORMAT if len <= 64 => {
                let mut name = vec![0; len as usize];
                file.read_exact_at(&mut name, at + 8)
                    .map_err(|_| corrupt("a header extension is cut short"))?;
                return Ok(Some(String::from_utf8_lossy(&name).into_owned()));
            }
            BACKING_FORMAT => return Err(corrupt("its backing format's name is too long")),
            _ => at += 8 + u64::from(len).next_multiple_of(8),
        }
    }
    Err(corrupt("it has too many header extensions"))
}
