//! Which memory accesses of a block share a probe.
//!
//! Compiled code reads and writes the same structure or stack frame many times in a row. Accesses
//! whose addresses differ by a constant are put in a *group*: the first one probes once for the
//! whole range and leaves a host pointer in a register, the others use the pointer. That needs
//! two things, both found here: which addresses differ by a constant (registers are tracked
//! symbolically, as an unknown origin plus a known offset), and a register to hold the pointer: T1
//! when nothing else needs it meanwhile, otherwise one that the block doesn't use, which then
//! waits in memory.
//!
//! A range that turns out to cross a page, or a write to a page that may only be read, leaves the
//! block for a translation of the same code without groups.

use iced_x86::Code;
use iced_x86::Instruction;
use iced_x86::InstructionInfoFactory;
use iced_x86::InstructionInfoOptions;
use iced_x86::Mnemonic;
use iced_x86::OpAccess;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::step::has_high_byte;
use crate::translate::Class;
use crate::translate::asm::Reg;
use crate::translate::asm::T1;
use crate::translate::decode::Item;
use crate::translate::rename::addresses;
use crate::translate::rename::mentions;

/// Longest range of a group in bytes. Longer ranges cross a page more often.
const MAX_RANGE: i64 = 256;
/// Groups that may hold a borrowed register at a time.
pub(crate) const MAX_BORROWED: usize = 3;
const RSP: usize = 4;
const RBP: usize = 5;

/// What a memory access of an item is in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Probed by itself.
    Alone,
    /// In a group, `delta` bytes from the start of its range.
    Member { group: usize, delta: i32 },
}

/// Accesses that share a probe.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Bytes of the range.
    pub len: u16,
    /// Something in it is written.
    pub writes: bool,
    /// Register that holds the host address of the range's start.
    pub pointer: Reg,
    /// Where the pointer's register waits meanwhile, if it is a guest's.
    pub slot: usize,
    /// Item that probes.
    pub first: usize,
    /// Last item that uses the pointer.
    pub last: usize,
    /// Alignment that all members and the range's length have, as a power of two.
    pub one_size: Option<u16>,
}

/// The plan for a block.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Roles of each item's accesses, at most two.
    pub roles: Vec<[Role; 2]>,
    pub groups: Vec<Group>,
}

/// An address as far as it is known: origins of base and index, scale, segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    base: Option<u32>,
    index: Option<(u32, u32)>,
    segment: Register,
    narrow: bool,
}

#[derive(Clone, Copy, Debug)]
struct Access {
    item: usize,
    which: usize,
    offset: i64,
    bytes: u16,
    write: bool,
}

/// What is known of each general register: origin and offset.
struct Symbols {
    values: [(u32, i64); 16],
    next: u32,
}

impl Symbols {
    fn new() -> Self {
        let mut values = [(0, 0); 16];
        for (number, value) in (0..).zip(&mut values) {
            value.0 = number;
        }
        // Origin 16 is the page's own address, for RIP-relative operands.
        Self { values, next: 17 }
    }

    fn forget(&mut self, number: usize) {
        self.values[number & 15] = (self.next, 0);
        self.next += 1;
    }

    fn shift(&mut self, number: usize, by: i64) {
        let value = &mut self.values[number & 15];
        value.1 = value.1.wrapping_add(by);
    }
}

const PAGE_ORIGIN: u32 = 16;

/// Plans a block. `plain` asks for no groups at all.
pub(crate) fn plan_block(
    items: &[Item],
    info: &mut InstructionInfoFactory,
    bits: u32,
    plain: bool,
) -> Plan {
    let mut plan = Plan {
        roles: vec![[Role::Alone; 2]; items.len()],
        groups: Vec::new(),
    };
    if plain {
        return plan;
    }
    let mut used = 0_u16;
    let families = collect(items, info, bits, &mut used);
    let mut candidates: Vec<Vec<Access>> = families
        .into_iter()
        .flat_map(|(_, accesses)| split(accesses))
        .filter(|members| members.len() > 1)
        .collect();
    candidates.sort_by_key(|members| (members[0].item, members[0].which));
    let mut registers = Registers::new(items, used);
    for members in candidates {
        plan.admit(&members, &mut registers);
    }
    plan
}

