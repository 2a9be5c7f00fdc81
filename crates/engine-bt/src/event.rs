//! Exceptions and interrupts on their way into the guest (SDM 3A §6).

use ringfence_engine::VcpuExit;
use ringfence_x86::state::ACCESS_P;
use ringfence_x86::state::CS;
use ringfence_x86::state::SS;
use ringfence_x86::state::Segment;

use crate::core::Core;
use crate::core::flag;
use crate::core::is_canonical;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::fault::vector;
use crate::segment::null_segment;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception: faults push RF.
    Exception,
    /// An interrupt or NMI.
    External,
    /// INT n, INT3, INTO: the gate's privilege is checked.
    Software,
}

/// Bit 0 of an error code: the event that led to this fault was external to the program.
const ERROR_EXTERNAL: u32 = 1;
/// Bit 1 of an error code: it names an IDT entry.
const ERROR_IDT: u32 = 2;

struct Gate {
    selector: u16,
    offset: u64,
    ist: u8,
    kind: u8,
}

impl Core {
    /// Raises an exception, with double and triple faults (SDM 3A §6.15, interrupt 8).
    pub(crate) fn raise(&mut self, fault: Fault) -> Result<(), Stop> {
        let mut current = fault;
        loop {
            self.remote.counters.exceptions.bump();
            if current.vector == vector::PAGE {
                self.hot_mut().cr2 = current.address;
            }
            match self.deliver(current.vector, current.error, Source::Exception) {
                Err(Stop::Fault(next)) => current = escalate(current, next)?,
                other => return other,
            }
        }
    }

    /// Delivers an interrupt; a fault on the way is raised instead.
    pub(crate) fn interrupt(&mut self, number: u8, source: Source) -> Result<(), Stop> {
        if number == vector::DEBUG {
            // One exception tells of all that it could.
            self.touched.clear();
        }
        match self.deliver(number, None, source) {
            Err(Stop::Fault(fault)) if source == Source::External => self.raise(fault),
            other => other,
        }
    }

    fn deliver(&mut self, number: u8, error: Option<u32>, source: Source) -> Result<(), Stop> {
        if self.is_real() {
            return self.deliver_real(number);
        }
        let external = if source == Source::Software {
            0
        } else {
            ERROR_EXTERNAL
        };
        let gate = self.gate(number, source, external)?;
        let (code, level) = self.check_gate_segment(gate.selector, external)?;
        if self.is_long() {
            self.deliver_long(&gate, code, level, error, source, external)
        } else {
            self.deliver_protected(&gate, code, level, error, source, external)
        }
    }

    /// Reads and checks the IDT entry.
    fn gate(&mut self, number: u8, source: Source, external: u32) -> Result<Gate, Stop> {
        let named = u32::from(number) * 8 + ERROR_IDT + external;
        let size = if self.is_long() { 16 } else { 8 };
        let offset = u32::from(number) * size;
        if offset + size - 1 > u32::from(self.sys.idt.limit) {
            return Err(Fault::general(named).into());
        }
        let address = self.sys.idt.base.wrapping_add(u64::from(offset));
        let low = self.read_number(address, 8, false)?;
        let high = if size == 16 {
            self.read_number(address.wrapping_add(8), 4, false)?
        } else {
            0
        };
        let access = ((low >> 40) & 0xff) as u8;
        let kind = access & 0x1f;
        let known = if self.is_long() {
            matches!(kind, 0xe | 0xf)
        } else {
            matches!(kind, 0x6 | 0x7 | 0xe | 0xf)
        };
        let dpl = (access >> 5) & 3;
        if !known || (source == Source::Software && dpl < self.cpl) {
            return Err(Fault::general(named).into());
        }
        if u32::from(access) & ACCESS_P == 0 {
            return Err(Fault::not_present(named).into());
        }
        let mut target = (low & 0xffff) | ((low >> 32) & 0xffff_0000) | (high << 32);
        if kind & 8 == 0 {
            target &= 0xffff;
        }
        Ok(Gate {
            selector: ((low >> 16) & 0xffff) as u16,
            offset: target,
            ist: ((low >> 32) & 7) as u8,
            kind,
        })
    }

