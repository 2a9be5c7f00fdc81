//! What generated code asks of the monitor.
//!
//! Every gate ends here with the guest's registers saved. The answer is the host address to go on
//! at, or 0 to return from [`crate::gate::Enter`] to whoever entered.

// UNSAFETY: turns the gate's pointer back into the vCPU.
#![expect(unsafe_code, reason = "the gates pass the vCPU as a raw pointer")]

use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;

use ringfence_engine::EngineError;
use ringfence_engine::panic_message;
use ringfence_x86::state::Activity;

use crate::access::Place;
use crate::block::Block;
use crate::block::Site;
use crate::block::SiteKind;
use crate::core::Core;
use crate::core::flag;
use crate::core::is_canonical;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::hot::Gate;
use crate::translate::emit::BORROWED_SLOT;
use crate::translate::plan::MAX_BORROWED;
use crate::walk::Access;
use crate::window::Table;
use crate::window::page_index;

/// Return from the entry.
const LEAVE: u64 = 0;

/// An engine bug: what happened can't happen.
pub(crate) fn bug(text: String) -> Stop {
    Stop::Error(EngineError::Internal(text))
}

/// Called by the gates; see the module.
///
/// # Safety
/// `core` is the vCPU that was entered, and nobody else uses it.
pub(crate) unsafe extern "C" fn dispatch(core: *mut Core, gate: u32) -> u64 {
    // SAFETY: the caller's promise; the entry gave up its own use of the vCPU until it returns.
    let core = unsafe { &mut *core };
    // A panic must not cross generated code: it has no unwind tables.
    let answer = catch_unwind(AssertUnwindSafe(|| core.answer(gate)));
    let pc = answer.unwrap_or_else(|panic| {
        core.leaving = Some(Err(EngineError::Internal(format!(
            "the monitor panicked while serving translated code: {}",
            panic_message(&*panic)
        ))));
        LEAVE
    });
    core.sync_gs();
    pc
}

impl Core {
    fn answer(&mut self, gate: u32) -> u64 {
        const MEMORY: u32 = Gate::Memory as u32;
        const STEP: u32 = Gate::Step as u32;
        const LINK: u32 = Gate::Link as u32;
        const MISS: u32 = Gate::Miss as u32;
        const HOST_FAULT: u32 = Gate::HostFault as u32;
        const CROSSING: u32 = Gate::Crossing as u32;
        self.apply_transition();
        let outcome = match gate {
            MEMORY => self.on_memory(),
            STEP => self.on_step(),
            LINK => self.on_link(),
            MISS => self.on_miss(),
            HOST_FAULT => self.on_host_fault(),
            CROSSING => self.on_crossing(),
            _ => Ok(LEAVE),
        };
        match outcome {
            Ok(pc) => pc,
            Err(stop) => self.settle(stop),
        }
    }

    /// Raises a fault and goes on in its handler, or leaves.
    fn settle(&mut self, stop: Stop) -> u64 {
        let mut stop = stop;
        loop {
            match stop {
                Stop::Fault(fault) => match self.raise(fault) {
                    Ok(()) => match self.go_on() {
                        Ok(pc) => return pc,
                        Err(next) => stop = next,
                    },
                    Err(next) => stop = next,
                },
                Stop::Exit(exit) => {
                    self.leaving = Some(Ok(exit));
                    return LEAVE;
                }
                Stop::Error(error) => {
                    self.leaving = Some(Err(error));
                    return LEAVE;
                }
            }
        }
    }

    /// Sets RIP to the guest instruction that a place in a page's code stands for.
    fn set_rip_in_page(&mut self, offset: u16) {
        self.rip = self.wrap_rip(self.hot().pc_base.wrapping_add(u64::from(offset)));
    }

    fn site_argument(&self) -> Result<(Block, Site), Stop> {
        let number = self.hot().t1;
        u32::try_from(number)
            .ok()
            .and_then(|number| self.shared.code.site(number))
            .ok_or_else(|| bug(format!("no site {number:#x}")))
    }

    /// Takes the guest's own values of borrowed registers back; returns what they held.
    fn take_back(&mut self, site: &Site, count: usize) -> [u64; MAX_BORROWED] {
        let mut pointers = [0; MAX_BORROWED];
        for (pointer, held) in pointers.iter_mut().zip(site.held).take(count) {
            if let Some((register, slot)) = held {
                let register = usize::from(register);
                *pointer = self.gpr(register);
                let value = self.hot().spill[BORROWED_SLOT + usize::from(slot)];
                self.set_gpr(register, value);
            }
        }
        pointers
    }

    /// Undoes [`Self::take_back`], to go on in the block.
    fn lend(&mut self, site: &Site, pointers: &[u64; MAX_BORROWED]) {
        for (&pointer, held) in pointers
            .iter()
            .zip(site.held)
            .take(site.held_at_start.into())
        {
            if let Some((register, _)) = held {
                self.set_gpr(usize::from(register), pointer);
            }
        }
    }

