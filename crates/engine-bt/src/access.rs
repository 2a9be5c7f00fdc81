//! The monitor's own accesses to guest memory, and the filling of the windows.

// UNSAFETY: copies to and from guest RAM.
#![expect(unsafe_code, reason = "guest memory is reached by pointer")]

use ringfence_x86::paging::CR0_PG;
use ringfence_x86::paging::CR0_WP;

use crate::core::Core;
use crate::core::is_canonical;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::ram::read_raw;
use crate::ram::write_raw;
use crate::walk::Access;
use crate::walk::Translation;
use crate::window::REGION_PAGES;
use crate::window::Table;
use crate::window::page_index;

const PAGE: u64 = 4096;
const REGION_BYTES: u64 = REGION_PAGES * PAGE;

/// Where the bytes of a page lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In RAM: guest physical and host address.
    Ram { gpa: u64, host: u64 },
    /// In a device, at a guest physical address.
    Device(u64),
}

/// A virtual access of at most two pages, translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub first: Place,
    /// Bytes in the first page.
    pub first_len: usize,
    pub second: Option<Place>,
}

impl Core {
    /// Translates one byte's page for the monitor or a memory site, filling the window.
    pub(crate) fn locate(
        &mut self,
        address: u64,
        access: Access,
        user: bool,
    ) -> Result<Place, Fault> {
        if self.is_64bit() && !is_canonical(address) {
            return Err(Fault::general(0));
        }
        if let Some(place) = self.held(address, access, user) {
            self.remote.counters.hits.bump();
            return Ok(place);
        }
        let found = self
            .paging()
            .translate(&self.shared.ram, address, access, user, true)
            .map_err(|error| Fault::page(address, error))?;
        self.remote.counters.fills.bump();
        let Some(host) = self.shared.ram.host(found.gpa & !(PAGE - 1), PAGE) else {
            return Ok(Place::Device(found.gpa));
        };
        if access != Access::Fetch {
            self.fill(address, host, &found, user);
        }
        Ok(Place::Ram {
            gpa: found.gpa,
            host: host + found.gpa % PAGE,
        })
    }

    /// What the window says of a page, as a processor asks its TLB before it walks the tables.
    fn held(&self, address: u64, access: Access, user: bool) -> Option<Place> {
        let lower = address >> 47 == 0;
        if user && (!lower || self.windows.is_polluted()) {
            return None;
        }
        let table = match access {
            Access::Read => Table::Read,
            Access::Write => Table::Write,
            Access::Fetch => return None,
        };
        let addend = self.windows.get(table, page_index(address));
        if addend == 0 {
            return None;
        }
        let host = addend.wrapping_add(address);
        let gpa = self.shared.ram.guest(host)?;
        Some(Place::Ram { gpa, host })
    }

    /// Enters a translated page in the current window.
    fn fill(&mut self, address: u64, host: u64, found: &Translation, user: bool) {
        let index = page_index(address);
        // Entries of the user half serve user code too.
        let lower = address >> 47 == 0;
        if lower && !found.user {
            // A processor's own access on behalf of user code (to a descriptor, say).
            if self.cpl == 3 {
                return;
            }
            self.windows.pollute();
            self.hot_mut().fast_sysret = 0;
        }
        // With write protection off, the kernel may write pages that user code may not.
        let protected = self.sys.cr0 & (CR0_WP | CR0_PG) == CR0_PG;
        let writable = found.writable && (user || !protected);
        if found.page_bytes >= REGION_BYTES && self.fill_region(address, found, writable) {
            return;
        }
        let page = address & !(PAGE - 1);
        let addend = host.wrapping_sub(page);
        self.windows.fill(Table::Read, index, addend, found.global);
        if writable {
            let gpa = found.gpa & !(PAGE - 1);
            self.shared.pages.note_writable(gpa);
            if !self.shared.pages.is_code(gpa) {
                self.log_dirty(gpa);
                self.windows.fill(Table::Write, index, addend, found.global);
            }
        }
    }

    /// Fills a whole 2 MiB region of a large page when it is RAM throughout.
    fn fill_region(&mut self, address: u64, found: &Translation, writable: bool) -> bool {
        let start = found.gpa & !(REGION_BYTES - 1);
        let Some(host) = self.shared.ram.host(start, REGION_BYTES) else {
            return false;
        };
        if self.shared.dirty_log_is_on() {
            return false;
        }
        let index = page_index(address);
        if self.windows.has_region(index, found.global, writable) {
            // Only this page's write entry can be missing: it held code when the region was filled.
            return false;
        }
        let addend = host.wrapping_sub(address & !(REGION_BYTES - 1));
        let shared = std::sync::Arc::clone(&self.shared);
        let may_write = |page: u64| {
            let gpa = start + page * PAGE;
            shared.pages.note_writable(gpa);
            !shared.pages.is_code(gpa)
        };
        let writable: Option<&dyn Fn(u64) -> bool> = writable.then_some(&may_write);
        self.windows
            .fill_region(index, addend, found.global, writable);
        true
    }

    fn log_dirty(&self, gpa: u64) {
        if self.shared.dirty_log_is_on() {
            self.shared.mark_dirty(gpa);
        }
    }

    /// Translates `len` bytes at `address` (at most two pages).
    pub(crate) fn span(
        &mut self,
        address: u64,
        len: usize,
        access: Access,
        user: bool,
    ) -> Result<Span, Fault> {
        let room = usize::try_from(PAGE - address % PAGE).unwrap_or(0);
        let first = self.locate(address, access, user)?;
        if len <= room {
            return Ok(Span {
                first,
                first_len: len,
                second: None,
            });
        }
        let next = self.wrap_address(address.wrapping_add(room as u64));
        let second = self.locate(next, access, user)?;
        Ok(Span {
            first,
            first_len: room,
            second: Some(second),
        })
    }

