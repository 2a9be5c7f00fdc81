//! The last steps: privileges go, the filter comes, the program starts.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::path::Path;

use rustix::fs::Access;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::InitError;
use crate::error::Step;
use crate::hooks;
use crate::plan::Plan;
use crate::plan::Process;
use crate::plan::Seccomp;
use crate::reaper;
use crate::status::Message;
use crate::status::Runtime;
use crate::sys;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const LAST_CAPABILITY: &str = "sys/kernel/cap_last_cap";

/// Files of the host's `/proc` by which the security module is told the next program's label.
pub(crate) struct Labels(Vec<(File, String)>);

impl Labels {
    pub(crate) fn open(process: &Process) -> Result<Self, InitError> {
        let mut files = Vec::new();
        if let Some(profile) = &process.apparmor {
            let own = "/proc/self/attr/apparmor/exec";
            let path = if Path::new(own).exists() {
                own
            } else {
                "/proc/self/attr/exec"
            };
            files.push((open_label(path)?, format!("exec {profile}")));
        }
        if let Some(label) = &process.selinux {
            files.push((open_label("/proc/self/attr/exec")?, label.clone()));
        }
        Ok(Self(files))
    }

    fn write(self) -> Result<(), InitError> {
        for (mut file, label) in self.0 {
            file.write_all(label.as_bytes())
                .step(|| format!("set the label {label}"))?;
        }
        Ok(())
    }
}

fn open_label(path: &str) -> Result<File, InitError> {
    File::options()
        .write(true)
        .open(path)
        .step(|| format!("open {path}"))
}

/// Gives up what isn't the program's, and becomes the program.
pub(crate) fn become_program(
    plan: &Plan,
    proc: &OwnedFd,
    labels: Labels,
    state: &str,
    runtime: &mut Runtime,
) -> Result<(), InitError> {
    let process = &plan.process;
    if let Some(name) = &plan.keyring {
        let name = CString::new(name.as_str()).unwrap_or_default();
        // Kernels without keyrings, and a user whose quota is used up, start all the same.
        let _none = sys::join_keyring(&name);
    }
    let last = last_capability(proc);
    limits(process)?;
    labels.write()?;
    if process.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1).step(|| "forbid new privileges".to_owned())?;
    } else if let Some(filter) = &process.seccomp {
        // Only a privileged process may install a filter without that promise.
        install(filter, runtime)?;
    }
    let entered = rustix::process::chdir(process.cwd.as_str());
    change_user(process, last)?;
    if entered.is_err() {
        // A directory that the user may enter and root may not: a file system of the network.
        rustix::process::chdir(process.cwd.as_str())
            .step(|| format!("enter the directory {}", process.cwd))?;
    }
    let program = find(process)?;
    hold(plan, proc, runtime)?;
    if plan.reaper {
        reaper::stay()?;
    }
    stay_inside()?;
    if process.no_new_privileges
        && let Some(filter) = &process.seccomp
    {
        install(filter, runtime)?;
    }
    // As in runc: with what the program has, its filter included.
    let environment = environment(process);
    hooks::run("startContainer", &plan.start_hooks, state, &environment)?;
    Err(start(plan, program, &environment))
}

/// Installs the filter. Whoever decides its calls gets to know of it by the runtime, which takes the
/// descriptor from here: to send it from here would take calls that are to be decided.
fn install(filter: &Seccomp, runtime: &mut Runtime) -> Result<(), InitError> {
    let listener = sys::seccomp(filter).step(|| "install the system call filter".to_owned())?;
    if let Some(listener) = listener {
        runtime.ask(&format!("listener {}", listener.as_raw_fd()))?;
    }
    Ok(())
}

