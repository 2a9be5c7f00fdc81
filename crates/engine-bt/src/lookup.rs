//! From a guest instruction pointer to translated code.

// UNSAFETY: reads code bytes out of guest memory.
#![expect(unsafe_code, reason = "guest memory is reached by pointer")]

use std::io;
use std::sync::Arc;

use ringfence_engine::EngineError;

use crate::block::PageKey;
use crate::code::Full;
use crate::code_table::map_entry;
use crate::core::Core;
use crate::core::is_canonical;
use crate::dispatch::bug;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::ram::read_raw;
use crate::remote::Remote;
use crate::remote::request;
use crate::translate::PAGE_BYTES;
use crate::translate::TAIL_BYTES;
use crate::translate::is_cut;
use crate::walk::Access;
use crate::window::Table;
use crate::window::page_index;

const PAGE: u64 = 4096;

fn no_table(source: io::Error) -> EngineError {
    EngineError::Host {
        action: "map a part of the code table",
        source,
    }
}

impl Core {
    fn code_table(&self) -> Table {
        if self.is_user() {
            Table::CodeUser
        } else {
            Table::CodeKernel
        }
    }

    /// Host address of the translated code at RIP, translating it first where needed.
    pub(crate) fn lookup(&mut self) -> Result<u64, Stop> {
        let rip = self.rip;
        let linear = self.linear_rip(rip);
        if self.is_64bit() && !is_canonical(linear) {
            return Err(Fault::general(0).into());
        }
        if self.is_user() && linear >> 47 != 0 {
            // User code in the kernel's half (the vsyscall page, if it is executable at all).
            return Ok(self.step_apart());
        }
        if self.windows.admit_mode(self.mode) || self.fast_stale {
            self.refresh_fast_paths();
        }
        if self.is_user() && self.is_direct() {
            // The run loop takes it from here.
            return Ok(0);
        }
        self.set_if_poll();
        let page = linear & !(PAGE - 1);
        let offset = u16::try_from(linear % PAGE).unwrap_or(0);
        let index = page_index(linear);
        let table = self.code_table();
        let entry = self.windows.code(table, index).map_err(no_table)?;
        let map = entry.wrapping_add(page.wrapping_mul(4));
        self.hot_mut().pc_base = page;
        if let Some(body) = self.shared.code.find(map, offset) {
            return Ok(body);
        }
        self.translate_at(linear, index, table)
    }

    /// Makes the run loop execute one instruction by itself.
    fn step_apart(&mut self) -> u64 {
        self.step_once = true;
        0
    }

    fn translate_at(&mut self, linear: u64, index: u64, table: Table) -> Result<u64, Stop> {
        let page = linear & !(PAGE - 1);
        loop {
            let user = self.is_user();
            let found = self
                .paging()
                .translate(&self.shared.ram, linear, Access::Fetch, user, true)
                .map_err(|error| Fault::page(linear, error))?;
            let gpa = found.gpa & !(PAGE - 1);
            let Some(host) = self.shared.ram.host(gpa, PAGE) else {
                return Ok(self.step_apart());
            };
            let key = PageKey {
                gpa,
                mode: self.mode,
            };
            match self.translate_page(key, host, linear, false) {
                Ok(Some(body)) => {
                    let map = self.shared.code.map(key).map_err(|_| self.full())?;
                    self.windows
                        .fill_code(table, index, map_entry(map, page), found.global)
                        .map_err(no_table)?;
                    return Ok(body);
                }
                Ok(None) => {}
                Err(Full) => self.empty_code_cache()?,
            }
        }
    }

    fn full(&self) -> Stop {
        bug("a map that was just made is gone".to_owned())
    }

    /// Finds or translates the block at `linear` of a page; `None` to start over.
    fn translate_page(
        &mut self,
        key: PageKey,
        host: u64,
        linear: u64,
        plain: bool,
    ) -> Result<Option<u64>, Full> {
        let shared = Arc::clone(&self.shared);
        let offset = u16::try_from(linear % PAGE).unwrap_or(0);
        let found = if plain {
            shared.code.find_plain(key, offset)
        } else {
            let map = shared.code.map(key)?;
            shared.code.find(map, offset)
        };
        if found.is_some() {
            return Ok(found);
        }
        let version = shared.code.begin(key)?;
        if shared.pages.mark_code(key.gpa) {
            self.revoke_writes(host);
        }
        let mut page = [0; PAGE_BYTES + TAIL_BYTES];
        // SAFETY: a page of RAM.
        unsafe { read_raw(host, &mut page[..PAGE_BYTES]) };
        let near_end = usize::from(offset) + TAIL_BYTES >= PAGE_BYTES;
        let tail = near_end && self.read_tail(linear, &mut page[PAGE_BYTES..]);
        let page = &page[..if tail { page.len() } else { PAGE_BYTES }];
        if near_end && !tail && is_cut(page, offset, self.mode.bits()) {
            // Its other half may be there next time: such a block would be of no use then.
            return Ok(Some(self.step_apart()));
        }
        let new = self.translate(key, page, offset, plain);
        if self.is_user() {
            self.note_user_translation();
        }
        shared.code.install(key, version, &new, plain)
    }

