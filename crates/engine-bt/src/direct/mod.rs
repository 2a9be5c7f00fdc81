//! Direct execution: hot user code runs on the processor as it is, in a process of its own.
//!
//! Translated code pays for every access to memory. User code that computes for a while is rather
//! given a *space*: a host process whose address space shows the guest's pages where the guest has
//! them, so that the host's own memory management does what the guest's page tables say. The guest's
//! instructions are all unprivileged there; whatever needs the monitor traps, and the monitor
//! goes on from the state that the trap left: system calls, exceptions, pages that aren't shown yet.
//!
//! ```text
//!   vCPU thread                      space: the guest's process          the mapper
//!   commands ───────────────────────────────────────────────────────────► mmap, munmap
//!   registers ─► frame ─► answer ──► sigreturn ─► guest code
//!   wait ◄────────────── notice ◄─── signal handler ◄─ trap, kick
//! ```
//!
//! A space is to its vCPU what a look-aside buffer is: each vCPU has its own, a tag one, and what is
//! invalidated is unmapped before it is entered again. A page that holds translated code is shown
//! without the right to write; of a page of code that might tell of the host ([`scan`]), a copy is shown
//! in which that traps ([`Patches`]).
//!
//! A trap costs some microseconds, so only code that has used its vCPU for some time runs this way,
//! and only while it doesn't trap too often ([`Pace`]). All the rest is translated as ever.

mod clean;
mod filter;
mod maps;
mod pace;
mod patches;
mod run;
mod scan;
mod space;
mod spawner;
mod stub;
mod surroundings;

use std::io;

use clean::Clean;
use maps::Maps;
use pace::Experience;
use pace::Pace;
use space::Space;

pub(crate) use patches::Patches;
pub(crate) use run::Missing;
pub(crate) use space::kill;
pub(crate) use spawner::Spawner;

/// The signal that takes a vCPU out of a space.
pub(crate) const KICK: libc::c_int = libc::SIGUSR1;

/// What a vCPU remembers between visits to spaces.
#[derive(Debug, Default)]
pub(crate) struct Visits {
    /// A page of code that may not run directly: it is translated until it is left. CR3 and page
    /// number.
    held: Option<(u64, u64)>,
    /// How often pages were held since the last interrupt.
    holds: u32,
    /// An access that the guest is asked to make possible.
    missing: Option<Missing>,
    experience: Experience,
    clean: Clean,
}

/// What one window has for direct execution.
#[derive(Debug, Default)]
pub(crate) struct Direct {
    pub(crate) maps: Maps,
    pub(crate) pace: Pace,
    /// Guest physical address of the address space's page tables.
    root: u64,
    space: Option<Box<Space>>,
}

impl Visits {
    /// The current window is for the address space with these page tables.
    pub(crate) fn arrive(&mut self, direct: &mut Direct, root: u64) {
        if direct.root != root {
            direct.root = root;
            direct.pace.end(&mut self.experience);
        }
    }
}

impl Direct {
    /// The space, made when there is none yet, showing what it should.
    fn enter(&mut self, spawner: &Spawner) -> io::Result<&mut Space> {
        if self.space.is_none() {
            self.space = Some(Box::new(Space::new(spawner)?));
        }
        let Some(space) = self.space.as_deref_mut() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let commands = self.maps.take_pending();
        if !commands.is_empty() {
            space.execute(&commands)?;
        }
        Ok(space)
    }

    /// Gives the space up: it is gone, or can't be made.
    fn lose(&mut self) {
        self.space = None;
        self.maps = Maps::default();
        self.pace.give_up();
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "writes guest code")]
mod tests;
