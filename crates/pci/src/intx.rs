//! The INTA wires of the bus, shared by devices (PCI 3.0 §2.2.6).
//!
//! A wire is level-triggered and wired-or: it is high while any device on it asserts it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;

use ringfence_bus::Gsi;
use ringfence_bus::IrqLine;

use crate::PciAddress;

#[derive(Debug)]
struct Wire {
    line: IrqLine,
    asserted: Mutex<BTreeSet<PciAddress>>,
}

/// Which interrupt input each device's INTA goes to.
#[derive(Debug)]
pub struct IntxRouter {
    wires: Vec<Wire>,
}

impl IntxRouter {
    /// Routes device `n` to line `n` modulo their number. With no lines, devices have no wire.
    #[must_use]
    pub fn new(lines: Vec<IrqLine>) -> Arc<Self> {
        let wires = lines
            .into_iter()
            .map(|line| Wire {
                line,
                asserted: Mutex::new(BTreeSet::new()),
            })
            .collect();
        Arc::new(Self { wires })
    }

    fn wire(&self, device: u8) -> Option<&Wire> {
        let index = usize::from(device).checked_rem(self.wires.len())?;
        self.wires.get(index)
    }

    /// The input that `device`'s INTA goes to, for the firmware's routing table (ACPI `_PRT`).
    #[must_use]
    pub fn gsi(&self, device: u8) -> Option<Gsi> {
        self.wire(device).map(|wire| wire.line.gsi())
    }

    /// The wire of the function at `address`.
    #[must_use]
    pub fn pin(self: &Arc<Self>, address: PciAddress) -> IntxPin {
        IntxPin {
            router: Arc::clone(self),
            address,
        }
    }
}

/// One function's INTA.
#[derive(Clone, Debug)]
pub struct IntxPin {
    router: Arc<IntxRouter>,
    address: PciAddress,
}

impl IntxPin {
    /// Asserts or releases the wire.
    pub fn set(&self, high: bool) {
        let Some(wire) = self.router.wire(self.address.device()) else {
            return;
        };
        let mut asserted = wire.asserted.lock().unwrap_or_else(PoisonError::into_inner);
        let was_high = !asserted.is_empty();
        if high {
            asserted.insert(self.address);
        } else {
            asserted.remove(&self.address);
        }
        if was_high == asserted.is_empty() {
            // Under the lock, so that two devices' changes reach the controller in their order.
            wire.line.set(!asserted.is_empty());
        }
    }

    /// The input it goes to.
    #[must_use]
    pub fn gsi(&self) -> Option<Gsi> {
        self.router.gsi(self.address.device())
    }
}

#[cfg(test)]
mod tests {
    use ringfence_bus::InterruptController;
    use ringfence_bus::MsiMessage;

    use super::*;

    #[derive(Default)]
    struct Levels(Mutex<Vec<(u32, bool)>>);

    impl InterruptController for Levels {
        fn set_line(&self, gsi: Gsi, high: bool) {
            self.0.lock().expect("test").push((gsi.0, high));
        }
        fn send_msi(&self, _: MsiMessage) {}
    }

    #[test]
    fn a_shared_wire_stays_high_until_the_last_device_lets_go() {
        let levels = Arc::new(Levels::default());
        let lines = (16..18).map(|n| IrqLine::new(levels.clone(), Gsi(n)));
        let router = IntxRouter::new(lines.collect());
        let one = router.pin(PciAddress::new(1, 0));
        let three = router.pin(PciAddress::new(3, 0));
        one.set(true);
        one.set(true);
        three.set(true);
        one.set(false);
        three.set(false);
        assert_eq!(*levels.0.lock().expect("test"), [(17, true), (17, false)]);
    }

    #[test]
    fn without_lines_a_pin_is_not_connected() {
        let pin = IntxRouter::new(Vec::new()).pin(PciAddress::new(1, 0));
        pin.set(true);
        assert_eq!(pin.gsi(), None);
    }
}
