//! How connections that the guest makes reach the host's program.

use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::net::sendmsg;

/// Bytes of a message: the port that the guest connected to and the guest's own port, both
/// little-endian; the descriptor travels beside them.
pub const HANDOUT_BYTES: usize = 8;

/// The sending end of the hand-out socket.
#[derive(Debug)]
pub struct Handout(OwnedFd);

impl Handout {
    /// Over `socket`, a SOCK_SEQPACKET one.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Hands out a new connection and keeps the device's end of it.
    ///
    /// # Errors
    /// When nobody takes it: the socket is closed or full.
    pub(super) fn open(&self, port: u32, guest_port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [theirs.as_fd()];
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut message = [0; HANDOUT_BYTES];
        message[..4].copy_from_slice(&port.to_le_bytes());
        message[4..].copy_from_slice(&guest_port.to_le_bytes());
        sendmsg(
            &self.0,
            &[IoSlice::new(&message)],
            &mut ancillary,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        Ok(ours)
    }
}
