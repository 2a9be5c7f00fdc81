//! One connection to the host: frames over a stream socket.

use crate::error::AgentError;
use crate::frame::Decoder;
use crate::frame::Frame;
use crate::frame::FrameError;
use crate::frame::Kind;
use crate::frame::MAX_PAYLOAD_BYTES;
use crate::frame::encode;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use serde::Serialize;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

/// Bytes that are read at once.
pub(crate) const CHUNK_BYTES: usize = 64 << 10;

/// The connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The host closed it, in the middle of something.
    #[error("the host closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection failed")]
    Io(#[from] Errno),
    /// The host sends what are no frames.
    #[error("the host broke the protocol")]
    Frame(#[from] FrameError),
    /// The host sends a frame where another belongs.
    #[error("a frame of kind {0:?} came at the wrong time")]
    Unexpected(Kind),
}

/// A connection. Closed when dropped.
#[derive(Debug)]
pub(crate) struct Link {
    fd: OwnedFd,
    decoder: Decoder,
    chunk: Vec<u8>,
}

impl Link {
    /// Takes a connected stream socket.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            decoder: Decoder::default(),
            chunk: vec![0; CHUNK_BYTES],
        }
    }

    /// To wait on.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A frame that has already been read.
    ///
    /// # Errors
    ///
    /// The host broke the protocol.
    pub(crate) fn buffered(&mut self) -> Result<Option<Frame>, LinkError> {
        Ok(self.decoder.next_frame()?)
    }

    /// Reads what there is, without waiting. Returns `false` at the stream's end.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub(crate) fn fill(&mut self) -> Result<bool, LinkError> {
        match self.read(RecvFlags::DONTWAIT) {
            Err(LinkError::Io(Errno::AGAIN)) => Ok(true),
            other => other,
        }
    }

    fn read(&mut self, flags: RecvFlags) -> Result<bool, LinkError> {
        let (count, _) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.fd, self.chunk.as_mut_slice(), flags)
        })?;
        self.decoder
            .push(self.chunk.get(..count).unwrap_or_default());
        Ok(count > 0)
    }

    /// Waits for a frame; `None` at the stream's end.
    ///
    /// # Errors
    ///
    /// The socket failed or the host broke the protocol.
    pub(crate) fn receive(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            if !self.read(RecvFlags::empty())? {
                return Ok(None);
            }
        }
    }

    /// Waits for a piece of a file or tar stream; `None` at its end.
    ///
    /// # Errors
    ///
    /// The connection failed, or the host sends something else.
    pub(crate) fn receive_data(&mut self) -> Result<Option<Vec<u8>>, LinkError> {
        match self.receive()? {
            Some(frame) if frame.kind == Kind::Data => {
                Ok((!frame.payload.is_empty()).then_some(frame.payload))
            }
            Some(frame) => Err(LinkError::Unexpected(frame.kind)),
            None => Err(LinkError::Closed),
        }
    }

    /// Sends as much of `bytes` as goes without waiting; returns how much.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub(crate) fn send_some(&self, bytes: &[u8]) -> Result<usize, LinkError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, bytes, flags)) {
            Err(Errno::AGAIN) => Ok(0),
            other => Ok(other?),
        }
    }

    /// Sends a frame, waiting as long as it takes.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub(crate) fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), LinkError> {
        let mut bytes = Vec::with_capacity(payload.len() + 8);
        encode(kind, payload, &mut bytes);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let count = rustix::io::retry_on_intr(|| {
                rustix::net::send(&self.fd, rest, SendFlags::NOSIGNAL)
            })?;
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// Sends a frame of JSON.
    ///
    /// # Errors
    ///
    /// The socket failed.
    pub(crate) fn send_json<T: Serialize>(&self, kind: Kind, value: &T) -> Result<(), LinkError> {
        let bytes = json(value);
        if bytes.len() > MAX_PAYLOAD_BYTES {
            let error = AgentError::guest("the answer is too long for a frame");
            return self.send(Kind::Error, &json(&error));
        }
        self.send(kind, &bytes)
    }
}

/// A value as JSON. Ours always have a form.
pub(crate) fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_else(|_| b"{}".to_vec())
}
