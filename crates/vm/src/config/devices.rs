//! Devices in the configuration document.

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error;

use super::Fd;

/// A device, by its `type`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceConfig {
    /// `console`
    Console(ConsoleConfig),
    /// `block`
    Block(BlockConfig),
    /// `net`
    Net(NetConfig),
    /// `vsock`
    Vsock(VsockConfig),
    /// `rng`
    Rng,
    /// `balloon`
    Balloon,
    /// `fs`
    Fs(FsConfig),
}

impl DeviceConfig {
    /// The value of `type`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Console(_) => "console",
            Self::Block(_) => "block",
            Self::Net(_) => "net",
            Self::Vsock(_) => "vsock",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Fs(_) => "fs",
        }
    }

    /// The descriptors that it uses, with the fields that name them.
    pub fn fds(&self) -> Vec<(String, Fd)> {
        let named = |name: &str, fd: Option<Fd>| fd.map(|fd| (name.to_owned(), fd));
        match self {
            Self::Console(console) => [("in_fd", console.in_fd), ("out_fd", console.out_fd)]
                .into_iter()
                .filter_map(|(name, fd)| named(name, fd))
                .collect(),
            Self::Block(block) => std::iter::once(("fd".to_owned(), block.fd))
                .chain(
                    block
                        .backing
                        .iter()
                        .enumerate()
                        .map(|(i, backing)| (format!("backing[{i}].fd"), backing.fd)),
                )
                .collect(),
            Self::Net(net) => net
                .tap_fds
                .iter()
                .enumerate()
                .map(|(i, &fd)| (format!("tap_fds[{i}]"), fd))
                .chain(
                    net.vhost_fds
                        .iter()
                        .enumerate()
                        .map(|(i, &fd)| (format!("vhost_fds[{i}]"), fd)),
                )
                .chain(named("link_fd", net.link_fd))
                .collect(),
            Self::Vsock(vsock) => [
                ("listen_fd", vsock.listen_fd),
                ("handout_fd", vsock.handout_fd),
            ]
            .into_iter()
            .filter_map(|(name, fd)| named(name, fd))
            .collect(),
            Self::Rng | Self::Balloon => Vec::new(),
            Self::Fs(fs) => fs
                .entries
                .iter()
                .enumerate()
                .filter_map(|(i, entry)| match entry.source {
                    FsSource::Fd { fd, .. } => Some((format!("entries[{i}].fd"), fd)),
                    _ => None,
                })
                .collect(),
        }
    }
}

/// A console on the virtio port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// What the guest reads.
    #[serde(default)]
    pub in_fd: Option<Fd>,
    /// Where its output goes.
    #[serde(default)]
    pub out_fd: Option<Fd>,
}

/// The form of a disk image. It is always stated: a guest can write any header into a raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// An image behind another.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backing {
    /// The image file.
    pub fd: Fd,
    /// Its form.
    pub format: ImageFormat,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The image file.
    pub fd: Fd,
    /// Its form.
    pub format: ImageFormat,
    /// What it is an overlay of, nearest first.
    #[serde(default)]
    pub backing: Vec<Backing>,
    /// The guest can't write.
    #[serde(default)]
    pub read_only: bool,
    /// Serial number, at most 20 bytes.
    #[serde(default)]
    pub serial: String,
    /// Bounds.
    #[serde(default)]
    pub rate: Option<RateConfig>,
}

/// Bounds on how fast a device works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateConfig {
    /// Bytes a second.
    pub bytes_per_s: Option<u64>,
    /// Bytes at once after a pause; a second's worth when not given.
    pub burst_bytes: Option<u64>,
    /// Requests or packets a second.
    pub ops_per_s: Option<u64>,
    /// Requests at once after a pause; a second's worth when not given.
    pub burst_ops: Option<u64>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// TAP devices, one a queue pair.
    #[serde(default)]
    pub tap_fds: Vec<Fd>,
    /// Instances of vhost-net, one a queue pair: where the engine allows it, the host's kernel
    /// moves the frames. Whoever gives them answers for their source addresses.
    #[serde(default)]
    pub vhost_fds: Vec<Fd>,
    /// Instead: a socket, whose messages are frames.
    #[serde(default)]
    pub link_fd: Option<Fd>,
    /// Its address.
    #[serde(deserialize_with = "mac")]
    pub mac: [u8; 6],
    /// Whether the guest is held to that address.
    #[serde(default)]
    pub lock_mac: bool,
    /// The largest packet, told to the guest.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Bounds, for each direction.
    #[serde(default)]
    pub rate: Option<RateConfig>,
}

