//! The hardware: RAM, buses, chips and the PCI root, assembled.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringfence_bus::Gsi;
use ringfence_bus::InterruptController;
use ringfence_bus::IrqLine;
use ringfence_bus::MmioBus;
use ringfence_bus::MmioDevice;
use ringfence_bus::PioBus;
use ringfence_bus::PioDevice;
use ringfence_bus::Range;
use ringfence_chipset as chipset;
use ringfence_chipset::AcpiPm;
use ringfence_chipset::I8042;
use ringfence_chipset::I8042Port;
use ringfence_chipset::IoApicWindow;
use ringfence_chipset::Irqchip;
use ringfence_chipset::OutputLimits;
use ringfence_chipset::PicPorts;
use ringfence_chipset::Pit;
use ringfence_chipset::PitGate;
use ringfence_chipset::PowerEvents;
use ringfence_chipset::Pvpanic;
use ringfence_chipset::Rtc;
use ringfence_chipset::SerialOutput;
use ringfence_chipset::SerialPort;
use ringfence_chipset::Timers;
use ringfence_clock::Clock;
use ringfence_device::PersistValue;
use ringfence_engine::Engine;
use ringfence_engine::InterruptChips;
use ringfence_engine::Interrupts;
use ringfence_engine::LocalApic;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_loader::BootProtocol;
use ringfence_loader::BootSetup;
use ringfence_loader::Kernel;
use ringfence_memory::GuestRam;
use ringfence_pci::ConfigPorts;
use ringfence_pci::Ecam;
use ringfence_pci::IntxRouter;
use ringfence_pci::PciRoot;
use ringfence_virtio::EventLoop;
use ringfence_x86::cpuid::CpuidTable;
use ringfence_x86::state::VcpuState;

use crate::AddressMap;
use crate::MachineError;
use crate::MachineEvent;
use crate::acpi;
use crate::acpi::Tables;
use crate::address_map::ECAM;
use crate::cpuid;
use crate::input::SerialInput;
use crate::lifecycle::Lifecycle;

/// COM1's interrupt.
pub(crate) const SERIAL_IRQ: Gsi = Gsi(4);
const PIT_IRQ: Gsi = Gsi(0);
/// The system control interrupt.
const SCI: Gsi = Gsi(9);
/// The inputs that the PCI bus's INTA wires share.
const INTX: std::ops::Range<u32> = 16..20;

/// The serial port's files.
#[derive(Debug)]
pub struct SerialSetup {
    /// What the guest reads.
    pub input: Option<OwnedFd>,
    /// Where its output goes.
    pub output: Option<OwnedFd>,
    /// How much of it.
    pub limits: OutputLimits,
}

/// What a board is made of.
pub struct BoardSetup<'a> {
    /// What runs it.
    pub engine: &'a dyn Engine,
    /// The RAM.
    pub ram: GuestRam,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The machine's time, which the engine shares.
    pub clock: Arc<Clock>,
    /// The serial port; without one, none is there.
    pub serial: Option<SerialSetup>,
    /// Who hears of what the machine does. Called from any of its threads; it must not wait for
    /// one of them.
    pub observer: Box<dyn Fn(MachineEvent) + Send + Sync>,
}

impl std::fmt::Debug for BoardSetup<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoardSetup")
            .field("engine", &self.engine.name())
            .field("vcpus", &self.vcpus)
            .finish_non_exhaustive()
    }
}

/// What to boot.
#[derive(Debug)]
pub struct Boot<'a> {
    /// The kernel.
    pub kernel: Kernel,
    /// How to enter it; what suits it when `None`.
    pub protocol: Option<BootProtocol>,
    /// The initramfs.
    pub initramfs: Option<std::fs::File>,
    /// The command line.
    pub cmdline: &'a str,
    /// Fresh randomness for the kernel's pool.
    pub rng_seed: [u8; 32],
}

