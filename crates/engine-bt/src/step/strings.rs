//! String instructions, page by page.
//!
//! A repeated instruction is restartable after any element: the count and the pointers are kept
//! up to date, so a fault in the middle leaves exactly what a processor leaves (SDM 2B, REP). Runs
//! of elements inside one page of RAM on each side are moved at once.

// UNSAFETY: moves guest memory.
#![expect(unsafe_code, reason = "guest memory is reached by pointer")]

use std::arch::asm;

use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use ringfence_x86::state::DS;
use ringfence_x86::state::ES;
use ringfence_x86::state::FS;

use crate::access::Place;
use crate::access::Span;
use crate::core::Core;
use crate::core::flag;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::gate::ARITHMETIC_FLAGS;
use crate::step::Flow;
use crate::step::segment_index;
use crate::walk::Access;

const RSI: usize = 6;
const RDI: usize = 7;

/// Elements after which a repeated instruction looks for interrupts.
const BATCH: u64 = 1 << 16;

/// One string instruction, taken apart.
#[derive(Clone, Copy)]
struct Shape {
    operation: Operation,
    /// Bytes of an element.
    size: usize,
    /// Width of RSI, RDI and RCX.
    address_bits: u32,
    /// Segment of the source.
    segment: usize,
    repeat: Repeat,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Move,
    Store,
    Load,
    Compare,
    Scan,
    In,
    Out,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    Count,
    WhileEqual,
    WhileNotEqual,
}

impl Shape {
    fn of(instruction: &Instruction) -> Option<Self> {
        use Mnemonic as M;
        let (operation, size) = match instruction.mnemonic() {
            M::Movsb => (Operation::Move, 1),
            M::Movsw => (Operation::Move, 2),
            M::Movsd => (Operation::Move, 4),
            M::Movsq => (Operation::Move, 8),
            M::Stosb => (Operation::Store, 1),
            M::Stosw => (Operation::Store, 2),
            M::Stosd => (Operation::Store, 4),
            M::Stosq => (Operation::Store, 8),
            M::Lodsb => (Operation::Load, 1),
            M::Lodsw => (Operation::Load, 2),
            M::Lodsd => (Operation::Load, 4),
            M::Lodsq => (Operation::Load, 8),
            M::Cmpsb => (Operation::Compare, 1),
            M::Cmpsw => (Operation::Compare, 2),
            M::Cmpsd => (Operation::Compare, 4),
            M::Cmpsq => (Operation::Compare, 8),
            M::Scasb => (Operation::Scan, 1),
            M::Scasw => (Operation::Scan, 2),
            M::Scasd => (Operation::Scan, 4),
            M::Scasq => (Operation::Scan, 8),
            M::Insb => (Operation::In, 1),
            M::Insw => (Operation::In, 2),
            M::Insd => (Operation::In, 4),
            M::Outsb => (Operation::Out, 1),
            M::Outsw => (Operation::Out, 2),
            M::Outsd => (Operation::Out, 4),
            _ => return None,
        };
        let compares = matches!(operation, Operation::Compare | Operation::Scan);
        let repeat = if instruction.has_repne_prefix() {
            if compares {
                Repeat::WhileNotEqual
            } else {
                Repeat::Count
            }
        } else if instruction.has_rep_prefix() {
            if compares {
                Repeat::WhileEqual
            } else {
                Repeat::Count
            }
        } else {
            Repeat::Once
        };
        Some(Self {
            operation,
            size,
            address_bits: address_bits(instruction),
            segment: segment_index(instruction.memory_segment()).unwrap_or(DS),
            repeat,
        })
    }
}

fn address_bits(instruction: &Instruction) -> u32 {
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => return 16,
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => return 32,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => return 64,
            _ => {}
        }
    }
    64
}

