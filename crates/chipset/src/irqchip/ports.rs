//! The chips' places on the buses.

use std::sync::Arc;

use ringfence_bus::MmioDevice;
use ringfence_bus::PioDevice;

use super::Irqchip;

/// Ports of one PIC: command and data.
#[derive(Debug)]
pub struct PicPorts {
    chip: Arc<Irqchip>,
    index: usize,
}

impl PicPorts {
    /// The master's ports, at [`PIC_MASTER_PORT`](super::PIC_MASTER_PORT).
    #[must_use]
    pub fn master(chip: Arc<Irqchip>) -> Self {
        Self { chip, index: 0 }
    }

    /// The slave's ports, at [`PIC_SLAVE_PORT`](super::PIC_SLAVE_PORT).
    #[must_use]
    pub fn slave(chip: Arc<Irqchip>) -> Self {
        Self { chip, index: 1 }
    }
}

impl PioDevice for PicPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.chip.with_pic(|pic| pic.read(self.index, offset));
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let &[byte] = data {
            self.chip
                .with_pic(|pic| pic.write(self.index, offset, byte));
        }
    }
}

/// The edge/level control registers, at [`PIC_ELCR_PORT`](super::PIC_ELCR_PORT).
#[derive(Debug)]
pub struct ElcrPorts(Arc<Irqchip>);

impl ElcrPorts {
    /// The registers of both PICs.
    #[must_use]
    pub fn new(chip: Arc<Irqchip>) -> Self {
        Self(chip)
    }
}

impl PioDevice for ElcrPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.0.with_pic(|pic| pic.elcr(usize::from(offset)));
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let &[byte] = data {
            self.0
                .with_pic(|pic| pic.set_elcr(usize::from(offset), byte));
        }
    }
}

/// The I/O APIC's registers, at [`IOAPIC_START`](super::IOAPIC_START).
#[derive(Debug)]
pub struct IoApicWindow(Arc<Irqchip>);

impl IoApicWindow {
    /// The window of `chip`'s I/O APIC.
    #[must_use]
    pub fn new(chip: Arc<Irqchip>) -> Self {
        Self(chip)
    }
}

impl MmioDevice for IoApicWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.ioapic().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut ioapic = self.0.ioapic();
        if let Some(message) = ioapic.write(offset, data) {
            self.0.send(message, None);
        }
    }
}
