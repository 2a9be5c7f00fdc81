//! From the kernel's first process to a guest that is set up.

use crate::address::Address;
use crate::error::AgentError;
use crate::error::Tried;
use crate::frame::Kind;
use crate::guest::Guest;
use crate::guest::set_clock;
use crate::link::Link;
use crate::message::Hello;
use crate::message::Ready;
use crate::message::Setup;
use crate::modules::Modules;
use crate::names;
use crate::network;
use crate::place::DEVICE_STEP;
use crate::place::mount;
use crate::place::wait;
use crate::power;
use crate::root;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::time::ClockId;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

const PROTOCOL: u32 = 1;
/// How long the host may take to be there.
const HOST_PATIENCE: Duration = Duration::from_secs(60);
/// Descriptors of the agent: a connection with a command has up to eight.
const DESCRIPTORS: u64 = 1 << 16;
/// What commands get unless the host says otherwise: what service managers give.
const COMMAND_DESCRIPTORS: (u64, u64) = (1024, 1 << 19);

/// When the drivers of devices that commands can do without are loaded.
const OTHERS_DELAY: Duration = Duration::from_millis(500);

/// What a guest with a network card needs.
pub(crate) const NETWORK_MODULES: [&str; 3] = ["virtio_net", "ipv6", "af_packet"];
/// Device IDs (virtio 1.2 §5) and their drivers: those that setting up may need, and the others.
const NEEDED: [(u32, &str); 3] = [(1, "virtio_net"), (2, "virtio_blk"), (26, "virtiofs")];
const OTHERS: [(u32, &str); 3] = [
    (3, "virtio_console"),
    (4, "virtio_rng"),
    (5, "virtio_balloon"),
];

/// Runs as the guest's first process. Returns only when the guest can't be spoken to.
///
/// # Errors
///
/// What failed.
pub fn init() -> Result<(), AgentError> {
    let mut phases = Phases::start();
    let none = MountFlags::empty();
    mount("proc", Path::new("/proc"), "proc", none, "")?;
    mount("sysfs", Path::new("/sys"), "sysfs", none, "")?;
    mount("devtmpfs", Path::new("/dev"), "devtmpfs", none, "")?;
    let mut modules = Modules::open(Path::new("/ringfence"))?;
    modules.load("virtio_pci")?;
    modules.load("vmw_vsock_virtio_transport")?;
    phases.end("modules");
    let guest = Arc::new(Guest::new(true));
    let address = Address::Vsock;
    let listener = address
        .listen()
        .tried(|| "cannot listen for the host".into())?;
    let mut link = reach_host(&address)?;
    phases.end("connect");
    modules.load_drivers(&NEEDED)?;
    modules.load("overlay")?;
    phases.end("drivers");
    start_reaper(&guest)?;
    while let Err(error) = be_set_up(&mut link, &guest, &mut modules, &mut phases) {
        // The host is told, and may ask again only before the root has changed; it mostly gives up.
        let sent = link.send_json(Kind::Error, &error);
        if sent.is_err() || phases.changed_root {
            return Err(error);
        }
    }
    let serving = Arc::clone(&guest);
    thread::Builder::new()
        .spawn(move || serving.serve(link))
        .tried(|| "cannot serve the host".into())?;
    guest.keep(modules);
    let later = Arc::clone(&guest);
    let _background = thread::Builder::new().spawn(move || {
        // A kernel without it panics all the same; only nobody is told why the guest resets.
        let _optional = later.with_modules(|modules| modules.load("pvpanic_mmio"));
        // The first command comes first.
        wait(OTHERS_DELAY);
        later.with_modules(|modules| modules.load_drivers(&OTHERS))
    });
    guest.accept(&listener);
    Ok(())
}

