//! The guest's debug registers (SDM 3B §17.2).
//!
//! While any breakpoint is enabled the vCPU runs instruction by instruction, so that checks cost
//! nothing otherwise.

use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;

/// Kinds of DR7's R/W fields.
const ON_EXECUTE: u64 = 0;
const ON_WRITE: u64 = 1;
const ON_ACCESS: u64 = 3;

/// A data access made by the current instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touched {
    pub address: u64,
    pub bytes: usize,
    pub write: bool,
}

impl Core {
    /// Enabled breakpoints: number, kind, address, length.
    fn enabled_breakpoints(&self) -> impl Iterator<Item = (usize, u64, u64, u64)> + '_ {
        let dr7 = self.sys.dr7;
        (0..4)
            .filter(move |&number| dr7 >> (2 * number) & 3 != 0)
            .map(move |number| {
                let field = dr7 >> (16 + 4 * number);
                let bytes = match field >> 2 & 3 {
                    0 => 1,
                    1 => 2,
                    2 => 8,
                    _ => 4,
                };
                (number, field & 3, self.sys.dr[number] & !(bytes - 1), bytes)
            })
    }

    /// Faults when an instruction breakpoint is at `linear`, unless RF suppresses it.
    pub(crate) fn check_instruction_breakpoints(&mut self, linear: u64) -> Result<(), Stop> {
        if self.sys.dr7 & 0xff == 0 || self.has(flag::RF) {
            return Ok(());
        }
        let hits = self
            .enabled_breakpoints()
            .filter(|&(number, kind, _, _)| kind == ON_EXECUTE && self.sys.dr[number] == linear)
            .fold(0, |hits, (number, ..)| hits | 1 << number);
        if hits == 0 {
            return Ok(());
        }
        self.sys.dr6 |= hits;
        Err(Fault::bare(vector::DEBUG).into())
    }

    /// Notes an access, when somebody watches.
    pub(crate) fn touch(&mut self, address: u64, bytes: usize, write: bool) {
        if self.sys.dr7 & 0xff != 0 {
            self.touched.push(Touched {
                address,
                bytes,
                write,
            });
        }
    }

    /// Executes an instruction and traps when it touched watched data. A load of SS delays that until
    /// the next instruction is complete, which may have led into a handler (SDM 3A §6.8.3).
    pub(crate) fn step_watched(&mut self) -> Result<(), Stop> {
        let stepped = self.step();
        if stepped.is_err() {
            // A fault is all that is heard of its instruction.
            self.touched.clear();
            return stepped;
        }
        if self.shadow {
            return Ok(());
        }
        let hits = self.take_data_hits();
        if hits == 0 {
            return Ok(());
        }
        self.sys.dr6 |= hits;
        self.interrupt(vector::DEBUG, crate::event::Source::External)
    }

    /// Breakpoints, as bits of DR6, whose data has been touched since they were last taken.
    pub(crate) fn take_data_hits(&mut self) -> u64 {
        let touched = std::mem::take(&mut self.touched);
        if touched.is_empty() {
            return 0;
        }
        self.enabled_breakpoints()
            .filter(|&(_, kind, start, len)| {
                touched.iter().any(|access| {
                    let wanted = kind == ON_ACCESS || (kind == ON_WRITE && access.write);
                    let before = access.address < start.wrapping_add(len);
                    let after = start < access.address.wrapping_add(access.bytes as u64);
                    wanted && before && after
                })
            })
            .fold(0, |hits, (number, ..)| hits | 1 << number)
    }
}
