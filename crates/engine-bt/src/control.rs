//! Control and debug registers.

use ringfence_x86::paging::CR0_AM;
use ringfence_x86::paging::CR0_CD;
use ringfence_x86::paging::CR0_EM;
use ringfence_x86::paging::CR0_ET;
use ringfence_x86::paging::CR0_MP;
use ringfence_x86::paging::CR0_NE;
use ringfence_x86::paging::CR0_NW;
use ringfence_x86::paging::CR0_PE;
use ringfence_x86::paging::CR0_PG;
use ringfence_x86::paging::CR0_TS;
use ringfence_x86::paging::CR0_WP;
use ringfence_x86::paging::CR4_DE;
use ringfence_x86::paging::CR4_FSGSBASE;
use ringfence_x86::paging::CR4_MCE;
use ringfence_x86::paging::CR4_OSFXSR;
use ringfence_x86::paging::CR4_OSXMMEXCPT;
use ringfence_x86::paging::CR4_OSXSAVE;
use ringfence_x86::paging::CR4_PAE;
use ringfence_x86::paging::CR4_PCIDE;
use ringfence_x86::paging::CR4_PGE;
use ringfence_x86::paging::CR4_PSE;
use ringfence_x86::paging::CR4_SMEP;
use ringfence_x86::paging::CR4_TSD;
use ringfence_x86::paging::CR4_UMIP;
use ringfence_x86::paging::EFER_LMA;
use ringfence_x86::paging::EFER_LME;
use ringfence_x86::paging::PTE_ADDR;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::CS;

use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::walk::PHYSICAL_BITS;

const CR0_VALID: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;
/// VME and PVI exist so that they may be set; nothing depends on them.
const CR4_VME_PVI: u64 = 0b11;
const CR4_VALID: u64 = CR4_VME_PVI
    | CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_MCE
    | CR4_PGE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_UMIP
    | CR4_FSGSBASE
    | CR4_PCIDE
    | CR4_OSXSAVE
    | CR4_SMEP;
/// CR3 bit 63 under PCIDE: keep the entries of the new address space.
const CR3_KEEP: u64 = 1 << 63;
const CR3_PCID: u64 = 0xfff;
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 0x400;
const DR7_GD: u64 = 1 << 13;

impl Core {
    /// Tag of the current address space: its PCID, or 0.
    pub(crate) fn current_tag(&self) -> u64 {
        if self.sys.cr4 & CR4_PCIDE != 0 {
            self.sys.cr3 & CR3_PCID
        } else {
            0
        }
    }

    pub(crate) fn read_control(&self, number: usize) -> Result<u64, Stop> {
        match number {
            0 => Ok(self.sys.cr0),
            2 => Ok(self.hot().cr2),
            3 => Ok(self.sys.cr3),
            4 => Ok(self.sys.cr4),
            8 => Ok(u64::from(self.apic.as_ref().map_or_else(
                || u8::try_from(self.sys.cr8 & 0xf).unwrap_or(0),
                |apic| apic.task_priority(),
            ))),
            _ => Err(Fault::undefined().into()),
        }
    }

