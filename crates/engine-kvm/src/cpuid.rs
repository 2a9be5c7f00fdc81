//! Which CPUID leaves and bits a guest of this engine may see.
//!
//! The table is a list of what is shown: a bit that isn't listed is hidden, so a feature that a
//! newer host kernel starts to offer reaches no guest unseen. docs/reference/cpuid.md names the
//! bits and the reasons.

use kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::Cap;
use kvm_ioctls::Kvm;
use ringfence_engine::EngineError;
use ringfence_x86::cpuid::CpuidResult;
use ringfence_x86::cpuid::CpuidTable;

/// The state components that a guest may enable: x87, SSE, AVX and AVX-512 (SDM 1 §13.1).
pub(crate) const XCR0_MASK: u64 = 0xe7;

const ALL: u32 = u32::MAX;
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
/// The highest basic and extended leaves shown.
const LAST_BASIC: u32 = 0xd;
const LAST_EXTENDED: u32 = 0x8000_0021;
const XSTATE_LEAF: u32 = 0xd;
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
/// Leaves whose result depends on ECX (SDM 2A, CPUID).
const INDEXED: [u32; 4] = [0x4, 0x7, 0xb, 0xd];

/// What is shown of one leaf: a mask for each register.
struct Shown(u32, u32, CpuidResult);

const fn shown(leaf: u32, subleaf: u32, masks: [u32; 4]) -> Shown {
    let [eax, ebx, ecx, edx] = masks;
    Shown(leaf, subleaf, CpuidResult { eax, ebx, ecx, edx })
}

const SHOWN: [Shown; 19] = [
    shown(0x0, 0, [ALL, ALL, ALL, ALL]),
    shown(0x1, 0, [ALL, 0xff00, 0xfffa_3203, 0x078b_fbff]),
    shown(0x2, 0, [ALL, ALL, ALL, ALL]),
    // How many processors share a cache is topology, which the machine fills in.
    shown(0x4, 0, [0x3fff, ALL, ALL, ALL]),
    shown(0x4, 1, [0x3fff, ALL, ALL, ALL]),
    shown(0x4, 2, [0x3fff, ALL, ALL, ALL]),
    shown(0x4, 3, [0x3fff, ALL, ALL, ALL]),
    shown(0x6, 0, [0x4, 0, 0, 0]),
    shown(0x7, 0, [ALL, 0xf1bf_27eb, 0x1840_5f46, 0xac80_4510]),
    shown(0x7, 1, [0x0080_1c30, 0, 0, 0x4030]),
    shown(0x7, 2, [0, 0, 0, 0x3f]),
    shown(KVM_FEATURES_LEAF, 0, [0x0100_bae9, 0, 0, 0]),
    shown(0x8000_0000, 0, [ALL, ALL, ALL, ALL]),
    shown(0x8000_0001, 0, [ALL, 0, 0x0021_09f1, 0x2fd3_fbff]),
    shown(0x8000_0005, 0, [ALL, ALL, ALL, ALL]),
    shown(0x8000_0006, 0, [ALL, ALL, ALL, ALL]),
    shown(0x8000_0007, 0, [0, 0, 0, 0x100]),
    shown(0x8000_0008, 0, [0x00ff_ffff, 0x1700_d205, 0, 0]),
    shown(0x8000_0021, 0, [0x7800_0345, 0, 0, 0]),
];

/// KVM_GET_SUPPORTED_CPUID (§4.46), with what KVM does but doesn't list there.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuidTable, EngineError> {
    let entries = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| EngineError::host("ask KVM for the supported CPUID")(errno.into()))?;
    let mut table = CpuidTable::default();
    for entry in entries.as_slice() {
        let subleaf = if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 {
            entry.index
        } else {
            0
        };
        table.set(
            entry.function,
            subleaf,
            CpuidResult {
                eax: entry.eax,
                ebx: entry.ebx,
                ecx: entry.ecx,
                edx: entry.edx,
            },
        );
    }
    if let Some(features) = table.get_mut(1, 0) {
        features.ecx |= HYPERVISOR;
        // The in-kernel local APIC's timer has this mode (§4.46); without a local APIC the
        // machine clears it together with the APIC bit.
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            features.ecx |= TSC_DEADLINE;
        }
    }
    Ok(table)
}

