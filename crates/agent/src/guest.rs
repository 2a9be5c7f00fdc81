//! Serves the host's connections.

use crate::archive;
use crate::boot::NETWORK_MODULES;
use crate::error::AgentError;
use crate::error::ServeError;
use crate::error::Tried;
use crate::exec;
use crate::files;
use crate::files::WriteOptions;
use crate::frame::Kind;
use crate::link::Link;
use crate::link::LinkError;
use crate::message::Interface;
use crate::message::Request;
use crate::modules::Modules;
use crate::network;
use crate::place::DEVICE_STEP;
use crate::place::wait;
use crate::power;
use crate::reaper::Reaper;
use crate::stats;
use rustix::net::SocketFlags;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::time::ClockId;
use rustix::time::Timespec;
use serde_json::json;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;

/// Connections that are served at once.
const MAX_CONNECTIONS: usize = 256;
/// Room for removing directories that are thousands deep; only what is used takes memory.
const STACK_BYTES: usize = 8 << 20;
const NS: i64 = 1_000_000_000;

/// What connections share.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    /// Starts and reaps.
    pub(crate) reaper: Reaper,
    limits: Mutex<Vec<(Resource, Rlimit)>>,
    connections: AtomicUsize,
    /// What the kernel may still need.
    modules: Mutex<Option<Modules>>,
    /// The agent is the guest's first process, rather than one of many under test.
    pub(crate) is_init: bool,
    /// The guest is a container: its end is the agent's.
    pub(crate) is_contained: bool,
}

impl Guest {
    /// As the first process or, under test, as any.
    pub(crate) fn new(is_init: bool) -> Self {
        Self {
            is_init,
            ..Self::default()
        }
    }

    /// As a container's first process.
    pub(crate) fn contained() -> Self {
        Self {
            is_contained: true,
            ..Self::new(true)
        }
    }

    /// Keeps what the kernel may still need.
    pub(crate) fn keep(&self, modules: Modules) {
        let mut kept = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = Some(modules);
    }

    /// Does something with the kernel's modules.
    ///
    /// # Errors
    ///
    /// There are none, or it fails.
    pub(crate) fn with_modules(
        &self,
        act: impl FnOnce(&mut Modules) -> Result<(), AgentError>,
    ) -> Result<(), AgentError> {
        let mut kept = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let modules = kept.as_mut();
        act(modules.ok_or_else(|| AgentError::state("this guest has no kernel of its own"))?)
    }

    /// Limits of every command.
    pub(crate) fn limits(&self) -> Vec<(Resource, Rlimit)> {
        let limits = self.limits.lock();
        limits.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets them.
    pub(crate) fn set_limits(&self, limits: Vec<(Resource, Rlimit)>) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Takes the host's connections for ever, each in a thread of its own.
    pub(crate) fn accept(self: &Arc<Self>, listener: &OwnedFd) {
        loop {
            match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(fd) => self.start(fd),
                // Out of descriptors or memory: others end, then it goes on.
                Err(_) => wait(DEVICE_STEP),
            }
        }
    }

    fn start(self: &Arc<Self>, fd: OwnedFd) {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let guest = Arc::clone(self);
        let thread = thread::Builder::new().stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            guest.serve(Link::new(fd));
            guest.connections.fetch_sub(1, Ordering::Relaxed);
        });
        if started.is_err() {
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Does what the host asks on one connection, until it closes.
    pub(crate) fn serve(&self, mut link: Link) {
        // The host learns of it by the connection's end.
        let _broken = self.serve_requests(&mut link);
    }

    fn serve_requests(&self, link: &mut Link) -> Result<(), LinkError> {
        while let Some(frame) = link.receive()? {
            if frame.kind.is_for_a_command() {
                // Its command has just ended.
                continue;
            }
            if frame.kind != Kind::Request {
                return Err(LinkError::Unexpected(frame.kind));
            }
            let request = serde_json::from_slice(&frame.payload).map_err(|error| {
                ServeError::from(AgentError::config(format!("no request: {error}")))
            });
            match request.and_then(|request| self.handle(link, request)) {
                Ok(()) => {}
                Err(ServeError::Failed(error)) => link.send_json(Kind::Error, &error)?,
                Err(ServeError::Link(error)) => return Err(error),
            }
        }
        Ok(())
    }

    fn handle(&self, link: &mut Link, request: Request) -> Result<(), ServeError> {
        let answer = match request {
            Request::Exec(request) => return exec::run(link, &request, self),
            Request::Read {
                path,
                offset,
                length,
            } => return files::read(link, &path, offset, length),
            Request::Write {
                path,
                mode,
                append,
                user,
            } => {
                let options = WriteOptions {
                    mode,
                    append,
                    user: &user,
                };
                return files::write(link, &path, &options);
            }
            Request::TarOut { path } => return archive::tar_out(link, &path),
            Request::TarIn { path, owner } => return archive::tar_in(link, &path, owner),
            Request::PowerOff { reboot, grace_ms } => {
                power::check(self)?;
                link.send_json(Kind::Answer, &json!({}))?;
                return Ok(power::off(self, reboot, grace_ms)?);
            }
            Request::AddInterface { interface } => self.add_interface(&interface)?,
            other => Self::answer(other)?,
        };
        Ok(link.send_json(Kind::Answer, &answer)?)
    }

    /// Requests of one answer.
    /// Drivers first: a machine that had no card has none of them loaded.
    fn add_interface(&self, interface: &Interface) -> Result<serde_json::Value, AgentError> {
        self.with_modules(|modules| {
            NETWORK_MODULES
                .iter()
                .try_for_each(|name| modules.load(name))
        })?;
        network::find(interface).map(|()| json!({}))
    }

    fn answer(request: Request) -> Result<serde_json::Value, AgentError> {
        match request {
            Request::Stat { path, follow } => value(files::stat(&path, follow)?),
            Request::List { path, skip } => {
                let (entries, count, more) = files::list(&path, skip)?;
                Ok(json!({ "entries": entries, "count": count, "more": more }))
            }
            Request::Mkdir {
                path,
                mode,
                parents,
            } => files::mkdir(&path, mode, parents).map(|()| json!({})),
            Request::Remove { path, recursive } => {
                files::remove(&path, recursive).map(|()| json!({}))
            }
            Request::Rename { source, target } => {
                files::rename(&source, &target).map(|()| json!({}))
            }
            Request::RemoveInterface { mac } => network::let_go(&mac).map(|()| json!({})),
            Request::Stats => value(stats::read()?),
            Request::SyncTime { time_ns } => Ok(json!({ "change_ns": set_clock(time_ns)? })),
            _ => Ok(json!({})),
        }
    }
}

fn value<T: serde::Serialize>(value: T) -> Result<serde_json::Value, AgentError> {
    serde_json::to_value(value).map_err(|error| AgentError::guest(error.to_string()))
}

/// Sets the clock; returns by how many nanoseconds it changed.
///
/// # Errors
///
/// The agent may not, or the time is none.
pub(crate) fn set_clock(time_ns: i64) -> Result<i64, AgentError> {
    let before = rustix::time::clock_gettime(ClockId::Realtime);
    let before = before
        .tv_sec
        .saturating_mul(NS)
        .saturating_add(before.tv_nsec);
    let time = Timespec {
        tv_sec: time_ns.div_euclid(NS),
        tv_nsec: time_ns.rem_euclid(NS),
    };
    rustix::time::clock_settime(ClockId::Realtime, time).tried(|| "cannot set the clock".into())?;
    Ok(time_ns.saturating_sub(before))
}
