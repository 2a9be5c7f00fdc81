//! The board's interrupt chips for the conformance suite.

use std::sync::Arc;
use std::thread;

use ringfence_bus::Gsi;
use ringfence_bus::InterruptController;
use ringfence_bus::IrqLine;
use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_bus::Range;
use ringfence_chipset::ElcrPorts;
use ringfence_chipset::IOAPIC_LEN;
use ringfence_chipset::IOAPIC_START;
use ringfence_chipset::IoApicWindow;
use ringfence_chipset::Irqchip;
use ringfence_chipset::PIC_ELCR_PORT;
use ringfence_chipset::PIC_MASTER_PORT;
use ringfence_chipset::PIC_SLAVE_PORT;
use ringfence_chipset::PIT_PORT;
use ringfence_chipset::PIT_PORTS;
use ringfence_chipset::PicPorts;
use ringfence_chipset::Pit;
use ringfence_chipset::Timers;
use ringfence_clock::Clock;
use ringfence_clock::TscCalibration;
use ringfence_conformance::BoardChips;
use ringfence_conformance::Chips;

/// A PC's interrupt chips.
pub(crate) struct Pc;

impl BoardChips for Pc {
    fn make(&self, vcpus: u32, pio: &Arc<PioBus>, mmio: &Arc<MmioBus>) -> Chips {
        let timers = Timers::new().expect("timer files");
        let clock = Arc::new(Clock::new(TscCalibration::start().finish()));
        let chips = Irqchip::new(vcpus, &clock, &timers).expect("timer files");
        let controller: Arc<dyn InterruptController> = chips.clone();
        let line = IrqLine::new(Arc::clone(&controller), Gsi(0));
        let pit = Pit::new(line, &timers).expect("a timer file");
        let ports = |start: u16, len| Range {
            start: u64::from(start),
            len,
        };
        let master = Arc::new(PicPorts::master(chips.clone()));
        let slave = Arc::new(PicPorts::slave(chips.clone()));
        let elcr = Arc::new(ElcrPorts::new(chips.clone()));
        pio.insert(ports(PIC_MASTER_PORT, 2), master)
            .expect("free ports");
        pio.insert(ports(PIC_SLAVE_PORT, 2), slave)
            .expect("free ports");
        pio.insert(ports(PIC_ELCR_PORT, 2), elcr)
            .expect("free ports");
        pio.insert(ports(PIT_PORT, PIT_PORTS), pit)
            .expect("free ports");
        let window = Range {
            start: IOAPIC_START,
            len: IOAPIC_LEN,
        };
        mmio.insert(window, Arc::new(IoApicWindow::new(chips.clone())))
            .expect("free addresses");
        // The thread ends with the test process.
        thread::spawn(move || timers.run());
        Chips {
            local_apics: (0..vcpus)
                .map(|index| chips.local_apic(index).expect("one a vCPU"))
                .collect(),
            controller,
        }
    }
}
