//! The guest's RAM as host addresses, for the translator and the monitor's own accesses.

// UNSAFETY: reads and writes guest memory, which the guest changes at the same time.
#![expect(unsafe_code, reason = "guest memory is reached by pointer")]

use std::arch::asm;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::GuestMemoryRegion;
use ringfence_memory::GuestRam;
use ringfence_memory::MemoryRegionAddress;

/// A run of RAM.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    len: u64,
    host: u64,
    /// Offset of the first byte in the memory's file.
    offset: u64,
}

/// Where each page of guest RAM lies in the host's address space.
#[derive(Clone, Debug)]
pub(crate) struct Ram {
    runs: Vec<Run>,
    /// Keeps the mapping alive.
    owner: GuestRam,
}

impl Ram {
    /// The view of `ram`.
    pub(crate) fn new(ram: &GuestRam) -> Self {
        let runs = ram
            .memory()
            .iter()
            .filter_map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some(Run {
                    start: region.start_addr().0,
                    len: region.len(),
                    host: host as u64,
                    offset: region.file_offset().map_or(0, |file| file.start()),
                })
            })
            .collect();
        Self {
            runs,
            owner: ram.clone(),
        }
    }

    /// The RAM this is a view of.
    pub(crate) fn owner(&self) -> &GuestRam {
        &self.owner
    }

    /// Host address of guest physical `gpa` when all `len` bytes are RAM in one run.
    pub(crate) fn host(&self, gpa: u64, len: u64) -> Option<u64> {
        self.runs.iter().find_map(|run| {
            let offset = gpa.checked_sub(run.start)?;
            (offset.checked_add(len)? <= run.len).then(|| run.host + offset)
        })
    }

    /// Offset of RAM at guest physical `gpa` in the memory's file.
    pub(crate) fn file_offset(&self, gpa: u64) -> Option<u64> {
        self.runs.iter().find_map(|run| {
            let offset = gpa.checked_sub(run.start)?;
            (offset < run.len).then(|| run.offset + offset)
        })
    }

    /// Guest physical address of a host address inside RAM.
    pub(crate) fn guest(&self, host: u64) -> Option<u64> {
        self.runs.iter().find_map(|run| {
            let offset = host.checked_sub(run.host)?;
            (offset < run.len).then(|| run.start + offset)
        })
    }

    /// Number of page slots that [`Self::page_number`] can return.
    pub(crate) fn pages(&self) -> usize {
        usize::try_from(self.runs.iter().map(|run| run.len >> 12).sum::<u64>()).unwrap_or(0)
    }

    /// Dense number of the RAM page that holds `gpa`.
    pub(crate) fn page_number(&self, gpa: u64) -> Option<usize> {
        let mut before = 0;
        for run in &self.runs {
            if let Some(offset) = gpa.checked_sub(run.start)
                && offset < run.len
            {
                return usize::try_from(before + (offset >> 12)).ok();
            }
            before += run.len >> 12;
        }
        None
    }

    /// A page-table entry, to be read and updated atomically.
    pub(crate) fn entry64(&self, gpa: u64) -> Option<&AtomicU64> {
        let host = self.host(gpa & !7, 8)?;
        // SAFETY: 8 aligned bytes of RAM that stay mapped as long as `self`; the guest accesses
        // them concurrently, which an atomic allows.
        Some(unsafe { AtomicU64::from_ptr(host as *mut u64) })
    }

    /// As [`Self::entry64`], for 32-bit paging.
    pub(crate) fn entry32(&self, gpa: u64) -> Option<&AtomicU32> {
        let host = self.host(gpa & !3, 4)?;
        // SAFETY: as above, for 4 bytes.
        Some(unsafe { AtomicU32::from_ptr(host as *mut u32) })
    }

    /// Reads an aligned 64-bit word of RAM.
    pub(crate) fn load64(&self, gpa: u64) -> Option<u64> {
        Some(self.entry64(gpa)?.load(Ordering::SeqCst))
    }
}

/// Copies between guest memory and the monitor's, or within guest memory, forwards.
///
/// # Safety
/// Both ranges are mapped. They may change under the copy: it is an instruction, not Rust's
/// notion of a copy, so that is only a race of the guest with itself.
pub(crate) unsafe fn copy_raw(from: u64, to: u64, len: usize) {
    // SAFETY: the caller vouches for the ranges; the direction flag is clear in Rust code.
    unsafe {
        asm!(
            "rep movsb",
            inout("rsi") from => _,
            inout("rdi") to => _,
            inout("rcx") len => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Reads from guest memory at host address `from`.
///
/// # Safety
/// `from` leads to `data.len()` bytes of RAM.
pub(crate) unsafe fn read_raw(from: u64, data: &mut [u8]) {
    // SAFETY: the caller vouches for the source; the destination is ours.
    unsafe { copy_raw(from, data.as_mut_ptr() as u64, data.len()) };
}

/// Writes to guest memory at host address `to`.
///
/// # Safety
/// `to` leads to `data.len()` bytes of RAM.
pub(crate) unsafe fn write_raw(to: u64, data: &[u8]) {
    // Words are written whole: other vCPUs may be polling them.
    // SAFETY: the caller vouches for the destination; the source is ours.
    unsafe {
        match data.len() {
            2 if to.is_multiple_of(2) => {
                (to as *mut u16).write_volatile(u16::from_ne_bytes([data[0], data[1]]));
            }
            4 if to.is_multiple_of(4) => (to as *mut u32)
                .write_volatile(u32::from_ne_bytes([data[0], data[1], data[2], data[3]])),
            8 if to.is_multiple_of(8) => {
                let mut word = [0; 8];
                word.copy_from_slice(data);
                (to as *mut u64).write_volatile(u64::from_ne_bytes(word));
            }
            _ => copy_raw(data.as_ptr() as u64, to, data.len()),
        }
    }
}
