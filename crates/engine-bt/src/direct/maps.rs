//! What a space shows: which guest pages are mapped in it, and what the mapper has yet to do.
//!
//! A space is a translation look-aside buffer that the host's processor walks for us: what the guest
//! invalidates must be gone before its code runs again. So every change is a command, and all
//! commands are executed before the space is entered.

use std::collections::BTreeMap;
use std::collections::HashMap;

use super::space::Command;
use super::space::unmap;
use super::spawner::MEMORY_FD;
use super::spawner::PATCHES_FD;
use super::stub;
use crate::walk::Access;

const PAGE: u64 = 4096;
/// Mappings that a space may have. The kernel allows a process 65,530 by default.
const MOST_PAGES: usize = 48 << 10;
/// Shared, at a fixed place.
const FLAGS: u64 = 0x11;
const POPULATE: u64 = 0x8000;

pub(crate) const READ: u8 = 1;
pub(crate) const WRITE: u8 = 2;
pub(crate) const EXECUTE: u8 = 4;

/// When a page is entered in the host's page table. That costs as much as mapping it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Enter {
    /// It is about to be used.
    Now,
    /// It may be used.
    OnUse,
}

/// Where a page's bytes are, by the mapper's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bytes {
    /// In the machine's RAM, at this offset in its file.
    Ram(u64),
    /// In the file of patched pages.
    Patched(u64),
}

/// A guest page in a space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// Host address of its RAM in this process.
    host: u64,
    protection: u8,
    /// Whether it is in [`Maps::tied`].
    tied: bool,
}

/// A space's pages.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    /// By guest virtual page number.
    pages: BTreeMap<u64, Page>,
    /// Writable and patched pages by the host address of their RAM: those that code in it makes stale,
    /// and those that a write to it does.
    tied: HashMap<u64, Vec<u64>>,
    pending: Vec<Command>,
}

impl Maps {
    /// Whether the page lets such an access pass.
    pub(crate) fn allows(&self, page: u64, access: Access) -> bool {
        let wanted = match access {
            Access::Read => READ,
            Access::Write => WRITE,
            Access::Fetch => EXECUTE,
        };
        self.pages
            .get(&page)
            .is_some_and(|found| found.protection & wanted != 0)
    }

    /// Whether the page is mapped at all.
    pub(crate) fn has(&self, page: u64) -> bool {
        self.pages.contains_key(&page)
    }

    /// Whether a further page has a place.
    pub(crate) fn is_full(&self) -> bool {
        self.pages.len() >= MOST_PAGES
    }

    /// Shows guest page `page`, whose RAM is at `host` here.
    pub(crate) fn show(
        &mut self,
        page: u64,
        host: u64,
        bytes: Bytes,
        protection: u8,
        enter: Enter,
    ) {
        let flags = match enter {
            Enter::Now => FLAGS | POPULATE,
            Enter::OnUse => FLAGS,
        };
        let (file, offset) = match bytes {
            Bytes::Ram(offset) => (MEMORY_FD, offset),
            Bytes::Patched(offset) => (PATCHES_FD, offset),
        };
        let file = u64::from(file.cast_unsigned());
        self.forget(page);
        let tied = protection & WRITE != 0 || matches!(bytes, Bytes::Patched(_));
        self.pages.insert(
            page,
            Page {
                host,
                protection,
                tied,
            },
        );
        if tied {
            self.tied.entry(host).or_default().push(page);
        }
        let address = page * PAGE;
        if let Some(last) = self.pending.last_mut() {
            let [number, start, len, before, how, of, end] = *last;
            let follows = number == libc::SYS_mmap.cast_unsigned()
                && start + len == address
                && (of, end + len) == (file, offset)
                && (before, how) == (u64::from(protection), flags);
            if follows {
                last[2] += PAGE;
                return;
            }
        }
        self.pending.push([
            libc::SYS_mmap.cast_unsigned(),
            address,
            PAGE,
            protection.into(),
            flags,
            file,
            offset,
        ]);
    }

    /// Hides a page.
    pub(crate) fn hide(&mut self, page: u64) {
        if self.forget(page) {
            self.pending.push(unmap(page * PAGE, PAGE));
        }
    }

