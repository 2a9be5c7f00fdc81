//! Code tables: from a guest page to the map of its translated code.
//!
//! Entry *n* is `map - 4 * page`, where `map` is an array of 4096 block numbers and `page` the
//! guest page's first address, so that `entry + 4 * target` is the map element of `target`. An
//! indirect transfer computes that without a check, so **every readable entry leads to a map**: a page
//! whose code isn't known leads to the miss map, whose 4096 elements are block 0, the miss stub.
//!
//! That default isn't zero, so the table is inaccessible until a part of it is committed: the
//! first transfer through it faults, and the monitor fills that part with defaults.

// UNSAFETY: protects and writes table memory.
#![expect(
    unsafe_code,
    reason = "the table is a raw mapping that generated code reads"
)]

use std::collections::HashSet;
use std::io;

use crate::mapping::Reservation;
use crate::window::page_address;

/// Entries that are committed together: 16 KiB of table, 8 MiB of guest addresses.
const CHUNK_ENTRIES: u64 = 2048;
const CHUNK_BYTES: u64 = CHUNK_ENTRIES * 8;

pub(crate) struct CodeTable {
    reservation: Reservation,
    entries: u64,
    committed: HashSet<u64>,
    miss_map: u64,
}

impl CodeTable {
    /// A table of `entries` pages that all lead to `miss_map`.
    pub(crate) fn new(entries: u64, miss_map: u64) -> io::Result<Self> {
        Ok(Self {
            reservation: Reservation::new(entries * 8)?,
            entries,
            committed: HashSet::new(),
            miss_map,
        })
    }

    /// Host address of the first entry.
    pub(crate) fn start(&self) -> u64 {
        self.reservation.start()
    }

    /// Host address of entry `index`.
    pub(crate) fn address(&self, index: u64) -> u64 {
        debug_assert!(index < self.entries);
        self.start() + 8 * index
    }

    /// The entry that lies at host address `address`.
    pub(crate) fn index_of(&self, address: u64) -> Option<u64> {
        let index = address.checked_sub(self.start())? / 8;
        (index < self.entries).then_some(index)
    }

    fn default_entry(&self, index: u64) -> u64 {
        map_entry(self.miss_map, page_address(index))
    }

    /// Makes the part around `index` readable.
    pub(crate) fn commit(&mut self, index: u64) -> io::Result<()> {
        let chunk = index / CHUNK_ENTRIES;
        if self.committed.contains(&chunk) {
            return Ok(());
        }
        let first = chunk * CHUNK_ENTRIES;
        self.reservation
            .allow_writes(self.address(first), CHUNK_BYTES)?;
        for index in first..first + CHUNK_ENTRIES {
            self.write(index, self.default_entry(index));
        }
        self.committed.insert(chunk);
        Ok(())
    }

    fn write(&self, index: u64, value: u64) {
        // SAFETY: the index is inside the table and its part is committed (callers check).
        unsafe { (self.address(index) as *mut u64).write(value) };
    }

    /// Puts an entry back to the miss map.
    pub(crate) fn unset(&self, index: u64) {
        if self.committed.contains(&(index / CHUNK_ENTRIES)) {
            self.write(index, self.default_entry(index));
        }
    }

    /// Gives all memory back.
    pub(crate) fn reset(&mut self) {
        self.committed.clear();
        self.reservation.hide();
    }
}

/// The entry for a page at guest address `page` with the given map.
pub(crate) fn map_entry(map: u64, page: u64) -> u64 {
    map.wrapping_sub(page.wrapping_mul(4))
}
