//! Host memory: sparse files, reservations of address space, and the code cache's two views.

// UNSAFETY: mmap and its relatives.
#![expect(unsafe_code, reason = "reserves and maps host address space")]

use std::ffi::CStr;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

/// A sparse file in memory.
pub(crate) fn memory_file(name: &CStr, len_bytes: u64) -> io::Result<OwnedFd> {
    // SAFETY: a valid C string and documented flags.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created and owned by nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = libc::off_t::try_from(len_bytes).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for writing.
    if unsafe { libc::ftruncate(fd, len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// A stretch of host address space that this value owns.
#[derive(Debug)]
pub(crate) struct Reservation {
    start: u64,
    len_bytes: u64,
}

/// Children of this process don't get these mappings: they have no use for them, and copying their
/// page tables takes time.
fn keep_from_children(start: u64, len: usize) {
    // SAFETY: the range is mapped; the advice changes no content. Without it children get more.
    unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTFORK) };
}

impl Reservation {
    /// Reserves address space; touching it faults.
    pub(crate) fn new(len_bytes: u64) -> io::Result<Self> {
        Self::anonymous(len_bytes, libc::PROT_NONE)
    }

    /// Reserves memory that reads as zero and is allocated as it is written.
    pub(crate) fn zeroed(len_bytes: u64) -> io::Result<Self> {
        Self::anonymous(len_bytes, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn anonymous(len_bytes: u64, protection: i32) -> io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start as u64;
        // Huge pages would turn one touched entry into 2 MiB of zeroes.
        // SAFETY: the range was just mapped; the advice changes no content.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_NOHUGEPAGE) };
        keep_from_children(start, len);
        Ok(Self { start, len_bytes })
    }

    /// Maps a whole file shared, with the given protection.
    pub(crate) fn of_file(file: &OwnedFd, len_bytes: u64, protection: i32) -> io::Result<Self> {
        let reservation = Self::new(len_bytes)?;
        reservation.map(
            reservation.start,
            len_bytes,
            protection,
            file.as_raw_fd(),
            0,
        )?;
        Ok(reservation)
    }

    /// Shared memory that no file stands for, for reading and writing.
    pub(crate) fn shared(len_bytes: u64) -> io::Result<Self> {
        let reservation = Self::new(len_bytes)?;
        let flags = libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        reservation.map_with(reservation.start, len_bytes, protection, (-1, 0), flags)?;
        Ok(reservation)
    }

    /// A second view of [`Self::shared`] memory, to read and to run.
    pub(crate) fn executable_view(&self) -> io::Result<Self> {
        let len = usize::try_from(self.len_bytes).map_err(io::Error::other)?;
        // SAFETY: an old length of zero leaves the shared mapping alone and makes another one at an
        // address of the kernel's choice (mremap(2)).
        let view = unsafe {
            libc::mremap(
                self.start as *mut libc::c_void,
                0,
                len,
                libc::MREMAP_MAYMOVE,
            )
        };
        if view == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let view = Self {
            start: view as u64,
            len_bytes: self.len_bytes,
        };
        // SAFETY: the range was just mapped and nobody uses it yet.
        if unsafe {
            libc::mprotect(
                view.start as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_EXEC,
            )
        } != 0
        {
            return Err(io::Error::last_os_error());
        }
        keep_from_children(view.start, len);
        Ok(view)
    }

    /// First address.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Replaces a part of the reservation with a shared mapping of `fd`, for reading and writing.
    pub(crate) fn map_file(
        &self,
        address: u64,
        len_bytes: u64,
        fd: RawFd,
        offset: u64,
    ) -> io::Result<()> {
        self.map(
            address,
            len_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            fd,
            offset,
        )
    }

    fn map(
        &self,
        address: u64,
        len_bytes: u64,
        protection: i32,
        fd: RawFd,
        offset: u64,
    ) -> io::Result<()> {
        self.map_with(address, len_bytes, protection, (fd, offset), 0)
    }

    fn map_with(
        &self,
        address: u64,
        len_bytes: u64,
        protection: i32,
        (fd, offset): (RawFd, u64),
        further: i32,
    ) -> io::Result<()> {
        let end = address.checked_add(len_bytes);
        if address < self.start || end.is_none_or(|end| end > self.start + self.len_bytes) {
            return Err(io::Error::other("mapping outside its reservation"));
        }
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE | further;
        // SAFETY: MAP_FIXED replaces only address space of this reservation, as checked above.
        let mapped = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                len,
                protection,
                flags,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        keep_from_children(address, len);
        Ok(())
    }

    /// Makes a part of an anonymous reservation readable and writable.
    pub(crate) fn allow_writes(&self, address: u64, len_bytes: u64) -> io::Result<()> {
        debug_assert!(address >= self.start && address + len_bytes <= self.start + self.len_bytes);
        let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
        // SAFETY: the range belongs to this reservation.
        let result = unsafe {
            libc::mprotect(
                address as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Makes an anonymous reservation inaccessible and empty again.
    pub(crate) fn hide(&self) {
        let Ok(len) = usize::try_from(self.len_bytes) else {
            return;
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: replaces only this reservation's own range.
        let mapped = unsafe {
            libc::mmap(
                self.start as *mut libc::c_void,
                len,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        assert!(
            mapped != libc::MAP_FAILED,
            "replacing a mapping needs no memory"
        );
    }

    /// Gives the memory behind a part of the reservation back; it reads as zero afterwards.
    pub(crate) fn discard(&self, address: u64, len_bytes: u64) {
        debug_assert!(address >= self.start && address + len_bytes <= self.start + self.len_bytes);
        let Ok(len) = usize::try_from(len_bytes) else {
            return;
        };
        let address = address as *mut libc::c_void;
        // Shared mappings need REMOVE, private ones know only DONTNEED.
        // SAFETY: the range belongs to this reservation and holds only what may be zeroed.
        unsafe {
            if libc::madvise(address, len, libc::MADV_REMOVE) != 0 {
                libc::madvise(address, len, libc::MADV_DONTNEED);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Ok(len) = usize::try_from(self.len_bytes) {
            // SAFETY: the range is this value's own and nothing refers to it any more.
            unsafe { libc::munmap(self.start as *mut libc::c_void, len) };
        }
    }
}
