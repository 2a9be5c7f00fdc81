//! Files and sockets straight to and from guest memory, with no copy in between.
//!
//! The kernel reads and writes the guest's pages by the mapping that [`crate::GuestRam`] holds; the guest
//! may change them meanwhile, which is its own affair. Writes to guest memory are reported to the
//! page tracker after the bytes are in place.

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;
use vm_memory::bitmap::RefSlice;

use crate::PageTracker;

/// A run of guest memory that lies in one region.
pub type GuestSlice<'a> = VolatileSlice<'a, RefSlice<'a, PageTracker>>;

/// Most buffers that one call hands to the kernel (`IOV_MAX`); more are a short transfer.
const MAX_BUFFERS: usize = 1024;

/// Whether a transfer may wait for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until it's done.
    Allowed,
    /// `WouldBlock` instead (`RWF_NOWAIT`): only what is cached.
    Never,
}

impl Wait {
    fn flags(self) -> libc::c_int {
        match self {
            Self::Allowed => 0,
            Self::Never => libc::RWF_NOWAIT,
        }
    }
}

struct Buffers<'a, 'm> {
    slices: &'a [GuestSlice<'m>],
    raw: Vec<libc::iovec>,
}

impl<'a, 'm> Buffers<'a, 'm> {
    fn new(slices: &'a [GuestSlice<'m>]) -> Self {
        let slices = &slices[..slices.len().min(MAX_BUFFERS)];
        let raw = slices
            .iter()
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        Self { slices, raw }
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.raw.len()).unwrap_or(0)
    }

    /// Reports the first `len` bytes as written.
    fn mark_written(&self, len: usize) {
        let mut rest = len;
        for slice in self.slices {
            let part = rest.min(slice.len());
            slice.bitmap().mark_dirty(0, part);
            rest -= part;
            if rest == 0 {
                break;
            }
        }
    }
}

fn done(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Reads from `file` at `offset` into `slices`; returns the number of bytes, 0 at the end.
///
/// # Errors
/// What the kernel says; `WouldBlock` for [`Wait::Never`].
pub fn read_at(
    file: BorrowedFd<'_>,
    slices: &[GuestSlice<'_>],
    offset: u64,
    wait: Wait,
) -> io::Result<usize> {
    let buffers = Buffers::new(slices);
    let offset = file_offset(offset)?;
    // SAFETY: each buffer is a run of the mapping that `slices` borrows, so it stays mapped and
    // writable during the call; nothing in this process holds a reference into guest memory.
    let len = done(unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            buffers.raw.as_ptr(),
            buffers.count(),
            offset,
            wait.flags(),
        )
    })?;
    buffers.mark_written(len);
    Ok(len)
}

/// Writes `slices` to `file` at `offset`; returns the number of bytes taken.
///
/// # Errors
/// What the kernel says.
pub fn write_at(file: BorrowedFd<'_>, slices: &[GuestSlice<'_>], offset: u64) -> io::Result<usize> {
    let buffers = Buffers::new(slices);
    let offset = file_offset(offset)?;
    // SAFETY: as in `read_at`; the kernel only reads the buffers.
    done(unsafe {
        libc::pwritev(
            file.as_raw_fd(),
            buffers.raw.as_ptr(),
            buffers.count(),
            offset,
        )
    })
}

/// Reads from a stream or packet source into `slices`.
///
/// # Errors
/// What the kernel says.
pub fn read(source: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let buffers = Buffers::new(slices);
    // SAFETY: as in `read_at`.
    let len =
        done(unsafe { libc::readv(source.as_raw_fd(), buffers.raw.as_ptr(), buffers.count()) })?;
    buffers.mark_written(len);
    Ok(len)
}

/// Writes `slices` to a stream or packet sink.
///
/// # Errors
/// What the kernel says.
pub fn write(sink: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let buffers = Buffers::new(slices);
    // SAFETY: as in `read_at`; the kernel only reads the buffers.
    done(unsafe { libc::writev(sink.as_raw_fd(), buffers.raw.as_ptr(), buffers.count()) })
}

fn message(buffers: &mut Buffers<'_, '_>) -> libc::msghdr {
    // SAFETY: an all-zero msghdr is a valid empty one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.raw.as_mut_ptr();
    message.msg_iovlen = buffers.raw.len();
    message
}

/// Sends `slices` on a socket without waiting; a closed peer is an error, never a signal.
///
/// # Errors
/// What the kernel says; `WouldBlock` when the socket is full.
pub fn send(socket: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let mut buffers = Buffers::new(slices);
    let message = message(&mut buffers);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: as in `read_at`; the message names `buffers.raw`, which outlives the call, and
    // nothing else.
    done(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// Sends bytes of this program's own on a socket without waiting.
///
/// # Errors
/// What the kernel says; `WouldBlock` when the socket is full.
pub fn send_bytes(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `bytes` lives during the call, and the kernel only reads it.
    done(unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    })
}

/// Receives from a socket into `slices` without waiting.
///
/// # Errors
/// What the kernel says; `WouldBlock` when nothing came.
pub fn receive(socket: BorrowedFd<'_>, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
    let mut buffers = Buffers::new(slices);
    let mut message = message(&mut buffers);
    // SAFETY: as in `send`; the kernel writes to the buffers and to the message alone.
    let len = done(unsafe {
        libc::recvmsg(
            socket.as_raw_fd(),
            &raw mut message,
            libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
        )
    })?;
    buffers.mark_written(len);
    Ok(len)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::Bytes;
    use vm_memory::GuestAddress;
    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::GuestRam;
    use crate::HugePages;

    fn ram() -> GuestRam {
        GuestRam::new(1 << 20, HugePages::Off).expect("ram")
    }

    #[test]
    fn a_file_round_trips_and_only_the_bytes_read_are_marked() {
        let (file, ram) = (ram(), ram());
        let disk = file.file().as_fd();
        let memory = ram.memory();
        memory
            .write_slice(b"hello, world", GuestAddress(0x1ffc))
            .expect("ram");
        let slice = |at, len| memory.get_slice(GuestAddress(at), len).expect("ram");
        let written = write_at(disk, &[slice(0x1ffc, 5), slice(0x2001, 7)], 100);
        assert_eq!(written.expect("write"), 12);
        ram.set_logging(true).expect("all are heard");
        let into = [slice(0x5ffe, 2), slice(0x7000, 0x3000)];
        let read = read_at(disk, &into, 100, Wait::Allowed).expect("read");
        assert_eq!(read, 0x3002);
        let mut text = [0; 10];
        memory
            .read_slice(&mut text, GuestAddress(0x7000))
            .expect("ram");
        assert_eq!(&text, b"llo, world");
        let (tracker, _) = ram.tracker(GuestAddress(0)).expect("ram");
        assert_eq!(tracker.take_dirty()[0], 0b11_1010_0000);
    }

    #[test]
    fn offsets_that_no_file_has_are_refused() {
        let ram = ram();
        let slice = ram.memory().get_slice(GuestAddress(0), 16).expect("ram");
        let refused = read_at(ram.file().as_fd(), &[slice], u64::MAX, Wait::Allowed);
        assert_eq!(
            refused.expect_err("too far").kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