impl Core {
    /// Executes a string instruction or XLATB.
    pub(super) fn execute_string(&mut self, instruction: &Instruction) -> Result<Flow, Stop> {
        if instruction.mnemonic() == Mnemonic::Xlatb {
            let address = self.operand_address(instruction, 0, 1, Access::Read)?;
            let value = self.read_number(address, 1, self.is_user())?;
            self.write_register(iced_x86::Register::AL, value);
            return Ok(Flow::Next);
        }
        let mut shape = Shape::of(instruction).ok_or_else(Fault::undefined)?;
        if self.is_64bit() && shape.segment < FS {
            shape.segment = DS;
        }
        if matches!(shape.operation, Operation::In | Operation::Out) {
            self.check_port(self.port(), shape.size)?;
        }
        if shape.repeat == Repeat::Once {
            self.element(&shape)?;
            return Ok(Flow::Next);
        }
        self.repeat(&shape)
    }

    fn port(&self) -> u16 {
        (self.gpr(2) & 0xffff) as u16
    }

    fn mask(shape: &Shape) -> u64 {
        u64::MAX >> (64 - shape.address_bits)
    }

    fn repeat(&mut self, shape: &Shape) -> Result<Flow, Stop> {
        let mask = Self::mask(shape);
        // A single step is one element.
        let mut budget = if self.has(flag::TF) { 1 } else { BATCH };
        loop {
            let count = self.gpr(1) & mask;
            if count == 0 {
                if shape.address_bits == 32 && !self.shared.host.amd {
                    self.shorten_registers(shape);
                }
                return Ok(Flow::Next);
            }
            if budget == 0 || !self.exits.is_empty() {
                // Interrupts may be taken between elements; the instruction starts over.
                return Ok(Flow::Jumped);
            }
            let (done, stop) = self.elements(shape, count.min(budget))?;
            budget -= done.min(budget);
            self.write_counter(shape.address_bits, count - done);
            if stop {
                return Ok(Flow::Next);
            }
            if done > 0 {
                self.end_replay();
            }
        }
    }

    /// Intel's processors write 32-bit registers even when the count is zero: RCX always, the
    /// pointers of MOVS and STOS.
    fn shorten_registers(&mut self, shape: &Shape) {
        self.write_counter(32, 0);
        let pointers: &[usize] = match shape.operation {
            Operation::Move => &[RSI, RDI],
            Operation::Store => &[RDI],
            _ => &[],
        };
        for &register in pointers {
            self.set_gpr(register, self.gpr(register) & 0xffff_ffff);
        }
    }

    /// Handles some elements, at least one: how many, and whether the condition ended it.
    fn elements(&mut self, shape: &Shape, count: u64) -> Result<(u64, bool), Stop> {
        if !self.has(flag::DF)
            && let Some(done) = self.bulk(shape, count)?
        {
            return Ok((done, false));
        }
        self.element(shape)?;
        let equal = self.hot().flags & (1 << 6) != 0;
        let ended = match shape.repeat {
            Repeat::WhileEqual => !equal,
            Repeat::WhileNotEqual => equal,
            Repeat::Once | Repeat::Count => false,
        };
        Ok((1, ended))
    }

    fn pointer(&mut self, index: usize, shape: &Shape, access: Access) -> Result<u64, Stop> {
        let segment = if index == RDI { ES } else { shape.segment };
        let offset = self.gpr(index) & Self::mask(shape);
        let base = self.register_value(SEGMENTS[segment]).unwrap_or(0);
        self.check_segment(segment, base.wrapping_add(offset), shape.size, access)
    }

    fn advance(&mut self, index: usize, shape: &Shape, elements: u64) {
        let by = elements.wrapping_mul(shape.size as u64);
        let by = if self.has(flag::DF) {
            by.wrapping_neg()
        } else {
            by
        };
        let value = self.gpr(index).wrapping_add(by);
        let merged = match shape.address_bits {
            16 => (self.gpr(index) & !0xffff) | (value & 0xffff),
            32 => value & 0xffff_ffff,
            _ => value,
        };
        self.set_gpr(index, merged);
    }