    /// The flags image that an event pushes.
    fn pushed_flags(&self, source: Source) -> u64 {
        let flags = self.rflags();
        if source == Source::Exception {
            flags | flag::RF
        } else {
            flags
        }
    }

    fn deliver_long(
        &mut self,
        gate: &Gate,
        code: Segment,
        level: u8,
        error: Option<u32>,
        source: Source,
        external: u32,
    ) -> Result<(), Stop> {
        let inner = level != self.cpl;
        let top = if gate.ist != 0 {
            self.tss_stack(0x24 + 8 * u64::from(gate.ist - 1))?
        } else if inner {
            self.tss_stack(4 + 8 * u64::from(level))?
        } else {
            self.gpr(4)
        };
        if !is_canonical(top) {
            return Err(Fault::stack(external).into());
        }
        if !is_canonical(gate.offset) {
            return Err(Fault::general(external).into());
        }
        let frame = [
            self.rip,
            u64::from(self.sys.segments[CS].selector),
            self.pushed_flags(source),
            self.gpr(4),
            u64::from(self.sys.segments[SS].selector),
        ];
        let mut bytes = Vec::with_capacity(48);
        if let Some(error) = error {
            bytes.extend_from_slice(&u64::from(error).to_le_bytes());
        }
        for word in frame {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let rsp = (top & !15).wrapping_sub(bytes.len() as u64);
        // The frame is written with the new level's rights. Level 1 and 2 are supervisor too. The
        // word that is pushed first is the one that faults first.
        let first_push = rsp.wrapping_add(bytes.len() as u64 - 8);
        self.span(first_push, 8, crate::walk::Access::Write, level == 3)?;
        self.write_virtual(rsp, &bytes, level == 3)?;
        if inner {
            self.set_segment(SS, null_segment(u16::from(level)));
        }
        self.set_gpr(4, rsp);
        self.enter_handler(gate, code);
        Ok(())
    }

    /// A stack pointer out of the 64-bit TSS.
    fn tss_stack(&mut self, offset: u64) -> Result<u64, Stop> {
        let tr = self.sys.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(Fault::invalid_tss(crate::segment::selector_error(tr.selector)).into());
        }
        self.read_number(tr.base.wrapping_add(offset), 8, false)
    }

    fn enter_handler(&mut self, gate: &Gate, code: Segment) {
        let mut flags = self.rflags() & !(flag::TF | flag::NT | flag::RF | flag::VM);
        // Interrupt gates have type 6 or 14, trap gates 7 or 15.
        if gate.kind & 1 == 0 {
            flags &= !flag::IF;
        }
        self.enter_code_segment(code);
        self.set_rflags(flags);
        self.rip = gate.offset;
        self.shadow = false;
        self.activity = ringfence_x86::state::Activity::Running;
    }

