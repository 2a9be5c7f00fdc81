//! The header of every vsock packet (virtio 1.2 §5.10.6).

/// The host's context ID.
pub const HOST_CID: u64 = 2;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The only socket type spoken here (§5.10.6.4.1).
pub(super) const TYPE_STREAM: u16 = 1;

/// `op` values.
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// `flags` of SHUTDOWN: the sender won't receive, won't send.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`, fields as little-endian bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's context ID.
    pub source_cid: u64,
    /// Receiver's context ID.
    pub destination_cid: u64,
    /// Sender's port.
    pub source_port: u32,
    /// Receiver's port.
    pub destination_port: u32,
    /// Payload bytes that follow.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// What the packet does.
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Sender's receive buffer in bytes (§5.10.6.3).
    pub buffer: u32,
    /// Bytes that the sender has taken out of that buffer so far, wrapping.
    pub forwarded: u32,
}

impl Header {
    /// From its bytes.
    #[must_use]
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let quad = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            source_cid: quad(0),
            destination_cid: quad(8),
            source_port: word(16),
            destination_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// To its bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.destination_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.destination_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buffer.to_le_bytes());
        put(&self.forwarded.to_le_bytes());
        bytes
    }
}