/// A device that goes into snapshots, by name.
pub(crate) type Persisted = (&'static str, Arc<dyn PersistValue + Send + Sync>);

/// The assembled hardware.
pub struct Board {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) timers: Arc<Timers>,
    pub(crate) events: Arc<EventLoop>,
    pub(crate) vcpus: u32,
    pub(crate) cpuid: CpuidTable,
    pub(crate) clock: Arc<Clock>,
    ram: GuestRam,
    map: AddressMap,
    interrupts: Arc<dyn InterruptController>,
    pci: Arc<PciRoot>,
    intx: Arc<IntxRouter>,
    acpi_pm: Arc<AcpiPm>,
    serial: Option<Arc<SerialPort>>,
    serial_output: Option<Arc<SerialOutput>>,
    persisted: Vec<Persisted>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board")
            .field("lifecycle", &self.lifecycle)
            .field("vcpus", &self.vcpus)
            .field("map", &self.map)
            .finish_non_exhaustive()
    }
}

/// The two buses, while devices are put on them.
struct Buses {
    pio: Arc<PioBus>,
    mmio: Arc<MmioBus>,
}

impl Buses {
    fn ports(
        &self,
        device: &'static str,
        start: u16,
        len: u64,
        on: impl PioDevice + 'static,
    ) -> Result<(), MachineError> {
        self.shared_ports(device, start, len, Arc::new(on))
    }

    fn shared_ports(
        &self,
        device: &'static str,
        start: u16,
        len: u64,
        on: Arc<dyn PioDevice>,
    ) -> Result<(), MachineError> {
        let start = u64::from(start);
        self.pio
            .insert(Range { start, len }, on)
            .map_err(|source| MachineError::Bus { device, source })
    }

    fn memory(
        &self,
        device: &'static str,
        range: Range,
        on: impl MmioDevice + 'static,
    ) -> Result<(), MachineError> {
        self.mmio
            .insert(range, Arc::new(on))
            .map_err(|source| MachineError::Bus { device, source })
    }
}

/// The board's own interrupt chips, for engines that bring none.
fn board_chips(
    buses: &Buses,
    vcpus: u32,
    clock: &Arc<Clock>,
    timers: &Timers,
) -> Result<Arc<Irqchip>, MachineError> {
    let chip = Irqchip::new(vcpus, clock, timers)
        .map_err(MachineError::host("make the local APICs' timers"))?;
    let ioapic = Range {
        start: chipset::IOAPIC_START,
        len: chipset::IOAPIC_LEN,
    };
    buses.memory("the I/O APIC", ioapic, IoApicWindow::new(chip.clone()))?;
    let master = PicPorts::master(chip.clone());
    buses.ports("the PIC", chipset::PIC_MASTER_PORT, 2, master)?;
    let slave = PicPorts::slave(chip.clone());
    buses.ports("the PIC", chipset::PIC_SLAVE_PORT, 2, slave)?;
    let elcr = chipset::ElcrPorts::new(chip.clone());
    buses.ports("the PIC", chipset::PIC_ELCR_PORT, 2, elcr)?;
    Ok(chip)
}

/// The interval timer, which belongs to whoever has the interrupt chips.
fn board_pit(
    buses: &Buses,
    interrupts: &Arc<dyn InterruptController>,
    timers: &Timers,
) -> Result<Arc<Pit>, MachineError> {
    const DEVICE: &str = "the interval timer";
    let irq = IrqLine::new(Arc::clone(interrupts), PIT_IRQ);
    let pit = Pit::new(irq, timers).map_err(MachineError::host("make the interval timer"))?;
    let ports: Arc<dyn PioDevice> = pit.clone();
    buses.shared_ports(DEVICE, chipset::PIT_PORT, chipset::PIT_PORTS, ports)?;
    buses.ports(DEVICE, chipset::PIT_GATE_PORT, 1, PitGate::new(pit.clone()))?;
    Ok(pit)
}

/// The engine's machine, with whoever's interrupt chips.
struct Core {
    vm: Arc<dyn Vm>,
    interrupts: Arc<dyn InterruptController>,
    persisted: Vec<Persisted>,
}

