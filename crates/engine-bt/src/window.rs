//! Windows: linear tables, one set an address space, that turn guest virtual pages into host
//! addresses without a tag or a hash.
//!
//! A window is a stretch of host address space around the host's GS base:
//!
//! ```text
//!            writes (512 GiB)              │         reads (512 GiB)
//!   … kernel half │ user half │    gap   [Hot]  blocks …  gap  │ user half │ kernel half …
//!                             ▲            ▲GS base            ▲
//!                     entry of page n at                 entry of page n at
//!                     WRITES - 8·(n+1)                   READS + 8·n
//! ```
//!
//! Entry *n* is 0, or what must be added to a guest address in page *n* (bits 47:12) to get the
//! host address of the same byte. Page numbers come out of PEXT with a constant mask, so an index
//! can't leave its table; an entry that isn't 0 leads to a page of guest RAM. That is what holds
//! generated code inside guest memory, by construction.
//!
//! The tables are sparse mappings of one memfd a vCPU, so that the kernel half and [`Hot`] appear in
//! every window while each window has its own user half. Every window also has a code table for
//! user mode, and the vCPU one for kernel mode; see [`crate::pages`] for what those entries mean.

// UNSAFETY: maps the tables and writes their entries by pointer.
#![expect(
    unsafe_code,
    reason = "the tables are raw mappings that generated code reads"
)]

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use crate::code_table::CodeTable;
use crate::direct::Direct;
use crate::hot::Hot;
use crate::mapping::Reservation;
use crate::mapping::memory_file;
use crate::mode::Mode;

/// Guest pages that one half (user or kernel) of the address space has: 2^47 / 4096.
const HALF_PAGES: u64 = 1 << 35;
const HALF_BYTES: u64 = HALF_PAGES * 8;
/// Distance from GS to either table; what lies between is [`Hot`] and the block table.
const GAP_DISPLACEMENT: i32 = 64 << 20;
const GAP: u64 = GAP_DISPLACEMENT.unsigned_abs() as u64;
/// GS-relative place of the block table.
pub(crate) const BLOCKS: i32 = 1 << 20;
/// Bytes of the block table.
pub(crate) const BLOCKS_BYTES: usize = 16 << 20;
/// GS-relative displacement of the read table.
pub(crate) const READS: i32 = GAP_DISPLACEMENT;
/// GS-relative displacement of the write table, for indices that were complemented.
pub(crate) const WRITES: i32 = -GAP_DISPLACEMENT;

const WINDOW_BYTES: u64 = 2 * GAP + 4 * HALF_BYTES;
const PAGE: u64 = 4096;
const HOT_BYTES: u64 = size_of::<Hot>() as u64;
/// Region of 512 pages: what one page of table entries covers, and one 2 MiB guest page.
pub(crate) const REGION_PAGES: u64 = 512;
/// Table pages that may be touched before the memory behind them is given back. A guest that
/// strides through its address space would otherwise grow the tables without end.
const TOUCHED_LIMIT: usize = 8192;

/// PEXT masks that take the page number out of an address.
pub(crate) const MASK_USER: u64 = (1 << 47) - PAGE;
/// As [`MASK_USER`], with the kernel half.
pub(crate) const MASK_KERNEL: u64 = (1 << 48) - PAGE;

/// Page number of an address, as the tables count: bits 47:12.
pub(crate) fn page_index(address: u64) -> u64 {
    (address & MASK_KERNEL) >> 12
}

/// First address of page `index` (canonical).
pub(crate) fn page_address(index: u64) -> u64 {
    (index << 28).cast_signed().wrapping_shr(16).cast_unsigned()
}

fn is_user(index: u64) -> bool {
    index < HALF_PAGES
}

/// Which table an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    Read,
    Write,
    CodeUser,
    CodeKernel,
}

/// A region that was filled as a whole.
#[derive(Clone, Copy)]
struct Region {
    addend: u64,
    writable: bool,
}

/// Entries that were filled, so that a flush needn't look at the rest.
#[derive(Default)]
struct Log {
    entries: Vec<(Table, u64)>,
    /// Regions filled as a whole.
    regions: HashMap<u64, Region>,
    last_region: u64,
    touched: usize,
}

impl Log {
    fn push(&mut self, table: Table, index: u64) {
        let region = index / REGION_PAGES;
        if region != self.last_region {
            self.last_region = region;
            self.touched += 1;
        }
        self.entries.push((table, index));
    }

