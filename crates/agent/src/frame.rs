//! Frames: a length (u32, little-endian), a kind (u8), the payload. docs/reference/agent-protocol.md.

/// The longest payload that a frame may have, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// Length and kind, in bytes.
pub const HEADER_BYTES: usize = 5;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Guest: here I am.
    Hello = 1,
    /// Host: how the guest is set up.
    Setup = 2,
    /// Guest: it is set up.
    Ready = 3,
    /// Host: do something.
    Request = 4,
    /// Guest: what came of it.
    Answer = 5,
    /// Guest: what failed, and why.
    Error = 6,
    /// Bytes of a file or a tar stream; none end it.
    Data = 7,
    /// Host: bytes for a command; none close it.
    Stdin = 16,
    /// Guest: what a command wrote.
    Stdout = 17,
    /// Guest: what a command wrote to its standard error.
    Stderr = 18,
    /// How many bytes more may be sent on a stream.
    Credit = 19,
    /// Host: a signal for the command.
    Signal = 20,
    /// Host: the terminal's new size.
    Resize = 21,
    /// Guest: how the command ended.
    Exit = 22,
}

impl Kind {
    const ALL: [Self; 14] = [
        Self::Hello,
        Self::Setup,
        Self::Ready,
        Self::Request,
        Self::Answer,
        Self::Error,
        Self::Data,
        Self::Stdin,
        Self::Stdout,
        Self::Stderr,
        Self::Credit,
        Self::Signal,
        Self::Resize,
        Self::Exit,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Whether this is for the command that runs on a connection; such frames may still be under way
    /// when it has ended.
    pub fn is_for_a_command(self) -> bool {
        matches!(
            self,
            Self::Stdin | Self::Credit | Self::Signal | Self::Resize
        )
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// At most [`MAX_PAYLOAD_BYTES`].
    pub payload: Vec<u8>,
}

/// What a sender did wrong. The connection can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A payload is longer than allowed.
    #[error("a frame of {0} bytes is longer than {MAX_PAYLOAD_BYTES}")]
    TooLong(usize),
    /// A kind that doesn't exist.
    #[error("there is no frame of kind {0}")]
    UnknownKind(u8),
}

/// Takes frames out of a stream of bytes, however it is cut. Holds one frame and a read's worth.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next frame that is there as a whole.
    ///
    /// # Errors
    ///
    /// The sender broke the rules.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let [a, b, c, d, kind] = *header;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if length > MAX_PAYLOAD_BYTES {
            return Err(FrameError::TooLong(length));
        }
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.start += HEADER_BYTES + length;
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        Ok(Some(Frame { kind, payload }))
    }
}

/// Appends a frame to what is to be sent.
///
/// # Panics
///
/// The payload is longer than [`MAX_PAYLOAD_BYTES`]: callers bound it.
pub fn encode(kind: Kind, payload: &[u8], out: &mut Vec<u8>) {
    assert!(
        payload.len() <= MAX_PAYLOAD_BYTES,
        "payloads are bounded where they are made"
    );
    let length = u32::try_from(payload.len()).expect("checked above");
    out.extend_from_slice(&length.to_le_bytes());
    out.push(kind as u8);
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let kind = proptest::sample::select(Kind::ALL.to_vec());
        let payload = proptest::collection::vec(any::<u8>(), 0..300);
        let frame = (kind, payload).prop_map(|(kind, payload)| Frame { kind, payload });
        proptest::collection::vec(frame, 0..8)
    }

    proptest! {
        #[test]
        fn frames_come_back_however_the_stream_is_cut(sent in frames(), cut in 1_usize..400) {
            let mut bytes = Vec::new();
            for frame in &sent {
                encode(frame.kind, &frame.payload, &mut bytes);
            }
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().expect("well-formed") {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert_eq!(decoder.next_frame(), Ok(None));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4096), cut in 1_usize..64) {
            let mut decoder = Decoder::default();
            'stream: for piece in bytes.chunks(cut) {
                decoder.push(piece);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => prop_assert!(frame.payload.len() <= MAX_PAYLOAD_BYTES),
                        Ok(None) => break,
                        Err(_) => break 'stream,
                    }
                }
                prop_assert!(decoder.buffer.len() <= MAX_PAYLOAD_BYTES + HEADER_BYTES + 64);
            }
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut decoder = Decoder::default();
        decoder.push(&[0x01, 0x00, 0x10, 0x00, 4]);
        let refused = decoder.next_frame();
        assert_eq!(refused, Err(FrameError::TooLong((1 << 20) + 1)));
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(&[0, 0, 0, 0, 99]);
        assert_eq!(decoder.next_frame(), Err(FrameError::UnknownKind(99)));
    }
}
