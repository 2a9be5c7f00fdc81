//! The JSON payloads. Their meaning is in docs/reference/agent-protocol.md.

use crate::privileges::Privileges;
use serde::Deserialize;
use serde::Serialize;
use std::collections::BTreeMap;

/// The first word of a guest.
#[derive(Debug, Serialize)]
pub(crate) struct Hello {
    /// Of the protocol.
    pub(crate) version: u32,
    /// Of the agent.
    pub(crate) agent: &'static str,
    /// `uname -r`.
    pub(crate) kernel: String,
}

/// The guest is set up.
#[derive(Debug, Serialize)]
pub(crate) struct Ready {
    /// How long each step took, in microseconds; `kernel` is the time before the agent.
    pub(crate) phases_us: BTreeMap<&'static str, u64>,
}

/// How the guest is set up.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Setup {
    /// The guest's name.
    pub(crate) hostname: String,
    /// Now, in nanoseconds since 1970; 0 leaves the clock.
    #[serde(default)]
    pub(crate) time_ns: i64,
    /// The root file system.
    pub(crate) root: Root,
    /// Further mounts, in order.
    #[serde(default)]
    pub(crate) mounts: Vec<Mount>,
    /// Network interfaces.
    #[serde(default)]
    pub(crate) interfaces: Vec<Interface>,
    /// Lines of /etc/hosts: name to address.
    #[serde(default)]
    pub(crate) hosts: BTreeMap<String, String>,
    /// Kernel parameters.
    #[serde(default)]
    pub(crate) sysctls: BTreeMap<String, String>,
    /// Resource limits: name to (soft, hard).
    #[serde(default)]
    pub(crate) limits: BTreeMap<String, (u64, u64)>,
}

/// The root file system.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Root {
    /// Lowest first.
    pub(crate) layers: Vec<Layer>,
    /// What becomes of writes.
    pub(crate) writable: Writable,
    /// The most that an overlay in memory may hold, in MiB.
    #[serde(default)]
    pub(crate) upper_mib: Option<u64>,
}

/// What becomes of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Writable {
    /// They stay in memory.
    Overlay,
    /// They go to the layer.
    Direct,
    /// They are refused.
    No,
}

/// One layer of a root file system.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layer {
    /// Where it comes from.
    pub(crate) kind: LayerKind,
    /// Tag, device or directory.
    pub(crate) source: String,
    /// Of a block device.
    #[serde(default)]
    pub(crate) filesystem: String,
    /// The directory to take.
    #[serde(default)]
    pub(crate) subpath: String,
}

/// Where a layer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LayerKind {
    /// A shared tree.
    Virtiofs,
    /// A disk.
    Block,
    /// The initramfs.
    Directory,
}

/// One mount.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mount {
    /// What is mounted.
    #[serde(rename = "type")]
    pub(crate) kind: MountKind,
    /// Where.
    pub(crate) target: String,
    /// Tag, device or path.
    #[serde(default)]
    pub(crate) source: String,
    /// What to take of it.
    #[serde(default)]
    pub(crate) subpath: String,
    /// Of a block device.
    #[serde(default)]
    pub(crate) filesystem: String,
    /// As `mount -o` has them.
    #[serde(default)]
    pub(crate) options: String,
    /// Refuse writes.
    #[serde(default)]
    pub(crate) read_only: bool,
}

/// What is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MountKind {
    /// A shared tree.
    Virtiofs,
    /// A disk.
    Block,
    /// Another place of the root.
    Bind,
    /// Memory.
    Tmpfs,
}

/// One network interface.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Interface {
    /// Which it is.
    pub(crate) mac: String,
    /// With prefix lengths.
    #[serde(default)]
    pub(crate) addresses: Vec<String>,
    /// At most one of each family.
    #[serde(default)]
    pub(crate) gateways: Vec<String>,
    /// Name servers.
    #[serde(default)]
    pub(crate) dns: Vec<String>,
    /// Search domains.
    #[serde(default)]
    pub(crate) search: Vec<String>,
    /// Bytes.
    #[serde(default)]
    pub(crate) mtu: Option<u32>,
    /// A new name; empty keeps the kernel's.
    #[serde(default)]
    pub(crate) name: String,
}