    fn is_large(&self) -> bool {
        self.touched > TOUCHED_LIMIT || self.entries.len() > 16 * TOUCHED_LIMIT
    }
}

struct Window {
    reservation: Reservation,
    code: CodeTable,
    log: Log,
    tag: Option<u64>,
    used: u64,
    /// Mode of the maps in the code table.
    mode: Option<Mode>,
    direct: Direct,
}

impl Window {
    fn gs_base(&self) -> u64 {
        self.reservation.start() + 2 * HALF_BYTES + GAP
    }
}

/// All the windows of one vCPU.
pub(crate) struct Windows {
    file: OwnedFd,
    slots: Vec<Window>,
    code_kernel: CodeTable,
    kernel_mode: Option<Mode>,
    current: usize,
    clock: u64,
    global: Log,
    /// Kernel-half entries that aren't global, and kernel code in the user half: they belong to
    /// the current CR3 only.
    local: Log,
    hot: NonNull<Hot>,
    /// Supervisor-only pages of the user half were filled for kernel code: user code must not run
    /// before they are gone.
    polluted: bool,
}

// SAFETY: the pointers lead into mappings that this value owns.
unsafe impl Send for Windows {}

impl Windows {
    /// Reserves `slots` windows that share `blocks`, the machine's block table, and whose code
    /// tables lead to `miss_map` by default.
    pub(crate) fn new(slots: usize, blocks: &OwnedFd, miss_map: u64) -> io::Result<Self> {
        let slots_u64 = slots as u64;
        let shared = HOT_BYTES + 2 * HALF_BYTES;
        let file = memory_file(c"ringfence-bt-tables", shared + slots_u64 * 2 * HALF_BYTES)?;
        let mut windows = Vec::with_capacity(slots);
        for slot in 0..slots_u64 {
            let reservation = Reservation::new(WINDOW_BYTES)?;
            let gs = reservation.start() + 2 * HALF_BYTES + GAP;
            let fd = file.as_raw_fd();
            let own = shared + slot * 2 * HALF_BYTES;
            reservation.map_file(gs, HOT_BYTES, fd, 0)?;
            reservation.map_file(gs + GAP, HALF_BYTES, fd, own)?;
            reservation.map_file(gs + GAP + HALF_BYTES, HALF_BYTES, fd, HOT_BYTES)?;
            reservation.map_file(gs - GAP - HALF_BYTES, HALF_BYTES, fd, own + HALF_BYTES)?;
            reservation.map_file(
                gs - GAP - 2 * HALF_BYTES,
                HALF_BYTES,
                fd,
                HOT_BYTES + HALF_BYTES,
            )?;
            reservation.map_file(
                gs + u64::from(BLOCKS.unsigned_abs()),
                BLOCKS_BYTES as u64,
                blocks.as_raw_fd(),
                0,
            )?;
            windows.push(Window {
                reservation,
                code: CodeTable::new(HALF_PAGES, miss_map)?,
                log: Log::default(),
                tag: None,
                used: 0,
                mode: None,
                direct: Direct::default(),
            });
        }
        let hot = NonNull::new(windows[0].gs_base() as *mut Hot)
            .ok_or_else(|| io::Error::other("the window lies at address 0"))?;
        Ok(Self {
            file,
            slots: windows,
            code_kernel: CodeTable::new(2 * HALF_PAGES, miss_map)?,
            kernel_mode: None,
            current: 0,
            clock: 0,
            global: Log::default(),
            local: Log::default(),
            hot,
            polluted: false,
        })
    }

    /// Maps the shared state once more, over the start of `reservation`.
    pub(crate) fn map_hot(&self, reservation: &Reservation) -> io::Result<()> {
        reservation.map_file(reservation.start(), HOT_BYTES, self.file.as_raw_fd(), 0)
    }

    /// The shared state, through the first window's mapping (every window shows the same page).
    pub(crate) fn hot(&self) -> NonNull<Hot> {
        self.hot
    }

    /// GS base of the current window.
    pub(crate) fn gs_base(&self) -> u64 {
        self.slots[self.current].gs_base()
    }

    /// Code table of the current window, for user mode.
    pub(crate) fn code_user(&self) -> u64 {
        self.slots[self.current].code.start()
    }

    /// Code table for kernel mode.
    pub(crate) fn code_kernel(&self) -> u64 {
        self.code_kernel.start()
    }

