//! x87, SSE and AVX state outside generated code.
//!
//! While a vCPU is entered, x87 state is in the processor and vector state in the processor or in
//! [`crate::hot::Hot`]. Otherwise all of it is here, in XSAVE's standard format (SDM 1 §13.4).

// UNSAFETY: FXSAVE and FXRSTOR.
#![expect(unsafe_code, reason = "saves and loads processor state")]

use std::arch::asm;

use crate::core::Core;

/// MXCSR after reset: all exceptions masked.
pub(crate) const MXCSR_DEFAULT: u32 = 0x1f80;
/// x87 control word after FNINIT.
const FCW_DEFAULT: u16 = 0x037f;
const AREA_BYTES: usize = 1024;
const MXCSR: usize = 24;
const XMM: usize = 160;
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;

/// A standard-format XSAVE area.
#[repr(C, align(64))]
#[derive(Clone)]
pub(crate) struct XsaveArea(pub [u8; AREA_BYTES]);

impl XsaveArea {
    /// The state after reset.
    pub(crate) fn initial() -> Box<Self> {
        let mut area = Box::new(Self([0; AREA_BYTES]));
        area.0[..2].copy_from_slice(&FCW_DEFAULT.to_le_bytes());
        area.0[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_DEFAULT.to_le_bytes());
        area
    }

    fn word(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    fn set_word(&mut self, at: usize, value: u64) {
        self.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Makes an area that another process wrote one that can be loaded: no components but the
    /// guest's, no reserved bits.
    pub(crate) fn sanitize(&mut self, xcr0: u64) {
        let present = self.word(XSTATE_BV) & xcr0;
        self.set_word(XSTATE_BV, present);
        self.0[XSTATE_BV + 8..HEADER_END].fill(0);
        self.0[MXCSR + 2..MXCSR + 4].fill(0);
    }

    /// The first `len` bytes, for a saved state.
    pub(crate) fn bytes(&self, len: usize) -> Vec<u8> {
        self.0[..len.min(AREA_BYTES)].to_vec()
    }

    /// Replaces the state by a saved one; false when it isn't one (bits of components that the
    /// guest doesn't have, a compacted or short area, reserved MXCSR bits).
    pub(crate) fn load(&mut self, bytes: &[u8], xcr0: u64) -> bool {
        if bytes.len() < HEADER_END || bytes.len() > AREA_BYTES {
            return false;
        }
        let mut new = Self([0; AREA_BYTES]);
        new.0[..bytes.len()].copy_from_slice(bytes);
        let reserved_header = new.0[XSTATE_BV + 8..HEADER_END].iter().any(|&b| b != 0);
        let mxcsr = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        if new.word(XSTATE_BV) & !xcr0 != 0 || reserved_header || mxcsr & !0xffff != 0 {
            return false;
        }
        *self = new;
        true
    }
}

impl Core {
    fn avx_offset(&self) -> usize {
        self.shared
            .host
            .xsave_len
            .saturating_sub(256)
            .max(HEADER_END)
    }

    /// Puts the guest's state where generated code finds it.
    pub(crate) fn load_fpu(&mut self) {
        let present = self.xsave.word(XSTATE_BV);
        let avx = self.avx_offset();
        for register in 0..16 {
            let mut value = [0; 4];
            if present & SSE != 0 {
                value[0] = self.xsave.word(XMM + 16 * register);
                value[1] = self.xsave.word(XMM + 16 * register + 8);
            }
            if present & AVX != 0 && self.shared.host.avx {
                value[2] = self.xsave.word(avx + 16 * register);
                value[3] = self.xsave.word(avx + 16 * register + 8);
            }
            self.hot_mut().ymm[register] = value;
        }
        self.hot_mut().upper = 1;
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&self.xsave.0[MXCSR..MXCSR + 4]);
        self.hot_mut().mxcsr = u32::from_le_bytes(mxcsr);
        if present & 1 == 0 {
            let initial = XsaveArea::initial();
            self.xsave.0[..XMM].copy_from_slice(&initial.0[..XMM]);
            self.xsave.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr);
        }
        let area = self.xsave.0.as_ptr();
        // SAFETY: the area is 64-byte aligned and MXCSR in it is valid; vector registers and
        // MXCSR are put back to Rust's by the next line and by the ABI (all are call-clobbered).
        unsafe {
            asm!(
                "fxrstor64 [{area}]",
                "ldmxcsr [{default}]",
                area = in(reg) area,
                default = in(reg) &raw const DEFAULT,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nostack),
            );
        }
    }

    /// Takes the guest's state from where generated code left it.
    pub(crate) fn save_fpu(&mut self) {
        let area = self.xsave.0.as_mut_ptr();
        // SAFETY: the area is 64-byte aligned and 512 bytes at least; FNINIT leaves the x87 unit
        // as the ABI wants it.
        unsafe { asm!("fxsave64 [{}]", "fninit", in(reg) area, options(nostack)) };
        let avx = self.avx_offset();
        for register in 0..16 {
            let value = self.hot().ymm[register];
            self.xsave.set_word(XMM + 16 * register, value[0]);
            self.xsave.set_word(XMM + 16 * register + 8, value[1]);
            if self.shared.host.avx {
                self.xsave.set_word(avx + 16 * register, value[2]);
                self.xsave.set_word(avx + 16 * register + 8, value[3]);
            }
        }
        let mxcsr = self.hot().mxcsr.to_le_bytes();
        self.xsave.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr);
        let present = self.shared.host.guest_xcr0;
        self.xsave.set_word(XSTATE_BV, present);
        self.xsave.0[XSTATE_BV + 8..HEADER_END].fill(0);
    }
}

/// Whether an unmasked x87 exception of the guest waits for the next x87 instruction. Only while
/// its state is in the processor.
pub(crate) fn exception_waits() -> bool {
    const ERROR_SUMMARY: u16 = 1 << 7;
    let status: u16;
    // SAFETY: FNSTSW reads the status word and changes nothing.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status & ERROR_SUMMARY != 0
}

static DEFAULT: u32 = MXCSR_DEFAULT;
