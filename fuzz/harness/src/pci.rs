//! The root complex with a few devices.

use std::sync::Arc;

use ringfence_bus::MmioBus;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioBus;
use ringfence_bus::PioDevice;
use ringfence_bus::Range;
use ringfence_pci::ConfigPorts;
use ringfence_pci::Ecam;
use ringfence_pci::PciAddress;
use ringfence_pci::PciRoot;
use ringfence_pci::RootWindows;
use ringfence_virtio::pci::VirtioPci;
use ringfence_virtio::rng::Rng;
use ringfence_virtio::testing::TestDriver;

use crate::script::Input;

const WINDOWS: RootWindows = RootWindows {
    memory32: Range {
        start: 0xc000_0000,
        len: 0x0100_0000,
    },
    memory64: Range {
        start: 0x10_0000_0000,
        len: 0x0100_0000,
    },
    io: Range {
        start: 0x1000,
        len: 0x100,
    },
};
const MAX_STEPS: usize = 400;

fn device() -> Arc<VirtioPci> {
    TestDriver::reset(Box::<Rng>::default()).pci
}

/// Configuration accesses of any form, and devices that come and go. Oracle: outside the windows
/// nothing ever answers.
///
/// # Panics
/// When an oracle fails.
pub fn root(data: &[u8]) {
    let mut input = Input::new(data);
    let mmio = Arc::new(MmioBus::default());
    let pio = Arc::new(PioBus::default());
    let root = PciRoot::new(Arc::clone(&mmio), pio, WINDOWS).expect("windows");
    let root = Arc::new(root);
    let ports = ConfigPorts::new(Arc::clone(&root), Box::new(|_| {}));
    let ecam = Ecam::new(Arc::clone(&root));
    for slot in 1..4 {
        root.insert(PciAddress::new(slot, 0), &device().as_pci())
            .expect("room");
    }
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        step(&mut input, &root, &ports, &ecam, &mmio);
        check_outside(&mut input, &mmio);
    }
}

fn step(input: &mut Input<'_>, root: &PciRoot, ports: &ConfigPorts, ecam: &Ecam, mmio: &MmioBus) {
    let mut data = input.u64().to_le_bytes();
    let len = 1 << (input.u8() % 4);
    let config = u64::from(input.u8() % 5) << 15 | u64::from(input.u16() % 260);
    match input.u8() % 8 {
        0 => ports.write(u16::from(input.u8() % 10), &data[..len.min(4)]),
        1 => ports.read(u16::from(input.u8() % 10), &mut data[..len.min(4)]),
        2 => ecam.read(input.u64(), &mut data[..len]),
        3 => ecam.write(input.u64(), &data[..len]),
        4 => ecam.read(config, &mut data[..len]),
        5 => ecam.write(config, &data[..len]),
        6 => {
            let address = PciAddress::new(input.u8() % 5, 0);
            if root.remove(address).is_err() {
                // Taken, or the host bridge's place.
                let _ = root.insert(address, &device().as_pci());
            }
        }
        _ => {
            let window = [WINDOWS.memory32, WINDOWS.memory64][input.below(2)];
            let at = window.start + u64::from(input.u32()) % window.len;
            mmio.write(at, &data[..len]);
            mmio.read(at, &mut data[..len]);
        }
    }
}

fn check_outside(input: &mut Input<'_>, mmio: &MmioBus) {
    let at = input.u64() >> (input.u8() % 40);
    let inside = [WINDOWS.memory32, WINDOWS.memory64]
        .iter()
        .any(|window| (window.start..window.start + window.len).contains(&at));
    assert!(
        inside || mmio.find(at, 1).is_none(),
        "a device answers at {at:#x}"
    );
}