    /// Hides `count` pages from `first` on.
    pub(crate) fn hide_range(&mut self, first: u64, count: u64) {
        let found: Vec<_> = self
            .pages
            .range(first..first + count)
            .map(|(&page, _)| page)
            .collect();
        for page in found {
            self.hide(page);
        }
    }

    /// Hides everything.
    pub(crate) fn clear(&mut self) {
        if self.pages.is_empty() && self.pending.is_empty() {
            return;
        }
        self.pages.clear();
        self.tied.clear();
        self.pending.clear();
        self.pending.push(unmap(0, stub::BASE));
        self.pending
            .push(unmap(stub::END, stub::TASK_END - stub::END));
    }

    /// Hides the pages that show the RAM at `host` to write, or a copy of it. Returns whether there
    /// were any.
    pub(crate) fn revoke(&mut self, host: u64) -> bool {
        let Some(pages) = self.tied.remove(&host) else {
            return false;
        };
        for page in pages {
            self.hide_stale(page, host);
        }
        true
    }

    fn hide_stale(&mut self, page: u64, host: u64) {
        if self
            .pages
            .get(&page)
            .is_some_and(|found| found.host == host)
        {
            self.pages.remove(&page);
            self.pending.push(unmap(page * PAGE, PAGE));
        }
    }

    /// What the mapper has to do now.
    pub(crate) fn take_pending(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.pending)
    }

    fn forget(&mut self, page: u64) -> bool {
        let Some(found) = self.pages.remove(&page) else {
            return false;
        };
        if found.tied
            && let Some(pages) = self.tied.get_mut(&found.host)
        {
            pages.retain(|&known| known != page);
            if pages.is_empty() {
                self.tied.remove(&found.host);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_mapped_by_one_call() {
        let mut maps = Maps::default();
        maps.show(0x400, 0x7000_0000, Bytes::Ram(0x1000), READ, Enter::Now);
        maps.show(0x401, 0x7000_1000, Bytes::Ram(0x2000), READ, Enter::Now);
        maps.show(
            0x402,
            0x7000_2000,
            Bytes::Ram(0x3000),
            READ | WRITE,
            Enter::Now,
        );
        maps.show(
            0x403,
            0x7000_9000,
            Bytes::Ram(0xa000),
            READ | WRITE,
            Enter::Now,
        );
        let lengths: Vec<_> = maps
            .take_pending()
            .iter()
            .map(|command| command[2])
            .collect();
        assert_eq!(lengths, [2 * PAGE, PAGE, PAGE]);
    }

    #[test]
    fn a_hidden_page_is_unmapped_once() {
        let mut maps = Maps::default();
        maps.show(0x400, 0x7000_0000, Bytes::Ram(0), READ, Enter::Now);
        maps.take_pending();
        maps.hide(0x400);
        maps.hide(0x400);
        assert_eq!(maps.take_pending(), [unmap(0x40_0000, PAGE)]);
        assert!(!maps.allows(0x400, Access::Read));
    }

    #[test]
    fn revoking_finds_every_page_that_shows_the_ram() {
        let mut maps = Maps::default();
        maps.show(1, 0x7000_0000, Bytes::Ram(0), READ | WRITE, Enter::Now);
        maps.show(9, 0x7000_0000, Bytes::Ram(0), READ | WRITE, Enter::Now);
        maps.show(5, 0x7000_0000, Bytes::Ram(0), READ, Enter::Now);
        maps.show(
            6,
            0x7000_0000,
            Bytes::Patched(0),
            READ | EXECUTE,
            Enter::Now,
        );
        assert!(maps.revoke(0x7000_0000));
        assert!(!maps.has(1) && !maps.has(9) && !maps.has(6) && maps.has(5));
        assert!(!maps.revoke(0x7000_0000));
    }

    #[test]
    fn clearing_forgets_what_was_to_be_mapped() {
        let mut maps = Maps::default();
        maps.show(1, 0x7000_0000, Bytes::Ram(0), READ, Enter::Now);
        maps.clear();
        let pending = maps.take_pending();
        assert!(
            pending
                .iter()
                .all(|command| command[0] == libc::SYS_munmap.cast_unsigned())
        );
        maps.clear();
        assert!(maps.take_pending().is_empty());
    }
}