    /// A run of elements of MOVS or STOS within one page of RAM on each side; `None` when there
    /// is none.
    fn bulk(&mut self, shape: &Shape, count: u64) -> Result<Option<u64>, Stop> {
        if !matches!(shape.operation, Operation::Move | Operation::Store) {
            return Ok(None);
        }
        let to = self.pointer(RDI, shape, Access::Write)?;
        let mut elements = count.min(page_room(to) / shape.size as u64);
        let from = if shape.operation == Operation::Move {
            let from = self.pointer(RSI, shape, Access::Read)?;
            elements = elements.min(page_room(from) / shape.size as u64);
            Some(from)
        } else {
            None
        };
        if elements == 0 || (!self.is_64bit() && !self.has_flat_segments()) {
            return Ok(None);
        }
        let user = self.is_user();
        let source = match from.map(|from| self.locate_ram(from, Access::Read, user)) {
            Some(place) => match place? {
                Some((_, host)) => Some(host),
                None => return Ok(None),
            },
            None => None,
        };
        let Some((gpa, host)) = self.locate_ram(to, Access::Write, user)? else {
            return Ok(None);
        };
        let bytes = elements * shape.size as u64;
        // SAFETY: both runs lie within one page of RAM each.
        unsafe {
            match source {
                Some(source) => move_forwards(source, host, elements, shape.size),
                None => store_forwards(self.gpr(0), host, elements, shape.size),
            }
        }
        self.wrote_ram(gpa, usize::try_from(bytes).unwrap_or(4096));
        self.advance(RDI, shape, elements);
        if source.is_some() {
            self.advance(RSI, shape, elements);
        }
        Ok(Some(elements))
    }

    fn element(&mut self, shape: &Shape) -> Result<(), Stop> {
        match shape.operation {
            Operation::Move => {
                let value = self.source_element(shape)?;
                self.store_element(shape, value)?;
                self.advance(RSI, shape, 1);
            }
            Operation::Store => self.store_element(shape, self.gpr(0))?,
            Operation::Load => {
                let value = self.source_element(shape)?;
                self.write_register(accumulator(shape.size), value);
                self.advance(RSI, shape, 1);
            }
            Operation::Compare => {
                let left = self.source_element(shape)?;
                let right = self.target_element(shape)?;
                self.compare(left, right, shape.size);
                self.advance(RSI, shape, 1);
                self.advance(RDI, shape, 1);
            }
            Operation::Scan => {
                let right = self.target_element(shape)?;
                self.compare(self.gpr(0), right, shape.size);
                self.advance(RDI, shape, 1);
            }
            Operation::In => self.in_element(shape)?,
            Operation::Out => {
                let value = self.source_element(shape)?;
                self.write_port(self.port(), &value.to_le_bytes()[..shape.size])?;
                self.advance(RSI, shape, 1);
            }
        }
        Ok(())
    }

    fn source_element(&mut self, shape: &Shape) -> Result<u64, Stop> {
        let at = self.pointer(RSI, shape, Access::Read)?;
        self.read_number(at, shape.size, self.is_user())
    }

    fn target_element(&mut self, shape: &Shape) -> Result<u64, Stop> {
        let at = self.pointer(RDI, shape, Access::Read)?;
        self.read_number(at, shape.size, self.is_user())
    }

    fn store_element(&mut self, shape: &Shape, value: u64) -> Result<(), Stop> {
        let at = self.pointer(RDI, shape, Access::Write)?;
        self.write_number(at, value, shape.size, self.is_user())?;
        self.advance(RDI, shape, 1);
        Ok(())
    }

    fn in_element(&mut self, shape: &Shape) -> Result<(), Stop> {
        // The destination is checked before the port is read: a fault must not lose the value.
        let at = self.pointer(RDI, shape, Access::Write)?;
        let span: Span = self.span(at, shape.size, Access::Write, self.is_user())?;
        let mut data = [0; 8];
        self.read_port(self.port(), &mut data[..shape.size])?;
        self.write_span(&span, &data[..shape.size])?;
        self.advance(RDI, shape, 1);
        Ok(())
    }