    fn deliver_protected(
        &mut self,
        gate: &Gate,
        code: Segment,
        level: u8,
        error: Option<u32>,
        source: Source,
        external: u32,
    ) -> Result<(), Stop> {
        let width = if gate.kind & 8 != 0 { 4 } else { 2 };
        let inner = level != self.cpl;
        let from_v86 = self.has(flag::VM);
        if from_v86 && level != 0 {
            let error = crate::segment::selector_error(gate.selector);
            return Err(Fault::general(error | external).into());
        }
        let mut words = Vec::with_capacity(11);
        if from_v86 {
            use ringfence_x86::state::{DS, ES, FS, GS};
            for index in [GS, FS, DS, ES] {
                words.push(u64::from(self.sys.segments[index].selector));
            }
        }
        let stack = if inner {
            let (selector, pointer) = self.tss_stack_protected(level)?;
            let segment = self.check_stack_segment(selector, level, Fault::invalid_tss)?;
            words.push(u64::from(self.sys.segments[SS].selector));
            words.push(self.gpr(4));
            Some((segment, pointer))
        } else {
            None
        };
        words.push(self.pushed_flags(source));
        words.push(u64::from(self.sys.segments[CS].selector));
        words.push(self.rip);
        words.extend(error.map(u64::from));
        let (segment, top) = stack.unwrap_or_else(|| (self.sys.segments[SS], self.gpr(4)));
        let wide = segment.access & ringfence_x86::state::ACCESS_DB != 0;
        let mask = if wide { 0xffff_ffff } else { 0xffff };
        let mut pointer = top & mask;
        for word in words {
            pointer = pointer.wrapping_sub(width) & mask;
            let at = segment.base.wrapping_add(pointer) & 0xffff_ffff;
            let bytes = usize::try_from(width).unwrap_or(4);
            self.write_number(at, word, bytes, level == 3)?;
        }
        self.set_segment(SS, segment);
        let kept = self.gpr(4) & !mask;
        self.set_gpr(4, kept | pointer);
        if from_v86 {
            use ringfence_x86::state::{DS, ES, FS, GS};
            for index in [GS, FS, DS, ES] {
                self.set_segment(index, null_segment(0));
            }
        }
        self.enter_handler(gate, code);
        Ok(())
    }

    /// Stack selector and pointer for `level` out of a 32- or 16-bit TSS.
    fn tss_stack_protected(&mut self, level: u8) -> Result<(u16, u64), Stop> {
        let tr = self.sys.tr;
        let wide = tr.access & 8 != 0;
        let (offset, width) = if wide {
            (4 + 8 * u64::from(level), 4)
        } else {
            (2 + 4 * u64::from(level), 2)
        };
        if offset + 2 * width > u64::from(tr.limit) + 1 {
            return Err(Fault::invalid_tss(crate::segment::selector_error(tr.selector)).into());
        }
        let bytes = usize::try_from(width).unwrap_or(4);
        let pointer = self.read_number(tr.base.wrapping_add(offset), bytes, false)?;
        let selector = self.read_number(tr.base.wrapping_add(offset + width), 2, false)?;
        Ok(((selector & 0xffff) as u16, pointer))
    }

    fn deliver_real(&mut self, number: u8) -> Result<(), Stop> {
        let offset = u32::from(number) * 4;
        if offset + 3 > u32::from(self.sys.idt.limit) {
            return Err(Fault::general(u32::from(number) * 8 + ERROR_IDT).into());
        }
        let entry =
            self.read_number(self.sys.idt.base.wrapping_add(u64::from(offset)), 4, false)?;
        let words = [
            self.rflags(),
            u64::from(self.sys.segments[CS].selector),
            self.rip,
        ];
        for word in words {
            let pointer = self.gpr(4).wrapping_sub(2) & 0xffff;
            let at = self.segment_base(SS).wrapping_add(pointer);
            self.write_number(at, word, 2, false)?;
            let kept = self.gpr(4) & !0xffff;
            self.set_gpr(4, kept | pointer);
        }
        let flags = self.rflags() & !(flag::IF | flag::TF | flag::RF | flag::AC);
        self.set_rflags(flags);
        self.load_real_segment(CS, ((entry >> 16) & 0xffff) as u16);
        self.rip = entry & 0xffff;
        self.shadow = false;
        self.activity = ringfence_x86::state::Activity::Running;
        Ok(())
    }
}

/// What two exceptions in a row make.
fn escalate(first: Fault, second: Fault) -> Result<Fault, Stop> {
    if first.vector == vector::DOUBLE_FAULT {
        return Err(Stop::Exit(VcpuExit::Shutdown));
    }
    let first_page = first.vector == vector::PAGE;
    let second_page = second.vector == vector::PAGE;
    let double = (first.is_contributory() && second.is_contributory())
        || (first_page && (second_page || second.is_contributory()));
    if double {
        return Ok(Fault {
            vector: vector::DOUBLE_FAULT,
            error: Some(0),
            address: 0,
        });
    }
    Ok(second)
}