/// What a guest may see of `supported`.
pub(crate) fn filter(supported: &CpuidTable) -> CpuidTable {
    let mut table = CpuidTable::default();
    for &Shown(leaf, subleaf, mask) in &SHOWN {
        if let Some(result) = supported.get(leaf, subleaf) {
            table.set(leaf, subleaf, masked(*result, mask));
        }
    }
    for leaf in 0x8000_0002..=0x8000_0004 {
        if let Some(name) = supported.get(leaf, 0) {
            table.set(leaf, 0, *name);
        }
    }
    if let Some(result) = table.get_mut(0, 0) {
        result.eax = result.eax.min(LAST_BASIC);
    }
    if let Some(result) = table.get_mut(0x8000_0000, 0) {
        result.eax = result.eax.min(LAST_EXTENDED);
    }
    // Subleaf 2 of leaf 7 is the last one shown.
    if let Some(result) = table.get_mut(7, 0) {
        result.eax = result.eax.min(2);
    }
    without_xsave(&mut table);
    xstate(supported, &mut table);
    if table.get(KVM_FEATURES_LEAF, 0).is_some() {
        table.set(KVM_SIGNATURE_LEAF, 0, kvm_signature());
    }
    table
}

/// A host may list AVX without XSAVE (an emulated one does); nobody could use it.
fn without_xsave(table: &mut CpuidTable) {
    const XSAVE: u32 = 1 << 26;
    const FMA_AVX_F16C: u32 = 1 << 12 | 1 << 28 | 1 << 29;
    /// AVX2 and all of AVX-512 in leaf 7.
    const WIDE_EBX: u32 = 1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31;
    const WIDE_ECX: u32 = 1 << 1 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 14;
    if table.get(1, 0).is_none_or(|leaf| leaf.ecx & XSAVE != 0) {
        return;
    }
    if let Some(features) = table.get_mut(1, 0) {
        features.ecx &= !FMA_AVX_F16C;
    }
    if let Some(features) = table.get_mut(7, 0) {
        features.ebx &= !WIDE_EBX;
        features.ecx &= !WIDE_ECX;
        features.edx &= !(1 << 8 | 1 << 23);
    }
    if let Some(features) = table.get_mut(7, 1) {
        *features = CpuidResult::default();
    }
    if let Some(features) = table.get_mut(0x8000_0001, 0) {
        // XOP and FMA4.
        features.ecx &= !(1 << 11 | 1 << 16);
    }
}

fn masked(result: CpuidResult, mask: CpuidResult) -> CpuidResult {
    CpuidResult {
        eax: result.eax & mask.eax,
        ebx: result.ebx & mask.ebx,
        ecx: result.ecx & mask.ecx,
        edx: result.edx & mask.edx,
    }
}

/// Leaf 0xd: the components of [`XCR0_MASK`], and no supervisor components.
fn xstate(supported: &CpuidTable, table: &mut CpuidTable) {
    let Some(main) = supported.get(XSTATE_LEAF, 0) else {
        return;
    };
    let components = main.eax & XCR0_MASK.to_le_bytes().map(u32::from)[0];
    let mut area_bytes = 576;
    for bit in 2..32 {
        if let Some(component) = supported.get(XSTATE_LEAF, bit)
            && components >> bit & 1 != 0
        {
            area_bytes = area_bytes.max(component.eax.saturating_add(component.ebx));
            table.set(XSTATE_LEAF, bit, *component);
        }
    }
    table.set(
        XSTATE_LEAF,
        0,
        CpuidResult {
            eax: components,
            ebx: area_bytes,
            ecx: area_bytes,
            edx: 0,
        },
    );
    if let Some(extended) = supported.get(XSTATE_LEAF, 1) {
        let eax = extended.eax & 0xf;
        table.set(
            XSTATE_LEAF,
            1,
            CpuidResult {
                eax,
                ebx: if eax & 0xa != 0 { area_bytes } else { 0 },
                ..CpuidResult::default()
            },
        );
    }
}

fn kvm_signature() -> CpuidResult {
    CpuidResult {
        eax: KVM_FEATURES_LEAF,
        ebx: u32::from_le_bytes(*b"KVMK"),
        ecx: u32::from_le_bytes(*b"VMKV"),
        edx: u32::from_le_bytes(*b"M\0\0\0"),
    }
}

