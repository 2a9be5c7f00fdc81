//! The guest's page tables (SDM 3A §4): 32-bit, PAE and 4-level paging, with accessed and dirty
//! bits and page-fault error codes.

use std::sync::atomic::Ordering;

use ringfence_x86::paging::CR0_PG;
use ringfence_x86::paging::CR0_WP;
use ringfence_x86::paging::CR4_PAE;
use ringfence_x86::paging::CR4_PGE;
use ringfence_x86::paging::CR4_PSE;
use ringfence_x86::paging::CR4_SMEP;
use ringfence_x86::paging::EFER_LMA;
use ringfence_x86::paging::EFER_NXE;
use ringfence_x86::paging::PTE_A;
use ringfence_x86::paging::PTE_ADDR;
use ringfence_x86::paging::PTE_D;
use ringfence_x86::paging::PTE_G;
use ringfence_x86::paging::PTE_NX;
use ringfence_x86::paging::PTE_P;
use ringfence_x86::paging::PTE_PS;
use ringfence_x86::paging::PTE_U;
use ringfence_x86::paging::PTE_W;

use crate::ram::Ram;

/// Physical address bits that guests are told of; entries with higher bits set are reserved.
pub(crate) const PHYSICAL_BITS: u32 = 46;

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// The registers that paging depends on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Paging {
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
}

/// Page-fault error-code bits (SDM 3A §4.7).
pub(crate) const FAULT_P: u32 = 1 << 0;
pub(crate) const FAULT_W: u32 = 1 << 1;
pub(crate) const FAULT_U: u32 = 1 << 2;
pub(crate) const FAULT_RSVD: u32 = 1 << 3;
pub(crate) const FAULT_I: u32 = 1 << 4;

/// A successful translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Physical address of the byte asked for.
    pub gpa: u64,
    /// Bytes of the page: 4 KiB, 2 MiB, 4 MiB or 1 GiB.
    pub page_bytes: u64,
    /// User code may access it.
    pub user: bool,
    /// The access mode asked for may write it.
    pub may_write: bool,
    /// It may do so without the page tables being touched again (the dirty bit is set).
    pub writable: bool,
    /// The entry is global.
    pub global: bool,
    /// The accessed bit is set.
    pub accessed: bool,
    /// The dirty bit is set.
    pub dirty: bool,
}

/// A page-table entry of either width.
#[derive(Clone, Copy)]
struct Slot {
    gpa: u64,
    wide: bool,
}

struct Walk<'a> {
    ram: &'a Ram,
    paging: Paging,
    access: Access,
    user: bool,
    /// Update accessed and dirty bits.
    mark: bool,
}

impl Paging {
    fn wp(&self) -> bool {
        self.cr0 & CR0_WP != 0
    }

    fn nxe(&self) -> bool {
        self.efer & EFER_NXE != 0
    }

    /// Translates `address`, or returns the page fault's error code.
    ///
    /// `mark` updates accessed and dirty bits, as a real access does.
    pub(crate) fn translate(
        &self,
        ram: &Ram,
        address: u64,
        access: Access,
        user: bool,
        mark: bool,
    ) -> Result<Translation, u32> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                gpa: address & 0xffff_ffff,
                page_bytes: 4096,
                user: true,
                may_write: true,
                writable: true,
                global: false,
                accessed: true,
                dirty: true,
            });
        }
        let walk = Walk {
            ram,
            paging: *self,
            access,
            user,
            mark,
        };
        if self.efer & EFER_LMA != 0 {
            walk.levels(address, self.cr3 & PTE_ADDR, 4)
        } else if self.cr4 & CR4_PAE != 0 {
            walk.pae(address)
        } else {
            walk.legacy(address)
        }
    }
}