    /// Makes the window tagged `tag` current; an unknown tag takes the window that was unused for
    /// longest and starts empty.
    pub(crate) fn select(&mut self, tag: u64) {
        self.enter_user();
        self.clock += 1;
        let slot = match self.slots.iter().position(|slot| slot.tag == Some(tag)) {
            Some(slot) => slot,
            None => {
                let slot = self.oldest();
                self.flush_slot(slot);
                self.slots[slot].tag = Some(tag);
                slot
            }
        };
        self.slots[slot].used = self.clock;
        self.current = slot;
    }

    fn oldest(&self) -> usize {
        (0..self.slots.len())
            .min_by_key(|&slot| (self.slots[slot].tag.is_some(), self.slots[slot].used))
            .unwrap_or(0)
    }

    fn entry(&self, slot: usize, table: Table, index: u64) -> *mut u64 {
        let gs = self.slots[slot].gs_base();
        let address = match table {
            Table::Read => gs + GAP + 8 * index,
            Table::Write => gs - GAP - 8 - 8 * index,
            Table::CodeUser => self.slots[slot].code.address(index % HALF_PAGES),
            Table::CodeKernel => self.code_kernel.address(index),
        };
        address as *mut u64
    }

    fn commit_code(&mut self, table: Table, index: u64) -> io::Result<()> {
        match table {
            Table::CodeUser => self.slots[self.current].code.commit(index),
            _ => self.code_kernel.commit(index),
        }
    }

    /// The code map that the current window holds for a page, as the tables store it.
    pub(crate) fn code(&mut self, table: Table, index: u64) -> io::Result<u64> {
        self.commit_code(table, index)?;
        Ok(self.get(table, index))
    }

    /// Fills one entry of a current code table, whose part may have been given back meanwhile.
    pub(crate) fn fill_code(
        &mut self,
        table: Table,
        index: u64,
        map: u64,
        global: bool,
    ) -> io::Result<()> {
        self.commit_code(table, index)?;
        self.fill(table, index, map, global);
        Ok(())
    }

