//! Writes to guest code: what they touch, and what is dropped.

use std::sync::atomic::Ordering;

use crate::block::PageKey;
use crate::block::parts;
use crate::code::CodeCache;
use crate::remote::request;
use crate::shared::Shared;

impl CodeCache {
    /// Whether a write of `len` bytes at `gpa` (within a page) touches translated code.
    pub(crate) fn overlaps(&self, gpa: u64, len: usize) -> bool {
        let page = gpa & !0xfff;
        let inner = self.lock();
        let Some(modes) = inner.modes.get(&page) else {
            return false;
        };
        let first = u16::try_from(gpa & 0xfff).unwrap_or(0);
        let written = parts(first, u16::try_from(len).unwrap_or(4096));
        modes.iter().any(|&mode| {
            inner
                .pages
                .get(&PageKey { gpa: page, mode })
                .is_some_and(|page| page.pending > 0 || page.parts & written != 0)
        })
    }

    /// Drops all translations of the page at `gpa`. Other vCPUs are told to look again.
    pub(crate) fn invalidate(&self, shared: &Shared, gpa: u64) {
        let gpa = gpa & !0xfff;
        let mut inner = self.lock();
        let modes = inner.modes.get(&gpa).cloned().unwrap_or_default();
        for mode in modes {
            let mut dropped = Vec::new();
            if let Some(page) = inner.pages.get_mut(&PageKey { gpa, mode }) {
                page.parts = 0;
                page.plain.clear();
                page.version = page.version.wrapping_add(1);
                let map = page.map;
                dropped = std::mem::take(&mut page.blocks)
                    .into_iter()
                    .map(|number| (map, number))
                    .collect();
            }
            for (map, number) in dropped {
                let guest = inner.blocks[number as usize].guest;
                Self::map_element(map, guest).store(0, Ordering::SeqCst);
            }
        }
        // The page stays marked: it will probably be executed, or patched further, soon.
        drop(inner);
        for remote in shared.remotes() {
            remote.post(request::EVENT);
        }
    }

    /// Lets a page be written freely again if no code of it is translated.
    pub(crate) fn release(&self, shared: &Shared, gpa: u64) {
        let gpa = gpa & !0xfff;
        let inner = self.lock();
        let busy = inner.modes.get(&gpa).is_some_and(|modes| {
            modes.iter().any(|&mode| {
                inner
                    .pages
                    .get(&PageKey { gpa, mode })
                    .is_some_and(|page| page.pending > 0 || page.parts != 0)
            })
        });
        // Under the lock: nobody translates or copies the page in between.
        if !busy && !shared.is_patched(gpa) {
            shared.pages.unmark_code(gpa);
        }
    }
}
