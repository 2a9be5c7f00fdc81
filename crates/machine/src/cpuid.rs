//! The parts of CPUID that depend on the board: who the processor is among the others, and how
//! fast its counters count.
//!
//! Spec: SDM 2A (CPUID), APM 3 appendix E. One package, a core each, no threads: a guest that is
//! told of threads schedules for them, and the host's own topology isn't the guest's.

use ringfence_chipset::APIC_TIMER_HZ;
use ringfence_x86::cpuid::CpuidResult;
use ringfence_x86::cpuid::CpuidTable;

/// Leaf 1 EDX: more than one logical processor's APIC IDs are set aside.
const HTT: u32 = 1 << 28;
/// Leaf 0xb ECX: level types.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

const KVM_SIGNATURE: u32 = 0x4000_0000;
/// The timing leaf that VMware introduced: counter and APIC timer frequencies in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

const DEFAULT_ADDRESS_BITS: u8 = 36;

/// Who the processor is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Its number, and its APIC ID.
    pub(crate) index: u32,
    /// How many there are.
    pub(crate) vcpus: u32,
    /// How fast the time-stamp counter counts.
    pub(crate) tsc_hz: u64,
}

/// The width of a guest physical address.
pub(crate) fn address_bits(table: &CpuidTable) -> u8 {
    table
        .get(0x8000_0008, 0)
        .map(|leaf| leaf.eax.to_le_bytes()[0])
        .filter(|&bits| bits != 0)
        .unwrap_or(DEFAULT_ADDRESS_BITS)
}

/// Adds to an engine's table what depends on the board.
pub(crate) fn complete(mut table: CpuidTable, place: Place) -> CpuidTable {
    let Place { index, vcpus, .. } = place;
    let highest = table.get(0, 0).map_or(0, |leaf| leaf.eax);
    // APIC IDs are set aside in powers of two.
    let id_bits = vcpus.next_power_of_two().ilog2();
    if let Some(leaf) = table.get_mut(1, 0) {
        leaf.ebx = leaf.ebx & 0xffff | 1 << id_bits << 16 | index << 24;
        leaf.edx = leaf.edx & !HTT | if vcpus > 1 { HTT } else { 0 };
    }
    caches(&mut table, id_bits);
    if highest >= 0xb {
        levels(&mut table, place, id_bits);
    }
    if let Some(leaf) = table.get_mut(0x8000_0008, 0) {
        leaf.ecx = leaf.ecx & !0xf0ff | id_bits << 12 | (vcpus - 1) & 0xff;
    }
    frequencies(&mut table, highest, place.tsc_hz);
    table
}

/// Leaf 4 (Intel): each core has its own first two levels; the third is everybody's.
fn caches(table: &mut CpuidTable, id_bits: u32) {
    for subleaf in 0..4 {
        let Some(leaf) = table.get_mut(4, subleaf) else {
            continue;
        };
        let is_shared = leaf.eax >> 5 & 7 >= 3;
        let sharing = if is_shared { (1 << id_bits) - 1 } else { 0 };
        let cores = (1 << id_bits) - 1;
        leaf.eax = leaf.eax & 0x3fff | sharing << 14 | (cores & 0x3f) << 26;
    }
}

/// Leaf 0xb: a level of one thread a core, a level of all cores.
fn levels(table: &mut CpuidTable, place: Place, id_bits: u32) {
    for (subleaf, shift, count, kind) in [
        (0, 0, 1, LEVEL_THREAD),
        (1, id_bits, place.vcpus, LEVEL_CORE),
        (2, 0, 0, 0),
    ] {
        let result = CpuidResult {
            eax: shift,
            ebx: count,
            ecx: kind << 8 | subleaf,
            edx: place.index,
        };
        table.set(0xb, subleaf, result);
    }
}

