//! The plan: what the runtime decided, in the words of the kernel.
//!
//! Nothing here has a default that decides anything: numbers are the kernel's own flags, and a
//! field that is left out means that its step isn't taken.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error;

/// One container's setup, or one process that joins a container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plan {
    /// Namespaces to enter by their files, in order.
    #[serde(default)]
    pub(crate) join: Vec<Join>,
    /// A process whose namespaces are entered all at once: exec.
    pub(crate) join_process: Option<JoinProcess>,
    /// `CLONE_NEW*` flags of the namespaces to make, the cgroup's excepted.
    #[serde(default)]
    pub(crate) unshare: u32,
    /// Ask the runtime to write the ID maps once the user namespace is there.
    #[serde(default)]
    pub(crate) map_ids: bool,
    /// Become user and group 0 of the user namespace before anything is set up.
    #[serde(default)]
    pub(crate) become_root: bool,
    /// What goes to `/proc/self/timens_offsets`.
    pub(crate) time_offsets: Option<String>,
    /// A directory of cgroup v2 in which the process is created.
    pub(crate) cgroup_directory: Option<String>,
    /// Version 1: the `tasks` files of the cgroups that the process enters by itself.
    #[serde(default)]
    pub(crate) cgroup_tasks: Vec<String>,
    /// Version 2: which devices may be used, as a program that the cgroup gets.
    pub(crate) device_program: Option<Vec<u64>>,
    /// Descriptors beyond standard error that the process keeps.
    #[serde(default)]
    pub(crate) keep_descriptors: Vec<RawFd>,
    /// Make a cgroup namespace once the process is in its cgroups.
    #[serde(default)]
    pub(crate) cgroup_namespace: bool,
    /// The runtime does something with the process once it is in its groups and namespaces.
    #[serde(default)]
    pub(crate) ask_register: bool,
    /// Bring the loopback interface up.
    #[serde(default)]
    pub(crate) loopback: bool,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    /// Files below `/proc/sys` and what is written to them.
    #[serde(default)]
    pub(crate) sysctl: BTreeMap<String, String>,
    pub(crate) root: Option<Root>,
    pub(crate) console: Option<Console>,
    /// Name of a new session keyring.
    pub(crate) keyring: Option<String>,
    /// Run just before the program, inside.
    #[serde(default)]
    pub(crate) start_hooks: Vec<Hook>,
    /// A FIFO to open for writing before the program is executed: it waits for `start`.
    pub(crate) start_fifo: Option<RawFd>,
    /// Stay as the container's process 1: reap, pass signals on, end as the program ends.
    #[serde(default)]
    pub(crate) reaper: bool,
    pub(crate) process: Process,
}

impl Plan {
    /// The descriptors that the plan names.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let mounts = self.root.iter().flat_map(|root| &root.mounts);
        let trees = mounts.filter_map(|mount| mount.tree);
        let console = self.console.iter().map(|console| console.socket);
        let kept = self.keep_descriptors.iter().copied();
        let alone = [self.start_fifo, self.process.program];
        trees
            .chain(console)
            .chain(kept)
            .chain(alone.into_iter().flatten())
    }
}

/// A namespace that exists.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Join {
    pub(crate) path: String,
    /// Its `CLONE_NEW*` flag.
    pub(crate) kind: u32,
}

/// The namespaces of a process.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinProcess {
    pub(crate) pid: i32,
    /// `CLONE_NEW*` flags.
    pub(crate) kinds: u32,
}

/// The container's file system.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Root {
    pub(crate) path: String,
    /// `MS_*` propagation flags of the whole tree.
    pub(crate) propagation: u32,
    /// Put together at `path` first.
    pub(crate) overlay: Option<Overlay>,
    #[serde(default)]
    pub(crate) mounts: Vec<Mount>,
    #[serde(default)]
    pub(crate) devices: Vec<Device>,
    /// Names and what they point to.
    #[serde(default)]
    pub(crate) links: Vec<(String, String)>,
    /// Directories to make, with their modes.
    #[serde(default)]
    pub(crate) directories: Vec<(String, u32)>,
    /// Small files to write: path and text.
    #[serde(default)]
    pub(crate) files: Vec<(String, String)>,
    #[serde(default)]
    pub(crate) masked: Vec<String>,
    #[serde(default)]
    pub(crate) read_only_paths: Vec<String>,
    #[serde(default)]
    pub(crate) read_only: bool,
    /// The mounts are made in the runtime's own namespace: the process gets no more than a changed root.
    #[serde(default)]
    pub(crate) shared: bool,
    /// Change the root with chroot after moving the mount: for a root that is an initramfs.
    #[serde(default)]
    pub(crate) no_pivot: bool,
    /// Ask the runtime for its hooks before the root is changed.
    #[serde(default)]
    pub(crate) ask_hooks: bool,
    /// Mounts to be made read only once everything is in them.
    #[serde(default)]
    pub(crate) late_read_only: Vec<String>,
    /// Run before the root is changed, in the container's namespaces.
    #[serde(default)]
    pub(crate) create_hooks: Vec<Hook>,
    /// Directories of the runtime that hold nothing but what is mounted for the container.
    pub(crate) label: Option<String>,
}

/// A union of directories.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Overlay {
    /// Highest first; none with `memory` is an empty root.
    #[serde(default)]
    pub(crate) lower: Vec<String>,
    pub(crate) upper: Option<String>,
    pub(crate) work: Option<String>,
    #[serde(default)]
    pub(crate) options: Vec<String>,
    /// Keep what is written in memory, in a tmpfs of these options, instead of `upper`.
    pub(crate) memory: Option<String>,
    /// Where the layers are copied to, an empty path of the host's, where there is no overlay.
    pub(crate) copy: Option<String>,
    /// Directories of the host with a writable layer each, in the same memory.
    #[serde(default)]
    pub(crate) parts: Vec<Part>,
}

