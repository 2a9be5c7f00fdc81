//! Why a kernel could not be loaded.

use std::io;

use ringfence_engine::ErrorKind;
use ringfence_memory::GuestMemoryError;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is neither a bzImage nor an ELF image.
    #[error(
        "not an x86-64 kernel: neither a bzImage nor an ELF image (the file starts with {start:02x?})"
    )]
    NotAKernel {
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// The image is a kernel, but one that this machine can't enter.
    #[error("the kernel can't be started directly: {0}")]
    Unsupported(&'static str),
    /// The image contradicts itself.
    #[error("the kernel image is damaged: {0}")]
    Damaged(&'static str),
    /// The image ends before what its headers name.
    #[error("the kernel image is truncated: {part} needs {needed_bytes} bytes of {len_bytes}")]
    Truncated {
        /// What doesn't fit.
        part: &'static str,
        /// Where it would end.
        needed_bytes: u64,
        /// The file's length.
        len_bytes: u64,
    },
    /// The compressed payload could not be decompressed.
    #[error("cannot decompress the {format} kernel")]
    Decompress {
        /// The payload's compression.
        format: &'static str,
        /// What the decompressor said.
        source: io::Error,
    },
    /// The payload's size passes the limit.
    #[error("the decompressed kernel has {size_bytes} bytes; the limit is {limit_bytes}")]
    TooLarge {
        /// What the image declares.
        size_bytes: u64,
        /// The most that is accepted.
        limit_bytes: u64,
    },
    /// The machine has too little RAM.
    #[error(
        "{part} needs guest memory up to {end:#x}, but the machine has {low_bytes:#x} bytes below 4 GiB: \
         give the machine more memory"
    )]
    NoRoom {
        /// What doesn't fit.
        part: &'static str,
        /// First address past it.
        end: u64,
        /// RAM below the MMIO hole.
        low_bytes: u64,
    },
    /// A kernel segment lies where the boot structures go.
    #[error(
        "the kernel's segment at {0:#x} lies in the first MiB, which holds the boot structures"
    )]
    LowSegment(u64),
    /// The command line is longer than the kernel reads.
    #[error("the kernel command line has {len_bytes} bytes; this kernel takes {limit_bytes}")]
    CommandLine {
        /// The given length.
        len_bytes: usize,
        /// The kernel's limit.
        limit_bytes: usize,
    },
    /// The command line holds a zero byte.
    #[error("the kernel command line holds a zero byte")]
    CommandLineZero,
    /// Reading a file failed.
    #[error("cannot read {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// Writing to the machine's RAM failed.
    #[error("cannot write {what} to guest memory")]
    Write {
        /// What was written.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A boot structure does not fit the machine's RAM.
    #[error("cannot place {what} in guest memory")]
    Place {
        /// Which structure.
        what: &'static str,
        /// What vm-memory said.
        source: GuestMemoryError,
    },
}

impl LoadError {
    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotAKernel { .. }
            | Self::Damaged(_)
            | Self::Truncated { .. }
            | Self::Decompress { .. }
            | Self::LowSegment(_)
            | Self::TooLarge { .. } => ErrorKind::Format,
            Self::Unsupported(_) => ErrorKind::Unsupported,
            Self::NoRoom { .. } | Self::CommandLine { .. } | Self::CommandLineZero => {
                ErrorKind::Config
            }
            Self::Read { .. } | Self::Write { .. } => ErrorKind::Host,
            Self::Place { .. } => ErrorKind::Internal,
        }
    }
}
