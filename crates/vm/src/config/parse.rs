//! From bytes to a checked [`Config`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::BootConfig;
use super::Config;
use super::ConfigError;
use super::DeviceConfig;
use super::Fd;
use super::HugePages;
use super::JailConfig;
use super::MAX_DEVICES;
use super::MAX_MEMORY_MIB;
use super::MAX_VCPUS;
use super::MIN_MEMORY_MIB;
use super::NetConfig;
use super::NotesConfig;
use super::SerialConfig;
use super::UserCode;
use super::VERSION;

/// Longer documents are refused unread.
pub const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// Standard input, output and error are never the document's.
const FIRST_FD: i32 = 3;
const MAX_NAME_BYTES: usize = 64;
/// Guest context IDs: 0 to 2 mean the hypervisor, the local one and the host (virtio 1.2 §5.10.4).
const CIDS: std::ops::Range<u32> = 3..u32::MAX;
const MAX_SERIAL_BYTES: usize = 20;
/// Least packet size of a network card (virtio 1.2 §5.1.4.1 allows less, IPv6 doesn't).
const MIN_MTU: u16 = 1280;
const MAX_TAG_BYTES: usize = 36;

/// The document as written, devices not yet looked at.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    name: String,
    engine: String,
    #[serde(default)]
    engine_fd: Option<Fd>,
    #[serde(default)]
    user_code: UserCode,
    #[serde(default)]
    notes: NotesConfig,
    memory_mib: u64,
    #[serde(default)]
    huge_pages: HugePages,
    vcpus: u32,
    boot: BootConfig,
    #[serde(default)]
    serial: Option<SerialConfig>,
    control_fd: Fd,
    #[serde(default)]
    devices: Vec<Value>,
    #[serde(default)]
    jail: JailConfig,
}

/// Parses and checks a document.
///
/// # Errors
/// [`ConfigError`] for the first field that is wrong.
pub fn parse(text: &[u8]) -> Result<Config, ConfigError> {
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(ConfigError::TooLong(MAX_DOCUMENT_BYTES));
    }
    // The version first: a newer document's other fields mean nothing here.
    let value: Value = field("", serde_json::from_slice(text))?;
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        _ => {
            let message = format!("this program reads version {VERSION}");
            return Err(ConfigError::field("version", message));
        }
    }
    let written: Written = typed("", value)?;
    debug_assert_eq!(written.version, VERSION);
    let devices = written
        .devices
        .into_iter()
        .enumerate()
        .map(|(index, value)| device(&format!("devices[{index}]"), value))
        .collect::<Result<Vec<_>, _>>()?;
    let config = Config {
        name: written.name,
        engine: written.engine,
        engine_fd: written.engine_fd,
        user_code: written.user_code,
        notes: written.notes,
        memory_mib: written.memory_mib,
        huge_pages: written.huge_pages,
        vcpus: written.vcpus,
        boot: written.boot,
        serial: written.serial,
        control_fd: written.control_fd,
        devices,
        jail: written.jail,
    };
    check(&config)?;
    Ok(config)
}

fn field<T>(path: &str, result: Result<T, serde_json::Error>) -> Result<T, ConfigError> {
    result.map_err(|error| ConfigError::field(display(path), error.to_string()))
}

/// The top has no path of its own.
fn display(path: &str) -> &str {
    if path.is_empty() {
        "the document"
    } else {
        path
    }
}

fn typed<T: DeserializeOwned>(path: &str, value: Value) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let path = match (path, inner.as_str()) {
            (outer, ".") => display(outer).to_owned(),
            ("", inner) => inner.to_owned(),
            (outer, inner) => format!("{outer}.{inner}"),
        };
        ConfigError::field(path, error.into_inner().to_string())
    })
}

/// A device, by its `type`.
fn device(path: &str, mut value: Value) -> Result<DeviceConfig, ConfigError> {
    let kind = value
        .as_object_mut()
        .and_then(|fields| fields.remove("type"))
        .and_then(|kind| kind.as_str().map(str::to_owned))
        .ok_or_else(|| ConfigError::field(format!("{path}.type"), "is missing or no text"))?;
    Ok(match kind.as_str() {
        "console" => DeviceConfig::Console(typed(path, value)?),
        "block" => DeviceConfig::Block(typed(path, value)?),
        "net" => DeviceConfig::Net(typed(path, value)?),
        "vsock" => DeviceConfig::Vsock(typed(path, value)?),
        "rng" => typed(path, value).map(|Empty {}| DeviceConfig::Rng)?,
        "balloon" => typed(path, value).map(|Empty {}| DeviceConfig::Balloon)?,
        "fs" => DeviceConfig::Fs(typed(path, value)?),
        other => {
            let message = format!("there is no device type {other:?}");
            return Err(ConfigError::field(format!("{path}.type"), message));
        }
    })
}

/// A device without settings.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Empty {}

