//! The configuration document: what the machine is, and which descriptor is what.
//!
//! Whoever starts the process has checked the document already; it is checked again here, since
//! this is the door. An error names the field by its path (`devices[2].mac`). Unknown fields are
//! refused, so a document for a newer program is never half understood.
//!
//! docs/reference/vm-config.md describes it.

mod devices;
mod error;
mod parse;
#[cfg(test)]
mod tests;

use serde::Deserialize;

pub use devices::{
    Backing, BlockConfig, ConsoleConfig, DeviceConfig, FsCache, FsConfig, FsEntry, FsSource,
    FsXattrs, ImageFormat, NetConfig, OwnerIds, RateConfig, VsockConfig,
};
pub use error::ConfigError;
pub(crate) use parse::check_net;
pub use parse::{MAX_DOCUMENT_BYTES, parse};

/// The document's version that this program reads.
pub const VERSION: u32 = 1;
/// Most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 32;
/// Least memory: below it no Linux kernel of a distribution gets to its init.
pub const MIN_MEMORY_MIB: u64 = 16;
/// Most memory.
pub const MAX_MEMORY_MIB: u64 = 4 << 20;
/// Most devices: the bus has 32 places, and the host bridge has one of them.
pub const MAX_DEVICES: usize = 31;

/// A descriptor number that the process was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// The whole document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Name for logs.
    pub name: String,
    /// Which engine runs the machine.
    pub engine: String,
    /// The engine's device (`/dev/kvm`), opened by the caller; else it is opened at the start.
    pub engine_fd: Option<Fd>,
    /// How the guest's user code runs, where the engine has a choice.
    pub user_code: UserCode,
    /// Where the engine tells what it does.
    pub notes: NotesConfig,
    /// RAM.
    pub memory_mib: u64,
    /// Which host pages back it.
    pub huge_pages: HugePages,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What is booted.
    pub boot: BootConfig,
    /// The serial port; without one, none is there.
    pub serial: Option<SerialConfig>,
    /// A UNIX stream socket.
    pub control_fd: Fd,
    /// Devices, in the order of their places on the bus.
    pub devices: Vec<DeviceConfig>,
    /// The jail's layers.
    pub jail: JailConfig,
}

/// How the guest's user code runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UserCode {
    /// As it is, on the processor, where that is faster.
    #[default]
    Direct,
    /// Translated, like the kernel's.
    Translated,
}

/// Where an engine that translates tells what it does; other engines have nothing to tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NotesConfig {
    /// Takes the names of translated code as `perf` reads them.
    pub perf_map_fd: Option<Fd>,
    /// Takes every translation beside the guest's code.
    pub trace_fd: Option<Fd>,
}

/// Which host pages back the RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Ordinary ones.
    #[default]
    Off,
    /// Huge ones where the host likes.
    Transparent,
    /// Huge ones from the host's pool.
    Reserved,
}

/// What is booted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// A bzImage or an ELF image.
    pub kernel_fd: Fd,
    /// The initramfs.
    #[serde(default)]
    pub initramfs_fd: Option<Fd>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: Protocol,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// As suits it.
    #[default]
    Auto,
    /// Linux's 64-bit protocol.
    Linux,
    /// PVH.
    Pvh,
}

/// The serial port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// What the guest reads.
    #[serde(default)]
    pub in_fd: Option<Fd>,
    /// Where its output goes.
    #[serde(default)]
    pub out_fd: Option<Fd>,
    /// Bytes a second that pass on the long run.
    #[serde(default = "SerialConfig::default_rate")]
    pub bytes_per_s: u64,
    /// Bytes in all; the rest is dropped.
    #[serde(default = "SerialConfig::default_total")]
    pub total_bytes: u64,
}

impl SerialConfig {
    fn default_rate() -> u64 {
        1 << 20
    }

    fn default_total() -> u64 {
        1 << 30
    }
}

/// How much a layer of the jail is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Where the host allows it.
    #[default]
    Auto,
    /// The machine doesn't start without it.
    Require,
    /// Not at all, for debugging.
    Off,
}

/// The jail's layers that a caller may choose. The others (no new privileges, limits, closed
/// descriptors) always hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JailConfig {
    /// User, mount, network, IPC and UTS namespaces of its own.
    pub namespaces: Want,
    /// Landlock.
    pub landlock: Want,
    /// System call filters.
    pub seccomp: Want,
}
