//! From the configuration to a board that is ready to run.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use ringfence_chipset::OutputLimits;
use ringfence_clock::Clock;
use ringfence_clock::TscCalibration;
use ringfence_engine::Engine;
use ringfence_loader::BootProtocol;
use ringfence_loader::Kernel;
use ringfence_machine::Board;
use ringfence_machine::BoardSetup;
use ringfence_machine::Boot;
use ringfence_machine::MachineError;
use ringfence_machine::MachineEvent;
use ringfence_machine::SerialSetup;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_pci::PciAddress;
use ringfence_virtio::block::ThreadStart;
use ringfence_virtio::pci::Connections;
use ringfence_virtio::pci::VirtioPci;
use ringfence_x86::state::VcpuState;
use rustix::rand::GetRandomFlags;

use crate::VmError;
use crate::config;
use crate::config::Config;
use crate::config::DeviceConfig;
use crate::config::Fd;
use crate::config::FsSource;
use crate::config::Protocol;
use crate::descriptors::Descriptors;
use crate::devices::Card;
use crate::devices::Handles;
use crate::devices::Workshop;
use crate::engines;
use crate::engines::EngineContext;
use crate::jail;
use crate::jail::Reach;

/// How long the phases of the start took, in order.
#[derive(Debug)]
pub(crate) struct Timing {
    last: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl Timing {
    pub(crate) fn start() -> Self {
        Self {
            last: Instant::now(),
            phases: Vec::new(),
        }
    }

    /// The phase that ends now.
    pub(crate) fn phase(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now.duration_since(self.last)));
        self.last = now;
    }

    pub(crate) fn phases(&self) -> &[(&'static str, Duration)] {
        &self.phases
    }
}

/// A device on the bus.
pub(crate) struct PlacedDevice {
    /// Its type and place in the document.
    pub(crate) name: String,
    pub(crate) pci: Arc<VirtioPci>,
    /// Where it is.
    pub(crate) address: PciAddress,
    /// Of a network card.
    pub(crate) card: Option<Card>,
}

/// All that is needed to run.
pub(crate) struct Assembled {
    pub(crate) board: Board,
    pub(crate) first_state: VcpuState,
    pub(crate) devices: Vec<PlacedDevice>,
    pub(crate) handles: Handles,
    /// The engine has doorbells of its own.
    pub(crate) doorbells: bool,
    /// What stays in reach of the file system devices.
    pub(crate) reach: Vec<Reach>,
}

impl Assembled {
    /// Whether there are instances of vhost-net.
    pub(crate) fn has_vhost(&self) -> bool {
        self.devices
            .iter()
            .any(|device| device.card.is_some_and(|card| card.vhost))
    }
}

/// Who hears of the machine.
pub(crate) type Observer = Box<dyn Fn(MachineEvent) + Send + Sync>;

/// What the machine is put together from, beside its configuration.
pub(crate) struct Parts {
    pub(crate) descriptors: Descriptors,
    /// The engine's device.
    pub(crate) engine_device: Option<OwnedFd>,
    pub(crate) calibration: TscCalibration,
    pub(crate) observer: Observer,
    /// Jails the threads that wait for disks.
    pub(crate) disk_thread: ThreadStart,
}

fn take_file(descriptors: &mut Descriptors, fd: Option<Fd>) -> Result<Option<File>, VmError> {
    Ok(descriptors.take_optional(fd)?.map(File::from))
}

/// Puts everything together. The kernel is in its place afterwards.
pub(crate) fn assemble(
    config: &Config,
    parts: Parts,
    timing: &mut Timing,
) -> Result<Assembled, VmError> {
    let mut descriptors = parts.descriptors;
    let kernel = Kernel::open(File::from(descriptors.take(config.boot.kernel_fd)?))
        .map_err(VmError::Kernel)?;
    timing.phase("kernel opened");
    let ram = make_ram(config)?;
    let clock = Arc::new(Clock::calibrating(parts.calibration));
    let context = EngineContext {
        clock: Arc::clone(&clock),
        device: parts.engine_device,
        user_code: config.user_code,
        perf_map: take_file(&mut descriptors, config.notes.perf_map_fd)?,
        trace: take_file(&mut descriptors, config.notes.trace_fd)?,
    };
    let engine = engines::open(&config.engine, context)?;
    timing.phase("engine opened");
    let setup = BoardSetup {
        engine: &*engine,
        ram,
        vcpus: config.vcpus,
        clock,
        serial: make_serial(config, &mut descriptors)?,
        observer: parts.observer,
    };
    let board = Board::new(setup)?;
    timing.phase("board made");
    let reach = reach(config, &mut descriptors)?;
    let mut workshop = Workshop {
        descriptors: &mut descriptors,
        ram: board.ram(),
        unheard_writers: engine.caps().unheard_writers,
        vcpus: config.vcpus,
        disk_thread: parts.disk_thread,
        handles: Handles::default(),
    };
    let devices = place_devices(config, &mut workshop, &board, &*engine)?;
    let handles = workshop.handles;
    timing.phase("devices made");
    let first_state = board.boot(Boot {
        kernel,
        protocol: match config.boot.protocol {
            Protocol::Auto => None,
            Protocol::Linux => Some(BootProtocol::Linux64),
            Protocol::Pvh => Some(BootProtocol::Pvh),
        },
        initramfs: descriptors
            .take_optional(config.boot.initramfs_fd)?
            .map(File::from),
        cmdline: &config.boot.cmdline,
        rng_seed: rng_seed()?,
    })?;
    timing.phase("kernel loaded");
    Ok(Assembled {
        board,
        first_state,
        devices,
        handles,
        doorbells: engine.caps().doorbells,
        reach,
    })
}