/// What the host asks for.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Nothing: are you there?
    Ping,
    /// Run a command.
    Exec(Exec),
    /// What is at a path?
    Stat {
        /// Absolute.
        path: String,
        /// Through a symbolic link.
        #[serde(default = "yes")]
        follow: bool,
    },
    /// A directory's entries.
    List {
        /// Absolute.
        path: String,
        /// How many to leave out.
        #[serde(default)]
        skip: usize,
    },
    /// A file's content.
    Read {
        /// Absolute.
        path: String,
        /// First byte.
        #[serde(default)]
        offset: u64,
        /// Bytes; none for all.
        #[serde(default)]
        length: Option<u64>,
    },
    /// Writes a file.
    Write {
        /// Absolute.
        path: String,
        /// Of a new file.
        #[serde(default = "file_mode")]
        mode: u32,
        /// At its end, rather than in place of what is there.
        #[serde(default)]
        append: bool,
        /// Owner of a new file.
        #[serde(default)]
        user: String,
    },
    /// Makes a directory.
    Mkdir {
        /// Absolute.
        path: String,
        /// Its permissions.
        #[serde(default = "directory_mode")]
        mode: u32,
        /// With those above it, and no error if it is there.
        #[serde(default)]
        parents: bool,
    },
    /// Removes a file or directory.
    Remove {
        /// Absolute.
        path: String,
        /// With all that is in it.
        #[serde(default)]
        recursive: bool,
    },
    /// Renames.
    Rename {
        /// Absolute.
        source: String,
        /// Absolute.
        target: String,
    },
    /// A file or directory as a tar stream.
    TarOut {
        /// Absolute.
        path: String,
    },
    /// Unpacks a tar stream.
    TarIn {
        /// An absolute path of a directory.
        path: String,
        /// Keep the archive's owners.
        #[serde(default)]
        owner: bool,
    },
    /// A network card was put in: find it, and set it up.
    AddInterface {
        /// How.
        interface: Interface,
    },
    /// A network card will be taken out: let go of it.
    RemoveInterface {
        /// Its address.
        mac: String,
    },
    /// How is the guest doing?
    Stats,
    /// Sets the clock.
    SyncTime {
        /// Since 1970.
        time_ns: i64,
    },
    /// Ends the guest.
    PowerOff {
        /// Start again.
        #[serde(default)]
        reboot: bool,
        /// What commands get to end by themselves.
        #[serde(default)]
        grace_ms: u64,
    },
}

/// A command.
#[derive(Debug, Deserialize)]
pub(crate) struct Exec {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// Variables.
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
    /// Empty is the home directory.
    #[serde(default)]
    pub(crate) cwd: String,
    /// `NAME|UID[:GROUP|GID]`; empty is root.
    #[serde(default)]
    pub(crate) user: String,
    /// With it, the command has a terminal.
    #[serde(default)]
    pub(crate) terminal: Option<TerminalSize>,
    /// Whether there is a standard input.
    #[serde(default)]
    pub(crate) stdin: bool,
    /// After which the command is killed.
    #[serde(default)]
    pub(crate) timeout_ms: Option<u64>,
    /// What it may do; without it, what its user may.
    #[serde(default)]
    pub(crate) privileges: Option<Privileges>,
}

/// In characters.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct TerminalSize {
    /// Width.
    pub(crate) columns: u16,
    /// Height.
    pub(crate) rows: u16,
}

/// How a command ended: one of `code` and `signal`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Exit {
    /// Exit status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<i32>,
    /// What killed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) signal: Option<i32>,
    /// The guest killed it after its time.
    pub(crate) timed_out: bool,
    /// Why it didn't start.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
}

/// One file.
#[derive(Debug, Serialize)]
pub(crate) struct FileInfo {
    /// Its last part; bytes that are no UTF-8 are replaced.
    pub(crate) name: String,
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `block`, `char`.
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// Bytes.
    pub(crate) size: u64,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Since 1970.
    pub(crate) mtime_ns: i64,
    /// Of a symbolic link.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) target: String,
}

fn yes() -> bool {
    true
}

fn file_mode() -> u32 {
    0o644
}

fn directory_mode() -> u32 {
    0o755
}