impl Walk<'_> {
    fn error(&self, bits: u32) -> u32 {
        let mut error = bits;
        if self.access == Access::Write {
            error |= FAULT_W;
        }
        if self.user {
            error |= FAULT_U;
        }
        let fetch_is_told = self.paging.nxe() || self.paging.cr4 & CR4_SMEP != 0;
        if self.access == Access::Fetch && fetch_is_told {
            error |= FAULT_I;
        }
        error
    }

    fn load(&self, slot: Slot) -> Option<u64> {
        if slot.wide {
            self.ram.load64(slot.gpa)
        } else {
            let entry = self.ram.entry32(slot.gpa)?;
            Some(u64::from(entry.load(Ordering::SeqCst)))
        }
    }

    /// Sets bits in an entry unless it changed since `seen` was read; then the walk starts over.
    fn mark(&self, slot: Slot, seen: u64, bits: u64) -> bool {
        if !self.mark || seen & bits == bits {
            return true;
        }
        if slot.wide {
            self.ram.entry64(slot.gpa).is_none_or(|entry| {
                entry
                    .compare_exchange(seen, seen | bits, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            })
        } else {
            let (Ok(seen), Ok(bits)) = (u32::try_from(seen), u32::try_from(bits)) else {
                return true;
            };
            self.ram.entry32(slot.gpa).is_none_or(|entry| {
                entry
                    .compare_exchange(seen, seen | bits, Ordering::SeqCst, Ordering::SeqCst)
                    .is_ok()
            })
        }
    }

    fn has_reserved_bits(&self, entry: u64, level: u32, large: bool) -> bool {
        let beyond = entry & PTE_ADDR >> PHYSICAL_BITS << PHYSICAL_BITS != 0;
        let no_execute = entry & PTE_NX != 0 && !self.paging.nxe();
        // PS is reserved in a PML4 entry; a large page's address has zeroes below its size,
        // but for bit 12, which is PAT.
        let misplaced = large && level == 4;
        let unaligned = large && level < 4 && {
            let size = 1_u64 << (12 + 9 * (level - 1));
            entry & PTE_ADDR & (size - 1) & !(1 << 12) != 0
        };
        beyond || no_execute || misplaced || unaligned
    }

    /// 64-bit entries from table `table` at `level` (4: PML4) down.
    fn levels(&self, address: u64, table: u64, level: u32) -> Result<Translation, u32> {
        // Bounded: only a concurrent change of an entry starts over, and each start over means
        // that somebody else made progress.
        loop {
            if let Some(done) = self.try_levels(address, table, level)? {
                return Ok(done);
            }
        }
    }

    fn try_levels(
        &self,
        address: u64,
        mut table: u64,
        mut level: u32,
    ) -> Result<Option<Translation>, u32> {
        let mut rights = PTE_W | PTE_U;
        let mut nx = 0;
        loop {
            let shift = 12 + 9 * (level - 1);
            let slot = Slot {
                gpa: table + 8 * ((address >> shift) & 0x1ff),
                wide: true,
            };
            // A table outside RAM reads as ones: every reserved bit is set.
            let entry = self.load(slot).unwrap_or(u64::MAX);
            if entry & PTE_P == 0 {
                return Err(self.error(0));
            }
            let large = level > 1 && entry & PTE_PS != 0;
            if self.has_reserved_bits(entry, level, large) {
                return Err(self.error(FAULT_P | FAULT_RSVD));
            }
            rights &= entry;
            nx |= entry & PTE_NX;
            if level == 1 || large {
                let page_bytes = 1 << shift;
                return self.finish(slot, entry, rights, nx, address, page_bytes);
            }
            if !self.mark(slot, entry, PTE_A) {
                return Ok(None);
            }
            table = entry & PTE_ADDR;
            level -= 1;
        }
    }

    /// Checks the rights that the whole path grants and marks the last entry.
    fn finish(
        &self,
        slot: Slot,
        entry: u64,
        rights: u64,
        nx: u64,
        address: u64,
        page_bytes: u64,
    ) -> Result<Option<Translation>, u32> {
        let user_page = rights & PTE_U != 0;
        let may_write = rights & PTE_W != 0 || (!self.user && !self.paging.wp());
        let smep = self.paging.cr4 & CR4_SMEP != 0;
        let refused = (self.user && !user_page)
            || (self.access == Access::Write && !may_write)
            || (self.access == Access::Fetch && nx != 0)
            || (self.access == Access::Fetch && smep && !self.user && user_page);
        if refused {
            return Err(self.error(FAULT_P));
        }
        let bits = match self.access {
            Access::Write => PTE_A | PTE_D,
            Access::Read | Access::Fetch => PTE_A,
        };
        if !self.mark(slot, entry, bits) {
            return Ok(None);
        }
        let dirty = entry & PTE_D != 0 || self.mark && self.access == Access::Write;
        let base = entry & PTE_ADDR & !(page_bytes - 1);
        Ok(Some(Translation {
            gpa: base | (address & (page_bytes - 1)),
            page_bytes,
            user: user_page,
            may_write,
            writable: may_write && (dirty || self.access == Access::Write),
            dirty,
            accessed: self.mark || entry & PTE_A != 0,
            global: entry & PTE_G != 0 && self.paging.cr4 & CR4_PGE != 0,
        }))
    }

    /// PAE: four pointers, then two levels of 64-bit entries.
    fn pae(&self, address: u64) -> Result<Translation, u32> {
        let address = address & 0xffff_ffff;
        let pointer = (self.paging.cr3 & 0xffff_ffe0) + 8 * (address >> 30);
        let entry = self.ram.load64(pointer).unwrap_or(0);
        if entry & PTE_P == 0 {
            return Err(self.error(0));
        }
        self.levels(address, entry & PTE_ADDR, 2)
    }

    /// 32-bit paging, with 4 MiB pages when CR4.PSE is set.
    fn legacy(&self, address: u64) -> Result<Translation, u32> {
        let address = address & 0xffff_ffff;
        loop {
            if let Some(done) = self.try_legacy(address)? {
                return Ok(done);
            }
        }
    }

    fn try_legacy(&self, address: u64) -> Result<Option<Translation>, u32> {
        let directory = Slot {
            gpa: (self.paging.cr3 & 0xffff_f000) + 4 * (address >> 22),
            wide: false,
        };
        let entry = self.load(directory).unwrap_or(0);
        if entry & PTE_P == 0 {
            return Err(self.error(0));
        }
        if entry & PTE_PS != 0 && self.paging.cr4 & CR4_PSE != 0 {
            return self.finish(directory, entry, entry, 0, address, 4 << 20);
        }
        if !self.mark(directory, entry, PTE_A) {
            return Ok(None);
        }
        let slot = Slot {
            gpa: (entry & 0xffff_f000) + 4 * ((address >> 12) & 0x3ff),
            wide: false,
        };
        let page = self.load(slot).unwrap_or(0);
        if page & PTE_P == 0 {
            return Err(self.error(0));
        }
        self.finish(slot, page, page & entry, 0, address, 4096)
    }
}
