//! The record of a processor's user-visible state, as both sides load and leave it.

/// Bytes of the XSAVE area: x87 and SSE, header, upper halves of AVX (SDM 1 §13.4).
pub const XSAVE_BYTES: usize = 832;
/// Offset of the header's XSTATE_BV.
pub const XSTATE_BV: usize = 512;
/// Offset of the upper halves.
pub const UPPER: usize = 576;
/// Most cases of a batch.
pub const MAX_CASES: usize = 256;

/// What a case starts with, or how it ended. Ring 0 of the guest knows the layout.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct State {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// The exception that ended it.
    pub trap: u64,
    /// Its error code.
    pub error: u64,
    /// Address of the last page fault.
    pub cr2: u64,
    /// Room to a multiple of 64.
    pub reserved: u64,
    /// x87, SSE and AVX state in the standard format.
    pub xsave: [u8; XSAVE_BYTES],
}

const _: () = assert!(size_of::<State>() == 1024);

impl Default for State {
    fn default() -> Self {
        let mut xsave = [0; XSAVE_BYTES];
        xsave[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        xsave[XSTATE_BV] = 7;
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 2,
            fs_base: 0,
            gs_base: 0,
            trap: 0,
            error: 0,
            cr2: 0,
            reserved: 0,
            xsave,
        }
    }
}

impl State {
    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the structure is `repr(C)` without padding and holds plain integers.
        #[expect(unsafe_code, reason = "views plain data as bytes")]
        unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>())
        }
    }

    /// The state that `bytes` are.
    ///
    /// # Panics
    /// When there are fewer bytes than a state has.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        assert!(bytes.len() >= size_of::<Self>());
        // SAFETY: enough bytes, and any bytes are valid integers.
        #[expect(unsafe_code, reason = "views bytes as plain data")]
        unsafe {
            std::ptr::read_unaligned(bytes.as_ptr().cast())
        }
    }
}
