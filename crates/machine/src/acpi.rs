//! The firmware tables: what a kernel can't find out by looking at the hardware.
//!
//! Spec: ACPI 6.5 §5.2. The tables lie one after the other from the root pointer on:
//! RSDP, FACS, DSDT, FADT, MADT, MCFG, XSDT.

mod dsdt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::FADT;
use acpi_tables::fadt::FADTBuilder;
use acpi_tables::fadt::Flags;
use acpi_tables::fadt::PmProfile;
use acpi_tables::gas::AccessSize;
use acpi_tables::gas::AddressSpace;
use acpi_tables::gas::GAS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use ringfence_bus::Gsi;
use ringfence_chipset::ACPI_PM_PORT;
use ringfence_chipset::ACPI_PM_TIMER;
use ringfence_chipset::ACPI_PM1_CONTROL;
use ringfence_chipset::ACPI_PM1_EVENT;
use ringfence_chipset::RESET_CONTROL_PORT;
use ringfence_chipset::RESET_CONTROL_VALUE;
use ringfence_chipset::RTC_CENTURY;
use ringfence_loader::ACPI_LEN_BYTES;
use ringfence_loader::ACPI_START;
use ringfence_memory::Bytes;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use ringfence_pci::RootWindows;

use crate::MachineError;
use crate::address_map::ECAM;

const OEM_ID: [u8; 6] = *b"RNGFNC";
const OEM_TABLE_ID: [u8; 8] = *b"MACHINE ";
const OEM_REVISION: u32 = 1;

/// Tables start on boundaries of this (the FACS must).
const TABLE_ALIGN: usize = 64;

/// IAPC_BOOT_ARCH (§5.2.9.3): there are ISA devices; no VGA to probe for, no ASPM to switch on.
/// The keyboard controller's bit is clear, so nobody waits for one.
const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_ASPM: u16 = 1 << 4;

/// Latencies that mean "no such state" (§5.2.9).
const NO_C2: u16 = 0xfff;
const NO_C3: u16 = 0xfff;

/// What the tables describe.
#[derive(Debug)]
pub(crate) struct Tables<'a> {
    pub(crate) vcpus: u32,
    pub(crate) windows: &'a RootWindows,
    /// Where the INTA wires of device 0, 1, … go.
    pub(crate) intx: Vec<Gsi>,
    pub(crate) sci: Gsi,
    pub(crate) has_serial: bool,
}

/// The bytes from [`ACPI_START`] on.
struct Area(Vec<u8>);

impl Area {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let start = self.0.len().next_multiple_of(TABLE_ALIGN);
        self.0.resize(start, 0);
        table.to_aml_bytes(&mut self.0);
        ACPI_START + start as u64
    }
}

/// Writes the tables; returns the root pointer's address.
pub(crate) fn write(ram: &GuestRam, tables: &Tables<'_>) -> Result<u64, MachineError> {
    let bytes = build(tables);
    let limit_bytes = usize::try_from(ACPI_LEN_BYTES).unwrap_or(usize::MAX);
    if bytes.len() > limit_bytes {
        return Err(MachineError::TablesTooLarge {
            len_bytes: bytes.len(),
            limit_bytes,
        });
    }
    ram.memory()
        .write_slice(&bytes, GuestAddress(ACPI_START))
        .map_err(MachineError::Tables)?;
    Ok(ACPI_START)
}

fn build(tables: &Tables<'_>) -> Vec<u8> {
    // The root pointer comes first and names what comes last: its place is kept free.
    let mut area = Area(vec![0; Rsdp::len()]);
    let facs = area.add(&FACS::new());
    let dsdt = area.add(&dsdt::dsdt(tables));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(area.add(&fadt(tables, facs, dsdt)));
    xsdt.add_entry(area.add(&madt::madt(tables)));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    xsdt.add_entry(area.add(&mcfg));
    let xsdt = area.add(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    area.0[..root.len()].copy_from_slice(&root);
    area.0
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(address))
}

/// The fixed hardware (§5.2.9). The chips are in ACPI mode from the start: SMI_CMD is zero.
fn fadt(tables: &Tables<'_>, facs: u64, dsdt: u64) -> FADT {
    let event = ACPI_PM_PORT + ACPI_PM1_EVENT;
    let control = ACPI_PM_PORT + ACPI_PM1_CONTROL;
    let timer = ACPI_PM_PORT + ACPI_PM_TIMER;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .firmware_ctrl_64(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::try_from(tables.sci.0).unwrap_or(0).into();
    fadt.pm1a_evt_blk = u32::from(event).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(event, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(control).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(control, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(timer).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(timer, 32, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = (BOOT_LEGACY_DEVICES | BOOT_NO_VGA | BOOT_NO_ASPM).into();
    fadt.reset_reg = port(RESET_CONTROL_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_CONTROL_VALUE;
    fadt.finalize()
}

#[cfg(test)]
mod tests {
    use ringfence_memory::RamLayout;

    use super::*;
    use crate::AddressMap;

    fn tables(windows: &RootWindows, vcpus: u32) -> Tables<'_> {
        Tables {
            vcpus,
            windows,
            intx: (16..20).map(Gsi).collect(),
            sci: Gsi(9),
            has_serial: true,
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        let bytes = bytes[at..at + 4].first_chunk().expect("4 bytes");
        usize::try_from(u32::from_le_bytes(*bytes)).expect("64 bits")
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(*bytes[at..at + 8].first_chunk().expect("8 bytes"))
    }

    fn checksum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
    }

    /// The table at a guest address, checked.
    fn table(area: &[u8], address: u64) -> &[u8] {
        let start = usize::try_from(address - ACPI_START).expect("in the area");
        let table = &area[start..start + u32_at(area, start + 4)];
        assert_eq!(checksum(table), 0);
        table
    }

    #[test]
    fn the_root_pointer_leads_to_every_table() {
        let map = AddressMap::new(&RamLayout::pc(1 << 30), 48).expect("fits");
        let area = build(&tables(&map.windows, 2));
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((checksum(&area[..20]), checksum(&area[..36])), (0, 0));
        let xsdt = table(&area, u64_at(&area, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let found: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(&area, u64_at(entry, 0)))
            .collect();
        let names: Vec<_> = found.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = found[0];
        assert_eq!(&table(&area, u64_at(fadt, 140))[..4], b"DSDT");
        let facs = u64_at(fadt, 132);
        assert_eq!(facs % 64, 0);
        assert_eq!((fadt[46], fadt[47]), (9, 0), "SCI_INT");
        assert_eq!(u64_at(found[2], 44), ECAM.start);
    }

    #[test]
    fn the_largest_machine_fits() {
        let map = AddressMap::new(&RamLayout::pc(1 << 42), 48).expect("fits");
        let area = build(&tables(&map.windows, 32));
        assert!(area.len() < usize::try_from(ACPI_LEN_BYTES).expect("small") / 4);
    }
}
