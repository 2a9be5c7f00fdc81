//! Segment registers and descriptors (SDM 3A §3.4, §3.5, §5).

use ringfence_x86::paging::CR0_PE;
use ringfence_x86::state::ACCESS_DB;
use ringfence_x86::state::ACCESS_G;
use ringfence_x86::state::ACCESS_L;
use ringfence_x86::state::ACCESS_P;
use ringfence_x86::state::ACCESS_S;
use ringfence_x86::state::ACCESS_UNUSABLE;
use ringfence_x86::state::CS;
use ringfence_x86::state::DS;
use ringfence_x86::state::ES;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;
use ringfence_x86::state::SS;
use ringfence_x86::state::Segment;

use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;

/// Type bit: code segment.
const CODE: u32 = 1 << 3;
/// Type bit of code: conforming. Of data: expand-down.
const CONFORMING: u32 = 1 << 2;
/// Type bit of code: readable. Of data: writable.
const READ_WRITE: u32 = 1 << 1;
const ACCESSED: u64 = 1 << 40;

/// A descriptor as it lies in its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    raw: u64,
    /// Bits 63:32 of a 64-bit system descriptor's base.
    high: u64,
    address: u64,
}

impl Descriptor {
    /// The register contents that loading it gives.
    pub(crate) fn segment(&self, selector: u16) -> Segment {
        let raw = self.raw;
        let limit = (raw & 0xffff) | ((raw >> 32) & 0xf_0000);
        let base = ((raw >> 16) & 0xff_ffff) | ((raw >> 32) & 0xff00_0000) | (self.high << 32);
        let access = low32((raw >> 40) & 0xff) | low32((raw >> 52) & 0xf) << 12;
        let limit = if access & ACCESS_G != 0 {
            (limit << 12) | 0xfff
        } else {
            limit
        };
        Segment {
            selector,
            base,
            limit: low32(limit),
            access,
        }
    }
}

