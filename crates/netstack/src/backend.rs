//! What a network card needs of whatever it's plugged into.

use std::io;
use std::os::fd::BorrowedFd;

use ringfence_memory::GuestAddress;
use ringfence_memory::vectored::GuestSlice;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of `struct virtio_net_hdr_v1`, before every frame (virtio 1.2 §5.1.6).
pub const HEADER_BYTES: usize = 12;

/// Work that may be left to the other side of a frame's way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Splitting TCP over IPv4.
    pub tso4: bool,
    /// Splitting TCP over IPv6.
    pub tso6: bool,
    /// Both of these with congestion marks.
    pub ecn: bool,
    /// Splitting UDP.
    pub ufo: bool,
}

impl Offloads {
    /// What both sides have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            checksum: self.checksum && other.checksum,
            tso4: self.tso4 && other.tso4,
            tso6: self.tso6 && other.tso6,
            ecn: self.ecn && other.ecn,
            ufo: self.ufo && other.ufo,
        }
    }
}

/// The other end of a network card, with one or more queue pairs.
///
/// Nothing here blocks: what can't be done now is `WouldBlock`, and the queue's descriptor says
/// when it can.
pub trait NetBackend: Send {
    /// Queue pairs.
    fn queues(&self) -> u16;

    /// What it can leave to the guest, and take from it.
    fn offloads(&self) -> Offloads;

    /// What the guest agreed to take: frames may come so from now on.
    ///
    /// # Errors
    /// When the host refuses.
    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// How many of the queues the guest serves.
    ///
    /// # Errors
    /// When the host refuses.
    fn set_active_queues(&mut self, queues: u16) -> io::Result<()>;

    /// Readable when a frame waits, writable when one can be sent.
    fn descriptor(&self, queue: u16) -> BorrowedFd<'_>;

    /// Puts the next frame, header first, into `slices`; what doesn't fit is cut off.
    ///
    /// # Errors
    /// `WouldBlock` when none waits; others when the link is gone.
    fn receive(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<usize>;

    /// Sends a frame, header first.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room now; others when the frame is no good.
    fn send(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Whoever moves frames without this process, if there is somebody.
    fn mover(&mut self) -> Option<&mut dyn FrameMover> {
        None
    }
}

/// A ring (virtio 1.2 §2.7) that is lent to somebody outside the process, and how the two sides
/// hear of each other. The ring lies in guest memory: that was checked.
#[derive(Clone, Copy)]
pub struct LentRing<'a> {
    /// Descriptors in it.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub driver: GuestAddress,
    /// The used ring.
    pub device: GuestAddress,
    /// The next entry of the available ring.
    pub next: u16,
    /// Signalled when the driver made buffers available.
    pub kick: &'a EventFd,
    /// To be signalled when buffers were used.
    pub call: &'a EventFd,
    /// To be signalled when the driver broke the ring.
    pub broken: &'a EventFd,
}

impl std::fmt::Debug for LentRing<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LentRing")
            .field("size", &self.size)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// Moves frames between a pair of rings and the link by itself.
///
/// What it writes to guest memory nobody hears of
/// ([`UnheardWriter`](ringfence_memory::UnheardWriter)).
pub trait FrameMover: Send {
    /// Begins with the pair's receive and send ring; `features` were negotiated.
    ///
    /// # Errors
    /// When the host refuses, or somebody must hear of every write; nothing was begun then.
    fn start(&mut self, pair: u16, features: u64, rings: [LentRing<'_>; 2]) -> io::Result<()>;

    /// Ends, and returns the next entry of each available ring. Whatever comes of it, neither
    /// guest memory nor the link is touched afterwards.
    ///
    /// # Errors
    /// When the host doesn't say where the rings stand.
    fn stop(&mut self, pair: u16) -> io::Result<[u16; 2]>;
}
