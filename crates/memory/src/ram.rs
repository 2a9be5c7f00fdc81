//! The memfd that is the machine's RAM, and its mappings.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use vm_memory::FileOffset;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestRegionMmap;
use vm_memory::MemoryRegionAddress;
use vm_memory::mmap::MmapRegionBuilder;

use crate::GuestMemory;
use crate::PageTracker;
use crate::RamLayout;
use crate::Unheard;
use crate::WriteWatcher;

/// The most RAM a machine can have: 4 TiB, well inside every processor's physical address space.
pub const MAX_RAM_BYTES: u64 = 1 << 42;

/// Which host pages back the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Ordinary 4 KiB pages.
    #[default]
    Off,
    /// Ask for transparent huge pages; the host may decline silently.
    Transparent,
    /// 2 MiB pages from the host's reserved pool; creation fails when the pool is too small.
    Reserved,
}

/// Why the machine's RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero.
    #[error("a machine needs at least one page of memory")]
    Empty,
    /// The size passes [`MAX_RAM_BYTES`].
    #[error("a machine can have at most {MAX_RAM_BYTES} bytes of memory, not {0}")]
    TooLarge(u64),
    /// `memfd_create` or `ftruncate` failed.
    #[error("cannot create a memory file of {len_bytes} bytes")]
    Create {
        /// The size asked for.
        len_bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// `mmap` failed.
    #[error("cannot map {len_bytes} bytes of guest memory at guest address {start:#x}")]
    Map {
        /// First guest address of the run.
        start: u64,
        /// Its length.
        len_bytes: u64,
        /// What vm-memory said.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The runs don't form a memory map.
    #[error("the memory layout is not usable")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// A run lies past the end of the address space.
    #[error("guest memory at {0:#x} does not fit the address space")]
    Range(u64),
}

/// The machine's RAM: a memfd and its one mapping.
///
/// Clones share the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    file: Arc<File>,
    layout: RamLayout,
    memory: GuestMemory,
}

impl GuestRam {
    /// Makes zeroed RAM of `size_bytes`, laid out as a PC's.
    ///
    /// # Errors
    /// [`MemoryError`] when the size is zero or the host refuses the memory.
    pub fn new(size_bytes: u64, huge_pages: HugePages) -> Result<Self, MemoryError> {
        let layout = RamLayout::pc(size_bytes);
        if layout.size_bytes() == 0 {
            return Err(MemoryError::Empty);
        }
        if layout.size_bytes() > MAX_RAM_BYTES {
            return Err(MemoryError::TooLarge(size_bytes));
        }
        let file = memory_file(layout.size_bytes(), huge_pages)?;
        Self::from_file(file, layout, huge_pages)
    }

    /// Maps RAM from `file`, which holds at least `layout.size_bytes()`.
    ///
    /// # Errors
    /// [`MemoryError`] when the file can't be mapped.
    pub fn from_file(
        file: File,
        layout: RamLayout,
        huge_pages: HugePages,
    ) -> Result<Self, MemoryError> {
        let file = Arc::new(file);
        let mut regions = Vec::with_capacity(layout.ranges().len());
        for range in layout.ranges() {
            let len =
                usize::try_from(range.len_bytes).map_err(|_| MemoryError::Range(range.start.0))?;
            let mapping =
                MmapRegionBuilder::new_with_bitmap(len, PageTracker::new(range.start, len))
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::from_arc(Arc::clone(&file), range.file_offset))
                    .with_hugetlbfs(huge_pages == HugePages::Reserved)
                    .build()
                    .map_err(|source| MemoryError::Map {
                        start: range.start.0,
                        len_bytes: range.len_bytes,
                        source,
                    })?;
            if huge_pages == HugePages::Transparent {
                // SAFETY: the range is the mapping just made; the advice changes no content.
                // A kernel without huge pages for memfds refuses: that is what "ask" means.
                unsafe {
                    libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE)
                };
            }
            regions.push(
                GuestRegionMmap::new(mapping, range.start)
                    .ok_or(MemoryError::Range(range.start.0))?,
            );
        }
        let memory = GuestMemory::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(Self {
            file,
            layout,
            memory,
        })
    }

    /// The memory as devices and loaders use it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memfd, for snapshots, forks and back ends in other processes.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where the RAM lies.
    #[must_use]
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Gives the host pages of a range back; the guest finds zeros there. Only whole pages inside
    /// the range and inside RAM are given back.
    ///
    /// # Errors
    /// What the host says; a range that isn't RAM is nobody's and gives nothing back.
    pub fn discard(&self, start: GuestAddress, len_bytes: u64) -> io::Result<()> {
        let page = crate::PAGE_SIZE;
        let Some(end) = start.0.checked_add(len_bytes) else {
            return Ok(());
        };
        for range in self.layout.ranges() {
            let range_end = range.start.0 + range.len_bytes;
            let first = start.0.max(range.start.0).next_multiple_of(page);
            let last = end.min(range_end) / page * page;
            if first < last {
                let offset = range.file_offset + (first - range.start.0);
                punch_hole(&self.file, offset, last - first)?;
                self.mark_written(GuestAddress(first), last - first);
            }
        }
        Ok(())
    }

    /// The pages' content changed without a write: whoever follows writes hears of it.
    fn mark_written(&self, start: GuestAddress, len_bytes: u64) {
        if let (Some((tracker, offset)), Ok(len)) =
            (self.tracker(start), usize::try_from(len_bytes))
        {
            vm_memory::bitmap::Bitmap::mark_dirty(tracker, offset, len);
        }
    }

    /// Total bytes of RAM.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.layout.size_bytes()
    }

    /// Starts or stops the dirty log of every run.
    ///
    /// # Errors
    /// [`Unheard`] while there is an [`UnheardWriter`](crate::UnheardWriter); the log is off then.
    pub fn set_logging(&self, on: bool) -> Result<(), Unheard> {
        let trackers = || self.memory.iter().map(|region| (**region).bitmap());
        let result = trackers().try_for_each(|tracker| tracker.set_logging(on));
        if result.is_err() {
            for tracker in trackers() {
                // Turning it off is never refused.
                let _ = tracker.set_logging(false);
            }
        }
        result
    }

    /// Names who hears of device writes to watched pages.
    pub fn set_watcher(&self, watcher: &Arc<dyn WriteWatcher>) {
        for region in self.memory.iter() {
            (**region).bitmap().set_watcher(Arc::clone(watcher));
        }
    }

    /// The tracker that covers `address`, and the byte offset of `address` in its region.
    #[must_use]
    pub fn tracker(&self, address: GuestAddress) -> Option<(&PageTracker, usize)> {
        let region = self.memory.find_region(address)?;
        let MemoryRegionAddress(offset) = region.to_region_addr(address)?;
        Some(((**region).bitmap(), usize::try_from(offset).ok()?))
    }
}

