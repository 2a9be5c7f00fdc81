//! The root complex seen through its ports, its ECAM window and the buses.

use std::sync::Mutex;

use super::*;
use crate::ConfigPorts;
use crate::Ecam;

const WINDOWS: RootWindows = RootWindows {
    memory32: Range {
        start: 0xc000_0000,
        len: 0x1000_0000,
    },
    memory64: Range {
        start: 0x10_0000_0000,
        len: 0x1_0000_0000,
    },
    io: Range {
        start: 0x1000,
        len: 0x1000,
    },
};

struct Echo {
    function: PciFunction,
    placed: Mutex<Vec<(u8, Option<u64>)>>,
}

impl Echo {
    fn new(kind: BarKind) -> Arc<Self> {
        let mut function = PciFunction::new(&Identity {
            vendor: 0x8086,
            device: 0x100e,
            revision: 0,
            class: 0x02_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let size = if kind == BarKind::Io { 32 } else { 0x4000 };
        let spec = BarSpec {
            index: 0,
            kind,
            size,
        };
        function.add_bar(spec).expect("bar");
        Arc::new(Self {
            function,
            placed: Mutex::default(),
        })
    }
}

impl PciDevice for Echo {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.function.read_config(offset, data);
    }
    fn write_config(&self, offset: u16, data: &[u8]) {
        self.function.write_config(offset, data);
    }
    fn bars(&self) -> Vec<BarSpec> {
        self.function.bars().to_vec()
    }
    fn windows(&self) -> Vec<Window> {
        self.function.windows()
    }
    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        data.fill(offset.to_le_bytes()[0]);
    }
    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}
    fn bar_placed(&self, bar: u8, address: Option<u64>) {
        self.placed.lock().expect("test").push((bar, address));
    }
    fn reset(&self) {
        self.function.reset();
    }
}

struct Machine {
    mmio: Arc<MmioBus>,
    pio: Arc<PioBus>,
    root: Arc<PciRoot>,
}

impl Machine {
    fn new() -> Self {
        let mmio = Arc::new(MmioBus::default());
        let pio = Arc::new(PioBus::default());
        let root = PciRoot::new(mmio.clone(), pio.clone(), WINDOWS).expect("windows");
        Self {
            mmio,
            pio,
            root: Arc::new(root),
        }
    }

    fn insert(&self, address: PciAddress, device: &Arc<Echo>) -> Result<(), PciError> {
        let device: Arc<dyn PciDevice> = device.clone();
        self.root.insert(address, &device)
    }

    fn enable(&self, address: PciAddress) {
        self.root.write_config(address, 4, &[0b11, 0]);
    }

    fn reads(&self, address: u64) -> u8 {
        let mut data = [0];
        self.mmio.read(address, &mut data);
        data[0]
    }
}

const FIRST: PciAddress = PciAddress::new(1, 0);

#[test]
fn the_ports_find_devices_and_read_ones_where_none_is() {
    let machine = Machine::new();
    let ports = ConfigPorts::new(machine.root.clone(), Box::new(|_| {}));
    let read = |address: u32| {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(0x8000_0000), 0x0008_1b36);
    assert_eq!(read(0x8000_0800), 0xffff_ffff, "no device 1");
    assert_eq!(read(0x8001_0000), 0xffff_ffff, "no bus 1");
    assert_eq!(read(0x0000_0000), 0xffff_ffff, "not enabled");
}

#[test]
fn a_byte_at_cf9_is_the_reset_register_and_keeps_the_address() {
    let written = Arc::new(Mutex::new(Vec::new()));
    let sink = written.clone();
    let ports = ConfigPorts::new(
        Machine::new().root,
        Box::new(move |value| sink.lock().expect("test").push(value)),
    );
    ports.write(0, &0x8000_0000_u32.to_le_bytes());
    ports.write(1, &[6]);
    assert_eq!(*written.lock().expect("test"), [6]);
    assert_eq!(ports.address(), 0x8000_0000);
}

#[test]
fn ecam_serves_any_width_by_double_words() {
    let machine = Machine::new();
    let ecam = Ecam::new(machine.root);
    let mut data = [0; 8];
    ecam.read(0, &mut data);
    assert_eq!(data[..4], 0x0008_1b36_u32.to_le_bytes());
    ecam.read(1, &mut data);
    assert_eq!(data[0], 0x1b);
    ecam.read(1 << 15, &mut data);
    assert_eq!(data, [0xff; 8]);
    ecam.write(u64::MAX - 3, &[0; 8]);
}