    /// Sets the flags as CMP does.
    fn compare(&mut self, left: u64, right: u64, size: usize) {
        let flags: u64;
        // Aligned to the top, a subtraction of narrow operands sets every flag as the narrow
        // instruction would, but for AF and PF, which look at the low bits.
        let shift = 64 - 8 * u32::try_from(size).unwrap_or(8);
        // SAFETY: computes flags from two registers.
        unsafe {
            asm!(
                "cmp {left}, {right}",
                "pushfq",
                "pop {flags}",
                left = in(reg) left << shift,
                right = in(reg) right << shift,
                flags = out(reg) flags,
            );
        }
        const AF: u64 = 1 << 4;
        const PF: u64 = 1 << 2;
        let difference = left.wrapping_sub(right);
        let parity = if (difference & 0xff).count_ones().is_multiple_of(2) {
            PF
        } else {
            0
        };
        let borrow = if (left & 0xf) < (right & 0xf) { AF } else { 0 };
        let flags = (flags & ARITHMETIC_FLAGS & !(AF | PF)) | parity | borrow;
        self.hot_mut().flags = flags;
    }

    /// RAM behind an address, or `None` for a device; `gpa` and host address.
    fn locate_ram(
        &mut self,
        address: u64,
        access: Access,
        user: bool,
    ) -> Result<Option<(u64, u64)>, Stop> {
        if let Some(host) = self.known_host(address, access, user) {
            let gpa = self.shared.ram.guest(host);
            return Ok(gpa.map(|gpa| (gpa, host)));
        }
        Ok(match self.locate(address, access, user)? {
            Place::Ram { gpa, host } => Some((gpa, host)),
            Place::Device(_) => None,
        })
    }
}

const SEGMENTS: [iced_x86::Register; 6] = [
    iced_x86::Register::ES,
    iced_x86::Register::CS,
    iced_x86::Register::SS,
    iced_x86::Register::DS,
    iced_x86::Register::FS,
    iced_x86::Register::GS,
];

fn accumulator(size: usize) -> iced_x86::Register {
    match size {
        1 => iced_x86::Register::AL,
        2 => iced_x86::Register::AX,
        4 => iced_x86::Register::EAX,
        _ => iced_x86::Register::RAX,
    }
}

fn page_room(address: u64) -> u64 {
    4096 - address % 4096
}

/// REP MOVS forwards: overlapping runs repeat their start, as the instruction defines.
///
/// # Safety
/// Both runs are RAM.
unsafe fn move_forwards(from: u64, to: u64, elements: u64, size: usize) {
    // SAFETY: the caller vouches for the runs.
    unsafe {
        match size {
            1 => {
                asm!("rep movsb", inout("rcx") elements => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            2 => {
                asm!("rep movsw", inout("rcx") elements => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            4 => {
                asm!("rep movsd", inout("rcx") elements => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            _ => {
                asm!("rep movsq", inout("rcx") elements => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
            }
        }
    }
}

/// REP STOS forwards.
///
/// # Safety
/// The run is RAM.
unsafe fn store_forwards(value: u64, to: u64, elements: u64, size: usize) {
    // SAFETY: the caller vouches for the run.
    unsafe {
        match size {
            1 => {
                asm!("rep stosb", inout("rcx") elements => _, in("rax") value, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            2 => {
                asm!("rep stosw", inout("rcx") elements => _, in("rax") value, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            4 => {
                asm!("rep stosd", inout("rcx") elements => _, in("rax") value, inout("rdi") to => _, options(nostack, preserves_flags));
            }
            _ => {
                asm!("rep stosq", inout("rcx") elements => _, in("rax") value, inout("rdi") to => _, options(nostack, preserves_flags));
            }
        }
    }
}