    /// Makes the part of a code table that holds host address `address` usable; false when the
    /// address isn't in a code table.
    pub(crate) fn commit_code_at(&mut self, address: u64) -> io::Result<bool> {
        let current = self.current;
        for table in [&mut self.slots[current].code, &mut self.code_kernel] {
            if let Some(index) = table.index_of(address) {
                table.commit(index)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What the current window holds for a page.
    pub(crate) fn get(&self, table: Table, index: u64) -> u64 {
        // SAFETY: indices are below 2 · HALF_PAGES, so the entry lies in this value's mappings.
        unsafe { self.entry(self.current, table, index).read() }
    }

    fn set(&mut self, slot: usize, table: Table, index: u64, value: u64) {
        // SAFETY: as in `get`.
        unsafe { self.entry(slot, table, index).write(value) }
    }

    /// Puts an entry back to its default.
    fn unset(&mut self, slot: usize, table: Table, index: u64) {
        match table {
            Table::Read | Table::Write => self.set(slot, table, index, 0),
            Table::CodeUser => self.slots[slot].code.unset(index),
            Table::CodeKernel => self.code_kernel.unset(index),
        }
    }

    fn log_of(&mut self, table: Table, index: u64, global: bool) -> &mut Log {
        if is_user(index) && table != Table::CodeKernel {
            &mut self.slots[self.current].log
        } else if global {
            &mut self.global
        } else {
            &mut self.local
        }
    }

    /// Fills one entry of the current window. `global`: the guest's page-table entry has G set.
    pub(crate) fn fill(&mut self, table: Table, index: u64, value: u64, global: bool) {
        if self.get(table, index) == value {
            return;
        }
        self.set(self.current, table, index, value);
        self.log_of(table, index, global).push(table, index);
    }

    /// Whether the region of `index` is filled as a whole, for writing too if `writable`.
    pub(crate) fn has_region(&mut self, index: u64, global: bool, writable: bool) -> bool {
        let log = self.log_of(Table::Read, index, global);
        log.regions
            .get(&(index / REGION_PAGES))
            .is_some_and(|region| region.writable || !writable)
    }

    /// Fills the 2 MiB region of `index` for reading, and those of its pages for writing that
    /// `writable` names.
    pub(crate) fn fill_region(
        &mut self,
        index: u64,
        addend: u64,
        global: bool,
        writable: Option<&dyn Fn(u64) -> bool>,
    ) {
        let region = index / REGION_PAGES;
        let first = region * REGION_PAGES;
        for page in 0..REGION_PAGES {
            self.set(self.current, Table::Read, first + page, addend);
            let write = if writable.is_some_and(|may| may(page)) {
                addend
            } else {
                0
            };
            self.set(self.current, Table::Write, first + page, write);
        }
        let log = self.log_of(Table::Read, index, global);
        log.touched += 2;
        log.regions.insert(
            region,
            Region {
                addend,
                writable: writable.is_some(),
            },
        );
    }

    /// Notes that the user half holds entries that user code may not use.
    pub(crate) fn pollute(&mut self) {
        self.polluted = true;
    }

    /// Called before user code runs and before the window changes: drops what [`Self::pollute`]
    /// announced.
    pub(crate) fn enter_user(&mut self) {
        if self.polluted {
            self.flush_slot(self.current);
            self.polluted = false;
        }
    }

    fn clear(&mut self, slot: usize, log: &mut Log) {
        for (table, index) in log.entries.drain(..) {
            self.unset(slot, table, index);
        }
        for (region, _) in log.regions.drain() {
            self.clear_region(slot, region);
        }
        log.entries.shrink_to(4096);
        log.last_region = 0;
        // `touched` stays: the table pages are still there.
    }

    fn clear_region(&mut self, slot: usize, region: u64) {
        for index in region * REGION_PAGES..(region + 1) * REGION_PAGES {
            self.set(slot, Table::Read, index, 0);
            self.set(slot, Table::Write, index, 0);
        }
    }

    /// What the current window has for direct execution.
    pub(crate) fn direct(&self) -> &Direct {
        &self.slots[self.current].direct
    }

    /// As [`Self::direct`], to change it.
    pub(crate) fn direct_mut(&mut self) -> &mut Direct {
        &mut self.slots[self.current].direct
    }

    fn flush_slot(&mut self, slot: usize) {
        self.slots[slot].direct.maps.clear();
        let mut log = std::mem::take(&mut self.slots[slot].log);
        if log.is_large() {
            let gs = self.slots[slot].gs_base();
            self.slots[slot].reservation.discard(gs + GAP, HALF_BYTES);
            self.slots[slot]
                .reservation
                .discard(gs - GAP - HALF_BYTES, HALF_BYTES);
            self.slots[slot].code.reset();
            log = Log::default();
        } else {
            self.clear(slot, &mut log);
        }
        self.slots[slot].log = log;
    }

    /// Drops the user half of the window tagged `tag` (INVPCID type 1).
    pub(crate) fn flush_tag(&mut self, tag: u64) {
        if let Some(slot) = self.slots.iter().position(|slot| slot.tag == Some(tag)) {
            self.flush_slot(slot);
        }
    }

    /// Drops what isn't global and belongs to the current address space (MOV to CR3).
    pub(crate) fn flush_current(&mut self) {
        self.flush_slot(self.current);
        self.flush_local();
    }

    /// Drops kernel-half entries that aren't global (any change of address space).
    pub(crate) fn flush_local(&mut self) {
        let mut log = std::mem::take(&mut self.local);
        self.clear(self.current, &mut log);
        self.local = log;
    }

    /// Drops every entry of every window that isn't global.
    pub(crate) fn flush_all_users(&mut self) {
        for slot in 0..self.slots.len() {
            self.flush_slot(slot);
        }
        self.flush_local();
    }

    /// Drops everything.
    pub(crate) fn flush_everything(&mut self) {
        self.flush_all_users();
        let mut log = std::mem::take(&mut self.global);
        if log.is_large() {
            // The kernel half is one piece of the file, shown in every window.
            let gs = self.slots[0].gs_base();
            let window = &self.slots[0].reservation;
            window.discard(gs + GAP + HALF_BYTES, HALF_BYTES);
            window.discard(gs - GAP - 2 * HALF_BYTES, HALF_BYTES);
            self.code_kernel.reset();
            log = Log::default();
        } else {
            self.clear(0, &mut log);
        }
        self.global = log;
    }

    /// The mode whose maps the current code table of user or kernel mode holds.
    pub(crate) fn code_mode(&self, user: bool) -> Option<Mode> {
        if user {
            self.slots[self.current].mode
        } else {
            self.kernel_mode
        }
    }

    /// Makes the current code table one for `mode`: entries of another mode are dropped. Returns
    /// whether it was another.
    pub(crate) fn admit_mode(&mut self, mode: Mode) -> bool {
        let user = mode.is_user();
        if self.code_mode(user) == Some(mode) {
            return false;
        }
        let current = self.current;
        if user {
            let window = &mut self.slots[current];
            window.mode = Some(mode);
            forget_code(&mut window.log, Table::CodeUser, &window.code);
        } else {
            self.kernel_mode = Some(mode);
            forget_code(&mut self.global, Table::CodeKernel, &self.code_kernel);
            forget_code(&mut self.local, Table::CodeKernel, &self.code_kernel);
        }
        true
    }

    /// Drops what the current window's code table knows of user code.
    pub(crate) fn forget_user_code(&mut self) {
        let window = &mut self.slots[self.current];
        forget_code(&mut window.log, Table::CodeUser, &window.code);
    }

    /// Whether [`Self::pollute`] is in force.
    pub(crate) fn is_polluted(&self) -> bool {
        self.polluted
    }

    /// Drops every code entry: all translated code is about to go.
    pub(crate) fn flush_code(&mut self) {
        for slot in &mut self.slots {
            slot.code.reset();
        }
        self.code_kernel.reset();
    }

    /// Drops every write entry: from here on each page's first write is noticed again.
    pub(crate) fn flush_writes(&mut self) {
        self.flush_everything();
    }

    /// Drops one page of the current address space, global or not (INVLPG). A page inside a
    /// region that was filled as a whole takes the region with it: the guest's page is that large.
    pub(crate) fn flush_page(&mut self, address: u64) {
        let index = page_index(address);
        let slot = self.current;
        self.flush_page_in(slot, index);
    }

    /// As [`Self::flush_page`] for the window tagged `tag` (INVPCID type 0).
    pub(crate) fn flush_page_of(&mut self, tag: u64, address: u64) {
        if let Some(slot) = self.slots.iter().position(|slot| slot.tag == Some(tag)) {
            self.flush_page_in(slot, page_index(address));
        }
    }

    fn flush_page_in(&mut self, slot: usize, index: u64) {
        for table in [Table::Read, Table::Write, Table::CodeKernel] {
            self.unset(slot, table, index);
        }
        if is_user(index) {
            self.unset(slot, Table::CodeUser, index);
        }
        let region = index / REGION_PAGES;
        if is_user(index) {
            self.slots[slot].direct.maps.hide(index);
        }
        let large = if is_user(index) {
            self.slots[slot].log.regions.remove(&region).is_some()
        } else {
            // Not short-circuited: both logs may know the region.
            self.global.regions.remove(&region).is_some()
                | self.local.regions.remove(&region).is_some()
        };
        if large {
            self.clear_region(slot, region);
            let first = region * REGION_PAGES;
            self.slots[slot].direct.maps.hide_range(first, REGION_PAGES);
        }
    }

    /// Drops every write entry that leads to the host page at `host`: its code is about to be
    /// translated. Returns whether there was one.
    pub(crate) fn revoke_writes(&mut self, host: u64) -> bool {
        let mut found = Vec::new();
        for (slot, window) in self.slots.iter().enumerate() {
            self.find_writes(slot, &window.log, host, &mut found);
        }
        self.find_writes(0, &self.global, host, &mut found);
        self.find_writes(0, &self.local, host, &mut found);
        for &(slot, index) in &found {
            self.set(slot, Table::Write, index, 0);
        }
        let mut any = !found.is_empty();
        for window in &mut self.slots {
            any |= window.direct.maps.revoke(host);
        }
        any
    }

    /// An entry of any window.
    fn entry_of(&self, slot: usize, table: Table, index: u64) -> u64 {
        // SAFETY: logged indices and those of `page_index` are valid.
        unsafe { self.entry(slot, table, index).read() }
    }

    fn find_writes(&self, slot: usize, log: &Log, host: u64, found: &mut Vec<(usize, u64)>) {
        for &(table, index) in &log.entries {
            if table == Table::Write
                && self.entry_of(slot, table, index) == host.wrapping_sub(page_address(index))
            {
                found.push((slot, index));
            }
        }
        for (&region, &Region { addend, .. }) in &log.regions {
            let index = page_index(host.wrapping_sub(addend));
            if index / REGION_PAGES == region && self.entry_of(slot, Table::Write, index) == addend
            {
                found.push((slot, index));
            }
        }
    }
}

/// Puts the logged entries of a code table back to their default.
fn forget_code(log: &mut Log, table: Table, code: &CodeTable) {
    log.entries.retain(|&(of, index)| {
        if of == table {
            code.unset(index);
        }
        of != table
    });
}

#[cfg(test)]
mod tests;
