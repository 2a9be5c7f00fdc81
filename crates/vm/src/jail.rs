//! The jail: what the process gives up before a guest runs in it.
//!
//! | layer | what it takes away | when |
//! |---|---|---|
//! | descriptors | everything inherited that the document doesn't name | first |
//! | no new privileges | set-user-ID programs | first |
//! | namespaces | users, processes, mounts, network, IPC, host name | before anything is made |
//! | empty root | every path | with the mount namespace |
//! | capabilities | all, but those for shares that keep host owners | after the namespaces |
//! | Landlock | file access outside the shared directories | when all files are open |
//! | limits | core dumps, message queues, priorities | when all files are open |
//! | system calls | whatever that kind of thread doesn't need | at each thread's start |
//!
//! Each layer stands alone: a host that refuses one (containers refuse namespaces) leaves the
//! others. [`Report`] says which hold, and the machine's owner is told.

mod calls;
mod filter;
mod landlock;
mod limits;
mod namespaces;
mod process;

use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringfence_machine::ThreadKind;
use ringfence_virtio::block::ThreadStart;

use crate::VmError;
use crate::config::Config;
use crate::config::DeviceConfig;
use crate::config::FsSource;
use crate::config::JailConfig;
use crate::config::OwnerIds;
use crate::config::Want;
use crate::log;

pub(crate) use calls::Needs;
pub(crate) use landlock::Reach;

/// Whether a layer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layer {
    /// It holds.
    On,
    /// It doesn't, for this reason.
    Off(String),
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off(why) => write!(f, "off: {why}"),
        }
    }
}

/// The layers, in the order of the table above.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report(Vec<(&'static str, Layer)>);

impl Report {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'static str, &Layer)> {
        self.0.iter().map(|(name, layer)| (*name, layer))
    }

    fn add(&mut self, name: &'static str, layer: Layer) {
        self.0.push((name, layer));
    }

    /// Adds a layer that may be required.
    fn settle(&mut self, name: &'static str, want: Want, layer: Layer) -> Result<(), VmError> {
        if let (Want::Require, Layer::Off(why)) = (want, &layer) {
            return Err(VmError::Jail {
                layer: name,
                why: why.clone(),
            });
        }
        self.add(name, layer);
        Ok(())
    }
}

const BY_CONFIGURATION: &str = "not wanted by the configuration";

/// The jail while it is being built.
#[derive(Debug)]
pub(crate) struct Jail {
    config: JailConfig,
    /// Shares whose files keep their host owners: these need the host's user IDs, and may need
    /// rights over others' files.
    keeps_owners: Option<Access>,
    needs: Needs,
    report: Report,
}

/// What is done with shared files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Jail {
    /// Begins: no new privileges.
    pub(crate) fn begin(config: &Config) -> Result<Self, VmError> {
        rustix::thread::set_no_new_privs(true)
            .map_err(VmError::host("give up gaining privileges"))?;
        let mut report = Report::default();
        report.add("descriptors", Layer::On);
        report.add("no new privileges", Layer::On);
        Ok(Self {
            config: config.jail,
            keeps_owners: keeps_owners(config),
            needs: Needs::of(config),
            report,
        })
    }

    /// Enters namespaces of its own, and an empty root. The process has one thread yet, and has
    /// opened every path that it needs.
    ///
    /// With a process namespace the caller continues in a child process; the parent waits for it
    /// and ends as it ends. Returns the file that tells of this process's memory, which has to be
    /// opened in between.
    pub(crate) fn enter_namespaces(&mut self) -> Result<Option<File>, VmError> {
        let want = self.config.namespaces;
        let memory = if want == Want::Off {
            let off = || Layer::Off(BY_CONFIGURATION.to_owned());
            self.report.add("namespaces", off());
            self.report.add("empty root", off());
            own_memory()
        } else {
            let mut memory = None;
            let entered = namespaces::enter(self.keeps_owners, || memory = own_memory());
            for (name, layer) in entered {
                self.report.settle(name, want, layer)?;
            }
            memory
        };
        let dropped = namespaces::drop_capabilities(self.keeps_owners);
        self.report.add("capabilities", dropped);
        Ok(memory)
    }

    /// The machine has instances of vhost-net: its threads may use those.
    pub(crate) fn allow_vhost(&mut self) {
        self.needs.vhost = true;
    }

    /// Gives up what is not needed any more once everything is open. Threads that start later
    /// are held by it too.
    pub(crate) fn close(&mut self, reach: &[Reach]) -> Result<(), VmError> {
        let landlock = match self.config.landlock {
            Want::Off => Layer::Off(BY_CONFIGURATION.to_owned()),
            _ => landlock::restrict(reach),
        };
        self.report
            .settle("landlock", self.config.landlock, landlock)?;
        let limits = limits::set();
        self.report.add("limits", limits);
        let seccomp = match self.config.seccomp {
            Want::Off => Layer::Off(BY_CONFIGURATION.to_owned()),
            _ => filter::available(),
        };
        self.report
            .settle("system calls", self.config.seccomp, seccomp)
    }

    /// Which layers hold.
    pub(crate) fn report(&self) -> &Report {
        &self.report
    }

    /// Whether threads get filters. A kernel without them fails the first thread, which says so.
    fn filters(&self) -> bool {
        self.config.seccomp != Want::Off
    }

    /// Holds the threads that wait for disks. They start before [`Self::close`], which reaches
    /// only threads that start later.
    pub(crate) fn disk_thread(&self) -> ThreadStart {
        let (config, needs, filters) = (self.config, self.needs, self.filters());
        Arc::new(move || {
            if config.landlock != Want::Off {
                // What it is for holds without: it opens nothing, and may not by its filter.
                let _ = landlock::restrict(&[]);
            }
            if filters && let Err(error) = filter::apply(calls::of_disk(needs)) {
                log::write_line(&format!("cannot jail a disk thread: {error}"));
                std::process::abort();
            }
        })
    }

    /// The filters for the threads of the machine.
    pub(crate) fn thread_filters(&self) -> impl Fn(ThreadKind) -> std::io::Result<()> + use<> {
        let (needs, on) = (self.needs, self.filters());
        move |kind| match on {
            true => filter::apply(calls::of_thread(kind, needs)),
            false => Ok(()),
        }
    }

    /// Holds the calling thread, the one that serves the control socket.
    pub(crate) fn filter_control(&self) -> Result<(), VmError> {
        if self.filters() {
            filter::apply(calls::of_control(self.needs))
                .map_err(VmError::host("filter the control thread's system calls"))?;
        }
        Ok(())
    }
}

/// What tells of this process's memory; without /proc there are no such figures.
fn own_memory() -> Option<File> {
    File::open("/proc/self/status").ok()
}

/// The strongest access to a share that keeps host owners, if there is one.
fn keeps_owners(config: &Config) -> Option<Access> {
    let entries = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Fs(fs) => Some(&fs.entries),
        _ => None,
    });
    entries
        .flatten()
        .filter_map(|entry| match &entry.source {
            FsSource::Fd {
                ids: OwnerIds::Host,
                read_only,
                ..
            } => Some(if *read_only {
                Access::Read
            } else {
                Access::Write
            }),
            _ => None,
        })
        .max()
}

/// A second hold on a share's descriptor, for Landlock's rules.
pub(crate) fn reach_of(fd: &OwnedFd, read_only: bool) -> std::io::Result<Reach> {
    let access = if read_only {
        Access::Read
    } else {
        Access::Write
    };
    Ok(Reach {
        fd: fd.try_clone()?,
        access,
    })
}
