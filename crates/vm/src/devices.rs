//! From a device's configuration to the device.

use std::error::Error;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use ringfence_block::Format;
use ringfence_block::Image;
use ringfence_device::tracing;
use ringfence_engine::ErrorKind;
use ringfence_memory::GuestMemory;
use ringfence_memory::GuestRam;
use ringfence_netstack::Link;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Tap;
use ringfence_virtio::VirtioDevice;
use ringfence_virtio::balloon::Balloon;
use ringfence_virtio::balloon::BalloonHandle;
use ringfence_virtio::block::Block;
use ringfence_virtio::block::ThreadStart;
use ringfence_virtio::console::Console;
use ringfence_virtio::console::ConsoleHandle;
use ringfence_virtio::fs;
use ringfence_virtio::fs::FileSystem;
use ringfence_virtio::fs::Fs;
use ringfence_virtio::fs::Layout;
use ringfence_virtio::fs::Share;
use ringfence_virtio::net::Net;
use ringfence_virtio::rate;
use ringfence_virtio::rng::Rng;
use ringfence_virtio::vsock::Handout;
use ringfence_virtio::vsock::Vsock;
use serde_json::Value;
use serde_json::json;

use crate::VmError;
use crate::config::BlockConfig;
use crate::config::ConsoleConfig;
use crate::config::DeviceConfig;
use crate::config::Fd;
use crate::config::FsCache;
use crate::config::FsConfig;
use crate::config::FsSource;
use crate::config::FsXattrs;
use crate::config::ImageFormat;
use crate::config::NetConfig;
use crate::config::OwnerIds;
use crate::config::RateConfig;
use crate::config::VsockConfig;
use crate::descriptors::Descriptors;

/// Why a device could not be made, and whose fault that is.
pub(crate) struct Failure(ErrorKind, Box<dyn Error + Send + Sync>);

impl Failure {
    fn config(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(ErrorKind::Config, error.into())
    }

    fn host(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(ErrorKind::Host, error.into())
    }
}

impl Failure {
    /// Whose fault it is, and what is wrong.
    pub(crate) fn into_parts(self) -> (ErrorKind, String) {
        (self.0, self.1.to_string())
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        Self(error.kind(), Box::new(error))
    }
}

/// What devices are made from.
pub(crate) struct Workshop<'a> {
    pub(crate) descriptors: &'a mut Descriptors,
    pub(crate) ram: &'a GuestRam,
    /// The host's kernel may write to the RAM unheard.
    pub(crate) unheard_writers: bool,
    pub(crate) vcpus: u32,
    /// Jails the threads that wait for disks.
    pub(crate) disk_thread: ThreadStart,
    pub(crate) handles: Handles,
}

/// How devices are steered from outside, in the order of the document.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    pub(crate) balloons: Vec<Arc<BalloonHandle>>,
    pub(crate) consoles: Vec<Arc<ConsoleHandle>>,
}

pub(crate) type Made = Result<Box<dyn VirtioDevice>, Failure>;

/// A network card, seen from outside.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Card {
    pub(crate) mac: [u8; 6],
    /// vhost-net moves its frames; else this process does.
    pub(crate) vhost: bool,
}

impl Card {
    /// Its address, as it is written.
    pub(crate) fn address(self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }

    /// What its owner is told of the device that it is.
    pub(crate) fn describe(self, name: &str) -> Value {
        let frames = if self.vhost {
            "vhost-net"
        } else {
            "vm process"
        };
        json!({"name": name, "mac": self.address(), "frames": frames})
    }
}

impl Workshop<'_> {
    /// Makes `devices[index]`.
    pub(crate) fn make(
        &mut self,
        index: usize,
        config: &DeviceConfig,
    ) -> Result<(Box<dyn VirtioDevice>, Option<Card>), VmError> {
        let mut card = None;
        let made = match config {
            DeviceConfig::Console(console) => self.console(console),
            DeviceConfig::Block(block) => self.block(block),
            DeviceConfig::Net(net) => {
                let memory = self.unheard_writers.then(|| self.ram.memory());
                make_net(net, self.descriptors, memory).map(|(device, made)| {
                    card = Some(made);
                    device
                })
            }
            DeviceConfig::Vsock(vsock) => make_vsock(vsock, self.descriptors),
            DeviceConfig::Rng => Ok(Box::<Rng>::default() as Box<dyn VirtioDevice>),
            DeviceConfig::Balloon => self.balloon(),
            DeviceConfig::Fs(fs) => make_fs(fs, self.descriptors),
        };
        let device = made.map_err(|Failure(fault, source)| VmError::Device {
            index,
            kind: config.kind(),
            fault,
            source,
        })?;
        Ok((device, card))
    }

    fn file(&mut self, fd: Fd) -> Result<File, Failure> {
        Ok(File::from(self.descriptors.take(fd)?))
    }

    fn console(&mut self, config: &ConsoleConfig) -> Made {
        let input = config.in_fd.map(|fd| self.file(fd)).transpose()?;
        let output = config.out_fd.map(|fd| self.file(fd)).transpose()?;
        let console = Console::new(input, output).map_err(Failure::host)?;
        self.handles.consoles.push(console.handle());
        Ok(Box::new(console))
    }

    fn block(&mut self, config: &BlockConfig) -> Made {
        let image = Image {
            file: self.file(config.fd)?,
            format: format(config.format),
        };
        let backing = config
            .backing
            .iter()
            .map(|backing| {
                Ok(Image {
                    file: self.file(backing.fd)?,
                    format: format(backing.format),
                })
            })
            .collect::<Result<Vec<_>, Failure>>()?;
        let disk = ringfence_block::open(image, backing, config.read_only)
            .map_err(|error| Failure(error.kind(), Box::new(error)))?;
        let block = Block::new(ringfence_virtio::block::BlockConfig {
            disk: disk.into(),
            serial: config.serial.clone(),
            queues: u16::try_from(self.vcpus).unwrap_or(1),
            rate: bounds(config.rate),
            thread_start: Some(Arc::clone(&self.disk_thread)),
        });
        Ok(Box::new(block.map_err(Failure::host)?))
    }

    fn balloon(&mut self) -> Made {
        let balloon = Balloon::new(self.ram.clone()).map_err(Failure::host)?;
        self.handles.balloons.push(balloon.handle());
        Ok(Box::new(balloon))
    }
}