/// Sockets between guest and host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context ID.
    pub cid: u32,
    /// A listening UNIX socket, where host programs connect.
    #[serde(default)]
    pub listen_fd: Option<Fd>,
    /// A UNIX SOCK_SEQPACKET socket, where the guest's connections are handed out.
    #[serde(default)]
    pub handout_fd: Option<Fd>,
}

/// Shared directories.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// What the guest mounts it by.
    pub tag: String,
    /// The tree's parts.
    pub entries: Vec<FsEntry>,
    /// Extended attributes that pass.
    #[serde(default)]
    pub xattrs: FsXattrs,
}

/// A part of a shared tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsEntry {
    /// Where it is in the tree.
    pub path: String,
    /// What is there.
    pub source: FsSource,
}

/// What is at a path of a shared tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FsSource {
    /// A host directory or file.
    Fd {
        /// Its descriptor.
        fd: Fd,
        /// Nothing below can be changed.
        read_only: bool,
        /// Who owns the files.
        ids: OwnerIds,
        /// How long the guest may believe what it was told.
        cache: FsCache,
        /// Paths below that don't exist for the guest.
        hide: Vec<String>,
    },
    /// A symbolic link of ours.
    Symlink(String),
    /// An empty directory, to mount on.
    Directory,
}

/// Who owns shared files, seen from the guest: `host`, or `squash:UID:GID`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OwnerIds {
    /// As on the host.
    #[default]
    Host,
    /// One user and group.
    Squash {
        /// User ID.
        uid: u32,
        /// Group ID.
        gid: u32,
    },
}

/// How long the guest may believe what it was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsCache {
    /// Not at all.
    Never,
    /// A second.
    #[default]
    Auto,
    /// For good: nobody else changes the files.
    Always,
}

/// Extended attributes that pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FsXattrs {
    /// None.
    #[default]
    Off,
    /// `user.*`.
    User,
    /// `user.*` and POSIX ACLs.
    Acl,
}

/// [`FsEntry`] as it is written: exactly one of `fd`, `symlink` and `directory`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenEntry {
    path: String,
    fd: Option<Fd>,
    symlink: Option<String>,
    #[serde(default)]
    directory: bool,
    read_only: Option<bool>,
    ids: Option<OwnerIds>,
    cache: Option<FsCache>,
    hide: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for FsEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = WrittenEntry::deserialize(deserializer)?;
        let has_options = written.read_only.is_some()
            || written.ids.is_some()
            || written.cache.is_some()
            || written.hide.is_some();
        let source = match (written.fd, written.symlink, written.directory) {
            (Some(fd), None, false) => FsSource::Fd {
                fd,
                read_only: written.read_only.unwrap_or(true),
                ids: written.ids.unwrap_or_default(),
                cache: written.cache.unwrap_or_default(),
                hide: written.hide.unwrap_or_default(),
            },
            (None, Some(target), false) if !has_options => FsSource::Symlink(target),
            (None, None, true) if !has_options => FsSource::Directory,
            _ => {
                return Err(D::Error::custom(
                    "an entry has exactly one of fd (with its options), symlink and directory",
                ));
            }
        };
        Ok(Self {
            path: written.path,
            source,
        })
    }
}

impl<'de> Deserialize<'de> for OwnerIds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let squash = || {
            let (uid, gid) = text.strip_prefix("squash:")?.split_once(':')?;
            Some(Self::Squash {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
            })
        };
        match text.as_str() {
            "host" => Ok(Self::Host),
            _ => squash().ok_or_else(|| {
                D::Error::custom(format!("{text:?} is neither host nor squash:UID:GID"))
            }),
        }
    }
}

/// Six hexadecimal bytes with colons; a station's own address, not a group's.
fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        })
        .collect();
    bytes
        .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
        .filter(|mac| mac[0] & 1 == 0 && mac != &[0; 6])
        .ok_or_else(|| D::Error::custom(format!("{text:?} is not a unicast MAC address")))
}
