//! What is known of each page of guest RAM: whether code was translated from it.

use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use ringfence_memory::GuestAddress;

use crate::ram::Ram;

/// Code was translated from the page: no write entry may lead to it.
const CODE: u8 = 1;
/// A write entry may have been filled since the page last lost them all.
const WRITABLE: u8 = 2;

/// Slow writes in a row, none of them to code, after which a page counts as data again. Kernels
/// patch their code in many small steps; dropping the mark at each would cost a search each time.
const SLOW_WRITES: u8 = 32;

/// Two bytes a page of RAM.
pub(crate) struct Pages {
    states: Box<[AtomicU8]>,
    slow_writes: Box<[AtomicU8]>,
    ram: Ram,
}

impl Pages {
    pub(crate) fn new(ram: &Ram) -> Self {
        Self {
            states: (0..ram.pages()).map(|_| AtomicU8::new(0)).collect(),
            slow_writes: (0..ram.pages()).map(|_| AtomicU8::new(0)).collect(),
            ram: ram.clone(),
        }
    }

    fn state(&self, gpa: u64) -> Option<&AtomicU8> {
        self.states.get(self.ram.page_number(gpa)?)
    }

    /// Whether code was translated from the page.
    pub(crate) fn is_code(&self, gpa: u64) -> bool {
        self.state(gpa)
            .is_some_and(|state| state.load(Ordering::SeqCst) & CODE != 0)
    }

    /// Counts a write to a page marked as code that hit none; true when it looks like data.
    pub(crate) fn count_slow_write(&self, gpa: u64) -> bool {
        let Some(count) = self
            .ram
            .page_number(gpa)
            .and_then(|page| self.slow_writes.get(page))
        else {
            return false;
        };
        let writes = count.load(Ordering::Relaxed).saturating_add(1);
        count.store(
            if writes >= SLOW_WRITES { 0 } else { writes },
            Ordering::Relaxed,
        );
        writes >= SLOW_WRITES
    }

    /// Notes that a write entry is about to be filled.
    pub(crate) fn note_writable(&self, gpa: u64) {
        if let Some(state) = self.state(gpa)
            && state.load(Ordering::Relaxed) & WRITABLE == 0
        {
            state.fetch_or(WRITABLE, Ordering::SeqCst);
        }
    }

    /// Marks the page as code; true when write entries to it may exist and must be revoked.
    pub(crate) fn mark_code(&self, gpa: u64) -> bool {
        self.watch(gpa, true);
        self.state(gpa).is_some_and(|state| {
            let before = state.fetch_or(CODE, Ordering::SeqCst);
            let writable = before & WRITABLE != 0;
            if writable {
                state.fetch_and(!WRITABLE, Ordering::SeqCst);
            }
            writable
        })
    }

    /// Ends [`Self::mark_code`].
    pub(crate) fn unmark_code(&self, gpa: u64) {
        self.watch(gpa, false);
        if let Some(state) = self.state(gpa) {
            state.fetch_and(!CODE, Ordering::SeqCst);
        }
    }

    /// Has device writes to the page reported.
    fn watch(&self, gpa: u64, on: bool) {
        if let Some((tracker, offset)) = self.ram.owner().tracker(GuestAddress(gpa)) {
            if on {
                tracker.watch(offset);
            } else {
                tracker.unwatch(offset);
            }
        }
    }
}
