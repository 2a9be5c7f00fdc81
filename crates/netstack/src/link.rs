//! A socket as the link: the other end is a program of ours, such as the user-space gateway.
//!
//! One message on a connected UNIX `SOCK_SEQPACKET` or `SOCK_DGRAM` socket is one frame behind its
//! virtio header, up to 64 KiB long: segments cross unsplit. A message shorter than the header
//! isn't a frame but a [`LinkNotice`].

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;

use crate::NetBackend;
use crate::Offloads;

/// Bytes of a notice: its kind, its value, two zeros.
pub const NOTICE_BYTES: usize = 4;
const KIND_OFFLOADS: u8 = 1;
/// Asked of the host for the socket's buffer: several segments of 64 KiB.
const BUFFER_BYTES: libc::c_int = 4 << 20;

/// What the card's side tells the other besides frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkNotice {
    /// Frames to the guest may come so from now on.
    GuestOffloads(Offloads),
}

impl LinkNotice {
    /// As it goes over the link.
    #[must_use]
    pub fn encode(self) -> [u8; NOTICE_BYTES] {
        let Self::GuestOffloads(offloads) = self;
        let bits = [
            offloads.checksum,
            offloads.tso4,
            offloads.tso6,
            offloads.ecn,
            offloads.ufo,
        ];
        let value = bits
            .iter()
            .enumerate()
            .fold(0, |value, (bit, &on)| value | u8::from(on) << bit);
        [KIND_OFFLOADS, value, 0, 0]
    }

    /// The notice in a message, if it is one.
    #[must_use]
    pub fn decode(message: &[u8]) -> Option<Self> {
        let &[KIND_OFFLOADS, value, 0, 0] = message else {
            return None;
        };
        let has = |bit: u8| value >> bit & 1 != 0;
        Some(Self::GuestOffloads(Offloads {
            checksum: has(0),
            tso4: has(1),
            tso6: has(2),
            ecn: has(3),
            ufo: has(4),
        }))
    }
}

/// Why a descriptor can't be a link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Another kind of descriptor.
    #[error("the link of the network card is not a SOCK_SEQPACKET or SOCK_DGRAM socket")]
    NotPackets,
    /// Not a socket.
    #[error("cannot ask for the kind of socket that the network card's link is")]
    NotSocket(#[source] io::Error),
}

/// A socket whose other end takes and gives frames.
#[derive(Debug)]
pub struct Link {
    socket: File,
    /// A notice that found no room.
    pending: Option<LinkNotice>,
}

fn socket_type(socket: &File) -> io::Result<libc::c_int> {
    let mut kind: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of_val(&kind)).unwrap_or(4);
    // SAFETY: SO_TYPE fills one int; it and its length live during the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_TYPE,
            (&raw mut kind).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(kind)
}

fn enlarge(socket: &File) {
    let size = BUFFER_BYTES;
    let len = libc::socklen_t::try_from(size_of_val(&size)).unwrap_or(4);
    // SAFETY: SO_SNDBUF reads one int, a constant. A host that refuses leaves a smaller buffer.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_SNDBUF,
            (&raw const size).cast(),
            len,
        )
    };
}

impl Link {
    /// The link over `socket`, which is connected.
    ///
    /// # Errors
    /// [`LinkError`] when it doesn't carry messages.
    pub fn new(socket: File) -> Result<Self, LinkError> {
        match socket_type(&socket).map_err(LinkError::NotSocket)? {
            libc::SOCK_SEQPACKET | libc::SOCK_DGRAM => {}
            _ => return Err(LinkError::NotPackets),
        }
        enlarge(&socket);
        Ok(Self {
            socket,
            pending: None,
        })
    }

    fn send_pending(&mut self) -> io::Result<()> {
        let Some(notice) = self.pending else {
            return Ok(());
        };
        match vectored::send_bytes(self.socket.as_fd(), &notice.encode()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
            // A link that is gone shows when frames are sent.
            _ => {
                self.pending = None;
                Ok(())
            }
        }
    }
}