fn low32(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

/// Error code that names a selector.
pub(crate) fn selector_error(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// A register that holds a null selector.
pub(crate) fn null_segment(selector: u16) -> Segment {
    Segment {
        selector,
        access: ACCESS_UNUSABLE,
        ..Segment::default()
    }
}

fn is_code(segment: &Segment) -> bool {
    segment.access & (ACCESS_S | CODE) == ACCESS_S | CODE
}

fn is_conforming(segment: &Segment) -> bool {
    segment.access & CONFORMING != 0
}

fn is_present(segment: &Segment) -> bool {
    segment.access & ACCESS_P != 0
}

fn is_writable_data(segment: &Segment) -> bool {
    segment.access & (ACCESS_S | CODE | READ_WRITE) == ACCESS_S | READ_WRITE
}

fn is_readable(segment: &Segment) -> bool {
    let data = segment.access & (ACCESS_S | CODE) == ACCESS_S;
    data || (is_code(segment) && segment.access & READ_WRITE != 0)
}

impl Core {
    /// Replaces a segment register without checks.
    pub(crate) fn set_segment(&mut self, index: usize, segment: Segment) {
        self.sys.segments[index] = segment;
        self.hot_mut().seg_base[index] = segment.base;
        self.mode_changed();
    }

    /// A segment's base as it is now (FS and GS bases change by other ways too).
    pub(crate) fn segment_base(&self, index: usize) -> u64 {
        self.hot().seg_base[index]
    }

    /// Whether ordinary 32-bit code sees one flat space: all bases 0, all limits 4 GiB.
    pub(crate) fn has_flat_segments(&self) -> bool {
        [CS, SS, DS, ES].iter().all(|&index| {
            let segment = &self.sys.segments[index];
            segment.base == 0
                && segment.limit == u32::MAX
                && segment.access & ACCESS_UNUSABLE == 0
                // Expand-down data has its valid offsets above the limit.
                && (is_code(segment) || segment.access & CONFORMING == 0)
        })
    }

    /// Reads a descriptor; `None` when the selector lies past its table.
    fn table_entry(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        let (base, limit) = if selector & 4 == 0 {
            (self.sys.gdt.base, u32::from(self.sys.gdt.limit))
        } else if self.sys.ldtr.access & ACCESS_UNUSABLE == 0 {
            (self.sys.ldtr.base, self.sys.ldtr.limit)
        } else {
            return Ok(None);
        };
        let offset = u32::from(selector & 0xfff8);
        if offset + 7 > limit {
            return Ok(None);
        }
        let address = base.wrapping_add(u64::from(offset));
        let raw = self.read_number(address, 8, false)?;
        Ok(Some(Descriptor {
            raw,
            high: 0,
            address,
        }))
    }

    /// Reads a code or data descriptor, or faults with `fault`.
    pub(crate) fn descriptor(
        &mut self,
        selector: u16,
        fault: fn(u32) -> Fault,
    ) -> Result<Descriptor, Stop> {
        self.table_entry(selector)?
            .ok_or_else(|| fault(selector_error(selector)).into())
    }

    /// Reads a TSS or LDT descriptor, 16 bytes long in long mode.
    fn system_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        let mut descriptor = self.descriptor(selector, Fault::general)?;
        if self.is_long() {
            let end = u32::from(selector & 0xfff8) + 15;
            if end > u32::from(self.sys.gdt.limit) {
                return Err(Fault::general(selector_error(selector)).into());
            }
            let upper = descriptor.address.wrapping_add(8);
            descriptor.high = self.read_number(upper, 4, false)?;
        }
        Ok(descriptor)
    }

    /// EFER.LMA.
    pub(crate) fn is_long(&self) -> bool {
        self.sys.efer & ringfence_x86::paging::EFER_LMA != 0
    }

    fn mark_accessed(&mut self, descriptor: &Descriptor) -> Result<(), Stop> {
        if descriptor.raw & ACCESSED == 0 {
            let raw = descriptor.raw | ACCESSED;
            self.write_number(descriptor.address, raw, 8, false)?;
        }
        Ok(())
    }

    /// MOV or POP to DS, ES, FS, GS or SS, LDS and their like.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Stop> {
        if self.sys.cr0 & CR0_PE == 0 || self.has(flag::VM) {
            self.load_real_segment(index, selector);
            return Ok(());
        }
        let segment = if index == SS {
            self.check_stack_segment(selector, self.cpl, Fault::general)?
        } else {
            self.check_data_segment(selector)?
        };
        self.set_segment(index, segment);
        Ok(())
    }

    /// Real mode: the base is the selector times 16, nothing else changes.
    pub(crate) fn load_real_segment(&mut self, index: usize, selector: u16) {
        let mut segment = self.sys.segments[index];
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        self.set_segment(index, segment);
    }

    fn check_data_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        if selector & 0xfffc == 0 {
            return Ok(null_segment(selector));
        }
        let descriptor = self.descriptor(selector, Fault::general)?;
        let mut segment = descriptor.segment(selector);
        let rpl = (selector & 3) as u8;
        let privileged =
            !(is_code(&segment) && is_conforming(&segment)) && segment.dpl() < rpl.max(self.cpl);
        if !is_readable(&segment) || privileged {
            return Err(Fault::general(selector_error(selector)).into());
        }
        if !is_present(&segment) {
            return Err(Fault::not_present(selector_error(selector)).into());
        }
        self.mark_accessed(&descriptor)?;
        segment.access |= 1;
        Ok(segment)
    }

    /// Checks a stack selector for privilege level `cpl`.
    pub(crate) fn check_stack_segment(
        &mut self,
        selector: u16,
        cpl: u8,
        fault: fn(u32) -> Fault,
    ) -> Result<Segment, Stop> {
        let rpl = (selector & 3) as u8;
        if selector & 0xfffc == 0 {
            // 64-bit code below level 3 may run with a null stack selector.
            if self.is_64bit() && cpl != 3 && rpl == cpl {
                return Ok(null_segment(selector));
            }
            return Err(fault(0).into());
        }
        let descriptor = self.descriptor(selector, fault)?;
        let mut segment = descriptor.segment(selector);
        if rpl != cpl || segment.dpl() != cpl || !is_writable_data(&segment) {
            return Err(fault(selector_error(selector)).into());
        }
        if !is_present(&segment) {
            return Err(Fault::stack(selector_error(selector)).into());
        }
        self.mark_accessed(&descriptor)?;
        segment.access |= 1;
        Ok(segment)
    }

    /// Checks a code selector for a far transfer that stays at level `cpl` (JMP, CALL) or goes
    /// to the selector's own level (`returning`, for RET and IRET). The result's selector has
    /// the new level as RPL.
    pub(crate) fn check_code_segment(
        &mut self,
        selector: u16,
        returning: bool,
    ) -> Result<Segment, Stop> {
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::general(0).into());
        }
        let descriptor = self.descriptor(selector, Fault::general)?;
        let mut segment = descriptor.segment(selector);
        let rpl = (selector & 3) as u8;
        let dpl = segment.dpl();
        let allowed = match (returning, is_conforming(&segment)) {
            (true, false) => dpl == rpl && rpl >= self.cpl,
            (true, true) => dpl <= rpl && rpl >= self.cpl,
            (false, false) => rpl <= self.cpl && dpl == self.cpl,
            (false, true) => dpl <= self.cpl,
        };
        let both_sizes = segment.access & (ACCESS_L | ACCESS_DB) == ACCESS_L | ACCESS_DB;
        if !is_code(&segment) || !allowed || (self.is_long() && both_sizes) {
            return Err(Fault::general(error).into());
        }
        if !is_present(&segment) {
            return Err(Fault::not_present(error).into());
        }
        self.mark_accessed(&descriptor)?;
        segment.access |= 1;
        let level = if returning { rpl } else { self.cpl };
        segment.selector = (selector & !3) | u16::from(level);
        Ok(segment)
    }

    /// Checks the code segment that an interrupt gate names; returns it and the new level.
    pub(crate) fn check_gate_segment(
        &mut self,
        selector: u16,
        external: u32,
    ) -> Result<(Segment, u8), Stop> {
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::general(external).into());
        }
        let descriptor = self
            .table_entry(selector)?
            .ok_or_else(|| Fault::general(error | external))?;
        let mut segment = descriptor.segment(selector);
        let dpl = segment.dpl();
        let wrong_size = self.is_long() && segment.access & (ACCESS_L | ACCESS_DB) != ACCESS_L;
        if !is_code(&segment) || dpl > self.cpl || wrong_size {
            return Err(Fault::general(error | external).into());
        }
        if !is_present(&segment) {
            return Err(Fault::not_present(error | external).into());
        }
        self.mark_accessed(&descriptor)?;
        segment.access |= 1;
        let level = if is_conforming(&segment) {
            self.cpl
        } else {
            dpl
        };
        segment.selector = (selector & !3) | u16::from(level);
        Ok((segment, level))
    }

    /// LTR.
    pub(crate) fn load_task_register(&mut self, selector: u16) -> Result<(), Stop> {
        const BUSY: u64 = 1 << 41;
        let error = selector_error(selector);
        if error == 0 {
            return Err(Fault::general(0).into());
        }
        if selector & 4 != 0 {
            return Err(Fault::general(error).into());
        }
        let descriptor = self.system_descriptor(selector)?;
        let mut segment = descriptor.segment(selector);
        let available = segment.access & (ACCESS_S | 0xf);
        if available != 9 && (available != 1 || self.is_long()) {
            return Err(Fault::general(error).into());
        }
        if !is_present(&segment) {
            return Err(Fault::not_present(error).into());
        }
        self.write_number(descriptor.address, descriptor.raw | BUSY, 8, false)?;
        segment.access |= 2;
        self.sys.tr = segment;
        Ok(())
    }

    /// LLDT.
    pub(crate) fn load_ldt(&mut self, selector: u16) -> Result<(), Stop> {
        let error = selector_error(selector);
        if error == 0 {
            self.sys.ldtr = null_segment(selector);
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(Fault::general(error).into());
        }
        let descriptor = self.system_descriptor(selector)?;
        let segment = descriptor.segment(selector);
        if segment.access & (ACCESS_S | 0xf) != 2 {
            return Err(Fault::general(error).into());
        }
        if !is_present(&segment) {
            return Err(Fault::not_present(error).into());
        }
        self.sys.ldtr = segment;
        Ok(())
    }

    /// Enters code segment `segment`; its selector's RPL becomes the privilege level.
    pub(crate) fn enter_code_segment(&mut self, segment: Segment) {
        self.sys.segments[CS] = segment;
        self.hot_mut().seg_base[CS] = segment.base;
        self.set_cpl((segment.selector & 3) as u8);
    }

    /// Changes the privilege level.
    pub(crate) fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        if cpl == 3 {
            self.windows.enter_user();
        }
        self.mode_changed();
    }

    /// A return to an outer level nulls data segments that it may not use, and all of a null selector
    /// (SDM 3A §5.8.3, SDM 2A, IRET).
    pub(crate) fn drop_privileged_segments(&mut self) {
        for index in [ES, DS, FS, GS] {
            let segment = self.sys.segments[index];
            let conforming = is_code(&segment) && is_conforming(&segment);
            let usable = segment.access & ACCESS_UNUSABLE == 0;
            let privileged = usable && segment.dpl() < self.cpl && !conforming;
            if privileged || matches!(segment.selector, 1..=3) {
                let base = self.segment_base(index);
                let kept = if index == FS || index == GS { base } else { 0 };
                let gone = Segment {
                    base: kept,
                    ..null_segment(0)
                };
                self.set_segment(index, gone);
            }
        }
    }

    /// LAR, LSL, VERR, VERW: the segment that a selector names, if the current level may see it.
    pub(crate) fn visible_segment(
        &mut self,
        selector: u16,
        system_types: &[u32],
    ) -> Result<Option<(Segment, u32)>, Stop> {
        if selector & 0xfffc == 0 {
            return Ok(None);
        }
        let Some(descriptor) = self.table_entry(selector)? else {
            return Ok(None);
        };
        let segment = descriptor.segment(selector);
        let rpl = (selector & 3) as u8;
        let conforming = is_code(&segment) && is_conforming(&segment);
        if !conforming && segment.dpl() < rpl.max(self.cpl) {
            return Ok(None);
        }
        if segment.access & ACCESS_S == 0 && !system_types.contains(&(segment.access & 0xf)) {
            return Ok(None);
        }
        let rights = low32(descriptor.raw >> 32) & 0x00ff_ff00;
        Ok(Some((segment, rights)))
    }

    /// VERR or VERW.
    pub(crate) fn verify_segment(&mut self, selector: u16, write: bool) -> Result<bool, Stop> {
        let found = self.visible_segment(selector, &[])?;
        Ok(found.is_some_and(|(segment, _)| {
            if write {
                is_writable_data(&segment)
            } else {
                is_readable(&segment)
            }
        }))
    }
}