fn limits(process: &Process) -> Result<(), InitError> {
    if let Some(value) = process.personality {
        sys::personality(value).step(|| format!("set the personality {value:#x}"))?;
    }
    if let Some(value) = process.io_priority {
        sys::io_priority(value).step(|| format!("set the I/O priority {value:#x}"))?;
    }
    // What the caller was bound to isn't the container's business; its cgroup is.
    let _none = sys::set_affinity(None);
    if let Some(mask) = &process.affinity {
        sys::set_affinity(Some(mask)).step(|| "set the processors to run on".to_owned())?;
    }
    if let Some(policy) = &process.memory_policy {
        sys::set_memory_policy(policy).step(|| "set the memory policy".to_owned())?;
    }
    if let Some(scheduler) = &process.scheduler {
        sys::set_scheduler(scheduler).step(|| "set the scheduler".to_owned())?;
    }
    for &(resource, soft, hard) in &process.limits {
        sys::set_limit(resource, soft, hard)
            .step(|| format!("set limit {resource} to {soft} (soft) and {hard} (hard)"))?;
    }
    if let Some(mask) = process.umask {
        rustix::process::umask(Mode::from_raw_mode(mask));
    }
    Ok(())
}

fn last_capability(proc: &OwnedFd) -> u32 {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let text = rustix::fs::openat(proc, LAST_CAPABILITY, flags, Mode::empty())
        .map(File::from)
        .and_then(|file| std::io::read_to_string(file).map_err(|_| Errno::IO));
    text.ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(40)
}

fn change_user(process: &Process, last: u32) -> Result<(), InitError> {
    if let Some(sets) = &process.capabilities {
        for number in (0..=last).filter(|number| sets.bounding & (1 << number) == 0) {
            sys::prctl(libc::PR_CAPBSET_DROP, number.into())
                .step(|| format!("drop capability {number}"))?;
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1).step(|| "keep capabilities".to_owned())?;
    if let Some(groups) = &process.groups {
        sys::set_groups(groups).step(|| "set the groups".to_owned())?;
    }
    sys::become_user(process.uid, process.gid)
        .step(|| format!("become user {}:{}", process.uid, process.gid))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0).step(|| "keep no capabilities".to_owned())?;
    let Some(sets) = &process.capabilities else {
        return Ok(());
    };
    let known = if last >= 63 {
        u64::MAX
    } else {
        (1 << (last + 1)) - 1
    };
    sys::capset(
        sets.effective & known,
        sets.permitted & known,
        sets.inheritable & known,
    )
    .step(|| "set the capabilities".to_owned())?;
    sys::clear_ambient().step(|| "empty the ambient capabilities".to_owned())?;
    // The kernel's condition; engines ask for ambient sets that don't meet it, and get what does.
    let ambient = sets.ambient & sets.permitted & sets.inheritable;
    for number in (0..=last).filter(|number| ambient & (1 << number) != 0) {
        sys::raise_ambient(number).step(|| format!("raise capability {number}"))?;
    }
    Ok(())
}

/// Tells the runtime that all is set, and waits for `start` where the container was only created.
fn hold(plan: &Plan, proc: &OwnedFd, runtime: &mut Runtime) -> Result<(), InitError> {
    runtime.tell(&Message::Ready(true));
    if let Some(fifo) = plan.start_fifo {
        let what = || "wait for the start".to_owned();
        // The first process of a namespace takes no signal that it doesn't wait for.
        sys::end_by_signals();
        // By the host's /proc, since the container may have none or another.
        let path = format!("self/fd/{fifo}");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let mut fifo = loop {
            match rustix::fs::openat(proc, path.as_str(), flags, Mode::empty()) {
                Err(Errno::INTR) => {}
                result => break File::from(result.step(what)?),
            }
        };
        fifo.write_all(b"0").step(what)?;
    }
    Ok(())
}

/// A directory outside the root, kept through an inherited descriptor, has no path here.
fn stay_inside() -> Result<(), InitError> {
    let here = rustix::process::getcwd(Vec::new()).step(|| "ask for the directory".to_owned())?;
    if here.to_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(InitError::Refused(
        "the working directory is outside the container's root".to_owned(),
    ))
}