    /// A memory site that missed.
    fn on_memory(&mut self) -> Result<u64, Stop> {
        let (block, site) = self.site_argument()?;
        self.remote.counters.slow_memory.bump();
        self.set_rip_in_page(site.guest);
        let SiteKind::Memory { bytes, write } = site.kind else {
            return Err(bug(format!("site at {:#x} is not a memory site", self.rip)));
        };
        let pointers = self.take_back(&site, site.held_at_start.into());
        let delta = site.range.map_or(0, |range| u64::from(range.delta));
        let address = self.hot().t0.wrapping_add(delta);
        if self.is_64bit() && !is_canonical(address) {
            self.step()?;
            return self.go_on();
        }
        let access = if write { Access::Write } else { Access::Read };
        if address % 4096 + u64::from(bytes) <= 4096 {
            let place = match self.locate(address, access, self.is_user()) {
                // A vector instruction may rather complain of the alignment, or leave out the
                // bytes that aren't there; an x87 one may have an earlier error to report.
                Err(_) if bytes >= 16 || crate::fpu::exception_waits() => {
                    self.step()?;
                    return self.go_on();
                }
                other => other?,
            };
            if matches!(place, Place::Ram { .. }) {
                let write = write || site.range.is_some_and(|range| range.writes);
                let table = if write { Table::Write } else { Table::Read };
                if self.windows.get(table, page_index(address)) != 0 {
                    self.lend(&site, &pointers);
                    return Ok(self.shared.code.pc(&block, site.start));
                }
                if site.range.is_some() {
                    // The page can be read but not (yet) be written: one access at a time.
                    return self.lookup_plain(block.key);
                }
            }
        } else {
            self.remote.counters.crossings.bump();
        }
        // A device, two pages, or translated code: the whole instruction goes the general way.
        self.step()?;
        self.go_on()
    }

    /// A crossing access whose pages aren't both at hand.
    fn on_crossing(&mut self) -> Result<u64, Stop> {
        self.remote.counters.crossings.bump();
        let number = self.hot().cross_site;
        let (_, site) = u32::try_from(number)
            .ok()
            .and_then(|number| self.shared.code.site(number))
            .ok_or_else(|| bug(format!("no site {number:#x} for a crossing access")))?;
        if site.flags_parked {
            self.unpark_flags();
        }
        self.take_back(&site, site.held_at_start.into());
        self.set_rip_in_page(site.guest);
        self.step()?;
        self.go_on()
    }

    /// Undoes what the translator's parking did: the flags are in AX, RAX in a spill slot.
    fn unpark_flags(&mut self) {
        const OVERFLOW_BIT: u32 = 11;
        let parked = self.gpr(0);
        let hot = self.hot_mut();
        hot.flags = (parked >> 8 & 0xd5) | (parked & 1) << OVERFLOW_BIT;
        hot.gpr[0] = hot.spill[1];
    }

    fn on_step(&mut self) -> Result<u64, Stop> {
        let (block, site) = self.site_argument()?;
        self.take_back(&site, site.held_at_start.into());
        self.set_rip_in_page(site.guest);
        self.step_in(block.key.gpa)?;
        self.go_on()
    }

    fn on_link(&mut self) -> Result<u64, Stop> {
        let number = self.hot().t1;
        let number = u32::try_from(number).map_err(|_| bug(format!("no link {number:#x}")))?;
        let (block, link) = self
            .shared
            .code
            .link(number)
            .ok_or_else(|| bug(format!("no link {number}")))?;
        self.set_rip_in_page(link.target);
        let generation = self.shared.code.generation();
        let body = if link.plain {
            self.lookup_plain(block.key)?
        } else {
            self.lookup()?
        };
        if body != LEAVE && self.shared.code.generation() == generation {
            self.remote.counters.linked.bump();
            self.shared.code.connect(number, body);
        }
        Ok(body)
    }

    fn on_miss(&mut self) -> Result<u64, Stop> {
        self.remote.counters.misses.bump();
        self.rip = self.wrap_rip(self.hot().t0);
        self.lookup()
    }