/// Leaf 0x15 where the table goes that far, and the hypervisor's timing leaf where there is a
/// hypervisor's signature.
fn frequencies(table: &mut CpuidTable, highest: u32, tsc_hz: u64) {
    let khz = |hz: u64| u32::try_from(hz / 1000).unwrap_or(u32::MAX);
    if highest >= 0x15 {
        let result = CpuidResult {
            eax: khz(APIC_TIMER_HZ),
            ebx: khz(tsc_hz),
            ecx: u32::try_from(APIC_TIMER_HZ).unwrap_or(u32::MAX),
            edx: 0,
        };
        table.set(0x15, 0, result);
    }
    if let Some(signature) = table.get_mut(KVM_SIGNATURE, 0) {
        signature.eax = HYPERVISOR_TIMING;
        let result = CpuidResult {
            eax: khz(tsc_hz),
            ebx: khz(APIC_TIMER_HZ),
            ..CpuidResult::default()
        };
        table.set(HYPERVISOR_TIMING, 0, result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine_table() -> CpuidTable {
        let mut table = CpuidTable::default();
        let leaf = |eax, ebx, ecx, edx| CpuidResult { eax, ebx, ecx, edx };
        table.set(0, 0, leaf(0x15, 0, 0, 0));
        table.set(1, 0, leaf(0, 0x1234_0800, 0, HTT));
        table.set(4, 0, leaf(0xfc00_4121, 0, 0, 0));
        table.set(4, 3, leaf(0xfc1f_c163, 0, 0, 0));
        table.set(KVM_SIGNATURE, 0, leaf(0x4000_0001, 1, 2, 3));
        table.set(0x8000_0008, 0, leaf(0x3030, 0, 0x7001, 0));
        table
    }

    fn third_of_five() -> CpuidTable {
        let place = Place {
            index: 2,
            vcpus: 5,
            tsc_hz: 2_596_148_000,
        };
        complete(engine_table(), place)
    }

    #[test]
    fn a_processor_knows_its_number_and_its_peers() {
        let table = third_of_five();
        let leaf = |leaf, subleaf| *table.get(leaf, subleaf).expect("set");
        assert_eq!(leaf(1, 0).ebx, 0x0208_0800);
        assert_eq!(leaf(0xb, 0).ecx, 0x100);
        assert_eq!((leaf(0xb, 1).eax, leaf(0xb, 1).ebx), (3, 5));
        assert_eq!((leaf(0xb, 1).ecx, leaf(0xb, 1).edx), (0x201, 2));
        assert_eq!(leaf(0xb, 2).ebx, 0);
        assert_eq!(leaf(0x8000_0008, 0).ecx, 0x3004);
    }

    #[test]
    fn caches_are_private_up_to_the_third_level() {
        let table = third_of_five();
        let sharing = |subleaf| table.get(4, subleaf).expect("set").eax >> 14 & 0xfff;
        assert_eq!((sharing(0), sharing(3)), (0, 7));
    }

    #[test]
    fn frequencies_are_told_where_guests_look() {
        let table = third_of_five();
        let crystal = table.get(0x15, 0).expect("set");
        let hz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax);
        assert_eq!(hz, 2_596_148_000);
        let timing = table.get(HYPERVISOR_TIMING, 0).expect("set");
        assert_eq!((timing.eax, timing.ebx), (2_596_148, 1_000_000));
        assert_eq!(
            table.get(KVM_SIGNATURE, 0).expect("kept").eax,
            HYPERVISOR_TIMING
        );
    }

    #[test]
    fn one_processor_alone_has_no_siblings() {
        let place = Place {
            index: 0,
            vcpus: 1,
            tsc_hz: 1,
        };
        let table = complete(engine_table(), place);
        let leaf = table.get(1, 0).expect("set");
        assert_eq!((leaf.ebx, leaf.edx & HTT), (0x0001_0800, 0));
    }

    #[test]
    fn leaves_that_the_engine_does_not_show_are_not_added() {
        let mut table = CpuidTable::default();
        table.set(0, 0, CpuidResult::default());
        let place = Place {
            index: 0,
            vcpus: 1,
            tsc_hz: 1,
        };
        assert_eq!(complete(table, place).iter().count(), 1);
        assert_eq!(address_bits(&CpuidTable::default()), DEFAULT_ADDRESS_BITS);
    }
}