/// All accesses by address family, in order. A block has few families.
fn collect(
    items: &[Item],
    info: &mut InstructionInfoFactory,
    bits: u32,
    used: &mut u16,
) -> Vec<(Key, Vec<Access>)> {
    let mut symbols = Symbols::new();
    let mut families: Vec<(Key, Vec<Access>)> = Vec::new();
    let word = if bits == 64 { 8 } else { 4 };
    for (index, item) in items.iter().enumerate() {
        let accesses = accesses(item, &symbols, word);
        for (which, (key, offset, bytes, write)) in accesses.into_iter().flatten().enumerate() {
            let Some(key) = key else { continue };
            let access = Access {
                item: index,
                which,
                offset,
                bytes,
                write,
            };
            match families.iter_mut().find(|(known, _)| *known == key) {
                Some((_, members)) => members.push(access),
                None => families.push((key, vec![access])),
            }
        }
        follow(item, &mut symbols, info, word, used);
    }
    families
}

type Found = (Option<Key>, i64, u16, bool);

/// The accesses of an item in the order in which it makes them.
fn accesses(item: &Item, symbols: &Symbols, word: i64) -> [Option<Found>; 2] {
    let stack = |delta: i64, write: bool| {
        let (origin, offset) = symbols.values[RSP];
        let key = Key {
            base: Some(origin),
            index: None,
            segment: Register::None,
            narrow: false,
        };
        let bytes = u16::try_from(word).unwrap_or(8);
        (Some(key), offset.wrapping_add(delta), bytes, write)
    };
    let operand = |bytes: u16, write: bool| {
        let (key, offset) = operand_key(&item.instruction, symbols);
        (key, offset, bytes, write)
    };
    let bytes = u16::try_from(word).unwrap_or(8);
    let instruction = &item.instruction;
    match item.class {
        Class::Memory { bytes, write, .. } => [Some(operand(bytes, write)), None],
        Class::Push if instruction.op0_kind() == OpKind::Memory => {
            [Some(operand(bytes, false)), Some(stack(-word, true))]
        }
        Class::Push | Class::Call => [Some(stack(-word, true)), None],
        Class::CallIndirect if instruction.op0_kind() == OpKind::Memory => {
            [Some(operand(bytes, false)), Some(stack(-word, true))]
        }
        Class::CallIndirect => [Some((None, 0, bytes, false)), Some(stack(-word, true))],
        Class::JumpIndirect if instruction.op0_kind() == OpKind::Memory => {
            [Some(operand(bytes, false)), None]
        }
        Class::Pop | Class::Return => [Some(stack(0, false)), None],
        Class::Leave => {
            let (origin, offset) = symbols.values[RBP];
            let key = Key {
                base: Some(origin),
                index: None,
                segment: Register::None,
                narrow: false,
            };
            [Some((Some(key), offset, bytes, false)), None]
        }
        _ => [None, None],
    }
}

/// Family and offset of an explicit memory operand.
fn operand_key(instruction: &Instruction, symbols: &Symbols) -> (Option<Key>, i64) {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let narrow = base.is_gpr32() || index.is_gpr32();
    let disp = displacement(instruction, narrow);
    let segment = match instruction.memory_segment() {
        segment @ (Register::FS | Register::GS) => segment,
        _ => Register::None,
    };
    if instruction.is_ip_rel_memory_operand() {
        let key = Key {
            base: Some(PAGE_ORIGIN),
            index: None,
            segment,
            narrow: false,
        };
        return (Some(key), instruction.ip_rel_memory_address().cast_signed());
    }
    let value = |register: Register| symbols.values[register.number() & 15];
    let mut offset = disp;
    let mut key = Key {
        base: None,
        index: None,
        segment,
        narrow,
    };
    if narrow {
        // Offsets wrap at 32 bits: only equal addresses are recognised, by their registers'
        // exact values.
        if base != Register::None {
            let (origin, at) = value(base);
            key.base = Some(origin);
            offset = offset.wrapping_add(at);
        }
        if index != Register::None {
            let (origin, at) = value(index);
            if at != 0 {
                return (None, 0);
            }
            key.index = Some((origin, instruction.memory_index_scale()));
        }
        return (Some(key), offset);
    }
    if base != Register::None {
        let (origin, at) = value(base);
        key.base = Some(origin);
        offset = offset.wrapping_add(at);
    }
    if index != Register::None {
        let (origin, at) = value(index);
        let scale = instruction.memory_index_scale();
        key.index = Some((origin, scale));
        offset = offset.wrapping_add(at.wrapping_mul(i64::from(scale)));
    }
    (Some(key), offset)
}

/// The displacement, sign-extended from the width of the address.
fn displacement(instruction: &Instruction, narrow: bool) -> i64 {
    let disp = instruction.memory_displacement64();
    if narrow {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "32-bit addresses have 32 bits"
        )]
        let low = disp as u32;
        i64::from(low.cast_signed())
    } else {
        disp.cast_signed()
    }
}

