//! The port by which a guest's kernel says that it panicked.
//!
//! Spec: QEMU's docs/specs/pvpanic.rst, the ISA device. Linux's driver finds it by ACPI ID
//! QEMU0001.

use ringfence_bus::PioDevice;

use crate::PowerEvent;
use crate::PowerEvents;

/// The port.
pub const PVPANIC_PORT: u16 = 0x505;

const PANICKED: u8 = 1 << 0;
const CRASH_KERNEL: u8 = 1 << 1;

/// The device. It has no state.
pub struct Pvpanic(PowerEvents);

impl std::fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pvpanic")
    }
}

impl Pvpanic {
    /// A device that tells `events`.
    #[must_use]
    pub fn new(events: PowerEvents) -> Self {
        Self(events)
    }
}

impl PioDevice for Pvpanic {
    /// A read says which events can be told.
    fn read(&self, _: u16, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_KERNEL);
    }

    fn write(&self, _: u16, data: &[u8]) {
        let value = data.first().copied().unwrap_or(0);
        if value & PANICKED != 0 {
            (self.0)(PowerEvent::Panic);
        } else if value & CRASH_KERNEL != 0 {
            (self.0)(PowerEvent::CrashKernel);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::power::tests::Recorder;

    #[test]
    fn a_panic_is_told_and_the_events_are_listed() {
        let events = Arc::new(Recorder::default());
        let device = Pvpanic::new(events.sink());
        let mut supported = [0];
        device.read(0, &mut supported);
        assert_eq!(supported, [3]);
        for value in [1, 2, 3, 4, 0] {
            device.write(0, &[value]);
        }
        device.write(0, &[]);
        let (panic, crash) = (PowerEvent::Panic, PowerEvent::CrashKernel);
        assert_eq!(events.taken(), [panic, crash, panic]);
    }
}