    pub(crate) fn write_control(&mut self, number: usize, value: u64) -> Result<(), Stop> {
        match number {
            0 => self.write_cr0(value),
            2 => {
                self.hot_mut().cr2 = value;
                Ok(())
            }
            3 => self.write_cr3(value),
            4 => self.write_cr4(value),
            8 => {
                if value > 0xf {
                    return Err(Fault::general(0).into());
                }
                self.sys.cr8 = value;
                if let Some(apic) = &self.apic {
                    apic.set_task_priority(u8::try_from(value).unwrap_or(0));
                }
                self.maybe_interrupt = true;
                Ok(())
            }
            _ => Err(Fault::undefined().into()),
        }
    }

    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let value = value | CR0_ET;
        let paging = value & CR0_PG != 0;
        let bad = value >> 32 != 0
            || (paging && value & CR0_PE == 0)
            || (value & CR0_NW != 0 && value & CR0_CD == 0)
            || (!paging && self.sys.cr4 & CR4_PCIDE != 0 && self.sys.cr0 & CR0_PG != 0);
        if bad {
            return Err(Fault::general(0).into());
        }
        let value = value & CR0_VALID;
        let changed = self.sys.cr0 ^ value;
        if changed & CR0_PG != 0 {
            self.change_paging(paging)?;
        }
        self.sys.cr0 = value;
        if changed & (CR0_PG | CR0_WP | CR0_PE) != 0 {
            self.remote.counters.flushes.bump();
            self.windows.flush_everything();
        }
        self.mode_changed();
        Ok(())
    }

    /// Long mode becomes active with paging (SDM 3A §9.8.5).
    fn change_paging(&mut self, on: bool) -> Result<(), Stop> {
        if !on {
            if self.is_64bit() {
                return Err(Fault::general(0).into());
            }
            self.sys.efer &= !EFER_LMA;
            return Ok(());
        }
        if self.sys.efer & EFER_LME != 0 {
            let in_64bit_segment = self.sys.segments[CS].access & ACCESS_L != 0;
            if self.sys.cr4 & CR4_PAE == 0 || in_64bit_segment {
                return Err(Fault::general(0).into());
            }
            self.sys.efer |= EFER_LMA;
        }
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Result<(), Stop> {
        let tagged = self.sys.cr4 & CR4_PCIDE != 0;
        let keep = tagged && value & CR3_KEEP != 0;
        let value = if tagged { value & !CR3_KEEP } else { value };
        if self.is_long() && value & !(CR3_PCID | PTE_ADDR) != 0
            || value & PTE_ADDR >> PHYSICAL_BITS << PHYSICAL_BITS != 0
        {
            return Err(Fault::general(0).into());
        }
        self.remote.counters.switches.bump();
        self.windows.flush_local();
        self.sys.cr3 = value;
        self.windows.select(self.current_tag());
        let direct = self.windows.direct_mut();
        self.direct.arrive(direct, value & PTE_ADDR);
        if !keep {
            self.remote.counters.flushes.bump();
            self.windows.flush_current();
        }
        self.window_changed();
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let lost_pae = value & CR4_PAE == 0 && self.is_long();
        let turns_on_pcid = value & CR4_PCIDE != 0 && self.sys.cr4 & CR4_PCIDE == 0;
        let bad_pcid = turns_on_pcid && (!self.is_long() || self.sys.cr3 & CR3_PCID != 0);
        let no_xsave = value & CR4_OSXSAVE != 0 && !self.has_xsave();
        if value & !CR4_VALID != 0 || lost_pae || bad_pcid || no_xsave {
            return Err(Fault::general(0).into());
        }
        let changed = self.sys.cr4 ^ value;
        self.sys.cr4 = value;
        if changed & (CR4_PGE | CR4_PAE | CR4_PSE | CR4_PCIDE | CR4_SMEP) != 0 {
            self.remote.counters.flushes.bump();
            self.windows.flush_everything();
            self.windows.select(self.current_tag());
            self.window_changed();
        }
        self.mode_changed();
        Ok(())
    }

    fn debug_alias(&self, number: usize) -> Result<usize, Stop> {
        match number {
            4 | 5 if self.sys.cr4 & CR4_DE != 0 => Err(Fault::undefined().into()),
            4 | 5 => Ok(number + 2),
            0..=7 => Ok(number),
            _ => Err(Fault::undefined().into()),
        }
    }

    fn check_debug_access(&mut self) -> Result<(), Stop> {
        const DR6_BD: u64 = 1 << 13;
        if self.sys.dr7 & DR7_GD != 0 {
            self.sys.dr6 |= DR6_BD;
            self.sys.dr7 &= !DR7_GD;
            return Err(Fault::bare(crate::fault::vector::DEBUG).into());
        }
        Ok(())
    }

    pub(crate) fn read_debug(&mut self, number: usize) -> Result<u64, Stop> {
        let number = self.debug_alias(number)?;
        self.check_debug_access()?;
        Ok(match number {
            6 => self.sys.dr6 | DR6_FIXED,
            7 => self.sys.dr7 | DR7_FIXED,
            index => self.sys.dr[index & 3],
        })
    }

    pub(crate) fn write_debug(&mut self, number: usize, value: u64) -> Result<(), Stop> {
        let number = self.debug_alias(number)?;
        self.check_debug_access()?;
        if number >= 6 && value >> 32 != 0 {
            return Err(Fault::general(0).into());
        }
        match number {
            6 => self.sys.dr6 = value & 0xe00f | DR6_FIXED,
            7 => self.sys.dr7 = value & !0xdc00 | DR7_FIXED,
            index => self.sys.dr[index & 3] = value,
        }
        self.mode_changed();
        Ok(())
    }
}