fn memory_file(len_bytes: u64, huge_pages: HugePages) -> Result<File, MemoryError> {
    const NAME: &CStr = c"ringfence-ram";
    let mut flags = libc::MFD_CLOEXEC;
    if huge_pages == HugePages::Reserved {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    let create = |source| MemoryError::Create { len_bytes, source };
    // SAFETY: the name is a valid C string and the flags are memfd_create's.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(create(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor was just created and nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len_bytes).map_err(create)?;
    Ok(file)
}

fn punch_hole(file: &File, offset: u64, len_bytes: u64) -> io::Result<()> {
    let number = |value: u64| {
        libc::off_t::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
    };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open and the call takes no pointers. The mapping stays valid: its
    // pages are only replaced by zero pages, which the guest asked for.
    let result =
        unsafe { libc::fallocate(file.as_raw_fd(), mode, number(offset)?, number(len_bytes)?) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn ram_is_zeroed_and_holds_what_is_written() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let at = GuestAddress(0x1234);
        assert_eq!(ram.memory().read_obj::<u64>(at).expect("read"), 0);
        ram.memory().write_obj(0xfeed_u64, at).expect("write");
        assert_eq!(ram.memory().read_obj::<u64>(at).expect("read"), 0xfeed);
    }

    #[test]
    fn device_writes_reach_the_dirty_log_of_their_run() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        ram.set_logging(true).expect("all are heard");
        ram.memory()
            .write_obj(1_u8, GuestAddress(0x5000))
            .expect("write");
        let (tracker, _) = ram.tracker(GuestAddress(0)).expect("tracker");
        assert_eq!(tracker.take_dirty()[0], 1 << 5);
    }

    #[test]
    fn discarded_pages_are_given_back_and_read_as_zero() {
        use std::os::unix::fs::MetadataExt;
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let memory = ram.memory();
        memory
            .write_slice(&[7; 5 * 4096], GuestAddress(0x1000))
            .expect("write");
        let blocks = || ram.file().metadata().expect("a file").blocks();
        assert_eq!(blocks(), 5 * 8);
        ram.set_logging(true).expect("all are heard");
        ram.discard(GuestAddress(0x1800), 0x2800).expect("discard");
        assert_eq!(blocks(), 3 * 8, "the half page at the front stays");
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).expect("read");
        assert_eq!([byte(0x1fff), byte(0x2000), byte(0x4000)], [7, 0, 7]);
        let (tracker, _) = ram.tracker(GuestAddress(0)).expect("tracker");
        assert_eq!(tracker.take_dirty()[0], 0b1100);
    }

    #[test]
    fn discards_outside_ram_do_nothing() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        for (start, len) in [(1 << 40, 4096), (u64::MAX, 2), (0xf_f000, u64::MAX >> 1)] {
            ram.discard(GuestAddress(start), len)
                .expect("nothing to do");
        }
    }

    #[test]
    fn no_memory_is_refused() {
        assert!(matches!(
            GuestRam::new(0, HugePages::Off),
            Err(MemoryError::Empty)
        ));
    }

    #[test]
    fn an_impossible_size_names_the_size() {
        let error = GuestRam::new(1 << 62, HugePages::Off).expect_err("too large");
        assert!(error.to_string().contains("4611686018427387904"));
    }
}
