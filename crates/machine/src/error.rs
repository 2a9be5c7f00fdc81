//! Why a machine could not be made or driven.

use std::io;

use ringfence_bus::BusError;
use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use ringfence_loader::LoadError;
use ringfence_memory::GuestMemoryError;
use ringfence_pci::PciError;

use crate::MachineState;

/// Why a machine could not be made or driven.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The engine refused or failed.
    #[error("the engine failed")]
    Engine(#[from] EngineError),
    /// The kernel could not be loaded.
    #[error("cannot load the kernel")]
    Load(#[from] LoadError),
    /// Two devices want the same place: a bug of the board.
    #[error("cannot place {device} on its bus")]
    Bus {
        /// Which one.
        device: &'static str,
        /// What is in the way.
        source: BusError,
    },
    /// The PCI root could not be made.
    #[error("cannot make the PCI root")]
    Pci(#[from] PciError),
    /// The firmware tables don't fit their place.
    #[error("the ACPI tables need {len_bytes} bytes; {limit_bytes} are reserved for them")]
    TablesTooLarge {
        /// What they need.
        len_bytes: usize,
        /// What there is.
        limit_bytes: usize,
    },
    /// The firmware tables could not be written.
    #[error("cannot write the ACPI tables to guest memory")]
    Tables(#[source] GuestMemoryError),
    /// The machine's RAM reaches where devices have to go.
    #[error(
        "{ram_bytes} bytes of memory leave no room for devices in {bits} bits of guest address space"
    )]
    AddressSpace {
        /// The RAM.
        ram_bytes: u64,
        /// The width of a guest physical address.
        bits: u8,
    },
    /// A host call failed.
    #[error("cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A call at the wrong moment.
    #[error("cannot {action} a machine that is {state}")]
    State {
        /// What was asked.
        action: &'static str,
        /// What the machine is doing.
        state: MachineState,
    },
    /// There is no such vCPU.
    #[error("there is no vCPU {index} in a machine of {vcpus}")]
    NoVcpu {
        /// The number asked for.
        index: u32,
        /// How many there are.
        vcpus: u32,
    },
}

impl MachineError {
    /// Wraps a failed host call.
    pub(crate) fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }

    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Engine(error) => error.kind(),
            Self::Load(error) => error.kind(),
            Self::Pci(error) => error.kind(),
            Self::Bus { .. } | Self::TablesTooLarge { .. } | Self::Tables(_) => ErrorKind::Internal,
            Self::AddressSpace { .. } | Self::NoVcpu { .. } => ErrorKind::Config,
            Self::Host { .. } => ErrorKind::Host,
            Self::State { .. } => ErrorKind::State,
        }
    }
}