/// Applies an item to the symbols and adds the registers it names to `used`.
fn follow(
    item: &Item,
    symbols: &mut Symbols,
    info: &mut InstructionInfoFactory,
    word: i64,
    used: &mut u16,
) {
    let instruction = &item.instruction;
    if item.class == Class::Nop {
        return;
    }
    let usage = info.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
    let mut written = 0_u16;
    for register in usage.used_registers() {
        let full = register.register().full_register();
        if !full.is_gpr64() {
            continue;
        }
        let bit = 1 << full.number();
        *used |= bit;
        let reads_only = matches!(
            register.access(),
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
        );
        if !reads_only {
            written |= bit;
        }
    }
    if follow_known(item, symbols, word, written) {
        return;
    }
    for number in (0..16).filter(|number| written & (1 << number) != 0) {
        symbols.forget(number);
    }
}

/// Handles the instructions whose result is a register plus a constant.
fn follow_known(item: &Item, symbols: &mut Symbols, word: i64, written: u16) -> bool {
    let instruction = &item.instruction;
    let forget_others = |symbols: &mut Symbols, known: usize| {
        for number in (0..16).filter(|&number| number != known && written & (1 << number) != 0) {
            symbols.forget(number);
        }
    };
    match item.class {
        Class::Push | Class::Call | Class::CallIndirect => symbols.shift(RSP, -word),
        Class::Pop => {
            let number = instruction.op0_register().number();
            symbols.shift(RSP, word);
            symbols.forget(number);
        }
        Class::Return => {}
        Class::Leave => {
            symbols.values[RSP] = symbols.values[RBP];
            symbols.shift(RSP, word);
            symbols.forget(RBP);
        }
        Class::Lea => return follow_lea(instruction, symbols, word),
        Class::Copy => {
            let to = instruction.op0_register();
            let whole = to.is_gpr64() || (word == 4 && to.is_gpr32());
            if !whole || instruction.op0_kind() != OpKind::Register {
                return false;
            }
            let number = to.number();
            match instruction.mnemonic() {
                Mnemonic::Mov if instruction.op1_kind() == OpKind::Register => {
                    symbols.values[number] =
                        symbols.values[instruction.op1_register().number() & 15];
                }
                Mnemonic::Add | Mnemonic::Sub if is_immediate(instruction) => {
                    let value = instruction.immediate(1).cast_signed();
                    let by = if instruction.mnemonic() == Mnemonic::Add {
                        value
                    } else {
                        value.wrapping_neg()
                    };
                    symbols.shift(number, by);
                }
                Mnemonic::Inc => symbols.shift(number, 1),
                Mnemonic::Dec => symbols.shift(number, -1),
                _ => return false,
            }
            forget_others(symbols, number);
        }
        _ => return false,
    }
    true
}

fn is_immediate(instruction: &Instruction) -> bool {
    !matches!(instruction.op1_kind(), OpKind::Register | OpKind::Memory)
}

fn follow_lea(instruction: &Instruction, symbols: &mut Symbols, word: i64) -> bool {
    let to = instruction.op0_register();
    let plain = instruction.memory_index() == Register::None
        && instruction.memory_base().is_gpr()
        && (if word == 8 {
            to.is_gpr64() && instruction.memory_base().is_gpr64()
        } else {
            to.is_gpr32() && instruction.memory_base().is_gpr32()
        });
    if !plain {
        return false;
    }
    let (origin, at) = symbols.values[instruction.memory_base().number() & 15];
    let disp = displacement(instruction, word == 4);
    symbols.values[to.number() & 15] = (origin, at.wrapping_add(disp));
    true
}

/// Cuts a family into runs of accesses that fit one range.
fn split(family: Vec<Access>) -> Vec<Vec<Access>> {
    let mut runs: Vec<(i64, i64, Vec<Access>)> = Vec::new();
    for access in family {
        let (from, to) = (
            access.offset,
            access.offset.wrapping_add(i64::from(access.bytes)),
        );
        let fitting = runs.iter_mut().find(|(low, high, _)| {
            let low = from.min(*low);
            let high = to.max(*high);
            high.wrapping_sub(low) <= MAX_RANGE && high > low
        });
        match fitting {
            Some((low, high, members)) => {
                *low = from.min(*low);
                *high = to.max(*high);
                members.push(access);
            }
            None => runs.push((from, to, vec![access])),
        }
    }
    runs.into_iter().map(|(_, _, members)| members).collect()
}

/// Registers that can hold pointers, and when.
struct Registers<'a> {
    items: &'a [Item],
    /// Registers that the block doesn't name.
    free: Vec<(Reg, Vec<(usize, usize)>)>,
    /// When T1 holds a pointer.
    scratch: Vec<(usize, usize)>,
}