impl NetBackend for Link {
    fn queues(&self) -> u16 {
        1
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: false,
        }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.pending = Some(LinkNotice::GuestOffloads(offloads));
        // No room now: it goes before the next frame.
        let _ = self.send_pending();
        Ok(())
    }

    fn set_active_queues(&mut self, _queues: u16) -> io::Result<()> {
        Ok(())
    }

    fn descriptor(&self, _queue: u16) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self, _queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
        match vectored::receive(self.socket.as_fd(), slices)? {
            // The other end closed it.
            0 => Err(io::ErrorKind::ConnectionReset.into()),
            len => Ok(len),
        }
    }

    fn send(&mut self, _queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        self.send_pending()?;
        vectored::send(self.socket.as_fd(), slices).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::os::unix::net::UnixStream;

    use ringfence_memory::GuestAddress;
    use ringfence_memory::GuestMemoryBackend;
    use ringfence_memory::GuestRam;
    use ringfence_memory::HugePages;

    use super::*;

    fn link() -> (Link, UnixDatagram) {
        let (one, two) = UnixDatagram::pair().expect("a pair");
        two.set_nonblocking(true).expect("a socket");
        let link = Link::new(File::from(OwnedFd::from(one))).expect("a link");
        (link, two)
    }

    #[test]
    fn other_descriptors_are_refused() {
        let (stream, _other) = UnixStream::pair().expect("a pair");
        let refused = Link::new(File::from(OwnedFd::from(stream)));
        assert!(matches!(refused, Err(LinkError::NotPackets)));
        let null = File::open("/dev/null").expect("/dev/null");
        assert!(matches!(Link::new(null), Err(LinkError::NotSocket(_))));
    }

    #[test]
    fn frames_of_64_kib_cross_and_offloads_are_told_first() {
        let (mut link, peer) = link();
        let wanted = Offloads {
            checksum: true,
            tso6: true,
            ..Offloads::default()
        };
        link.set_guest_offloads(wanted).expect("told");
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let slice = |len| ram.memory().get_slice(GuestAddress(0), len).expect("ram");
        link.send(0, &[slice(65_000)]).expect("room");
        let mut message = vec![0; 70_000];
        let len = peer.recv(&mut message).expect("the notice");
        let notice = LinkNotice::decode(&message[..len]);
        assert_eq!(notice, Some(LinkNotice::GuestOffloads(wanted)));
        assert_eq!(peer.recv(&mut message).expect("the frame"), 65_000);
        peer.send(&message[..64_000]).expect("room");
        assert_eq!(link.receive(0, &[slice(70_000)]).expect("came"), 64_000);
        let nothing = link.receive(0, &[slice(70_000)]).expect_err("nothing");
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_notice_that_finds_no_room_goes_before_the_next_frame() {
        let (mut link, peer) = link();
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let slice = ram.memory().get_slice(GuestAddress(0), 60).expect("ram");
        while link.send(0, &[slice]).is_ok() {}
        link.set_guest_offloads(Offloads::default()).expect("kept");
        let mut message = [0; 100];
        while peer.recv(&mut message).is_ok_and(|len| len == 60) {}
        link.send(0, &[slice]).expect("room");
        assert_eq!(peer.recv(&mut message).expect("the notice"), NOTICE_BYTES);
        assert_eq!(peer.recv(&mut message).expect("the frame"), 60);
    }

    #[test]
    fn notices_round_trip_and_nothing_else_is_one() {
        for bits in 0..32_u8 {
            let notice = LinkNotice::decode(&[1, bits, 0, 0]).expect("a notice");
            assert_eq!(notice.encode(), [1, bits, 0, 0]);
        }
        for other in [&[][..], &[1, 0, 0], &[2, 0, 0, 0], &[1, 0, 0, 1]] {
            assert_eq!(LinkNotice::decode(other), None);
        }
    }
}
