//! Interrupts, seen from the device: lines and messages.

use std::sync::Arc;

/// A global system interrupt: an input pin of the machine's interrupt controllers (ACPI §5.2.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// A message-signalled interrupt: the write that a device would make (SDM 3A §11.11, PCI 3.0 §6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Destination address, in the `0xfee0_0000` window.
    pub address: u64,
    /// Vector and delivery mode.
    pub data: u32,
}

/// The machine's interrupt controllers, whoever models them (the host kernel or our own chips).
///
/// Both calls may come from any thread and never block on a vCPU.
pub trait InterruptController: Send + Sync {
    /// Drives an input pin. Repeating the current level is harmless.
    fn set_line(&self, gsi: Gsi, high: bool);
    /// Delivers a message.
    fn send_msi(&self, message: MsiMessage);
}

/// One device's wire to one interrupt input.
#[derive(Clone)]
pub struct IrqLine {
    controller: Arc<dyn InterruptController>,
    gsi: Gsi,
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IrqLine").field(&self.gsi.0).finish()
    }
}

impl IrqLine {
    /// Wires a device to input `gsi`.
    #[must_use]
    pub fn new(controller: Arc<dyn InterruptController>, gsi: Gsi) -> Self {
        Self { controller, gsi }
    }

    /// The input this wire goes to.
    #[must_use]
    pub fn gsi(&self) -> Gsi {
        self.gsi
    }

    /// Drives the wire (a level-triggered device holds it until it is served).
    pub fn set(&self, high: bool) {
        self.controller.set_line(self.gsi, high);
    }

    /// One edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}
