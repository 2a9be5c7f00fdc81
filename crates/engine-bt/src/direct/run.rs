//! A visit to a space, and what becomes of what ended it.

// UNSAFETY: reads code out of guest memory.
#![expect(unsafe_code, reason = "guest memory is reached by pointer")]

use std::io;
use std::sync::PoisonError;

use ringfence_x86::paging::CR4_FSGSBASE;
use ringfence_x86::paging::CR4_TSD;
use ringfence_x86::paging::PTE_ADDR;
use ringfence_x86::paging::PTE_P;
use ringfence_x86::state::CS;
use ringfence_x86::state::DS;
use ringfence_x86::state::ES;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;
use ringfence_x86::state::SS;

use super::maps::Bytes;
use super::maps::EXECUTE;
use super::maps::Enter;
use super::maps::READ;
use super::maps::WRITE;
use super::scan;
use super::scan::Found;
use super::scan::Verdict;
use super::space::Registers;
use super::space::Space;
use super::space::register;
use super::stub;
use crate::clock::tsc;
use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::gate::ARITHMETIC_FLAGS;
use crate::mode::Mode;
use crate::ram::read_raw;
use crate::translate::PAGE_BYTES;
use crate::walk::Access;
use crate::walk::Translation;
use crate::window::page_index;

const PAGE: u64 = 4096;
/// Pages around a missing one that are shown with it.
const AROUND: u64 = 16;
/// Pages of code that may be held between two interrupts: code that goes to and fro between such a
/// page and others is rather translated.
const MOST_HOLDS: u32 = 8;
/// Selectors of user code and its stack, which the host and a Linux guest agree on.
const USER_CODE: u16 = 0x33;
const USER_STACK: u16 = 0x2b;
/// Flags that user code changes by itself.
const USER_FLAGS: u64 = ARITHMETIC_FLAGS | flag::TF | flag::DF | flag::NT | flag::AC | flag::ID;
/// Bits of a page fault's error code.
const ERROR_WRITE: u64 = 1 << 1;
const ERROR_FETCH: u64 = 1 << 4;
const TRAP_DEBUG: u64 = 1;
const TRAP_BREAKPOINT: u64 = 3;
const TRAP_PAGE: u64 = 14;
const DR6_STEP: u64 = 1 << 14;
/// Bytes of SYSCALL and of INT n.
const CALL_BYTES: u64 = 2;

/// An access that a space didn't let pass, to be made possible before the code goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Missing {
    /// The address space.
    cr3: u64,
    address: u64,
    access: Access,
}

/// A page of code and what its neighbours add to it.
struct Code([u8; scan::LEAD + PAGE_BYTES + scan::TAIL]);

impl Default for Code {
    fn default() -> Self {
        Self([0; scan::LEAD + PAGE_BYTES + scan::TAIL])
    }
}

/// Why a visit ended.
struct Ended {
    signal: u64,
    registers: Registers,
    /// Ticks of the time-stamp counter for the guest's code, and for all of the visit.
    inside: u64,
    whole: u64,
}

impl Core {
    /// Whether the code at RIP runs directly now.
    pub(crate) fn is_direct(&self) -> bool {
        self.earns_direct()
            && self.mode == Mode::plain(64, true)
            && self.rip >> 47 == 0
            && self.has(flag::IF)
            && self.direct.holds <= MOST_HOLDS
            && !self.is_held()
            && self.shared.spawner.is_some()
            && self.msrs.tsc_offset == 0
            && self.sys.xcr0 == self.shared.host.guest_xcr0
            && self.sys.cr4 & (CR4_FSGSBASE | CR4_TSD) == CR4_FSGSBASE
            && self.has_flat_selectors()
            && !self.uses_the_stubs_place()
    }

    /// Whether the current address space is one whose code runs directly.
    pub(crate) fn earns_direct(&self) -> bool {
        let pace = &self.windows.direct().pace;
        pace.is_earned() || self.shared.always_direct && !pace.is_given_up()
    }

    /// Whether RIP is in the page that is translated until it is left.
    fn is_held(&self) -> bool {
        self.direct.held == Some((self.sys.cr3, page_index(self.rip)))
    }

    fn has_flat_selectors(&self) -> bool {
        let selector = |index: usize| self.sys.segments[index].selector;
        selector(CS) == USER_CODE
            && selector(SS) == USER_STACK
            && [DS, ES, FS, GS].iter().all(|&index| selector(index) == 0)
    }

    /// Whether the guest has something mapped near the stub.
    fn uses_the_stubs_place(&self) -> bool {
        let entry = (self.sys.cr3 & PTE_ADDR) + 8 * (stub::BASE >> 39 & 0x1ff);
        self.shared
            .ram
            .load64(entry)
            .is_none_or(|entry| entry & PTE_P != 0)
    }