    /// Reads the first bytes of the page behind that of `linear`; false when user or kernel code,
    /// whichever runs, couldn't run on into it.
    fn read_tail(&self, linear: u64, tail: &mut [u8]) -> bool {
        let next = (linear | (PAGE - 1)).wrapping_add(1);
        if !self.is_64bit() || !is_canonical(next) {
            return false;
        }
        let user = self.is_user();
        let found = self
            .paging()
            .translate(&self.shared.ram, next, Access::Fetch, user, false);
        let host = found.ok().and_then(|found| {
            let len = tail.len() as u64;
            self.shared.ram.host(found.gpa, len)
        });
        let Some(host) = host else {
            return false;
        };
        // SAFETY: bytes of RAM.
        unsafe { read_raw(host, tail) };
        true
    }

    /// The block at RIP, in a page that is mapped and has been translated from, without groups.
    pub(crate) fn lookup_plain(&mut self, key: PageKey) -> Result<u64, Stop> {
        let linear = self.linear_rip(self.rip);
        loop {
            let Some(host) = self.shared.ram.host(key.gpa, PAGE) else {
                return Err(bug(format!("code outside RAM at {:#x}", key.gpa)));
            };
            match self.translate_page(key, host, linear, true) {
                Ok(Some(body)) => return Ok(body),
                Ok(None) => {}
                Err(Full) => {
                    self.empty_code_cache()?;
                    // Nothing leads here any more: the way in is the ordinary one.
                    return self.lookup();
                }
            }
        }
    }

    /// Makes sure that no vCPU can write the page at host address `host` without asking.
    pub(crate) fn revoke_writes(&mut self, host: u64) {
        self.windows.revoke_writes(host);
        self.ask_others(|remote| remote.revoke(host));
    }

    /// Asks every other vCPU for something and waits until those that are running did it. Serves
    /// what they ask of this one meanwhile.
    pub(crate) fn ask_others(&mut self, ask: impl Fn(&Remote) -> u64) {
        let shared = Arc::clone(&self.shared);
        let tickets: Vec<_> = shared
            .remotes()
            .filter(|remote| !Arc::ptr_eq(remote, &self.remote))
            .map(|remote| (remote, ask(remote)))
            .collect();
        for (remote, ticket) in tickets {
            let mut spins = 0_u32;
            while !remote.is_served(ticket) {
                self.serve_awaited();
                spins += 1;
                if spins < 200 {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Serves what other vCPUs may be waiting for.
    pub(crate) fn serve_awaited(&mut self) {
        let (requests, receipt) = self.remote.take_awaited();
        self.serve(requests, receipt);
    }

    /// Serves requests that concern this vCPU's tables. When all code is about to go, comes back
    /// after it went: until then the tables would lead to the old code again.
    pub(crate) fn serve(&mut self, requests: u32, receipt: u64) {
        self.serve_tables(requests, receipt);
        if requests & request::FLUSH_CODE == 0 || self.clearing {
            return;
        }
        while self.shared.code.is_clearing() {
            let (requests, receipt) = self.remote.take_awaited();
            self.serve_tables(requests, receipt);
            std::thread::yield_now();
        }
    }

    fn serve_tables(&mut self, requests: u32, receipt: u64) {
        if requests & request::REVOKE != 0 {
            for host in self.remote.take_revoked() {
                self.windows.revoke_writes(host);
            }
        }
        if requests & request::FLUSH_CODE != 0 {
            self.windows.flush_code();
        }
        if requests & request::FLUSH_WRITES != 0 {
            self.windows.flush_writes();
        }
        self.remote.serve(receipt);
    }

    /// Drops all translated code of the machine. Nothing translated may be used afterwards: the
    /// caller looks RIP up again.
    pub(crate) fn empty_code_cache(&mut self) -> Result<(), Stop> {
        let shared = Arc::clone(&self.shared);
        if !shared.code.begin_clearing() {
            // Another vCPU is at it: serve its request and wait for it.
            while shared.code.is_clearing() {
                self.serve_awaited();
                std::thread::yield_now();
            }
            return Ok(());
        }
        self.clearing = true;
        self.windows.flush_code();
        self.ask_others(|remote| remote.post_awaited(request::FLUSH_CODE));
        shared.code.clear(&shared);
        self.clearing = false;
        self.remote.counters.cleared.bump();
        Ok(())
    }
}