/// A directory of the host in the root.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    pub(crate) target: String,
    pub(crate) lower: String,
    /// Paths below it that the container doesn't see.
    #[serde(default)]
    pub(crate) hide: Vec<String>,
    /// Copied into the root's memory where there is no overlay; else bound, read only.
    #[serde(default)]
    pub(crate) copy: bool,
}

/// One mount.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mount {
    pub(crate) target: String,
    /// None: a bind mount of `source`.
    pub(crate) filesystem: Option<String>,
    pub(crate) source: String,
    /// `MS_*` flags of the file system.
    #[serde(default)]
    pub(crate) flags: u64,
    #[serde(default)]
    pub(crate) data: String,
    /// The bind mount takes what is mounted below too.
    #[serde(default)]
    pub(crate) recursive: bool,
    /// `MOUNT_ATTR_*` to set and to clear on a bind mount.
    #[serde(default)]
    pub(crate) set: u64,
    #[serde(default)]
    pub(crate) clear: u64,
    /// The same, for all that is mounted below too.
    #[serde(default)]
    pub(crate) set_below: u64,
    #[serde(default)]
    pub(crate) clear_below: u64,
    /// `MS_*` propagation flags, each applied in turn.
    #[serde(default)]
    pub(crate) propagation: Vec<u32>,
    /// Fill a tmpfs with what it hides.
    #[serde(default)]
    pub(crate) copy_up: bool,
    /// Refused when the target is a symbolic link: `/proc` and `/sys`.
    #[serde(default)]
    pub(crate) no_link: bool,
    /// A mount that the runtime has made already, and that is nowhere yet: what a user namespace
    /// can't reach by its path, or with owners of its own.
    pub(crate) tree: Option<RawFd>,
}

/// A device node.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Device {
    pub(crate) path: String,
    /// `S_IF*` and permission bits.
    pub(crate) mode: u32,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Bind the host's own node: in a user namespace nodes can't be made.
    #[serde(default)]
    pub(crate) bind: bool,
}

/// A terminal for the process.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Console {
    /// A connected UNIX socket that gets the terminal's other end.
    pub(crate) socket: RawFd,
    pub(crate) rows: u16,
    pub(crate) columns: u16,
    /// Newlines leave it as they are: another terminal, to which it is copied, turns them.
    #[serde(default)]
    pub(crate) copied: bool,
    /// Put it at `/dev/console` as well.
    #[serde(default)]
    pub(crate) mount: bool,
}

/// A program that is run at a point of the container's life.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hook {
    pub(crate) path: String,
    #[serde(default)]
    pub(crate) args: Vec<String>,
    #[serde(default)]
    pub(crate) env: Vec<String>,
    /// Seconds.
    pub(crate) timeout: Option<u64>,
}

/// The program and what it may do.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Process {
    pub(crate) args: Vec<String>,
    #[serde(default)]
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// None: the groups stay, since they can't be set here.
    pub(crate) groups: Option<Vec<u32>>,
    pub(crate) umask: Option<u32>,
    pub(crate) capabilities: Option<Capabilities>,
    #[serde(default)]
    pub(crate) no_new_privileges: bool,
    /// Number, soft and hard limit.
    #[serde(default)]
    pub(crate) limits: Vec<(u32, u64, u64)>,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) seccomp: Option<Seccomp>,
    pub(crate) apparmor: Option<String>,
    pub(crate) selinux: Option<String>,
    pub(crate) personality: Option<u64>,
    /// Class and priority as `ioprio_set` wants them.
    pub(crate) io_priority: Option<i32>,
    pub(crate) scheduler: Option<Scheduler>,
    pub(crate) memory_policy: Option<MemoryPolicy>,
    /// Processors to run on once it is set up, a bit each; None: all that the cgroup has.
    pub(crate) affinity: Option<Vec<u64>>,
    /// A program by descriptor rather than by its first argument.
    pub(crate) program: Option<RawFd>,
}

/// How a process is scheduled: the fields of `struct sched_attr`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scheduler {
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    /// Nanoseconds, as the two below.
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
}

/// From which nodes memory comes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MemoryPolicy {
    /// `MPOL_*` with its flags.
    pub(crate) mode: u32,
    /// A bit each.
    pub(crate) nodes: Vec<u64>,
}

/// Sets of capabilities, a bit each.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Capabilities {
    pub(crate) bounding: u64,
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
    pub(crate) ambient: u64,
}

/// A system call filter.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seccomp {
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(crate) flags: u32,
    /// `struct sock_filter` of each instruction, in hexadecimal.
    #[serde(deserialize_with = "instructions")]
    pub(crate) program: Vec<Instruction>,
}

/// Code, jump if true, jump if false, constant.
pub(crate) type Instruction = (u16, u8, u8, u32);

fn instructions<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<Instruction>, D::Error> {
    let text = String::deserialize(source)?;
    let wrong = || D::Error::custom("no instructions in hexadecimal");
    let words = text.as_bytes().chunks(16).map(|digits| {
        let digits = str::from_utf8(digits)
            .ok()
            .filter(|text| text.len() == 16)?;
        let bytes = u64::from_str_radix(digits, 16).ok()?.to_be_bytes();
        let [a, b, jt, jf, c, d, e, f] = bytes;
        let code = u16::from_ne_bytes([a, b]);
        Some((code, jt, jf, u32::from_ne_bytes([c, d, e, f])))
    });
    words.collect::<Option<_>>().ok_or_else(wrong)
}