    /// An interrupt found user code at work.
    pub(crate) fn note_user_work(&mut self) {
        self.direct.holds = 0;
        self.windows.direct_mut().pace.note_work();
        self.fast_stale = true;
    }

    /// A block of user code had to be translated.
    pub(crate) fn note_user_translation(&mut self) {
        let pace = &mut self.windows.direct_mut().pace;
        if pace.note_translation(&self.direct.experience) {
            self.fast_stale = true;
        }
    }

    /// Runs user code in its space until something needs the monitor.
    pub(crate) fn run_direct(&mut self) -> Result<(), Stop> {
        if let Some(missing) = self.direct.missing.take()
            && missing.cr3 == self.sys.cr3
        {
            self.show_if_used(page_index(missing.address), missing.access, Enter::Now);
        }
        match self.visit() {
            Ok(Some(ended)) => {
                let fills = self.remote.counters.direct_fills.get();
                let result = self.after_visit(&ended);
                let filled = self.remote.counters.direct_fills.get() != fills;
                self.judge(&ended, filled);
                result
            }
            Ok(None) => Ok(()),
            Err(_) => {
                // Whatever happened to the space, translation needs none.
                self.remote.counters.direct_lost.bump();
                self.windows.direct_mut().lose();
                self.fast_stale = true;
                Ok(())
            }
        }
    }

    fn visit(&mut self) -> io::Result<Option<Ended>> {
        let shared = std::sync::Arc::clone(&self.shared);
        let Some(spawner) = &shared.spawner else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let direct = self.windows.direct_mut();
        direct.enter(&spawner.lock().unwrap_or_else(PoisonError::into_inner))?;
        let Some(mut space) = direct.space.take() else {
            return Ok(None);
        };
        self.save_fpu();
        self.give_registers(&mut space);
        self.remote.set_process(space.process());
        let result = if self.remote.has_requests() {
            Ok(None)
        } else {
            let start = tsc();
            let signal = space.run();
            let whole = tsc().wrapping_sub(start);
            let inside = space.ticks_inside();
            self.remote.counters.direct_visits.bump();
            self.remote.counters.direct_ticks.add(whole);
            signal.map(|signal| Some((signal, inside, whole)))
        };
        self.remote.set_process(-1);
        let ended = match result {
            Ok(Some((signal, inside, whole))) => {
                let registers = self.take_registers(&space);
                Ok(Some(Ended {
                    signal,
                    registers,
                    inside,
                    whole,
                }))
            }
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        self.load_fpu();
        let direct = self.windows.direct_mut();
        direct.space = Some(space);
        ended
    }

    /// Takes a visit into account.
    fn judge(&mut self, ended: &Ended, filled: bool) {
        let pace = &mut self.windows.direct_mut().pace;
        let experience = &mut self.direct.experience;
        if pace.note_visit(experience, ended.inside, ended.whole, filled) {
            self.fast_stale = true;
        }
    }

    fn give_registers(&self, space: &mut Space) {
        let mut registers: Registers = Default::default();
        for (number, &place) in register::GENERAL.iter().enumerate() {
            registers[place] = self.gpr(number);
        }
        registers[register::RIP] = self.rip;
        // The host's own interrupts stay on whatever the guest's flag says.
        registers[register::FLAGS] = self.rflags() & USER_FLAGS | flag::IF | flag::ONE;
        space.set_registers(&registers);
        let len = self.shared.host.xsave_len;
        space.set_vectors(&self.xsave.0[..len]);
        space.set_bases(self.segment_base(FS), self.segment_base(GS));
    }

    fn take_registers(&mut self, space: &Space) -> Registers {
        let registers = space.registers();
        for (number, &place) in register::GENERAL.iter().enumerate() {
            self.set_gpr(number, registers[place]);
        }
        self.rip = registers[register::RIP];
        let kept = self.rflags() & !USER_FLAGS;
        let flags = registers[register::FLAGS] & USER_FLAGS | kept;
        if flags != self.rflags() {
            self.set_rflags(flags);
        }
        let len = self.shared.host.xsave_len;
        space.vectors(&mut self.xsave.0[..len]);
        self.xsave.sanitize(self.shared.host.guest_xcr0);
        self.take_selectors(space.selectors());
        let (fs, gs) = space.bases();
        let hot = self.hot_mut();
        hot.seg_base[FS] = fs;
        hot.seg_base[GS] = gs;
        registers
    }

    /// Loads what code has loaded into DS, ES, FS and GS, which didn't trap.
    fn take_selectors(&mut self, selectors: [u16; 4]) {
        for (index, selector) in [DS, ES, FS, GS].into_iter().zip(selectors) {
            if selector == 0 {
                continue;
            }
            if self.load_segment(index, selector).is_ok() {
                self.fast_stale = true;
            } else {
                // The host's table has what the guest's may not: such a one stays null. Nor is
                // anybody asked for a table that lies in a device.
                self.replay.waiting = None;
            }
        }
    }

    /// Does what the trap asks for. The number of the signal and the registers are the guest's word:
    /// they can only lead to what the guest could do anyhow.
    fn after_visit(&mut self, ended: &Ended) -> Result<(), Stop> {
        let signal = i32::try_from(ended.signal).unwrap_or(0);
        match signal {
            super::KICK => {
                self.remote.counters.direct_kicks.bump();
                Ok(())
            }
            libc::SIGSYS => {
                self.remote.counters.direct_calls.bump();
                self.rip = self.rip.wrapping_sub(CALL_BYTES);
                self.step()
            }
            libc::SIGSEGV if ended.registers[register::TRAP] == TRAP_PAGE => {
                self.after_page_fault(&ended.registers)
            }
            libc::SIGTRAP if ended.registers[register::TRAP] == TRAP_BREAKPOINT => {
                self.rip = self.rip.wrapping_sub(1);
                self.step()
            }
            libc::SIGTRAP if ended.registers[register::TRAP] == TRAP_DEBUG => {
                self.sys.dr6 |= DR6_STEP;
                Err(Fault::bare(vector::DEBUG).into())
            }
            _ => {
                self.remote.counters.direct_traps.bump();
                self.step()
            }
        }
    }

    fn after_page_fault(&mut self, registers: &Registers) -> Result<(), Stop> {
        let address = registers[register::FAULT_ADDRESS];
        let error = registers[register::ERROR];
        let access = if error & ERROR_FETCH != 0 {
            Access::Fetch
        } else if error & ERROR_WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        };
        if address >> 47 != 0 || access == Access::Write && self.is_near_code(address) {
            return self.step();
        }
        match self.show(address, access) {
            Ok(true) => {
                self.remote.counters.direct_fills.bump();
                Ok(())
            }
            Ok(false) if access == Access::Fetch => {
                self.hold(page_index(address));
                Ok(())
            }
            Ok(false) => self.step(),
            Err(fault) => {
                self.remote.counters.direct_faults.bump();
                self.direct.missing = Some(Missing {
                    cr3: self.sys.cr3,
                    address,
                    access,
                });
                Err(fault.into())
            }
        }
    }

