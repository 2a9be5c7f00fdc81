//! For tests alone: what a process that was taken over would try, on each kind of thread.

// UNSAFETY: makes system calls that nothing else in the program makes.
#![expect(unsafe_code, reason = "the point is to do what safe code doesn't")]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use ringfence_machine::Machine;
use ringfence_virtio::EventHandler;
use ringfence_virtio::Interest;
use rustix::event::EventfdFlags;
use serde::Deserialize;
use serde_json::Value;
use serde_json::json;

/// Long enough for any thread to have its turn.
const TURN: Duration = Duration::from_secs(10);

/// What to do, and where.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Misdeed {
    thread: Thread,
    act: Act,
    /// The argument, where the act has one.
    #[serde(default)]
    number: i32,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Thread {
    Control,
    Vcpu,
    Timers,
    Devices,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Act {
    /// Opens /etc/hostname.
    Open,
    /// Starts /bin/true.
    Execute,
    /// Opens a network socket and connects it.
    Connect,
    /// Maps memory that can be written and executed.
    MapCode,
    /// Mounts a file system.
    Mount,
    /// Sends signal 0 to a process by its number.
    Signal,
    /// Traces its parent.
    Trace,
    /// Uses a descriptor by its number.
    Descriptor,
    /// Becomes root.
    BecomeRoot,
    /// Asks something of vhost-net.
    Vhost,
    /// Takes much memory in small parts and gives it back, which is no misdeed.
    Shrink,
}

fn check(result: i64) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn act(act: Act, number: i32) -> io::Result<()> {
    match act {
        Act::Open => File::open("/etc/hostname").map(drop),
        Act::Execute => std::process::Command::new("/bin/true").status().map(drop),
        Act::Connect => std::net::TcpStream::connect("192.0.2.1:9").map(drop),
        Act::MapCode => {
            let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping disturbs no other.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
            match start == libc::MAP_FAILED {
                true => Err(io::Error::last_os_error()),
                false => Ok(()),
            }
        }
        Act::Mount => rustix::mount::mount(
            "none",
            "/",
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            None,
        )
        .map_err(Into::into),
        // SAFETY: signal 0 does nothing but look.
        Act::Signal => check(i64::from(unsafe { libc::kill(number, 0) })),
        // SAFETY: asking to be traced changes no memory.
        Act::Trace => check(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }),
        // SAFETY: F_GETFD changes nothing.
        Act::Descriptor => check(i64::from(unsafe { libc::fcntl(number, libc::F_GETFD) })),
        Act::Shrink => {
            let parts: Vec<Vec<u8>> = (0..256).map(|_| vec![1; 64 << 10]).collect();
            drop(std::hint::black_box(parts));
            Ok(())
        }
        // SAFETY: the descriptor is none, so that nothing is read.
        Act::Vhost => check(i64::from(unsafe { libc::ioctl(-1, 0x4008_af00) })),
        // SAFETY: changes who the calling thread is, no memory.
        Act::BecomeRoot => check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) }),
    }
}

struct Handler {
    deed: (Act, i32),
    done: mpsc::Sender<io::Result<()>>,
}

impl Handler {
    fn run(&self) {
        // The other end waits for this.
        let _ = self.done.send(act(self.deed.0, self.deed.1));
    }
}

impl EventHandler for Handler {
    fn ready(&self, _: u32) {
        self.run();
    }
}

/// Does it, and says what came of it.
pub(crate) fn run(machine: &Machine, misdeed: &Misdeed) -> Value {
    let deed = (misdeed.act, misdeed.number);
    let result = match misdeed.thread {
        Thread::Control => act(deed.0, deed.1),
        Thread::Vcpu => on_vcpu(machine, deed),
        Thread::Timers => on_timers(machine, deed),
        Thread::Devices => on_devices(machine, deed),
    };
    match result {
        Ok(()) => json!({"errno": 0}),
        Err(error) => json!({"errno": error.raw_os_error(), "message": error.to_string()}),
    }
}

fn on_vcpu(machine: &Machine, deed: (Act, i32)) -> io::Result<()> {
    machine.pause().map_err(io::Error::other)?;
    let result = machine
        .with_vcpu(0, move |_| act(deed.0, deed.1))
        .map_err(io::Error::other)?;
    machine.resume().map_err(io::Error::other)?;
    result
}

fn on_timers(machine: &Machine, deed: (Act, i32)) -> io::Result<()> {
    let (done, result) = mpsc::channel();
    let handler = Handler { deed, done };
    let timer = machine.board().timers().add(move || handler.run())?;
    timer.arm(0);
    result.recv_timeout(TURN).map_err(io::Error::other)?
}

fn on_devices(machine: &Machine, deed: (Act, i32)) -> io::Result<()> {
    let (done, result) = mpsc::channel();
    let bell = rustix::event::eventfd(1, EventfdFlags::CLOEXEC)?;
    let registration = machine
        .board()
        .events()
        .register(Arc::new(Handler { deed, done }));
    registration.add(&bell, 0, Interest::Read)?;
    result.recv_timeout(TURN).map_err(io::Error::other)?
}