/// Runs as an ordinary process under test: everything but the machine.
///
/// # Errors
///
/// What failed.
pub fn hosted(address: &Address) -> Result<(), AgentError> {
    let _reap_orphans = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let guest = Arc::new(Guest::new(false));
    let listener = address
        .listen()
        .tried(|| "cannot listen for the host".into())?;
    start_reaper(&guest)?;
    if let Some(fd) = address.connect().tried(|| "cannot reach the host".into())? {
        let mut link = Link::new(fd);
        say_hello(&link)?;
        let setup = receive_setup(&mut link)?;
        guest.set_limits(limits(&setup)?);
        answer_ready(&link, BTreeMap::new())?;
        let serving = Arc::clone(&guest);
        thread::spawn(move || serving.serve(link));
    }
    guest.accept(&listener);
    Ok(())
}

/// Runs as a container's first process. What a guest is set up with, the container has already.
///
/// # Errors
///
/// What failed.
pub fn contained() -> Result<(), AgentError> {
    let taken = |from: std::io::Result<OwnedFd>| from.tried(|| "a socket is missing".into());
    let listener = taken(std::io::stdin().as_fd().try_clone_to_owned())?;
    let owner = taken(std::io::stdout().as_fd().try_clone_to_owned())?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::open("/dev/null", flags, Mode::empty())
        .tried(|| "cannot open /dev/null".into())?;
    rustix::stdio::dup2_stdin(&null).tried(|| "cannot let go of a socket".into())?;
    rustix::stdio::dup2_stdout(&null).tried(|| "cannot let go of a pipe".into())?;
    let guest = Arc::new(Guest::contained());
    start_reaper(&guest)?;
    // All that runs in the container ends with its first process.
    let waiting = thread::Builder::new().stack_size(64 << 10);
    let started = waiting.spawn(move || {
        while matches!(
            rustix::io::read(&owner, &mut [0; 64]),
            Ok(1..) | Err(Errno::INTR)
        ) {}
        power::end();
    });
    started.tried(|| "cannot watch the owner".into())?;
    guest.accept(&listener);
    Ok(())
}

fn start_reaper(guest: &Arc<Guest>) -> Result<(), AgentError> {
    let guest = Arc::clone(guest);
    let thread = thread::Builder::new().stack_size(64 << 10);
    let started = thread.spawn(move || guest.reaper.run());
    started.map(drop).tried(|| "cannot start the reaper".into())
}

/// Connects and says hello; the host's listener may come a moment later.
fn reach_host(address: &Address) -> Result<Link, AgentError> {
    let deadline = Instant::now() + HOST_PATIENCE;
    loop {
        match address.connect() {
            Ok(Some(fd)) => {
                let link = Link::new(fd);
                say_hello(&link)?;
                return Ok(link);
            }
            Ok(None) => return Err(AgentError::state("there is no host to connect to")),
            Err(errno) if Instant::now() > deadline => {
                return Err(AgentError::errno("cannot reach the host over vsock", errno));
            }
            Err(_) => wait(DEVICE_STEP),
        }
    }
}

fn say_hello(link: &Link) -> Result<(), AgentError> {
    let hello = Hello {
        version: PROTOCOL,
        agent: env!("CARGO_PKG_VERSION"),
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
    };
    let sent = link.send_json(Kind::Hello, &hello);
    sent.map_err(|error| AgentError::guest(format!("cannot greet the host: {error}")))
}

fn receive_setup(link: &mut Link) -> Result<Setup, AgentError> {
    match link.receive() {
        Ok(Some(frame)) if frame.kind == Kind::Setup => serde_json::from_slice(&frame.payload)
            .map_err(|error| AgentError::config(format!("the setup is wrong: {error}"))),
        Ok(Some(frame)) => {
            let kind = frame.kind;
            Err(AgentError::config(format!(
                "{kind:?} came in place of the setup"
            )))
        }
        Ok(None) => Err(AgentError::state("the host closed the connection")),
        Err(error) => Err(AgentError::config(error.to_string())),
    }
}