    /// Whether an instruction at RIP may reach into the page of `address`. No page is shown to write
    /// and to execute at once, so that an instruction that writes over its own page would ask for
    /// one and the other in turn.
    fn is_near_code(&self, address: u64) -> bool {
        let last = self.rip.wrapping_add(scan::TAIL as u64);
        [self.rip, last]
            .map(page_index)
            .contains(&page_index(address))
    }

    /// Has a page of code translated until it is left, which happens by way of the monitor: no other
    /// page's translations are known to the code table.
    fn hold(&mut self, page: u64) {
        self.direct.held = Some((self.sys.cr3, page));
        self.direct.holds += 1;
        self.remote.counters.direct_holds.bump();
        self.windows.forget_user_code();
        self.fast_stale = true;
    }

    /// Makes an access possible in the space, and what lies around it. False when it isn't to be:
    /// what lies there is a device's, holds translated code or is sensitive, or it was possible
    /// already.
    fn show(&mut self, address: u64, access: Access) -> Result<bool, Fault> {
        let found = self
            .paging()
            .translate(&self.shared.ram, address, access, true, true)
            .map_err(|error| Fault::page(address, error))?;
        let page = page_index(address);
        let direct = self.windows.direct_mut();
        if direct.maps.allows(page, access) {
            return Ok(false);
        }
        if direct.maps.is_full() {
            direct.maps.clear();
        }
        if !self.show_page(page, &found, access, Enter::Now) {
            return Ok(false);
        }
        let quiet = if access == Access::Fetch {
            Access::Fetch
        } else {
            Access::Read
        };
        let first = page & !(AROUND - 1);
        for near in (first..first + AROUND).filter(|&near| near != page) {
            if !self.windows.direct().maps.has(near) {
                self.show_if_used(near, quiet, Enter::OnUse);
            }
        }
        Ok(true)
    }

    /// Shows a page that the guest's tables say has been accessed; they aren't touched.
    fn show_if_used(&mut self, page: u64, access: Access, enter: Enter) {
        let translated =
            self.paging()
                .translate(&self.shared.ram, page * PAGE, access, true, false);
        if let Ok(found) = translated
            && found.accessed
            && (access != Access::Write || found.dirty)
        {
            self.show_page(page, &found, access, enter);
        }
    }