/// Makes a network card; `memory` is what the host's kernel may write to unheard.
pub(crate) fn make_net(
    config: &NetConfig,
    descriptors: &mut Descriptors,
    memory: Option<&GuestMemory>,
) -> Result<(Box<dyn VirtioDevice>, Card), Failure> {
    let mut card = Card {
        mac: config.mac,
        vhost: false,
    };
    let backend: Box<dyn NetBackend> = if let Some(fd) = config.link_fd {
        let link = File::from(descriptors.take(fd)?);
        Box::new(Link::new(link).map_err(Failure::config)?)
    } else {
        let mut tap =
            Tap::new(take_files(&config.tap_fds, descriptors)?).map_err(Failure::config)?;
        // Taken in any case: what isn't used is closed.
        let vhost = take_files(&config.vhost_fds, descriptors)?;
        card.vhost = leave_to_kernel(&mut tap, vhost, memory, card);
        Box::new(tap)
    };
    let net = Net::new(ringfence_virtio::net::NetConfig {
        backend,
        mac: config.mac,
        mtu: config.mtu,
        lock_mac: config.lock_mac,
        receive_rate: bounds(config.rate),
        send_rate: bounds(config.rate),
    });
    Ok((Box::new(net.map_err(Failure::host)?), card))
}

fn take_files(fds: &[Fd], descriptors: &mut Descriptors) -> Result<Vec<File>, Failure> {
    fds.iter()
        .map(|&fd| Ok(File::from(descriptors.take(fd)?)))
        .collect()
}

/// Leaves a card's frames to the host's kernel, if that is possible. It is no more than faster.
fn leave_to_kernel(
    tap: &mut Tap,
    vhost: Vec<File>,
    memory: Option<&GuestMemory>,
    card: Card,
) -> bool {
    let (false, Some(memory)) = (vhost.is_empty(), memory) else {
        return false;
    };
    let card = card.address();
    match tap.set_vhost(vhost, memory) {
        Ok(()) => {
            tracing::info!(card, "vhost-net moves a network card's frames");
            true
        }
        Err(error) => {
            tracing::warn!(card, %error, "vhost-net can't move a network card's frames");
            false
        }
    }
}

fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

/// A rate without a burst of its own has a second's worth.
fn bounds(config: Option<RateConfig>) -> rate::RateConfig {
    let config = config.unwrap_or_default();
    let limit = |per_second: Option<u64>, burst: Option<u64>| {
        per_second.map(|per_second| rate::Limit {
            per_second,
            burst: burst.unwrap_or(per_second),
        })
    };
    rate::RateConfig {
        bytes: limit(config.bytes_per_s, config.burst_bytes),
        operations: limit(config.ops_per_s, config.burst_ops),
    }
}

fn make_vsock(config: &VsockConfig, descriptors: &mut Descriptors) -> Made {
    let listener = descriptors.take_optional(config.listen_fd)?;
    let handout = descriptors.take_optional(config.handout_fd)?;
    let device = Vsock::new(ringfence_virtio::vsock::VsockConfig {
        guest_cid: config.cid,
        listener: listener.map(UnixListener::from),
        handout: handout.map(Handout::new),
    });
    Ok(Box::new(device.map_err(Failure::host)?))
}

fn make_fs(config: &FsConfig, descriptors: &mut Descriptors) -> Made {
    let mut layout = Layout::new();
    for entry in &config.entries {
        let path = entry.path.as_str();
        let added = match &entry.source {
            FsSource::Symlink(target) => layout.add_symlink(path, target),
            FsSource::Directory => layout.add_directory(path),
            FsSource::Fd {
                fd,
                read_only,
                ids,
                cache,
                hide,
            } => layout.add_share(
                path,
                Share {
                    file: File::from(descriptors.take(*fd)?),
                    read_only: *read_only,
                    ids: owner(*ids),
                    cache: believed(*cache),
                    hide: hide.clone(),
                },
            ),
        };
        added.map_err(Failure::config)?;
    }
    let xattrs = match config.xattrs {
        FsXattrs::Off => fs::Xattrs::Off,
        FsXattrs::User => fs::Xattrs::User,
        FsXattrs::Acl => fs::Xattrs::UserAndAcl,
    };
    let system = FileSystem::new(layout, xattrs, fs::Limits::default()).map_err(Failure::config)?;
    let device = Fs::new(&config.tag, system)
        .ok_or_else(|| Failure::config(format!("{:?} is not a tag", config.tag)))?;
    Ok(Box::new(device))
}

fn owner(ids: OwnerIds) -> fs::Ids {
    match ids {
        OwnerIds::Host => fs::Ids::Host,
        OwnerIds::Squash { uid, gid } => fs::Ids::Squash { uid, gid },
    }
}

fn believed(cache: FsCache) -> fs::Cache {
    match cache {
        FsCache::Never => fs::Cache::Never,
        FsCache::Auto => fs::Cache::Auto,
        FsCache::Always => fs::Cache::Always,
    }
}
