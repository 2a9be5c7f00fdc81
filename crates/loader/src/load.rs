//! Places a kernel and all that it is given in guest memory.

use std::fs::File;

use ringfence_memory::GuestRam;
use ringfence_memory::MMIO_HOLE_START;
use ringfence_memory::PAGE_SIZE;
use ringfence_x86::state::VcpuState;

use crate::BootProtocol;
use crate::Kernel;
use crate::LoadError;
use crate::MemoryMapEntry;
use crate::copy;
use crate::copy::Run;
use crate::linux;
use crate::memory_map::memory_map;
use crate::place;
use crate::pvh;
use crate::source::Source;
use crate::start;
use crate::start::write;

/// What to boot, and with what.
#[derive(Debug)]
pub struct BootSetup<'a> {
    /// The kernel.
    pub kernel: Kernel,
    /// How to enter it; [`Kernel::protocol`] when `None`.
    pub protocol: Option<BootProtocol>,
    /// The initramfs.
    pub initramfs: Option<File>,
    /// The command line, without a final zero.
    pub cmdline: &'a str,
    /// Where the ACPI root pointer lies, if the machine has one.
    pub rsdp: Option<u64>,
    /// Runs of addresses that the kernel must not give to devices.
    pub reserved: &'a [MemoryMapEntry],
    /// Fresh randomness for the kernel's pool.
    pub rng_seed: [u8; 32],
}

/// A kernel in its place.
#[derive(Debug)]
pub struct Loaded {
    /// What the first vCPU starts with. Its APIC base and MSRs are the board's to add.
    pub state: VcpuState,
    /// How it is entered.
    pub protocol: BootProtocol,
    /// First address past the kernel's segments.
    pub kernel_end: u64,
    /// The initramfs' address and length in bytes.
    pub initramfs: Option<(u64, u64)>,
}

/// What has been placed, as the boot structures tell it to the kernel.
pub(crate) struct Placed {
    pub(crate) initramfs: Option<(u64, u64)>,
    pub(crate) map: Vec<MemoryMapEntry>,
    pub(crate) rsdp: Option<u64>,
    pub(crate) cmdline_limit: u32,
}

/// Loads a kernel into fresh (zero) RAM.
///
/// # Errors
/// [`LoadError`] when something doesn't fit or can't be read. The RAM's content is undefined then.
pub fn load(ram: &GuestRam, setup: BootSetup<'_>) -> Result<Loaded, LoadError> {
    let kernel = setup.kernel;
    let protocol = setup.protocol.unwrap_or_else(|| kernel.protocol());
    place_segments(ram, &kernel)?;
    let cmdline_limit = place_cmdline(ram, &kernel, setup.cmdline)?;
    let initramfs = setup
        .initramfs
        .map(|file| place_initramfs(ram, &kernel, file))
        .transpose()?;
    let placed = Placed {
        initramfs,
        map: memory_map(ram.layout(), setup.reserved),
        rsdp: setup.rsdp,
        cmdline_limit,
    };
    let state = match protocol {
        BootProtocol::Linux64 => {
            let entry = linux64_entry(&kernel)?;
            linux::write_zero_page(
                ram,
                kernel.setup_header.as_deref(),
                &placed,
                &setup.rng_seed,
            )?;
            start::linux64(ram, entry)?
        }
        BootProtocol::Pvh => {
            let entry = kernel
                .elf
                .pvh_entry
                .ok_or(LoadError::Unsupported("it names no PVH entry point"))?;
            pvh::write_start_info(ram, &placed)?;
            start::pvh(ram, entry)?
        }
    };
    Ok(Loaded {
        state,
        protocol,
        kernel_end: kernel.end(),
        initramfs,
    })
}

/// Linux's ELF header names the physical address of `startup_64`.
fn linux64_entry(kernel: &Kernel) -> Result<u64, LoadError> {
    let elf = &kernel.elf;
    if !elf.is_64_bit {
        return Err(LoadError::Unsupported(
            "it is a 32-bit image without a PVH entry point",
        ));
    }
    let holds_entry =
        |segment: &&crate::elf::Segment| (segment.start..segment.end()).contains(&elf.entry);
    elf.segments
        .iter()
        .find(holds_entry)
        .map(|_| elf.entry)
        .ok_or(LoadError::Unsupported(
            "its entry point is not a physical address in its own segments",
        ))
}

/// RAM below the MMIO hole: everything at boot lies there.
fn low_bytes(ram: &GuestRam) -> u64 {
    ram.size_bytes().min(MMIO_HOLE_START)
}

fn place_segments(ram: &GuestRam, kernel: &Kernel) -> Result<(), LoadError> {
    let low_bytes = low_bytes(ram);
    let mut runs = Vec::with_capacity(kernel.elf.segments.len());
    for segment in &kernel.elf.segments {
        if segment.start < place::HIGH_MEMORY {
            return Err(LoadError::LowSegment(segment.start));
        }
        if segment.end() > low_bytes {
            return Err(LoadError::NoRoom {
                part: "the kernel",
                end: segment.end(),
                low_bytes,
            });
        }
        runs.push(Run {
            what: "the kernel",
            file_offset: segment.file_offset,
            len: segment.file_len,
            guest_start: segment.start,
        });
    }
    copy::into_low_ram(ram, &kernel.source, &runs)
}

/// Writes the command line and returns how long it could be.
fn place_cmdline(ram: &GuestRam, kernel: &Kernel, cmdline: &str) -> Result<u32, LoadError> {
    let limit_bytes = kernel.limits().cmdline_bytes.min(place::COMMAND_LINE_MAX);
    if cmdline.len() > limit_bytes {
        return Err(LoadError::CommandLine {
            len_bytes: cmdline.len(),
            limit_bytes,
        });
    }
    if cmdline.bytes().any(|byte| byte == 0) {
        return Err(LoadError::CommandLineZero);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    write(ram, "the command line", place::COMMAND_LINE, &bytes)?;
    Ok(u32::try_from(limit_bytes).unwrap_or(u32::MAX))
}

/// Places the initramfs as high as the kernel takes it, out of the way of its early allocations.
fn place_initramfs(ram: &GuestRam, kernel: &Kernel, file: File) -> Result<(u64, u64), LoadError> {
    let source = Source::file(file, "the initramfs")?;
    let len = source.len_bytes();
    let low_bytes = low_bytes(ram);
    let top = low_bytes.min(kernel.limits().initrd_last.saturating_add(1));
    let lowest = kernel.end().max(place::HIGH_MEMORY);
    let start = top
        .checked_sub(len)
        .map(|start| start & !(PAGE_SIZE - 1))
        .filter(|&start| start >= lowest)
        .ok_or_else(|| LoadError::NoRoom {
            part: "the initramfs",
            end: lowest.saturating_add(len),
            low_bytes,
        })?;
    let run = Run {
        what: "the initramfs",
        file_offset: 0,
        len,
        guest_start: start,
    };
    copy::into_low_ram(ram, &source, &[run])?;
    Ok((start, len))
}
