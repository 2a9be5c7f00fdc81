//! The two stages: namespaces in the first, all the rest in the second.

use std::fs;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::fs::Mode;
use rustix::fs::OFlags;

use crate::bpf;
use crate::console;
use crate::error::InitError;
use crate::error::Step;
use crate::paths::Tree;
use crate::plan::Plan;
use crate::process;
use crate::root;
use crate::status::Message;
use crate::status::Runtime;
use crate::sys;

const CLONE_NEWUSER: u32 = 0x1000_0000;
const CLONE_NEWCGROUP: u32 = 0x0200_0000;

/// Carries a plan out. Returns in the first stage alone; the second becomes the program.
pub(crate) fn run(plan: &Plan, runtime: &mut Runtime) -> Result<ExitCode, InitError> {
    let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .step(|| "open /proc".to_owned())?;
    if let Some(value) = plan.process.oom_score_adj {
        // Before privileges and /proc change; children inherit it.
        fs::write("/proc/self/oom_score_adj", value.to_string())
            .step(|| format!("set the OOM score adjustment {value}"))?;
    }
    // While paths and privileges are the host's.
    let cgroups = Cgroups::open(plan)?;
    if let (Some(program), Some(path)) = (&plan.device_program, &plan.cgroup_directory) {
        let directory = rustix::fs::open(
            path.as_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(|| format!("open the cgroup {path}"))?;
        bpf::attach_device_program(directory.as_fd(), program)
            .step(|| format!("say which devices {path} may use"))?;
    }
    namespaces(plan, runtime)?;
    let directory = cgroups.directory.as_ref().map(AsRawFd::as_raw_fd);
    let pid = sys::fork(true, directory).step(|| "create the container's process".to_owned())?;
    if pid != 0 {
        runtime.tell(&Message::Pid(pid));
        return Ok(ExitCode::SUCCESS);
    }
    cgroups.enter(plan)?;
    second(plan, &proc, runtime).map(|()| ExitCode::SUCCESS)
}

fn namespaces(plan: &Plan, runtime: &mut Runtime) -> Result<(), InitError> {
    join(plan)?;
    if plan.unshare & CLONE_NEWUSER != 0 {
        sys::unshare(CLONE_NEWUSER).step(|| "make a user namespace".to_owned())?;
    }
    if plan.map_ids {
        runtime.ask("map")?;
    }
    let others = plan.unshare & !(CLONE_NEWUSER | CLONE_NEWCGROUP);
    if others != 0 {
        sys::unshare(others).step(|| format!("make namespaces {others:#x}"))?;
    }
    if let Some(offsets) = &plan.time_offsets {
        fs::write("/proc/self/timens_offsets", offsets)
            .step(|| "set the time namespace's offsets".to_owned())?;
    }
    Ok(())
}

/// Enters namespaces. Those that a user namespace owns can be entered only from inside it.
fn join(plan: &Plan) -> Result<(), InitError> {
    if let Some(target) = &plan.join_process {
        let what = || format!("enter the namespaces of process {}", target.pid);
        let process = sys::pidfd_open(target.pid).step(what)?;
        sys::setns(process.as_fd(), target.kinds).step(what)?;
    }
    let mut files = Vec::new();
    for entry in &plan.join {
        let file = rustix::fs::open(
            entry.path.as_str(),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step(|| format!("open the namespace {}", entry.path))?;
        files.push((entry, file));
    }
    let (users, others): (Vec<_>, Vec<_>) = files
        .into_iter()
        .partition(|(entry, _)| entry.kind == CLONE_NEWUSER);
    let mut later = Vec::new();
    for (entry, file) in others {
        match sys::setns(file.as_fd(), entry.kind) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) && !users.is_empty() => {
                later.push((entry, file));
            }
            result => result.step(|| format!("enter the namespace {}", entry.path))?,
        }
    }
    for (entry, file) in users.into_iter().chain(later) {
        sys::setns(file.as_fd(), entry.kind)
            .step(|| format!("enter the namespace {}", entry.path))?;
    }
    Ok(())
}

fn second(plan: &Plan, proc: &OwnedFd, runtime: &mut Runtime) -> Result<(), InitError> {
    rustix::process::setsid().step(|| "start a session".to_owned())?;
    if plan.become_root {
        sys::become_user(0, 0).step(|| "become root of the user namespace".to_owned())?;
        // Where groups can't be set (a single mapped ID), they are nobody's anyway.
        let _denied = sys::set_groups(&[]);
    }
    if plan.ask_register {
        runtime.ask("register")?;
    }
    let (labels, entered) = if let Some(wanted) = &plan.root {
        root::settle(plan)?;
        let tree = root::build(wanted)?;
        let labels = process::Labels::open(&plan.process)?;
        let entered = root::enter(wanted, &tree, plan.console.as_ref(), runtime)?;
        (labels, entered)
    } else {
        let labels = process::Labels::open(&plan.process)?;
        let inside = Tree::open("/")?;
        let terminal = plan
            .console
            .as_ref()
            .map(|wanted| console::open(&inside, wanted))
            .transpose()?;
        let entered = root::Entered {
            terminal,
            ..Default::default()
        };
        (labels, entered)
    };
    if let Some(terminal) = entered.terminal {
        console::take(&terminal, plan.process.uid)?;
    }
    process::become_program(plan, proc, labels, &entered.state, runtime)
}

/// The container's cgroups, as descriptors that outlive the change of user.
struct Cgroups {
    directory: Option<OwnedFd>,
    tasks: Vec<File>,
}

impl Cgroups {
    fn open(plan: &Plan) -> Result<Self, InitError> {
        let directory = plan.cgroup_directory.as_ref().map(|path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path.as_str(), flags, Mode::empty())
                .step(|| format!("open the cgroup {path}"))
        });
        let tasks = plan.cgroup_tasks.iter().map(|path| {
            File::options()
                .write(true)
                .open(path)
                .step(|| format!("open {path}"))
        });
        Ok(Self {
            directory: directory.transpose()?,
            tasks: tasks.collect::<Result<_, _>>()?,
        })
    }

    /// Moves this process by itself and as a single thread, which the kernel does without waiting
    /// for a grace period: some 15 ms less than being moved by the runtime.
    fn enter(self, plan: &Plan) -> Result<(), InitError> {
        for (mut file, path) in self.tasks.into_iter().zip(&plan.cgroup_tasks) {
            file.write_all(b"0")
                .step(|| format!("enter the cgroup by {path}"))?;
        }
        if plan.cgroup_namespace {
            sys::unshare(CLONE_NEWCGROUP).step(|| "make a cgroup namespace".to_owned())?;
        }
        Ok(())
    }
}