    /// A host signal in generated code.
    fn on_host_fault(&mut self) -> Result<u64, Stop> {
        let hot = self.hot();
        let (pc, signal, address) = (hot.fault_pc, hot.fault_signal, hot.fault_address);
        if signal == crate::signal::PAGE_TRAP {
            let committed =
                self.windows
                    .commit_code_at(address)
                    .map_err(|source| EngineError::Host {
                        action: "map a part of the code table",
                        source,
                    })?;
            if committed {
                return Ok(pc);
            }
        }
        let found = self.shared.code.locate(pc);
        let Some((block, site)) = found else {
            return Err(self.unexpected_signal(pc, signal, address));
        };
        if block.key.gpa == u64::MAX && block.start > 0 {
            self.remote.counters.signals.bump();
            self.scratch_fault = Some(self.scratch_exception(pc, signal, address));
            return Ok(LEAVE);
        }
        // A poll inside a site is STI's or SYSRET's: the monitor executes those.
        if self.remote.is_closed_poll(address) && site.is_none() {
            self.remote.counters.polls.bump();
            self.set_rip_in_page(block.guest);
            return Ok(LEAVE);
        }
        self.remote.counters.signals.bump();
        if signal == crate::signal::BUS_ERROR {
            return Err(no_memory());
        }
        let Some(site) = site else {
            return Err(self.unexpected_signal(pc, signal, address));
        };
        if let Some(register) = site.transient {
            let value = self.hot().spill[0];
            self.set_gpr(usize::from(register), value);
        }
        self.take_back(&site, MAX_BORROWED);
        self.set_rip_in_page(site.guest);
        match site.kind {
            SiteKind::Jump => {
                let target = self.hot().spill[3];
                if !self.is_64bit() || is_canonical(target) {
                    // The transfer is done, and it is the target that can't be.
                    self.rip = self.wrap_rip(target);
                    return self.go_on();
                }
                if self.undo_transfer(&block, &site) == Some(iced_x86::Mnemonic::Call) {
                    // It can't start over: its target may have lain where it pushed.
                    return Err(Fault::general(0).into());
                }
            }
            SiteKind::String { source } => self.return_pointers(source),
            _ => {}
        }
        self.step()?;
        self.go_on()
    }

    /// Makes guest addresses of the host addresses that a string instruction stopped at.
    fn return_pointers(&mut self, source: bool) {
        let (target, from) = (self.hot().t0, self.hot().t1);
        self.set_gpr(7, self.gpr(7).wrapping_sub(target));
        if source {
            self.set_gpr(6, self.gpr(6).wrapping_sub(from));
        }
    }

    /// A transfer's target turned out to be impossible: takes back what the transfer did to the
    /// stack pointer, so that it can start over and fault as it should. Says what it was.
    fn undo_transfer(&mut self, block: &Block, site: &Site) -> Option<iced_x86::Mnemonic> {
        let mut bytes = [0; 15];
        let at = block.key.gpa + u64::from(site.guest);
        let len = 15.min(4096 - usize::from(site.guest));
        let host = self.shared.ram.host(at, len as u64)?;
        // SAFETY: `len` bytes of RAM.
        unsafe { crate::ram::read_raw(host, &mut bytes[..len]) };
        let bits = block.key.mode.bits();
        let instruction =
            iced_x86::Decoder::new(bits, &bytes[..len], iced_x86::DecoderOptions::NONE).decode();
        let moved = match instruction.mnemonic() {
            iced_x86::Mnemonic::Ret | iced_x86::Mnemonic::Call => {
                i64::from(instruction.stack_pointer_increment())
            }
            _ => 0,
        };
        let rsp = self.gpr(4).wrapping_sub(moved.cast_unsigned());
        self.set_gpr(4, if bits == 64 { rsp } else { rsp & 0xffff_ffff });
        Some(instruction.mnemonic())
    }

    fn unexpected_signal(&self, pc: u64, signal: u64, address: u64) -> Stop {
        bug(format!(
            "host trap {signal} at {pc:#x} (address {address:#x}) in translated code; \
             guest page {:#x}",
            self.hot().pc_base
        ))
    }

    /// What a scratch instruction's host trap is to the guest: the same.
    fn scratch_exception(&self, pc: u64, signal: u64, address: u64) -> Stop {
        match signal {
            crate::signal::BUS_ERROR => no_memory(),
            // Scratch operands are always mapped.
            crate::signal::PAGE_TRAP => self.unexpected_signal(pc, signal, address),
            12 => Fault::stack(0).into(),
            13 => Fault::general(0).into(),
            17 => Stop::Fault(Fault {
                vector: 17,
                error: Some(0),
                address: 0,
            }),
            number => Fault::bare(u8::try_from(number).unwrap_or(13)).into(),
        }
    }

    /// Continues at RIP after the monitor did something: in translated code, or in the run loop
    /// when that has something to do first.
    fn go_on(&mut self) -> Result<u64, Stop> {
        let interrupt = self.maybe_interrupt && self.has(flag::IF);
        if interrupt
            || self.apic_touched
            || self.shadow
            || self.activity != Activity::Running
            || self.mode.is_stepped()
            || !self.exits.is_empty()
            || self.remote.has_requests()
            || self.is_direct()
        {
            return Ok(LEAVE);
        }
        self.lookup()
    }
}

fn no_memory() -> Stop {
    Stop::Error(EngineError::Host {
        action: "back a page of guest memory (the host is out of memory)",
        source: std::io::Error::from_raw_os_error(libc::ENOMEM),
    })
}
