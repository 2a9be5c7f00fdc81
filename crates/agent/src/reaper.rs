//! Takes the exit status of every child: of commands, and of orphans that became the agent's own.

use rustix::event::EventfdFlags;
use rustix::event::eventfd;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::process::WaitId;
use rustix::process::WaitIdOptions;
use rustix::process::WaitOptions;
use rustix::process::WaitStatus;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::time::Duration;

/// A started command.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its process, which leads a session of its own.
    pub(crate) pid: Pid,
    ended: Arc<Ended>,
}

#[derive(Debug)]
struct Ended {
    event: OwnedFd,
    status: OnceLock<WaitStatus>,
}

impl Child {
    /// Readable when the command has ended.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.ended.event.as_fd()
    }

    /// How it ended, once it has.
    pub(crate) fn status(&self) -> Option<WaitStatus> {
        self.ended.status.get().copied()
    }
}

#[derive(Debug, Default)]
struct Children {
    commands: HashMap<i32, Arc<Ended>>,
    /// Whether the kernel said that there is no child at all.
    none: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    // Held while a command is started: its end must not be taken before it is known, nor that of a
    // process whose exec failed, which the standard library waits for itself.
    children: Mutex<Children>,
    changed: Condvar,
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Children> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a command.
    ///
    /// # Errors
    ///
    /// It can't be started: the error is that of exec when that failed.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let event = eventfd(0, EventfdFlags::CLOEXEC)?;
        let ended = Arc::new(Ended {
            event,
            status: OnceLock::new(),
        });
        let mut children = self.lock();
        let process = command.spawn()?;
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("the kernel gave no process number"))?;
        children
            .commands
            .insert(pid.as_raw_nonzero().get(), Arc::clone(&ended));
        children.none = false;
        drop(children);
        self.changed.notify_all();
        Ok(Child { pid, ended })
    }

    /// Takes exit statuses for ever.
    pub(crate) fn run(&self) {
        loop {
            // Waits without taking, so that nobody's end is taken outside the lock.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let waited = rustix::process::waitid(WaitId::All, options);
            let mut children = self.lock();
            let alone = matches!(waited, Err(Errno::CHILD));
            if alone && Self::take(&mut children) == Err(Errno::CHILD) {
                children.none = true;
                self.changed.notify_all();
                let wait = self.changed.wait_while(children, |children| children.none);
                drop(wait.unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            let _no_more = Self::take(&mut children);
        }
    }

    fn take(children: &mut Children) -> rustix::io::Result<()> {
        while let Some((pid, status)) = rustix::process::wait(WaitOptions::NOHANG)? {
            if let Some(ended) = children.commands.remove(&pid.as_raw_nonzero().get()) {
                let _first = ended.status.set(status);
                let _wakes = rustix::io::write(&ended.event, &1_u64.to_ne_bytes());
            }
        }
        Ok(())
    }

    /// Waits until no process is left below the agent; returns whether that is so.
    pub(crate) fn wait_none(&self, timeout: Duration) -> bool {
        let children = self.lock();
        let waited = self
            .changed
            .wait_timeout_while(children, timeout, |children| !children.none);
        let (children, _) = waited.unwrap_or_else(PoisonError::into_inner);
        children.none
    }
}
