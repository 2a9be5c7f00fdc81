//! Guest memory: one memfd, mapped shared, split around the PC's MMIO hole.
//!
//! The memfd is the machine's RAM and nothing else. It is mapped shared so that forks, snapshots
//! and vhost-user back ends can map the same pages. Access goes through `vm-memory`'s volatile
//! types: the guest writes concurrently, so guest memory is never a `&[u8]`.
//!
//! Every write that a device makes through these types passes [`PageTracker`], which serves two
//! readers: the dirty log (snapshots, migration) and an engine that has derived something from a
//! page's content (translated code) and must hear when a device changes it.
//!
//! See DESIGN.md for the principles.

// UNSAFETY: creates the memfd and hands its pages to `mmap` through vm-memory; hands guest pages to
// vectored reads and writes of files.
#![expect(
    unsafe_code,
    reason = "memfd_create, madvise and vectored I/O on guest pages have no safe wrapper"
)]

mod layout;
mod ram;
mod tracker;
mod unheard;
pub mod vectored;

pub use layout::{MMIO_HOLE_END, MMIO_HOLE_START, PAGE_SIZE, RamLayout, RamRange};
pub use ram::{GuestRam, HugePages, MAX_RAM_BYTES, MemoryError};
pub use tracker::{PageTracker, Unheard, WriteWatcher};
pub use unheard::UnheardWriter;
pub use vm_memory::{
    Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, Le16, Le32, Le64, MemoryRegionAddress, VolatileSlice,
};

/// The machine's physical memory, as devices and loaders see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<PageTracker>;

/// A guest virtual address (GVA). Only an engine translates it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestVirt(pub u64);