impl<'a> Registers<'a> {
    fn new(items: &'a [Item], used: u16) -> Self {
        // R10 and R11 are the translator's, RSP is never borrowed; RAX parks flags and RCX, RDX
        // and others are implied by instructions, which `used` includes.
        const NEVER: u16 = 1 << 4 | 1 << 10 | 1 << 11 | 1;
        let free = (0..16)
            .filter(|number| (used | NEVER) & (1 << number) == 0)
            .take(MAX_BORROWED)
            .map(|number| (Reg(number), Vec::new()))
            .collect();
        Self {
            items,
            free,
            scratch: Vec::new(),
        }
    }

    /// T1 if it is idle over the span but for the group's own members.
    fn try_scratch(&mut self, first: usize, last: usize, members: &[Access]) -> Option<Reg> {
        let overlaps = self
            .scratch
            .iter()
            .any(|&(from, to)| from <= last && first <= to);
        if overlaps {
            return None;
        }
        let idle = (first..=last).all(|index| {
            let item = &self.items[index];
            let own = members.iter().filter(|access| access.item == index).count();
            let total = match item.class {
                Class::Push | Class::CallIndirect | Class::JumpIndirect
                    if item.instruction.op0_kind() == OpKind::Memory =>
                {
                    if item.class == Class::JumpIndirect {
                        1
                    } else {
                        2
                    }
                }
                Class::Memory { .. }
                | Class::Push
                | Class::Pop
                | Class::Leave
                | Class::Call
                | Class::CallIndirect
                | Class::Return
                | Class::JumpIndirect => 1,
                Class::BitString { .. } | Class::System | Class::String | Class::Step => 2,
                _ => 0,
            };
            let total = if matches!(item.class, Class::JumpIndirect)
                && item.instruction.op0_kind() != OpKind::Memory
            {
                0
            } else {
                total
            };
            own == total && !needs_scratch(item)
        });
        idle.then(|| {
            self.scratch.push((first, last));
            T1
        })
    }

    fn try_free(&mut self, first: usize, last: usize) -> Option<(Reg, usize)> {
        for (slot, (register, spans)) in self.free.iter_mut().enumerate() {
            if spans.iter().all(|&(from, to)| to < first || last < from) {
                spans.push((first, last));
                return Some((*register, slot));
            }
        }
        None
    }
}

/// Needs T1 beside its memory accesses.
fn needs_scratch(item: &Item) -> bool {
    let instruction = &item.instruction;
    let touches = |register| mentions(instruction, register) || addresses(instruction, register);
    touches(Register::R10)
        || touches(Register::R11)
        || has_high_byte(instruction)
        || matches!(instruction.code(), Code::INVALID)
}

impl Plan {
    /// Makes a group of `members` if a register can be found for its pointer.
    fn admit(&mut self, members: &[Access], registers: &mut Registers<'_>) {
        let first = members[0].item;
        let last = members[members.len() - 1].item;
        if first == last {
            return;
        }
        let pointer = registers
            .try_scratch(first, last, members)
            .map(|pointer| (pointer, 0))
            .or_else(|| {
                // A borrowed register costs a store and a load.
                (members.len() > 2 || members.iter().all(|access| access.write))
                    .then(|| registers.try_free(first, last))
                    .flatten()
            });
        let Some((pointer, slot)) = pointer else {
            return;
        };
        let low = members
            .iter()
            .map(|access| access.offset)
            .min()
            .unwrap_or(0);
        let high = members
            .iter()
            .map(|access| access.offset + i64::from(access.bytes))
            .max()
            .unwrap_or(0);
        let len = u16::try_from(high - low).unwrap_or(u16::MAX);
        let group = self.groups.len();
        for access in members {
            self.roles[access.item][access.which] = Role::Member {
                group,
                delta: i32::try_from(access.offset - low).unwrap_or(0),
            };
        }
        self.groups.push(Group {
            len,
            writes: members.iter().any(|access| access.write),
            pointer,
            slot,
            first,
            last,
            one_size: members
                .iter()
                .all(|access| access.bytes == len)
                .then_some(len),
        });
    }

    /// The group that `item` probes for with access `which`.
    pub(crate) fn opens(&self, item: usize, which: usize) -> Option<usize> {
        match self.roles[item][which] {
            Role::Member { group, .. } if self.groups[group].first == item => {
                // Only the first of an item's two accesses can open a group it shares.
                let earlier = which == 1
                    && matches!(self.roles[item][0], Role::Member { group: other, .. } if other == group);
                (!earlier).then_some(group)
            }
            _ => None,
        }
    }

    /// Registers borrowed before `item` and still held at it, or opened by it.
    pub(crate) fn borrowed_at(&self, item: usize) -> impl Iterator<Item = &Group> + '_ {
        self.groups
            .iter()
            .filter(move |group| group.pointer != T1 && group.first <= item && item <= group.last)
    }
}