/// The program's path: by the container's own `PATH`, as the program's user sees it.
fn find(process: &Process) -> Result<Option<CString>, InitError> {
    if process.program.is_some() {
        return Ok(None);
    }
    let name = process.args.first().map_or("", String::as_str);
    let mut refused = Errno::NOENT;
    let mut tried = |path: &str| -> Option<CString> {
        let status = rustix::fs::stat(path);
        if status.is_ok_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFDIR) {
            refused = Errno::ACCESS;
            return None;
        }
        match rustix::fs::accessat(
            rustix::fs::CWD,
            path,
            Access::EXEC_OK,
            rustix::fs::AtFlags::EACCESS,
        ) {
            Ok(()) => CString::new(path).ok(),
            // The kernel is older than the call, or a filter is that doesn't know it: execve says.
            Err(Errno::NOSYS | Errno::PERM) if status.is_ok() => CString::new(path).ok(),
            Err(Errno::NOSYS | Errno::PERM) => None,
            Err(error) => {
                if error != Errno::NOENT {
                    refused = error;
                }
                None
            }
        }
    };
    let found = if name.contains('/') {
        tried(name)
    } else {
        let path = process
            .env
            .iter()
            .find_map(|pair| pair.strip_prefix("PATH="));
        path.unwrap_or(DEFAULT_PATH).split(':').find_map(|folder| {
            tried(&format!(
                "{}/{name}",
                if folder.is_empty() { "." } else { folder }
            ))
        })
    };
    match found {
        Some(path) => Ok(Some(path)),
        None if name.contains('/') => {
            Err(refused).step(|| format!("exec: \"{name}\": stat {name}"))
        }
        None if refused == Errno::NOENT => Err(InitError::System {
            step: format!("exec: \"{name}\": executable file not found in $PATH"),
            source: refused.into(),
        }),
        None => Err(refused).step(|| format!("exec: \"{name}\"")),
    }
}

/// The program's variables, with the user's home unless it is said.
fn environment(process: &Process) -> Vec<String> {
    let mut pairs = process.env.clone();
    if !pairs.iter().any(|pair| pair.starts_with("HOME=")) {
        pairs.push(format!("HOME={}", home(process.uid)));
    }
    pairs
}

fn start(plan: &Plan, program: Option<CString>, environment: &[String]) -> InitError {
    let strings = |texts: &[String]| -> Vec<CString> {
        texts
            .iter()
            .filter_map(|text| CString::new(text.as_str()).ok())
            .collect()
    };
    let (args, env) = (strings(&plan.process.args), strings(environment));
    for &descriptor in &plan.keep_descriptors {
        if let Err(source) = keep(descriptor) {
            return InitError::System {
                step: format!("keep descriptor {descriptor}"),
                source,
            };
        }
    }
    sys::reset_signals();
    let source = match (program, plan.process.program) {
        (Some(path), _) => sys::execute(Ok(&path), &args, &env),
        (None, Some(number)) => match sys::inherited(number) {
            Ok(descriptor) => sys::execute(Err(descriptor.as_fd()), &args, &env),
            Err(error) => error,
        },
        (None, None) => Errno::NOENT.into(),
    };
    // Without the number: engines look for the words.
    let reason = source.to_string();
    let reason = reason.split(" (os error").next().unwrap_or(&reason);
    let program = plan.process.args.first().map_or("", String::as_str);
    InitError::Refused(format!("exec {program}: {}", reason.to_lowercase()))
}

/// The user's directory by the container's own list of users.
fn home(uid: u32) -> String {
    const LONGEST: u64 = 1 << 20;
    let mut text = String::new();
    let read =
        File::open("/etc/passwd").and_then(|file| file.take(LONGEST).read_to_string(&mut text));
    let found = read.is_ok().then(|| {
        text.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            (fields.len() >= 6 && fields[2].parse() == Ok(uid)).then(|| fields[5].to_owned())
        })
    });
    found.flatten().unwrap_or_else(|| "/".to_owned())
}

fn keep(descriptor: RawFd) -> std::io::Result<()> {
    sys::set_inheritable(descriptor.as_raw_fd())
}