/// The table in KVM_SET_CPUID2's form.
pub(crate) fn entries(table: &CpuidTable) -> Vec<kvm_cpuid_entry2> {
    table
        .iter()
        .map(|((function, index), result)| {
            let indexed = INDEXED.contains(&function) || table.has_subleaves(function);
            kvm_cpuid_entry2 {
                function,
                index,
                flags: if indexed {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax: result.eax,
                ebx: result.ebx,
                ecx: result.ecx,
                edx: result.edx,
                ..Default::default()
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> CpuidTable {
        let mut table = CpuidTable::default();
        let all = CpuidResult {
            eax: ALL,
            ebx: ALL,
            ecx: ALL,
            edx: ALL,
        };
        for leaf in (0..0x20)
            .chain([KVM_FEATURES_LEAF])
            .chain(0x8000_0000..0x8000_0030)
        {
            table.set(leaf, 0, all);
        }
        table
    }

    #[test]
    fn hidden_features_stay_hidden_whatever_the_host_offers() {
        let shown = filter(&everything());
        let leaf = |leaf, subleaf| *shown.get(leaf, subleaf).expect("shown");
        let vmx_monitor_pdcm = 1 << 5 | 1 << 3 | 1 << 15;
        assert_eq!(leaf(1, 0).ecx & vmx_monitor_pdcm, 0);
        let hle_rtm_mpx_pt = 1 << 4 | 1 << 11 | 1 << 14 | 1 << 25;
        assert_eq!(leaf(7, 0).ebx & hle_rtm_mpx_pt, 0);
        let pku_la57_cet = 1 << 3 | 1 << 4 | 1 << 16 | 1 << 7;
        assert_eq!(leaf(7, 0).ecx & pku_la57_cet, 0);
        let amx_ibt = 1 << 22 | 1 << 24 | 1 << 25 | 1 << 20;
        assert_eq!(leaf(7, 0).edx & amx_ibt, 0);
        let svm_topoext = 1 << 2 | 1 << 22;
        assert_eq!(leaf(0x8000_0001, 0).ecx & svm_topoext, 0);
        let async_page_faults = 1 << 4 | 1 << 10 | 1 << 14;
        assert_eq!(leaf(KVM_FEATURES_LEAF, 0).eax & async_page_faults, 0);
        assert_eq!(leaf(XSTATE_LEAF, 0).eax, 0xe7);
        assert!(shown.get(0xa, 0).is_none(), "no performance counters");
    }

    #[test]
    fn the_features_that_linux_counts_on_are_shown() {
        let shown = filter(&everything());
        let features = shown.get(1, 0).expect("shown");
        for bit in [13, 17, 19, 20, 21, 23, 24, 25, 26, 28, 31] {
            assert!(features.ecx >> bit & 1 != 0, "leaf 1 ECX bit {bit}");
        }
        let structured = shown.get(7, 0).expect("shown");
        for bit in [0, 3, 5, 7, 8, 9, 10, 20] {
            assert!(structured.ebx >> bit & 1 != 0, "leaf 7 EBX bit {bit}");
        }
        let paravirtual = shown.get(KVM_FEATURES_LEAF, 0).expect("shown");
        for bit in [0, 3, 5, 6, 7, 9, 11, 12, 13, 15, 24] {
            assert!(paravirtual.eax >> bit & 1 != 0, "KVM feature bit {bit}");
        }
    }

    #[test]
    fn the_xsave_area_covers_the_components_that_are_shown() {
        let mut host = CpuidTable::default();
        let component = |eax, ebx| CpuidResult {
            eax,
            ebx,
            ..CpuidResult::default()
        };
        host.set(XSTATE_LEAF, 0, component(0x602e7, 0x2b00));
        host.set(XSTATE_LEAF, 2, component(256, 576));
        host.set(XSTATE_LEAF, 9, component(8, 2688));
        host.set(XSTATE_LEAF, 18, component(8192, 2816));
        let shown = filter(&host);
        let main = shown.get(XSTATE_LEAF, 0).expect("shown");
        assert_eq!((main.eax, main.ebx, main.ecx), (0xe7, 832, 832));
        assert!(shown.get(XSTATE_LEAF, 18).is_none(), "no AMX");
    }

    #[test]
    fn nothing_that_needs_xsave_is_shown_without_it() {
        let mut host = everything();
        host.get_mut(1, 0).expect("set").ecx &= !(1 << 26);
        let shown = filter(&host);
        let features = shown.get(1, 0).expect("shown");
        assert_eq!(
            features.ecx & (1 << 12 | 1 << 28 | 1 << 29),
            0,
            "FMA, AVX, F16C"
        );
        let structured = shown.get(7, 0).expect("shown");
        let avx512 = [16, 17, 21, 28, 30, 31].map(|bit| structured.ebx >> bit & 1);
        assert_eq!(avx512, [0; 6]);
        assert_eq!(structured.ebx >> 5 & 1, 0, "AVX2");
        for bit in [0, 3, 7, 8, 9, 18, 20, 29] {
            assert_eq!(structured.ebx >> bit & 1, 1, "leaf 7 EBX bit {bit} stays");
        }
    }

    #[test]
    fn the_reference_page_holds_the_masks_of_the_code() {
        let page = include_str!("../../../docs/reference/cpuid.md");
        for Shown(leaf, subleaf, mask) in &SHOWN {
            let row = format!(
                "| `{leaf:#x}.{subleaf}` | `{:08x}` | `{:08x}` | `{:08x}` | `{:08x}` |",
                mask.eax, mask.ebx, mask.ecx, mask.edx
            );
            assert!(page.contains(&row), "docs/reference/cpuid.md lacks: {row}");
        }
    }
}
