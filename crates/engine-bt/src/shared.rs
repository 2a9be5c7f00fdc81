//! What the vCPUs of one machine share.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use ringfence_bus::MmioBus;
use ringfence_bus::PioBus;
use ringfence_engine::EngineError;
use ringfence_engine::Unclaimed;
use ringfence_memory::GuestAddress;
use ringfence_memory::WriteWatcher;

use crate::clock::Clock;
use crate::code::CodeCache;
use crate::direct::Patches;
use crate::direct::Spawner;
use crate::gate::Gates;
use crate::host::Host;
use crate::notes::Notes;
use crate::pages::Pages;
use crate::ram::Ram;
use crate::remote::Remote;
use crate::remote::request;

/// One machine.
pub(crate) struct Shared {
    pub ram: Ram,
    pub pio: Arc<PioBus>,
    pub mmio: Arc<MmioBus>,
    pub unclaimed: Unclaimed,
    pub host: Host,
    pub gates: Gates,
    pub code: CodeCache,
    pub pages: Pages,
    pub clock: Clock,
    /// One slot a vCPU, filled as they are made.
    pub remotes: Vec<OnceLock<Arc<Remote>>>,
    /// Serialises accesses that can't be made atomic otherwise: locked ones that cross a page or
    /// go to a page with translated code.
    pub slow_writes: Mutex<()>,
    pub dirty: DirtyLog,
    /// Makes processes for direct execution, where the host has what that needs.
    pub spawner: Option<Mutex<Spawner>>,
    /// Code pages that run there as copies.
    pub patches: Option<Patches>,
    /// Who is told of translations.
    pub notes: Arc<Notes>,
    /// Whether it pays is not asked.
    pub always_direct: bool,
}

/// Pages that vCPUs wrote, while somebody wants to know.
#[derive(Default)]
pub(crate) struct DirtyLog {
    on: AtomicBool,
    /// One bit a RAM page, by [`Ram::page_number`].
    bits: Mutex<Vec<u64>>,
}

impl Shared {
    /// Takes the slow-write lock.
    pub(crate) fn lock_slow_writes(&self) -> std::sync::MutexGuard<'_, ()> {
        self.slow_writes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPUs made so far.
    pub(crate) fn remotes(&self) -> impl Iterator<Item = &Arc<Remote>> {
        self.remotes.iter().filter_map(OnceLock::get)
    }

    /// Whether vCPU writes are logged.
    pub(crate) fn dirty_log_is_on(&self) -> bool {
        self.dirty.on.load(Ordering::SeqCst)
    }

    /// Logs a write to the page at `gpa`.
    pub(crate) fn mark_dirty(&self, gpa: u64) {
        if let Some(page) = self.ram.page_number(gpa) {
            let mut bits = self.lock_dirty();
            if let Some(word) = bits.get_mut(page / 64) {
                *word |= 1 << (page % 64);
            }
        }
    }

    fn lock_dirty(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.dirty
            .bits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts an empty log, or stops it.
    pub(crate) fn set_dirty_log(&self, on: bool) {
        *self.lock_dirty() = if on {
            vec![0; self.ram.pages().div_ceil(64)]
        } else {
            Vec::new()
        };
        self.dirty.on.store(on, Ordering::SeqCst);
        self.forget_writable();
    }

    /// Has every vCPU drop its write entries, so that the next write to each page is noticed.
    fn forget_writable(&self) {
        let tickets: Vec<_> = self
            .remotes()
            .map(|remote| (remote, remote.post_awaited(request::FLUSH_WRITES)))
            .collect();
        for (remote, ticket) in tickets {
            while !remote.is_served(ticket) {
                std::thread::yield_now();
            }
        }
    }

    /// Takes the log of `pages` pages from guest physical `start` on.
    pub(crate) fn take_dirty(&self, start: u64, pages: usize) -> Result<Vec<u64>, EngineError> {
        if !self.dirty_log_is_on() {
            return Err(EngineError::State("the dirty page log is off"));
        }
        if !start.is_multiple_of(4096) {
            return Err(EngineError::Config(format!("{start:#x} is inside a page")));
        }
        // Entries go first: a write after the log was read must be seen next time.
        self.forget_writable();
        let mut taken = vec![0; pages.div_ceil(64)];
        let mut bits = self.lock_dirty();
        for index in 0..pages {
            let gpa = start.wrapping_add(index as u64 * 4096);
            let Some(page) = self.ram.page_number(gpa) else {
                continue;
            };
            let bit = 1 << (page % 64);
            if let Some(word) = bits.get_mut(page / 64)
                && *word & bit != 0
            {
                *word &= !bit;
                taken[index / 64] |= 1 << (index % 64);
            }
        }
        Ok(taken)
    }

    /// All vCPUs' counters, added up, and the sizes of what they share.
    pub(crate) fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut total: Vec<(&'static str, u64)> = Vec::new();
        for remote in self.remotes() {
            for (index, (name, value)) in remote.counters.list().into_iter().enumerate() {
                match total.get_mut(index) {
                    Some((_, sum)) => *sum = sum.wrapping_add(value),
                    None => total.push((name, value)),
                }
            }
        }
        total.push(("code_bytes", self.code.used_bytes()));
        total
    }

    /// Drops the translations and the copy of a page that was written at guest physical `gpa`.
    pub(crate) fn page_written(&self, gpa: u64) {
        self.code.invalidate(self, gpa);
        let page = gpa & !0xfff;
        let patched = self
            .patches
            .as_ref()
            .is_some_and(|patches| patches.forget(page));
        if patched && let Some(host) = self.ram.host(page, 4096) {
            for remote in self.remotes() {
                remote.revoke(host);
            }
        }
    }

    /// Whether a copy of the page at `gpa` runs in its place.
    pub(crate) fn is_patched(&self, gpa: u64) -> bool {
        let page = gpa & !0xfff;
        self.patches
            .as_ref()
            .is_some_and(|patches| patches.has(page))
    }
}

/// Hears of device writes to pages that hold translated code.
pub(crate) struct DeviceWrites(pub std::sync::Weak<Shared>);

impl WriteWatcher for DeviceWrites {
    fn page_written(&self, page: GuestAddress) {
        if let Some(shared) = self.0.upgrade() {
            shared.page_written(page.0);
        }
    }
}
