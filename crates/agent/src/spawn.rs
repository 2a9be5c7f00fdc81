//! Starts a command: finds the program, makes its streams and becomes its user.
// UNSAFETY: what a child does between fork and exec must be safe with locks of other threads held.
#![expect(unsafe_code, reason = "code runs between fork and exec")]

use crate::error::AgentError;
use crate::message::Exec;
use crate::message::TerminalSize;
use crate::privileges::Prepared;
use crate::reaper::Child;
use crate::reaper::Reaper;
use crate::users;
use crate::users::User;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Gid;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::Uid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::thread::set_thread_groups;
use rustix::thread::set_thread_res_gid;
use rustix::thread::set_thread_res_uid;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PIPE_BYTES: usize = 256 << 10;

/// Our ends of a command's streams; none of them makes us wait.
#[derive(Debug)]
pub(crate) struct Streams {
    /// What it reads.
    pub(crate) stdin: Option<OwnedFd>,
    /// What it writes.
    pub(crate) stdout: Option<OwnedFd>,
    /// What it writes to standard error; none with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
    /// Its terminal.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Why a command didn't start.
#[derive(Debug)]
pub(crate) struct NotStarted {
    /// As a shell's: 127 when there is no such program, 126 when it can't be run.
    pub(crate) code: i32,
    /// In words.
    pub(crate) message: String,
}

impl NotStarted {
    fn because(code: i32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl From<AgentError> for NotStarted {
    fn from(error: AgentError) -> Self {
        Self::because(126, error.message)
    }
}

/// Starts what is asked for.
///
/// # Errors
///
/// The command can't be started; the host is told as a shell tells it.
pub(crate) fn spawn(
    request: &Exec,
    limits: &[(Resource, Rlimit)],
    reaper: &Reaper,
) -> Result<(Child, Streams), NotStarted> {
    let mut user = users::find(&request.user)?;
    let privileges = match &request.privileges {
        Some(wanted) => {
            if let Some(groups) = &wanted.groups {
                user.groups.clone_from(groups);
            }
            let prepared = wanted.prepare();
            Some(prepared.map_err(|_| AgentError::config("the filter of system calls is wrong"))?)
        }
        None => None,
    };
    let env = environment(request, &user);
    let cwd = match request.cwd.as_str() {
        "" if Path::new(&user.home).is_dir() => user.home.as_str(),
        "" => "/",
        given => given,
    };
    if !Path::new(cwd).is_dir() {
        let message = format!("the working directory {cwd} doesn't exist in the guest");
        return Err(NotStarted::because(126, message));
    }
    let name = request.argv.first().map_or("", String::as_str);
    let program = find_program(name, env.get("PATH").map_or("", String::as_str), cwd)?;
    let mut command = Command::new(program);
    command
        .arg0(name)
        .args(request.argv.iter().skip(1))
        .env_clear()
        .envs(&env)
        .current_dir(cwd);
    let streams = make_streams(&mut command, request, &user)
        .map_err(|errno| AgentError::errno("cannot make the command's streams", errno))?;
    become_user(
        &mut command,
        &user,
        limits.to_vec(),
        privileges,
        request.terminal.is_some(),
    );
    let child = reaper.spawn(&mut command).map_err(|error| {
        if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) && !users::is_mapped(&user) {
            let message = format!(
                "the user {}:{} has no number in this container: whoever started it has too few",
                user.uid, user.gid
            );
            return NotStarted::because(126, message);
        }
        let error = AgentError::io(format!("cannot run {name}"), &error);
        // A program's interpreter may be missing: a shell says the same.
        let code = if error.errno == Errno::NOENT.raw_os_error() {
            127
        } else {
            126
        };
        NotStarted::because(code, error.message)
    })?;
    Ok((child, streams))
}

fn environment(request: &Exec, user: &User) -> BTreeMap<String, String> {
    let mut env = request.env.clone();
    let mut default = |name: &str, value: &str| {
        env.entry(name.to_owned())
            .or_insert_with(|| value.to_owned());
    };
    default("PATH", DEFAULT_PATH);
    default("HOME", &user.home);
    default("USER", &user.name);
    if request.terminal.is_some() {
        default("TERM", "xterm");
    }
    env
}

/// As a shell finds it.
fn find_program(name: &str, path: &str, cwd: &str) -> Result<PathBuf, NotStarted> {
    if name.is_empty() {
        return Err(NotStarted::because(127, "there is no command"));
    }
    if name.contains('/') {
        return check_program(&Path::new(cwd).join(name), name);
    }
    let mut refused = None;
    for folder in path.split(':') {
        // An empty part is the working directory (POSIX).
        let folder = if folder.is_empty() { "." } else { folder };
        match check_program(&Path::new(cwd).join(folder).join(name), name) {
            Ok(program) => return Ok(program),
            Err(error) if error.code == 126 => refused = Some(error),
            Err(_) => {}
        }
    }
    Err(refused.unwrap_or_else(|| {
        NotStarted::because(127, format!("{name}: command not found in the guest"))
    }))
}

fn check_program(path: &Path, name: &str) -> Result<PathBuf, NotStarted> {
    match fs::metadata(path) {
        Ok(status) if status.is_dir() => {
            Err(NotStarted::because(126, format!("{name}: is a directory")))
        }
        Ok(status) if status.permissions().mode() & 0o111 == 0 => Err(NotStarted::because(
            126,
            format!("{name}: permission denied"),
        )),
        Ok(_) => Ok(path.to_owned()),
        Err(error) => {
            let error = AgentError::io(format!("cannot run {name}"), &error);
            let missing = [Errno::NOENT, Errno::NOTDIR]
                .iter()
                .any(|errno| errno.raw_os_error() == error.errno);
            Err(NotStarted::because(
                if missing { 127 } else { 126 },
                error.message,
            ))
        }
    }
}

fn make_streams(command: &mut Command, request: &Exec, user: &User) -> rustix::io::Result<Streams> {
    if let Some(size) = request.terminal {
        return make_terminal(command, size, user);
    }
    let stdin = if request.stdin {
        let (theirs, ours) = pipe()?;
        command.stdin(theirs);
        Some(not_waiting(ours)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let (stdout, theirs) = pipe()?;
    command.stdout(theirs);
    let (stderr, theirs) = pipe()?;
    command.stderr(theirs);
    Ok(Streams {
        stdin,
        stdout: Some(not_waiting(stdout)?),
        stderr: Some(not_waiting(stderr)?),
        terminal: None,
    })
}

fn make_terminal(
    command: &mut Command,
    size: TerminalSize,
    user: &User,
) -> rustix::io::Result<Streams> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    resize(&ours, size)?;
    // Programs open their terminal by its name, too.
    let _as_root_only = rustix::fs::fchown(&theirs, Some(Uid::from_raw(user.uid)), None);
    command.stdin(theirs.try_clone().map_err(|_| Errno::MFILE)?);
    command.stdout(theirs.try_clone().map_err(|_| Errno::MFILE)?);
    command.stderr(theirs);
    let ours = not_waiting(ours)?;
    let copy = || rustix::io::fcntl_dupfd_cloexec(&ours, 3);
    Ok(Streams {
        stdin: Some(copy()?),
        stdout: Some(copy()?),
        stderr: None,
        terminal: Some(ours),
    })
}

/// Sets a terminal's size.
///
/// # Errors
///
/// It is gone.
pub(crate) fn resize(terminal: impl AsFd, size: TerminalSize) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}

fn pipe() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // Fewer turns for much output. Users' pipes may be at their limit: then it stays small.
    let _size = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
    Ok((read, write))
}

fn not_waiting(fd: OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
    Ok(fd)
}

fn become_user(
    command: &mut Command,
    user: &User,
    limits: Vec<(Resource, Rlimit)>,
    privileges: Option<Prepared>,
    terminal: bool,
) {
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let ours = rustix::process::geteuid().as_raw() == user.uid && user.uid != 0;
    let prepare = move || -> io::Result<()> {
        rustix::process::setsid()?;
        if terminal {
            // Standard input is the terminal by now.
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        for (resource, limit) in &limits {
            rustix::process::setrlimit(*resource, *limit)?;
        }
        if let Some(privileges) = &privileges {
            privileges.before_user()?;
        }
        if !ours {
            match set_thread_groups(&groups) {
                // In a container of one user nobody may set groups, and nobody has any.
                Err(Errno::PERM) if groups.is_empty() => {}
                result => result?,
            }
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        if let Some(privileges) = &privileges {
            privileges.after_user()?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls and reads values that it owns; it takes no lock and
    // neither allocates nor frees.
    unsafe { command.pre_exec(prepare) };
}