#[test]
fn an_inserted_device_has_addresses_and_answers_once_enabled() {
    let machine = Machine::new();
    let device = Echo::new(BarKind::Memory32);
    machine.insert(FIRST, &device).expect("free");
    let at = 0xc000_0000;
    assert_eq!(machine.reads(at + 5), 0xff);
    machine.enable(FIRST);
    assert_eq!(machine.reads(at + 5), 5);
    assert_eq!(*device.placed.lock().expect("test"), [(0, Some(at))]);
}

#[test]
fn a_moved_bar_answers_at_its_new_address_only() {
    let machine = Machine::new();
    let device = Echo::new(BarKind::Memory64 {
        prefetchable: false,
    });
    machine.insert(FIRST, &device).expect("free");
    machine.enable(FIRST);
    machine.root.write_config(FIRST, 0x10, &[0, 0, 1, 0]);
    assert_eq!(machine.reads(0x10_0000_0005), 0xff);
    assert_eq!(machine.reads(0x10_0001_0005), 5);
    let placed = device.placed.lock().expect("test").clone();
    assert_eq!(placed[1..], [(0, None), (0, Some(0x10_0001_0000))]);
}

// A BAR moved over RAM, the interrupt controllers or another device must not capture them.
#[test]
fn a_bar_outside_the_windows_or_over_another_device_answers_nowhere() {
    let machine = Machine::new();
    let second = PciAddress::new(2, 0);
    for address in [FIRST, second] {
        let device = Echo::new(BarKind::Memory32);
        machine.insert(address, &device).expect("free");
        machine.enable(address);
    }
    for start in [0_u32, 0x10_0000, 0xfee0_0000, 0xcfff_e000, 0xc000_0000] {
        machine
            .root
            .write_config(second, 0x10, &start.to_le_bytes());
        let elsewhere = u64::from(start & !0x3fff);
        assert_eq!(machine.reads(0xc000_4001), 0xff, "left its old place");
        assert_eq!(machine.reads(0xc000_0002), 2, "the first is untouched");
        if elsewhere != 0xc000_0000 && elsewhere != 0xcfff_c000 {
            assert!(machine.mmio.find(elsewhere, 1).is_none(), "{start:#x}");
        }
    }
}

#[test]
fn port_bars_answer_on_the_port_bus() {
    let machine = Machine::new();
    machine
        .insert(FIRST, &Echo::new(BarKind::Io))
        .expect("free");
    machine.enable(FIRST);
    let mut data = [0];
    machine.pio.read(0x1003, &mut data);
    assert_eq!(data, [3]);
}

#[test]
fn a_removed_device_is_gone_and_its_place_is_free() {
    let machine = Machine::new();
    for _ in 0..3 {
        let device = Echo::new(BarKind::Memory32);
        machine.insert(FIRST, &device).expect("free");
        machine.enable(FIRST);
        assert_eq!(machine.reads(0xc000_0007), 7);
        machine.root.remove(FIRST).expect("there");
        assert_eq!(machine.reads(0xc000_0007), 0xff);
    }
    assert!(matches!(
        machine.root.remove(FIRST),
        Err(PciError::Empty(_))
    ));
}

#[test]
fn a_full_bus_and_a_full_window_are_said() {
    let machine = Machine::new();
    for _ in 1..DEVICES {
        let address = machine.root.free_address().expect("room");
        let device = Echo::new(BarKind::Io);
        machine.insert(address, &device).expect("room");
    }
    assert!(matches!(
        machine.root.free_address(),
        Err(PciError::BusFull)
    ));
    let taken = machine.insert(FIRST, &Echo::new(BarKind::Io));
    assert!(matches!(taken, Err(PciError::SlotTaken(_))));
}

#[test]
fn a_bus_reset_stops_decoding_and_keeps_addresses() {
    let machine = Machine::new();
    machine
        .insert(FIRST, &Echo::new(BarKind::Memory32))
        .expect("free");
    machine.enable(FIRST);
    machine.root.reset();
    assert_eq!(machine.reads(0xc000_0000), 0xff);
    machine.enable(FIRST);
    assert_eq!(machine.reads(0xc000_0001), 1);
}
