//! The MADT: processors and interrupt controllers (ACPI 6.5 §5.2.12).

use acpi_tables::sdt::Sdt;
use ringfence_chipset::IOAPIC_START;

use super::OEM_ID;
use super::OEM_REVISION;
use super::OEM_TABLE_ID;
use super::Tables;

const REVISION: u8 = 5;
const HEADER_BYTES: u32 = 36;
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// There are PICs, to be masked before the APICs are used.
const PCAT_COMPAT: u32 = 1;

const LOCAL_APIC: u8 = 0;
const IO_APIC: u8 = 1;
const SOURCE_OVERRIDE: u8 = 2;
const LOCAL_APIC_NMI: u8 = 4;

const ENABLED: u32 = 1;
/// Edge-triggered and active high: as the bus (ISA) has it.
const CONFORMS: u16 = 0;
/// MPS INTI flags (table 5.26): active high (1), level-triggered (3).
const LEVEL_ACTIVE_HIGH: u16 = 0b1101;
const TIMER_IRQ: u8 = 0;
const TIMER_GSI: u32 = 2;
const ALL_PROCESSORS: u8 = 0xff;

pub(super) fn madt(tables: &Tables<'_>) -> Sdt {
    let mut madt = Sdt::new(
        *b"APIC",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.append_slice(&LOCAL_APIC_ADDRESS.to_le_bytes());
    madt.append_slice(&PCAT_COMPAT.to_le_bytes());
    for id in (0..tables.vcpus).filter_map(|id| u8::try_from(id).ok()) {
        madt.append_slice(&[LOCAL_APIC, 8, id, id]);
        madt.append_slice(&ENABLED.to_le_bytes());
    }
    let ioapic = u32::try_from(IOAPIC_START).unwrap_or(u32::MAX);
    madt.append_slice(&[IO_APIC, 12, 0, 0]);
    madt.append_slice(&ioapic.to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes());
    let sci = u8::try_from(tables.sci.0).unwrap_or(u8::MAX);
    for (irq, gsi, flags) in [
        (TIMER_IRQ, TIMER_GSI, CONFORMS),
        (sci, tables.sci.0, LEVEL_ACTIVE_HIGH),
    ] {
        madt.append_slice(&[SOURCE_OVERRIDE, 10, 0, irq]);
        madt.append_slice(&gsi.to_le_bytes());
        madt.append_slice(&flags.to_le_bytes());
    }
    // NMIs come by LINT1, as on every PC.
    madt.append_slice(&[LOCAL_APIC_NMI, 6, ALL_PROCESSORS, 0, 0, 1]);
    madt
}

#[cfg(test)]
mod tests {
    use ringfence_bus::Gsi;
    use ringfence_memory::RamLayout;

    use super::*;
    use crate::AddressMap;

    #[test]
    fn every_processor_has_an_entry() {
        let map = AddressMap::new(&RamLayout::pc(1 << 30), 48).expect("fits");
        let tables = Tables {
            vcpus: 3,
            windows: &map.windows,
            intx: Vec::new(),
            sci: Gsi(9),
            has_serial: false,
        };
        let madt = madt(&tables);
        let mut rest = &madt.as_slice()[44..];
        let mut kinds = Vec::new();
        while let [kind, len, ..] = *rest {
            kinds.push(kind);
            rest = &rest[usize::from(len)..];
        }
        assert_eq!(kinds, [0, 0, 0, 1, 2, 2, 4]);
        assert_eq!(madt.as_slice()[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
    }
}