fn require(
    path: impl Into<String>,
    holds: bool,
    message: impl Into<String>,
) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError::field(path, message))
    }
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let name_is_plain = (1..=MAX_NAME_BYTES).contains(&config.name.len())
        && config.name.bytes().all(|byte| byte.is_ascii_graphic());
    require("name", name_is_plain, "is not 1 to 64 plain characters")?;
    require(
        "vcpus",
        (1..=MAX_VCPUS).contains(&config.vcpus),
        format!("{} is not 1 to {MAX_VCPUS}", config.vcpus),
    )?;
    require(
        "memory_mib",
        (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&config.memory_mib),
        format!(
            "{} is not {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
            config.memory_mib
        ),
    )?;
    require(
        "boot.cmdline",
        !config.boot.cmdline.contains('\0'),
        "holds a zero byte",
    )?;
    require(
        "devices",
        config.devices.len() <= MAX_DEVICES,
        format!("a machine has at most {MAX_DEVICES}"),
    )?;
    for (index, device) in config.devices.iter().enumerate() {
        check_device(&format!("devices[{index}]"), device)?;
    }
    check_fds(config)
}

/// Checks a network card; `path` names it in errors.
pub(crate) fn check_net(path: &str, net: &NetConfig) -> Result<(), ConfigError> {
    require(
        format!("{path}.tap_fds"),
        net.tap_fds.is_empty() == net.link_fd.is_some(),
        "needs either TAP devices or a link_fd",
    )?;
    require(
        format!("{path}.vhost_fds"),
        net.vhost_fds.is_empty() || net.vhost_fds.len() == net.tap_fds.len(),
        "has another number of descriptors than tap_fds",
    )?;
    require(
        format!("{path}.vhost_fds"),
        net.vhost_fds.is_empty() || net.rate.is_none(),
        "is of no use with a rate, which only this process holds",
    )?;
    require(
        format!("{path}.mtu"),
        net.mtu.is_none_or(|mtu| mtu >= MIN_MTU),
        format!("is less than {MIN_MTU}, which IPv6 needs"),
    )
}

fn check_device(path: &str, device: &DeviceConfig) -> Result<(), ConfigError> {
    match device {
        DeviceConfig::Block(block) => {
            require(
                format!("{path}.serial"),
                block.serial.len() <= MAX_SERIAL_BYTES,
                format!("is longer than {MAX_SERIAL_BYTES} bytes"),
            )?;
            let is_overlay = block.format == super::ImageFormat::Qcow2;
            require(
                format!("{path}.backing"),
                is_overlay || block.backing.is_empty(),
                "only a qcow2 image can have one",
            )
        }
        DeviceConfig::Net(net) => check_net(path, net),
        DeviceConfig::Vsock(vsock) => require(
            format!("{path}.cid"),
            CIDS.contains(&vsock.cid),
            format!("{} is not a guest's context ID (3 and up)", vsock.cid),
        ),
        DeviceConfig::Fs(fs) => {
            let fits = (1..=MAX_TAG_BYTES).contains(&fs.tag.len()) && !fs.tag.contains('\0');
            require(
                format!("{path}.tag"),
                fits,
                format!("is not 1 to {MAX_TAG_BYTES} bytes"),
            )?;
            require(
                format!("{path}.entries"),
                !fs.entries.is_empty(),
                "needs at least one entry",
            )
        }
        DeviceConfig::Console(_) | DeviceConfig::Rng | DeviceConfig::Balloon => Ok(()),
    }
}

impl Config {
    /// Every descriptor that the document names, with its field.
    pub fn fds(&self) -> Vec<(String, Fd)> {
        let mut fds = vec![
            ("control_fd".to_owned(), self.control_fd),
            ("boot.kernel_fd".to_owned(), self.boot.kernel_fd),
        ];
        let serial = self.serial.as_ref();
        for (name, fd) in [
            ("engine_fd", self.engine_fd),
            ("notes.perf_map_fd", self.notes.perf_map_fd),
            ("notes.trace_fd", self.notes.trace_fd),
            ("boot.initramfs_fd", self.boot.initramfs_fd),
            ("serial.in_fd", serial.and_then(|serial| serial.in_fd)),
            ("serial.out_fd", serial.and_then(|serial| serial.out_fd)),
        ] {
            fds.extend(fd.map(|fd| (name.to_owned(), fd)));
        }
        for (index, device) in self.devices.iter().enumerate() {
            let fields = device.fds().into_iter();
            fds.extend(fields.map(|(name, fd)| (format!("devices[{index}].{name}"), fd)));
        }
        fds
    }
}

/// A descriptor belongs to one field: two owners would close it twice.
fn check_fds(config: &Config) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<Fd, String> = BTreeMap::new();
    for (path, fd) in config.fds() {
        if fd.0 < FIRST_FD {
            let message = format!("{} is not a descriptor of 3 or above", fd.0);
            return Err(ConfigError::field(path, message));
        }
        if let Some(other) = seen.insert(fd, path.clone()) {
            let message = format!("descriptor {} is {other}'s already", fd.0);
            return Err(ConfigError::field(path, message));
        }
    }
    Ok(())
}