    fn wrap_address(&self, address: u64) -> u64 {
        if self.is_64bit() {
            address
        } else {
            address & 0xffff_ffff
        }
    }

    /// Reads through a translated span.
    pub(crate) fn read_span(&mut self, span: &Span, data: &mut [u8]) -> Result<(), Stop> {
        let (head, tail) = data.split_at_mut(span.first_len.min(data.len()));
        self.read_place(span.first, head)?;
        if let Some(second) = span.second {
            self.read_place(second, tail)?;
        }
        Ok(())
    }

    fn read_place(&mut self, place: Place, data: &mut [u8]) -> Result<(), Stop> {
        match place {
            Place::Ram { host, .. } => {
                // SAFETY: a span's places are RAM for as many bytes as lie in their page.
                unsafe { read_raw(host, data) };
                Ok(())
            }
            Place::Device(gpa) => self.read_device(gpa, data),
        }
    }

    /// Writes through a translated span. Translated code that is hit is dropped.
    pub(crate) fn write_span(&mut self, span: &Span, data: &[u8]) -> Result<(), Stop> {
        let (head, tail) = data.split_at(span.first_len.min(data.len()));
        self.write_place(span.first, head)?;
        if let Some(second) = span.second {
            self.write_place(second, tail)?;
        }
        Ok(())
    }

    fn write_place(&mut self, place: Place, data: &[u8]) -> Result<(), Stop> {
        match place {
            Place::Ram { gpa, host } => {
                // SAFETY: as for reading.
                unsafe { write_raw(host, data) };
                self.wrote_ram(gpa, data.len());
                Ok(())
            }
            Place::Device(gpa) => self.write_device(gpa, data),
        }
    }

    /// Host address of a byte that the current window leads to already.
    pub(crate) fn known_host(&self, address: u64, access: Access, user: bool) -> Option<u64> {
        // Only the user half is open to user code.
        if user && address >> 47 != 0 {
            return None;
        }
        if self.is_64bit() && !is_canonical(address) {
            return None;
        }
        let table = match access {
            Access::Write => Table::Write,
            _ => Table::Read,
        };
        match self.windows.get(table, page_index(address)) {
            0 => None,
            addend => Some(addend.wrapping_add(address)),
        }
    }

    /// What follows a write to RAM by the monitor.
    pub(crate) fn wrote_ram(&mut self, gpa: u64, len: usize) {
        let (mut gpa, mut len) = (gpa, len);
        while len > 0 {
            let room = usize::try_from(PAGE - gpa % PAGE).unwrap_or(1);
            let part = len.min(room);
            self.log_dirty(gpa & !(PAGE - 1));
            self.after_write(gpa, part);
            gpa += part as u64;
            len -= part;
        }
    }

    /// Drops translations that a write to RAM has made stale.
    pub(crate) fn after_write(&mut self, gpa: u64, len: usize) {
        if !self.shared.pages.is_code(gpa) {
            return;
        }
        if self.shared.code.overlaps(gpa, len) || self.shared.is_patched(gpa) {
            self.remote.counters.invalidated.bump();
            self.shared.page_written(gpa);
        } else if self.shared.pages.count_slow_write(gpa) {
            self.shared.code.release(&self.shared, gpa);
        }
    }

    /// Reads guest virtual memory.
    pub(crate) fn read_virtual(
        &mut self,
        address: u64,
        data: &mut [u8],
        user: bool,
    ) -> Result<(), Stop> {
        let span = self.span(address, data.len(), Access::Read, user)?;
        self.read_span(&span, data)
    }

    /// Writes guest virtual memory: all of it or, with a fault, nothing.
    pub(crate) fn write_virtual(
        &mut self,
        address: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Stop> {
        let span = self.span(address, data.len(), Access::Write, user)?;
        self.write_span(&span, data)
    }

    /// Reads a little-endian number of 1 to 8 bytes.
    pub(crate) fn read_number(
        &mut self,
        address: u64,
        bytes: usize,
        user: bool,
    ) -> Result<u64, Stop> {
        let mut data = [0; 8];
        self.read_virtual(address, &mut data[..bytes], user)?;
        Ok(u64::from_le_bytes(data))
    }

    /// Writes a little-endian number of 1 to 8 bytes.
    pub(crate) fn write_number(
        &mut self,
        address: u64,
        value: u64,
        bytes: usize,
        user: bool,
    ) -> Result<(), Stop> {
        self.write_virtual(address, &value.to_le_bytes()[..bytes], user)
    }

    /// Reads instruction bytes at a linear address: as many as can be fetched, at least one.
    pub(crate) fn fetch(&mut self, address: u64, data: &mut [u8; 15]) -> Result<usize, Stop> {
        let user = self.is_user();
        let room = usize::try_from(PAGE - address % PAGE).unwrap_or(0).min(15);
        let first = self.locate(address, Access::Fetch, user)?;
        self.read_place(first, &mut data[..room])?;
        if room == 15 {
            return Ok(15);
        }
        let next = self.wrap_address(address.wrapping_add(room as u64));
        // Only an instruction that really continues there faults there.
        match self.locate(next, Access::Fetch, user) {
            Ok(second) => {
                self.read_place(second, &mut data[room..])?;
                Ok(15)
            }
            Err(_) => Ok(room),
        }
    }
}
