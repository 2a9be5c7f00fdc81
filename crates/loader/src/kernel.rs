//! A kernel file: opened, checked, and ready to be placed in a machine.

use std::fs::File;

use crate::LoadError;
use crate::bzimage;
use crate::bzimage::HeaderLimits;
use crate::decompress;
use crate::elf;
use crate::elf::ElfImage;
use crate::source::Source;

/// The largest kernel image accepted, compressed or not. Distribution kernels have 30 to 80 MB.
pub const MAX_KERNEL_BYTES: u64 = 512 << 20;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// Linux's 64-bit boot protocol: long mode, RSI holds the zero page.
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX holds the start info.
    Pvh,
}

/// An opened kernel.
#[derive(Debug)]
pub struct Kernel {
    pub(crate) source: Source,
    pub(crate) elf: ElfImage,
    /// The bzImage's setup header, from offset 0x1f1 on.
    pub(crate) setup_header: Option<Vec<u8>>,
}

impl Kernel {
    /// Reads a kernel: a bzImage, whose payload is decompressed, or an ELF image.
    ///
    /// # Errors
    /// [`LoadError`] when the file is not a kernel, is damaged or truncated, or can't be read.
    pub fn open(file: File) -> Result<Self, LoadError> {
        let source = Source::file(file, "the kernel")?;
        if source.len_bytes() > MAX_KERNEL_BYTES {
            return Err(LoadError::TooLarge {
                size_bytes: source.len_bytes(),
                limit_bytes: MAX_KERNEL_BYTES,
            });
        }
        Self::from_source(source)
    }

    /// [`Self::open`] for an image in memory.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, LoadError> {
        Self::from_source(Source::Bytes(bytes))
    }

    fn from_source(source: Source) -> Result<Self, LoadError> {
        let start_len = source.len_bytes().min(bzimage::HEADER_END_MAX as u64);
        let start = source.read_vec("the kernel", 0, start_len)?;
        if elf::is_elf(&start) {
            let elf = elf::parse(&source)?;
            return Ok(Self {
                source,
                elf,
                setup_header: None,
            });
        }
        if bzimage::is_bzimage(&start) {
            let image = bzimage::read(&source)?;
            let source = Source::Bytes(decompress::decompress(&image.payload, MAX_KERNEL_BYTES)?);
            let elf = elf::parse(&source)?;
            return Ok(Self {
                source,
                elf,
                setup_header: Some(image.header),
            });
        }
        Err(LoadError::NotAKernel {
            start: start.iter().take(8).copied().collect(),
        })
    }

    /// The protocol that suits this kernel.
    ///
    /// Linux is entered by its own protocol even when it offers PVH: the 64-bit entry spares the
    /// engine 32-bit code. Anything else that offers PVH is entered by that.
    #[must_use]
    pub fn protocol(&self) -> BootProtocol {
        let is_linux = self.elf.is_linux || self.setup_header.is_some();
        if self.elf.pvh_entry.is_some() && (!is_linux || !self.elf.is_64_bit) {
            BootProtocol::Pvh
        } else {
            BootProtocol::Linux64
        }
    }

    /// The ELF image's bytes when the file was a bzImage, to be kept so that the next start needs
    /// no decompression. An ELF image is its own cache.
    #[must_use]
    pub fn decompressed(&self) -> Option<&[u8]> {
        match &self.source {
            Source::Bytes(bytes) if self.setup_header.is_some() => Some(bytes),
            _ => None,
        }
    }

    /// The last guest address that the kernel takes while it starts, plus one.
    pub(crate) fn end(&self) -> u64 {
        self.elf
            .segments
            .iter()
            .map(elf::Segment::end)
            .max()
            .unwrap_or(0)
    }

    pub(crate) fn limits(&self) -> HeaderLimits {
        self.setup_header
            .as_deref()
            .map_or(HeaderLimits::DEFAULT, HeaderLimits::of)
    }
}