impl Core {
    fn new(setup: &BoardSetup<'_>, buses: &Buses, timers: &Timers) -> Result<Self, MachineError> {
        let vm_setup = |interrupts| VmSetup {
            ram: setup.ram.clone(),
            pio: Arc::clone(&buses.pio),
            mmio: Arc::clone(&buses.mmio),
            vcpus: setup.vcpus,
            interrupts,
            unclaimed: Unclaimed::Float,
        };
        match setup.engine.caps().interrupt_chips {
            InterruptChips::Engine => {
                let vm: Arc<dyn Vm> = setup.engine.create_vm(vm_setup(Interrupts::Engine))?.into();
                let interrupts = vm.interrupts().ok_or_else(|| {
                    ringfence_engine::EngineError::Internal("it made no interrupt chips".to_owned())
                })?;
                Ok(Self {
                    vm,
                    interrupts,
                    persisted: Vec::new(),
                })
            }
            InterruptChips::Board => {
                let chip = board_chips(buses, setup.vcpus, &setup.clock, timers)?;
                let apics: Vec<Arc<dyn LocalApic>> = (0..setup.vcpus)
                    .filter_map(|index| chip.local_apic(index))
                    .collect();
                let interrupts: Arc<dyn InterruptController> = chip.clone();
                let pit = board_pit(buses, &interrupts, timers)?;
                let vm = setup.engine.create_vm(vm_setup(Interrupts::Board(apics)))?;
                Ok(Self {
                    vm: vm.into(),
                    interrupts,
                    persisted: vec![("irqchip", chip), ("pit", pit)],
                })
            }
        }
    }
}

impl Board {
    /// Puts a board together. Its threads start with its [`Machine`](crate::Machine).
    ///
    /// # Errors
    /// [`MachineError`] when the engine or the host refuses something.
    pub fn new(setup: BoardSetup<'_>) -> Result<Self, MachineError> {
        let cpuid = setup.engine.supported_cpuid()?;
        let map = AddressMap::new(setup.ram.layout(), cpuid::address_bits(&cpuid))?;
        let timers = Timers::new().map_err(MachineError::host("make the timers"))?;
        let events = EventLoop::new().map_err(MachineError::host("make the device loop"))?;
        let buses = Buses {
            pio: Arc::default(),
            mmio: Arc::default(),
        };
        let core = Core::new(&setup, &buses, &timers)?;
        let lifecycle = Lifecycle::new(setup.observer);
        let power: PowerEvents = {
            let lifecycle = Arc::clone(&lifecycle);
            Arc::new(move |event| lifecycle.power_event(event))
        };
        let mut persisted = core.persisted;
        let acpi_pm = fixed_devices(&buses, &core.interrupts, &power, &mut persisted)?;
        let pci = pci_root(&buses, &map, power)?;
        let lines = INTX.map(|gsi| IrqLine::new(Arc::clone(&core.interrupts), Gsi(gsi)));
        let mut board = Self {
            vm: core.vm,
            lifecycle,
            timers,
            events,
            vcpus: setup.vcpus,
            cpuid,
            clock: setup.clock,
            ram: setup.ram,
            map,
            intx: IntxRouter::new(lines.collect()),
            interrupts: core.interrupts,
            pci,
            acpi_pm,
            serial: None,
            serial_output: None,
            persisted,
        };
        if let Some(serial) = setup.serial {
            board.add_serial(&buses, serial)?;
        }
        Ok(board)
    }

    fn add_serial(&mut self, buses: &Buses, setup: SerialSetup) -> Result<(), MachineError> {
        let output = setup
            .output
            .map(|file| SerialOutput::new(file, setup.limits, &self.timers))
            .transpose()
            .map_err(MachineError::host("make the serial port's output"))?;
        let irq = IrqLine::new(Arc::clone(&self.interrupts), SERIAL_IRQ);
        let port = Arc::new(SerialPort::new(irq, output.clone()));
        buses.shared_ports(
            "the serial port",
            chipset::SERIAL_PORT,
            chipset::SERIAL_PORTS,
            port.clone(),
        )?;
        if let Some(file) = setup.input {
            SerialInput::start(file, &port, &self.events)
                .map_err(MachineError::host("read the serial port's input"))?;
        }
        self.persisted.push(("serial", port.clone()));
        self.serial = Some(port);
        self.serial_output = output;
        Ok(())
    }

    /// The RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The PCI bus, for devices.
    #[must_use]
    pub fn pci(&self) -> &Arc<PciRoot> {
        &self.pci
    }

    /// The INTA wires, for devices.
    #[must_use]
    pub fn intx(&self) -> &Arc<IntxRouter> {
        &self.intx
    }

    /// Where devices' interrupts go.
    #[must_use]
    pub fn interrupts(&self) -> &Arc<dyn InterruptController> {
        &self.interrupts
    }

    /// The loop that device workers run in.
    #[must_use]
    pub fn events(&self) -> &Arc<EventLoop> {
        &self.events
    }