fn answer_ready(link: &Link, phases_us: BTreeMap<&'static str, u64>) -> Result<(), AgentError> {
    let sent = link.send_json(Kind::Ready, &Ready { phases_us });
    sent.map_err(|error| AgentError::guest(error.to_string()))
}

fn be_set_up(
    link: &mut Link,
    guest: &Guest,
    modules: &mut Modules,
    phases: &mut Phases,
) -> Result<(), AgentError> {
    let setup = receive_setup(link)?;
    phases.end("host");
    if setup.time_ns > 0 {
        set_clock(setup.time_ns)?;
    }
    guest.set_limits(limits(&setup)?);
    if !setup.interfaces.is_empty() {
        for name in NETWORK_MODULES {
            modules.load(name)?;
        }
    }
    phases.changed_root = true;
    // The kernel's network side waits more than it works, so it may do so meanwhile.
    thread::scope(|scope| {
        let network = scope.spawn(|| network::set_up(&setup.interfaces));
        root::enter(&setup.root, modules)?;
        spare_modprobe();
        phases.end("root");
        root::mount_all(&setup.mounts, modules)?;
        phases.end("mounts");
        names::set(&setup)?;
        phases.end("names");
        let done = network.join();
        done.unwrap_or_else(|_| Err(AgentError::guest("setting the network up failed")))
    })?;
    phases.end("network");
    for (name, value) in &setup.sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value).tried(|| format!("cannot set {name}"))?;
    }
    answer_ready(link, std::mem::take(&mut phases.took_us))
}

/// Where the root has no modules for this kernel, its own requests for some need not start a program
/// that finds none.
fn spare_modprobe() {
    let version = rustix::system::uname();
    let folder = Path::new("/lib/modules").join(version.release().to_string_lossy().as_ref());
    if !folder.is_dir() {
        let _kept = fs::write("/proc/sys/kernel/modprobe", "\n");
    }
}

fn limits(setup: &Setup) -> Result<Vec<(Resource, Rlimit)>, AgentError> {
    let ours = Rlimit {
        current: Some(DESCRIPTORS),
        maximum: Some(DESCRIPTORS.max(COMMAND_DESCRIPTORS.1)),
    };
    // Under test it may not.
    let raised = rustix::process::setrlimit(Resource::Nofile, ours).is_ok();
    let mut limits = Vec::new();
    if raised && !setup.limits.contains_key("nofile") {
        limits.push((Resource::Nofile, rlimit(COMMAND_DESCRIPTORS)));
    }
    for (name, values) in &setup.limits {
        let resource = match name.as_str() {
            "as" => Resource::As,
            "core" => Resource::Core,
            "cpu" => Resource::Cpu,
            "data" => Resource::Data,
            "fsize" => Resource::Fsize,
            "memlock" => Resource::Memlock,
            "nofile" => Resource::Nofile,
            "nproc" => Resource::Nproc,
            "stack" => Resource::Stack,
            _ => return Err(AgentError::config(format!("there is no limit {name}"))),
        };
        limits.push((resource, rlimit(*values)));
    }
    Ok(limits)
}

fn rlimit((soft, hard): (u64, u64)) -> Rlimit {
    Rlimit {
        current: Some(soft),
        maximum: Some(hard),
    }
}

/// How long the steps take.
struct Phases {
    last: Instant,
    took_us: BTreeMap<&'static str, u64>,
    changed_root: bool,
}

impl Phases {
    fn start() -> Self {
        let up = rustix::time::clock_gettime(ClockId::Boottime);
        let up = Duration::try_from(up).unwrap_or_default();
        Self {
            last: Instant::now(),
            took_us: BTreeMap::from([("kernel", microseconds(up))]),
            changed_root: false,
        }
    }

    fn end(&mut self, name: &'static str) {
        self.took_us.insert(name, microseconds(self.last.elapsed()));
        self.last = Instant::now();
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