    fn show_page(&mut self, page: u64, found: &Translation, access: Access, enter: Enter) -> bool {
        let gpa = found.gpa & !(PAGE - 1);
        let shared = std::sync::Arc::clone(&self.shared);
        let (Some(host), Some(offset)) = (shared.ram.host(gpa, PAGE), shared.ram.file_offset(gpa))
        else {
            return false;
        };
        let mut protection = READ;
        let mut bytes = Bytes::Ram(offset);
        if access == Access::Fetch {
            let Some(code) = self.code_to_run(page, gpa, host, bytes, found.may_write) else {
                return false;
            };
            bytes = code;
            protection |= EXECUTE;
        } else if found.writable {
            shared.pages.note_writable(gpa);
            if !shared.pages.is_code(gpa) {
                if shared.dirty_log_is_on() {
                    shared.mark_dirty(gpa);
                }
                protection |= WRITE;
            }
        }
        if access == Access::Write && protection & WRITE == 0 {
            return false;
        }
        self.windows
            .direct_mut()
            .maps
            .show(page, host, bytes, protection, enter);
        true
    }

    /// What is shown of a page of code: itself, or a copy; nothing if neither may run.
    fn code_to_run(
        &mut self,
        page: u64,
        gpa: u64,
        host: u64,
        itself: Bytes,
        writable: bool,
    ) -> Option<Bytes> {
        let shared = std::sync::Arc::clone(&self.shared);
        let patches = shared.patches.as_ref()?;
        let there = patches.offset(gpa).map(Bytes::Patched);
        if there.is_some() && !writable {
            return there;
        }
        let mut code = Code::default();
        match self.search(page, host, &mut code)?.verdict(writable) {
            Verdict::Itself => return Some(itself),
            Verdict::Not => return None,
            Verdict::Copy if there.is_some() => return there,
            Verdict::Copy => {}
        }
        let retired = patches.take_retired();
        if !retired.is_empty() {
            self.revoke_writes(host);
            patches.give_back(retired);
        }
        let mut was_writable = false;
        let ticket = shared.code.exclusively(|| {
            let ticket = patches.begin(gpa)?;
            was_writable = shared.pages.mark_code(gpa);
            Some(ticket)
        })?;
        if was_writable {
            self.revoke_writes(host);
        }
        let found = self
            .search(page, host, &mut code)
            .filter(|found| found.verdict(writable) != Verdict::Not);
        let Some(Found { places, .. }) = found else {
            patches.forget(gpa);
            return None;
        };
        let copy = &mut code.0[scan::LEAD..scan::LEAD + PAGE_BYTES];
        for place in places {
            copy[place] = scan::UNDEFINED;
        }
        let offset = patches.finish(gpa, ticket, copy)?;
        Some(Bytes::Patched(offset))
    }

    /// Reads a page of code and what its neighbours add to it, and searches it; nothing when what
    /// begins on the page before may have to trap.
    fn search(&mut self, page: u64, host: u64, code: &mut Code) -> Option<Found> {
        const START: usize = scan::LEAD;
        const END: usize = scan::LEAD + PAGE_BYTES;
        // SAFETY: a page of RAM.
        unsafe { read_raw(host, &mut code.0[START..END]) };
        let behind = self.read_code((page + 1) * PAGE, &mut code.0[END..]);
        let before = (page * PAGE).wrapping_sub(scan::LEAD as u64);
        let before = self.read_code(before, &mut code.0[..START]);
        let first = if before { 0 } else { START };
        let end = if behind { code.0.len() } else { END };
        let digest = self.direct.clean.digest(&code.0[first..end], START - first);
        if self.direct.clean.has(digest) {
            return Some(Found::default());
        }
        let mut among_data = false;
        if before {
            // The page before may have been shown when this one was another.
            let seam = START - scan::TAIL..START;
            let found = scan::search(&code.0[..START + scan::TAIL], seam);
            let reaches = |&place: &usize| place + 2 >= scan::TAIL;
            if found.unclear || found.places.iter().any(reaches) {
                return None;
            }
            among_data = found.among_data;
        }
        let mut found = scan::search(&code.0[first..end], START - first..END - first);
        found.among_data |= among_data;
        if found.is_nothing() {
            self.direct.clean.add(digest);
        }
        Some(found)
    }

    /// Reads code of one page where user code could run it.
    fn read_code(&self, address: u64, code: &mut [u8]) -> bool {
        let found = self
            .paging()
            .translate(&self.shared.ram, address, Access::Fetch, true, false);
        let host = found
            .ok()
            .and_then(|found| self.shared.ram.host(found.gpa, code.len() as u64));
        let Some(host) = host else {
            return false;
        };
        // SAFETY: bytes of RAM.
        unsafe { read_raw(host, code) };
        true
    }
}
