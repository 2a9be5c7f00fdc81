//! The model-specific registers that belong to a guest's state (docs/reference/msrs.md).

use kvm_bindings::Msrs;
use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::VcpuFd;
use ringfence_engine::EngineError;
use ringfence_x86::msr;

const MTRR_PHYSICAL_FIRST: u32 = 0x200;
const MTRR_PHYSICAL_LAST: u32 = 0x20f;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// The registers, in the order to load them: the TSC before what is relative to it, and the TSC
/// deadline last, because it arms a timer by all the rest.
fn saved() -> impl Iterator<Item = u32> {
    [
        msr::IA32_TSC,
        msr::IA32_TSC_ADJUST,
        msr::TSC_AUX,
        msr::IA32_MISC_ENABLE,
        msr::IA32_SPEC_CTRL,
        msr::IA32_SYSENTER_CS,
        msr::IA32_SYSENTER_ESP,
        msr::IA32_SYSENTER_EIP,
        msr::STAR,
        msr::LSTAR,
        msr::CSTAR,
        msr::SFMASK,
        msr::KERNEL_GS_BASE,
        msr::IA32_PAT,
    ]
    .into_iter()
    .chain(MTRR_PHYSICAL_FIRST..=MTRR_PHYSICAL_LAST)
    .chain(MTRR_FIXED)
    .chain([
        msr::IA32_MTRR_DEF_TYPE,
        msr::KVM_WALL_CLOCK_NEW,
        msr::KVM_SYSTEM_TIME_NEW,
        msr::KVM_STEAL_TIME,
        msr::KVM_PV_EOI_EN,
        msr::KVM_POLL_CONTROL,
        msr::IA32_TSC_DEADLINE,
    ])
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries)
        .map_err(|error| EngineError::Internal(format!("{} MSRs: {error}", entries.len())))
}

/// Reads every saved register that this vCPU has. KVM stops at the first that it doesn't have
/// (§4.19), so reading goes on behind it.
pub(crate) fn save(fd: &VcpuFd) -> Result<Vec<(u32, u64)>, EngineError> {
    let mut wanted: Vec<kvm_msr_entry> = saved().map(|index| entry(index, 0)).collect();
    let mut values = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let mut msrs = list(&wanted)?;
        let read = fd
            .get_msrs(&mut msrs)
            .map_err(|errno| EngineError::host("read a vCPU's MSRs")(errno.into()))?;
        let got = &msrs.as_slice()[..read.min(wanted.len())];
        values.extend(got.iter().map(|msr| (msr.index, msr.data)));
        wanted.drain(..(read + 1).min(wanted.len()));
    }
    Ok(values)
}

/// Writes `values` in their order.
pub(crate) fn load(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), EngineError> {
    if values.is_empty() {
        return Ok(());
    }
    let entries: Vec<_> = values
        .iter()
        .map(|&(index, data)| entry(index, data))
        .collect();
    let written = fd
        .set_msrs(&list(&entries)?)
        .map_err(|errno| EngineError::host("write a vCPU's MSRs")(errno.into()))?;
    match values.get(written) {
        None => Ok(()),
        Some((index, value)) => Err(EngineError::Config(format!(
            "KVM refuses the value {value:#x} for MSR {index:#x}"
        ))),
    }
}