    /// The machine's timers.
    #[must_use]
    pub fn timers(&self) -> &Arc<Timers> {
        &self.timers
    }

    /// The engine's machine, for doorbells and the dirty log.
    #[must_use]
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// The address map.
    #[must_use]
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// The serial port, if there is one.
    #[must_use]
    pub fn serial(&self) -> Option<&Arc<SerialPort>> {
        self.serial.as_ref()
    }

    /// Where the serial port's output goes.
    #[must_use]
    pub fn serial_output(&self) -> Option<&Arc<SerialOutput>> {
        self.serial_output.as_ref()
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        self.acpi_pm.press_power_button();
    }

    /// The chips that go into a snapshot, by name.
    pub fn persisted(&self) -> impl Iterator<Item = (&'static str, &dyn PersistValue)> {
        self.persisted
            .iter()
            .map(|(name, device)| (*name, &**device as &dyn PersistValue))
    }

    /// Writes the firmware tables, loads a kernel, and returns what the first vCPU starts with.
    ///
    /// # Errors
    /// [`MachineError`] when the kernel can't be loaded or doesn't fit.
    pub fn boot(&self, boot: Boot<'_>) -> Result<VcpuState, MachineError> {
        let intx = INTX.map(Gsi).collect();
        let tables = Tables {
            vcpus: self.vcpus,
            windows: &self.map.windows,
            intx,
            sci: SCI,
            has_serial: self.serial.is_some(),
        };
        let rsdp = acpi::write(&self.ram, &tables)?;
        let loaded = ringfence_loader::load(
            &self.ram,
            BootSetup {
                kernel: boot.kernel,
                protocol: boot.protocol,
                initramfs: boot.initramfs,
                cmdline: boot.cmdline,
                rsdp: Some(rsdp),
                reserved: &AddressMap::reserved(),
                rng_seed: boot.rng_seed,
            },
        )?;
        Ok(loaded.state)
    }
}

/// The chips that every machine has, whoever runs it.
fn fixed_devices(
    buses: &Buses,
    interrupts: &Arc<dyn InterruptController>,
    power: &PowerEvents,
    persisted: &mut Vec<Persisted>,
) -> Result<Arc<AcpiPm>, MachineError> {
    let rtc = Arc::new(Rtc::default());
    let ports: Arc<dyn PioDevice> = rtc.clone();
    buses.shared_ports("the clock", chipset::RTC_PORT, chipset::RTC_PORTS, ports)?;
    let keyboard = I8042::new(Arc::clone(power));
    let data = I8042Port::data(keyboard.clone());
    buses.ports("the keyboard controller", chipset::I8042_DATA_PORT, 1, data)?;
    let command = I8042Port::command(keyboard.clone());
    let port = chipset::I8042_COMMAND_PORT;
    buses.ports("the keyboard controller", port, 1, command)?;
    let sci = IrqLine::new(Arc::clone(interrupts), SCI);
    let acpi_pm = AcpiPm::new(sci, Arc::clone(power));
    let ports: Arc<dyn PioDevice> = acpi_pm.clone();
    let (start, len) = (chipset::ACPI_PM_PORT, chipset::ACPI_PM_PORTS);
    buses.shared_ports("the power registers", start, len, ports)?;
    let pvpanic = Pvpanic::new(Arc::clone(power));
    buses.ports("the panic port", chipset::PVPANIC_PORT, 1, pvpanic)?;
    persisted.push(("rtc", rtc));
    persisted.push(("i8042", keyboard));
    persisted.push(("acpi", acpi_pm.clone()));
    Ok(acpi_pm)
}

fn pci_root(
    buses: &Buses,
    map: &AddressMap,
    power: PowerEvents,
) -> Result<Arc<PciRoot>, MachineError> {
    let (mmio, pio) = (Arc::clone(&buses.mmio), Arc::clone(&buses.pio));
    let root = Arc::new(PciRoot::new(mmio, pio, map.windows)?);
    let reset = Box::new(move |value| chipset::write_reset_control(value, &power));
    let ports = ConfigPorts::new(Arc::clone(&root), reset);
    buses.ports("the PCI root", ConfigPorts::PORT, ConfigPorts::PORTS, ports)?;
    buses.memory("the PCI root", ECAM, Ecam::new(Arc::clone(&root)))?;
    Ok(root)
}