fn make_ram(config: &Config) -> Result<GuestRam, VmError> {
    let pages = match config.huge_pages {
        config::HugePages::Off => HugePages::Off,
        config::HugePages::Transparent => HugePages::Transparent,
        config::HugePages::Reserved => HugePages::Reserved,
    };
    Ok(GuestRam::new(config.memory_mib << 20, pages)?)
}

fn make_serial(
    config: &Config,
    descriptors: &mut Descriptors,
) -> Result<Option<SerialSetup>, VmError> {
    let Some(serial) = &config.serial else {
        return Ok(None);
    };
    Ok(Some(SerialSetup {
        input: descriptors.take_optional(serial.in_fd)?,
        output: descriptors.take_optional(serial.out_fd)?,
        limits: OutputLimits {
            bytes_per_s: serial.bytes_per_s,
            // A boot's worth of messages passes at once.
            burst_bytes: serial.bytes_per_s.max(1 << 18),
            total_bytes: serial.total_bytes,
        },
    }))
}

fn rng_seed() -> Result<[u8; 32], VmError> {
    let mut seed = [0; 32];
    let len = rustix::rand::getrandom(&mut seed, GetRandomFlags::empty())
        .map_err(VmError::host("get randomness"))?;
    // Requests up to 256 bytes are never cut short (getrandom(2)).
    debug_assert_eq!(len, seed.len());
    Ok(seed)
}

/// Second holds on the shared directories, before their devices take them.
fn reach(config: &Config, descriptors: &mut Descriptors) -> Result<Vec<Reach>, VmError> {
    let mut reach = Vec::new();
    for device in &config.devices {
        let DeviceConfig::Fs(fs) = device else {
            continue;
        };
        for entry in &fs.entries {
            if let FsSource::Fd { fd, read_only, .. } = entry.source {
                let held = jail::reach_of(descriptors.look(fd)?, read_only)
                    .map_err(VmError::host("duplicate a share's descriptor"))?;
                reach.push(held);
            }
        }
    }
    Ok(reach)
}

fn place_devices(
    config: &Config,
    workshop: &mut Workshop<'_>,
    board: &Board,
    engine: &dyn Engine,
) -> Result<Vec<PlacedDevice>, VmError> {
    let mut placed = Vec::with_capacity(config.devices.len());
    for (index, device) in config.devices.iter().enumerate() {
        let (made, card) = workshop.make(index, device)?;
        let failed = |source: Box<dyn std::error::Error + Send + Sync>, fault| VmError::Device {
            index,
            kind: device.kind(),
            fault,
            source,
        };
        let pci = board.pci();
        let address = pci.free_address().map_err(MachineError::from)?;
        let connections = Connections {
            memory: board.ram().memory().clone(),
            interrupts: Arc::clone(board.interrupts()),
            events: Arc::clone(board.events()),
            vm: engine.caps().doorbells.then(|| Arc::clone(board.vm())),
            intx: Some(board.intx().pin(address)),
        };
        let virtio = VirtioPci::new(made, connections).map_err(|error| {
            let kind = error.kind();
            failed(Box::new(error), kind)
        })?;
        pci.insert(address, &virtio.as_pci())
            .map_err(MachineError::from)?;
        placed.push(PlacedDevice {
            name: format!("{}{index}", device.kind()),
            pci: virtio,
            address,
            card,
        });
    }
    Ok(placed)
}

/// Opens what the engine needs by a path, before paths are gone.
pub(crate) fn engine_device(
    config: &Config,
    descriptors: &mut Descriptors,
) -> Result<Option<OwnedFd>, VmError> {
    if let Some(fd) = config.engine_fd {
        return descriptors.take(fd).map(Some);
    }
    engines::device_path(&config.engine)?
        .map(|path| {
            let opened = File::options().read(true).write(true).open(path);
            opened.map(Into::into).map_err(|source| VmError::Engine {
                name: config.engine.clone(),
                source: ringfence_engine::EngineError::Host {
                    action: "open the engine's device",
                    source,
                },
            })
        })
        .transpose()
}
