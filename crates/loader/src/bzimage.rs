//! The bzImage container: real-mode setup code, its header, and a compressed ELF kernel.
//!
//! Spec: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header" (protocol 2.12 to 2.15).

use crate::LoadError;
use crate::source::Source;

/// First byte of the setup header in the file and in the zero page.
pub(crate) const HEADER_START: usize = 0x1f1;
/// The setup header never passes this offset of the zero page.
pub(crate) const HEADER_END_MAX: usize = 0x290;

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_LEN: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

/// 2.12 added `xloadflags`, without which nobody can say that the 64-bit entry exists (Linux 3.8).
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1 << 0;
const XLF_KERNEL_64: u16 = 1 << 0;
const SECTOR: u64 = 512;

/// The parts of a bzImage that booting needs.
#[derive(Debug)]
pub(crate) struct BzImage {
    /// The setup header as in the file, from [`HEADER_START`] on.
    pub(crate) header: Vec<u8>,
    /// The compressed kernel with its size in the last four bytes.
    pub(crate) payload: Vec<u8>,
}

/// Whether the file carries the setup header's magic.
pub(crate) fn is_bzimage(start: &[u8]) -> bool {
    start.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa])
        && start.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS")
}

/// Parses a bzImage and reads its payload.
pub(crate) fn read(source: &Source) -> Result<BzImage, LoadError> {
    let start = source.read_vec("the setup header", 0, HEADER_END_MAX as u64)?;
    if u16_at(&start, VERSION) < MIN_VERSION {
        return Err(LoadError::Unsupported(
            "its boot protocol is older than 2.12 (Linux 3.8)",
        ));
    }
    if start[LOADFLAGS] & LOADED_HIGH == 0 {
        return Err(LoadError::Unsupported("it is a zImage, not a bzImage"));
    }
    if u16_at(&start, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(LoadError::Unsupported(
            "it has no 64-bit entry point (a 32-bit kernel)",
        ));
    }
    let setup_sects = match start[SETUP_SECTS] {
        // "For backwards compatibility, if the setup_sects field contains 0, the real value is 4."
        0 => 4,
        sectors => u64::from(sectors),
    };
    let protected_mode = (setup_sects + 1) * SECTOR;
    let payload = source.read_vec(
        "the compressed kernel",
        protected_mode + u64::from(u32_at(&start, PAYLOAD_OFFSET)),
        u64::from(u32_at(&start, PAYLOAD_LENGTH)),
    )?;
    // The header's length follows from its jump instruction's target (boot.rst, "64-bit Boot
    // Protocol").
    let end = (HEADER_MAGIC + usize::from(start[JUMP_LEN])).min(HEADER_END_MAX);
    let header = start
        .get(HEADER_START..end)
        .ok_or(LoadError::Damaged("the setup header has no length"))?;
    if end <= PAYLOAD_LENGTH + 4 {
        return Err(LoadError::Damaged("the setup header is too short"));
    }
    Ok(BzImage {
        header: header.to_vec(),
        payload,
    })
}

/// What a kernel says about its inputs, from a header as [`BzImage::header`] holds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeaderLimits {
    /// Most bytes of command line, without the final zero.
    pub(crate) cmdline_bytes: usize,
    /// Highest address that the initramfs may take.
    pub(crate) initrd_last: u64,
}

impl HeaderLimits {
    /// What every 64-bit Linux accepts (COMMAND_LINE_SIZE is 2048; the initramfs below 2 GiB).
    pub(crate) const DEFAULT: Self = Self {
        cmdline_bytes: 2047,
        initrd_last: 0x7fff_ffff,
    };

    pub(crate) fn of(header: &[u8]) -> Self {
        Self {
            cmdline_bytes: u32_at(header, CMDLINE_SIZE - HEADER_START) as usize,
            initrd_last: u64::from(u32_at(header, INITRD_ADDR_MAX - HEADER_START)),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
