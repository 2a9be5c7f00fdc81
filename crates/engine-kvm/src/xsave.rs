//! The XSAVE area (SDM 1 §13.4): KVM exchanges 4 KiB, a state keeps what is used of it.

// UNSAFETY: KVM_SET_XSAVE reads past the fixed structure when dynamic features are enabled.
#![expect(unsafe_code, reason = "kvm-ioctls marks KVM_SET_XSAVE unsafe")]

use kvm_bindings::kvm_xsave;
use kvm_ioctls::VcpuFd;
use ringfence_engine::EngineError;
use ringfence_x86::cpuid::CpuidTable;

use crate::cpuid::XCR0_MASK;

/// The legacy region and the XSAVE header.
const FIXED_BYTES: usize = 576;
/// What KVM_GET_XSAVE fills.
const KVM_BYTES: usize = 4096;

/// How long a vCPU's area is: every component that a guest may enable, in standard format.
#[derive(Clone, Copy, Debug)]
pub(crate) struct XsaveLayout {
    len_bytes: usize,
}

impl XsaveLayout {
    /// Reads the components' places from CPUID leaf 0xd.
    pub(crate) fn new(supported: &CpuidTable) -> Self {
        let ends = (2..63)
            .filter(|bit| XCR0_MASK >> bit & 1 != 0)
            .filter_map(|bit| {
                let component = supported.get(0xd, bit)?;
                usize::try_from(component.ebx.checked_add(component.eax)?).ok()
            });
        let len_bytes = ends.max().unwrap_or(0).clamp(FIXED_BYTES, KVM_BYTES);
        Self { len_bytes }
    }

    pub(crate) fn save(self, fd: &VcpuFd) -> Result<Vec<u8>, EngineError> {
        let area = fd
            .get_xsave()
            .map_err(|errno| EngineError::host("read a vCPU's XSAVE area")(errno.into()))?;
        let mut bytes: Vec<u8> = area
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.truncate(self.len_bytes);
        Ok(bytes)
    }

    pub(crate) fn load(self, fd: &VcpuFd, bytes: &[u8]) -> Result<(), EngineError> {
        if bytes.len() < FIXED_BYTES || bytes.len() > self.len_bytes {
            return Err(EngineError::Config(format!(
                "an XSAVE area has {FIXED_BYTES} to {} bytes here, not {}",
                self.len_bytes,
                bytes.len()
            )));
        }
        let mut area = kvm_xsave::default();
        for (word, chunk) in area.region.iter_mut().zip(bytes.chunks(4)) {
            let mut padded = [0; 4];
            padded[..chunk.len()].copy_from_slice(chunk);
            *word = u32::from_le_bytes(padded);
        }
        // SAFETY: the kernel reads more than the structure only when the process enabled dynamic
        // features by ARCH_REQ_XCOMP_GUEST_PERM, which this project never does.
        unsafe { fd.set_xsave(&area) }.map_err(|errno| {
            EngineError::Config(format!(
                "this host's processor refuses the XSAVE area (it may hold features or MXCSR bits that it lacks): {errno}"
            ))
        })
    }
}
