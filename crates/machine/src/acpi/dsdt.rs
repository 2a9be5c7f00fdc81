//! The DSDT: devices that can't be enumerated, and the sleep state (ACPI 6.5 §5.2.11.1, §19).

use acpi_tables::Aml;
use acpi_tables::aml::AddressSpace;
use acpi_tables::aml::AddressSpaceCacheable;
use acpi_tables::aml::Device;
use acpi_tables::aml::EISAName;
use acpi_tables::aml::IO;
use acpi_tables::aml::Interrupt;
use acpi_tables::aml::Name;
use acpi_tables::aml::Package;
use acpi_tables::aml::PackageBuilder;
use acpi_tables::aml::Path;
use acpi_tables::aml::ResourceTemplate;
use acpi_tables::aml::Scope;
use acpi_tables::sdt::Sdt;
use ringfence_bus::Range;
use ringfence_chipset::ACPI_SLEEP_OFF;
use ringfence_chipset::PVPANIC_PORT;
use ringfence_chipset::RTC_PORT;
use ringfence_chipset::SERIAL_PORT;

use super::OEM_ID;
use super::OEM_REVISION;
use super::OEM_TABLE_ID;
use super::Tables;
use crate::board::SERIAL_IRQ;

const REVISION: u8 = 6;
const HEADER_BYTES: u32 = 36;
const ZERO: u8 = 0;
/// Present, enabled, shown, working.
const STATUS_ALL: u8 = 0xf;
/// Device numbers on a bus.
const SLOTS: u32 = 32;
/// Configuration ports, which the root complex itself answers.
const CONFIG_PORT: u16 = 0xcf8;

pub(super) fn dsdt(tables: &Tables<'_>) -> Sdt {
    let mut aml = Vec::new();
    let off = Package::new(vec![&ACPI_SLEEP_OFF, &ACPI_SLEEP_OFF, &ZERO, &ZERO]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut aml);
    pci_root(tables, &mut aml);
    rtc(&mut aml);
    pvpanic(&mut aml);
    if tables.has_serial {
        serial(&mut aml);
    }
    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

fn in_system_bus(device: &Device<'_>, aml: &mut Vec<u8>) {
    Scope::new("_SB_".into(), vec![device]).to_aml_bytes(aml);
}

fn last(range: Range) -> u64 {
    range.start + range.len - 1
}

fn low<T: TryFrom<u64> + Default>(value: u64) -> T {
    T::try_from(value).unwrap_or_default()
}

/// The root complex with its windows and its INTA wires (PCI Firmware 3.3 §4.2).
fn pci_root(tables: &Tables<'_>, aml: &mut Vec<u8>) {
    let windows = tables.windows;
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let config = IO::new(CONFIG_PORT, CONFIG_PORT, 1, 8);
    let io = AddressSpace::<u16>::new_io(low(windows.io.start), low(last(windows.io)), None);
    let kind = AddressSpaceCacheable::NotCacheable;
    let (start, end) = (windows.memory32.start, last(windows.memory32));
    let memory32 = AddressSpace::<u32>::new_memory(kind, true, low(start), low(end), None);
    let (start, end) = (windows.memory64.start, last(windows.memory64));
    let memory64 = AddressSpace::<u64>::new_memory(kind, true, start, end, None);
    let resources = ResourceTemplate::new(vec![&bus, &config, &io, &memory32, &memory64]);
    let routes = routes(tables);
    in_system_bus(
        &Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &ZERO),
                &Name::new("_BBN".into(), &ZERO),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_CRS".into(), &resources),
                &Name::new("_PRT".into(), &routes),
            ],
        ),
        aml,
    );
}

/// `_PRT` (§6.2.13): INTA of each device number, by the number of its interrupt input.
fn routes(tables: &Tables<'_>) -> PackageBuilder {
    let mut routes = PackageBuilder::new();
    let slots = if tables.intx.is_empty() { 0 } else { SLOTS };
    for (slot, gsi) in (0..slots).zip(tables.intx.iter().cycle()) {
        let address = slot << 16 | 0xffff;
        routes.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &gsi.0]));
    }
    routes
}

fn ports(start: u16, count: u8) -> IO {
    IO::new(start, start, 1, count)
}

fn rtc(aml: &mut Vec<u8>) {
    let resources = ports(RTC_PORT, 2);
    in_system_bus(
        &Device::new(
            "RTC_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&resources])),
            ],
        ),
        aml,
    );
}

fn pvpanic(aml: &mut Vec<u8>) {
    let resources = ports(PVPANIC_PORT, 1);
    in_system_bus(
        &Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new("_STA".into(), &STATUS_ALL),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&resources])),
            ],
        ),
        aml,
    );
}

fn serial(aml: &mut Vec<u8>) {
    let registers = ports(SERIAL_PORT, 8);
    let irq = Interrupt::new(true, true, false, false, SERIAL_IRQ.0);
    in_system_bus(
        &Device::new(
            Path::new("COM1"),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&registers, &irq]),
                ),
            ],
        ),
        aml,
    );
}
