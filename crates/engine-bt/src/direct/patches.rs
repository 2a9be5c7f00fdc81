//! Copies of code pages in which what must not run directly traps.
//!
//! A page of code that may hold such an instruction is shown as a copy, with the instruction made
//! undefined; the monitor then executes the true one. A copy is as good as its page is unchanged, so its
//! page counts as code: a write to it comes to the monitor, which forgets the copy and has every vCPU
//! hide it.

// UNSAFETY: writes copies through a mapping.
#![expect(unsafe_code, reason = "a mapping of a file is written by pointer")]

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use crate::mapping::Reservation;
use crate::mapping::memory_file;
use crate::translate::PAGE_BYTES;

/// Most copies: programs have few such pages.
const SLOTS: u64 = 2048;
const SLOT_BYTES: u64 = PAGE_BYTES as u64;

/// The copies of one machine's pages.
pub(crate) struct Patches {
    file: OwnedFd,
    view: Reservation,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By guest physical address.
    copies: HashMap<u64, Patched>,
    free: Vec<u64>,
    /// Free, too, once no vCPU shows them any more.
    retired: Vec<u64>,
    made: u64,
}

struct Patched {
    ticket: Ticket,
    ready: bool,
}

/// The right to make a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    slot: u64,
    number: u64,
}

impl Patches {
    pub(crate) fn new() -> io::Result<Self> {
        let len = SLOTS * SLOT_BYTES;
        let file = memory_file(c"ringfence-bt-patched", len)?;
        let view = Reservation::of_file(&file, len, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(Self {
            file,
            view,
            inner: Mutex::new(Inner {
                free: (0..SLOTS).rev().collect(),
                ..Inner::default()
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of all copies.
    pub(crate) fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Whether the page at `gpa` has a copy or is getting one.
    pub(crate) fn has(&self, gpa: u64) -> bool {
        self.lock().copies.contains_key(&gpa)
    }

    /// Where in the file the copy of the page at `gpa` is.
    pub(crate) fn offset(&self, gpa: u64) -> Option<u64> {
        let inner = self.lock();
        let copy = inner.copies.get(&gpa).filter(|copy| copy.ready)?;
        Some(copy.ticket.slot * SLOT_BYTES)
    }

    /// Begins a copy; nothing when there is one, or no room. The page is read afterwards, and only
    /// once writes to it come to the monitor.
    pub(crate) fn begin(&self, gpa: u64) -> Option<Ticket> {
        let mut inner = self.lock();
        if inner.copies.contains_key(&gpa) {
            return None;
        }
        let slot = inner.free.pop()?;
        inner.made += 1;
        let ticket = Ticket {
            slot,
            number: inner.made,
        };
        let ready = false;
        inner.copies.insert(gpa, Patched { ticket, ready });
        Some(ticket)
    }

    /// Makes the copy, and returns where in the file it is; nothing when the page was written
    /// since [`Self::begin`].
    pub(crate) fn finish(&self, gpa: u64, ticket: Ticket, page: &[u8]) -> Option<u64> {
        assert!(page.len() <= PAGE_BYTES);
        let mut inner = self.lock();
        let copy = inner.copies.get_mut(&gpa)?;
        if copy.ticket != ticket {
            return None;
        }
        let offset = ticket.slot * SLOT_BYTES;
        // SAFETY: a slot of the view. Under the lock its ticket holds, so that it is nobody else's.
        unsafe {
            crate::ram::copy_raw(page.as_ptr() as u64, self.view.start() + offset, page.len());
        }
        copy.ready = true;
        Some(offset)
    }

    /// Forgets the copy of the page at `gpa`; true when there was one, which vCPUs may show.
    pub(crate) fn forget(&self, gpa: u64) -> bool {
        let mut inner = self.lock();
        let Some(copy) = inner.copies.remove(&gpa) else {
            return false;
        };
        inner.retired.push(copy.ticket.slot);
        true
    }

    /// Takes the slots of forgotten copies, when there is no other room.
    pub(crate) fn take_retired(&self) -> Vec<u64> {
        let mut inner = self.lock();
        if inner.free.is_empty() {
            std::mem::take(&mut inner.retired)
        } else {
            Vec::new()
        }
    }

    /// Gives back slots that no vCPU shows any more.
    pub(crate) fn give_back(&self, slots: Vec<u64>) {
        self.lock().free.extend(slots);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_of_a_page_that_was_written_meanwhile_is_none() {
        let patches = Patches::new().expect("a file");
        let ticket = patches.begin(0x5000).expect("room");
        assert!(patches.has(0x5000) && patches.offset(0x5000).is_none());
        assert!(patches.begin(0x5000).is_none());
        assert!(patches.forget(0x5000));
        let second = patches.begin(0x5000).expect("room");
        let first = || {
            let mut byte = [0xee];
            let slot = patches.view.start() + ticket.slot * SLOT_BYTES;
            // SAFETY: a byte of the view.
            unsafe { crate::ram::read_raw(slot, &mut byte) };
            byte[0]
        };
        assert_eq!(patches.finish(0x5000, ticket, &[1; 4096]), None);
        assert_eq!(first(), 0, "a slot that was given up may be another's");
        let offset = patches.finish(0x5000, second, &[2; 4096]);
        assert!(offset.is_some());
        assert_eq!(patches.offset(0x5000), offset);
    }

    #[test]
    fn slots_come_back_when_they_are_given_back() {
        let patches = Patches::new().expect("a file");
        for number in 0..SLOTS {
            assert!(patches.begin(number << 12).is_some());
        }
        assert!(patches.begin(SLOTS << 12).is_none());
        assert!(patches.take_retired().is_empty());
        assert!(patches.forget(0x1000));
        assert!(patches.begin(SLOTS << 12).is_none());
        let retired = patches.take_retired();
        assert_eq!(retired.len(), 1);
        patches.give_back(retired);
        assert!(patches.begin(SLOTS << 12).is_some());
    }
}
