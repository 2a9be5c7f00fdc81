//! Where the arithmetic flags are dead.
//!
//! Backwards over the block: a flag is live where the block is left (unless the code that follows
//! is in the same page and overwrites it at once), an instruction that surely writes a flag kills
//! it, and one that reads it revives it. A flag that an instruction leaves *undefined* isn't killed:
//! the host may leave it alone, and the result must be what the host gives.
//!
//! An exception between a probe and the instruction that overwrites the flags shows its handler
//! flags that the program can't have been interested in; see DESIGN.md.

use iced_x86::Decoder;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::RflagsBits;

use crate::step::decoder_options;
use crate::translate::Class;
use crate::translate::PAGE_BYTES;
use crate::translate::Request;
use crate::translate::decode::Item;
use crate::translate::decode::leaves;
use crate::translate::decode::target;

/// Flags by iced-x86's bits.
const ARITHMETIC: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// Instructions that are looked at behind a jump.
const LOOKAHEAD: usize = 6;

/// For each instruction, which flags something still reads that follow or are it; and the parts of
/// the page beyond the block that this depends on.
pub(crate) fn live_before(request: &Request<'_>, items: &[Item]) -> (Vec<u32>, u64) {
    let mut seen = 0;
    let mut live = vec![ARITHMETIC; items.len()];
    let end = items.last().map_or(0, |item| {
        i64::from(item.offset) + i64::try_from(item.instruction.len()).unwrap_or(0)
    });
    let mut after = live_at(request, end, &mut seen);
    for (index, item) in items.iter().enumerate().rev() {
        after = match item.class {
            // Left to the monitor, or for another page.
            Class::System if leaves(&item.instruction) => ARITHMETIC,
            // PUSHF shows all flags.
            Class::System if item.instruction.mnemonic() == Mnemonic::Pushfq => ARITHMETIC,
            Class::Step | Class::JumpIndirect | Class::CallIndirect | Class::Return => ARITHMETIC,
            Class::Jump | Class::Call => live_at(request, target(item), &mut seen),
            Class::Conditional | Class::Counted => {
                let taken = live_at(request, target(item), &mut seen);
                after | taken | item.instruction.rflags_read() & ARITHMETIC
            }
            _ => {
                let instruction = &item.instruction;
                let read = instruction.rflags_read() & ARITHMETIC;
                (after & !killed(instruction)) | read
            }
        };
        live[index] = after;
    }
    (live, seen)
}

/// Flags that the code at `offset` reads before it writes them, as far as it is in this page.
fn live_at(request: &Request<'_>, offset: i64, seen: &mut u64) -> u32 {
    let Some(start) = usize::try_from(offset).ok().filter(|&at| at < PAGE_BYTES) else {
        return ARITHMETIC;
    };
    let mut decoder = Decoder::with_ip(
        request.mode.bits(),
        &request.page[start..PAGE_BYTES],
        start as u64,
        decoder_options(request.host.amd),
    );
    let mut live = 0;
    let mut open = ARITHMETIC;
    for _ in 0..LOOKAHEAD {
        if !decoder.can_decode() {
            break;
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() || instruction.flow_control() != FlowControl::Next {
            live |= instruction.rflags_read() & open;
            break;
        }
        live |= instruction.rflags_read() & open;
        open &= !killed(&instruction);
        if open & !live == 0 {
            break;
        }
    }
    let end = usize::try_from(decoder.ip()).unwrap_or(start).min(4096);
    for part in start / 64..=(end.max(start + 1) - 1) / 64 {
        *seen |= 1 << part;
    }
    live | open
}

/// Flags that `instruction` surely defines.
fn killed(instruction: &Instruction) -> u32 {
    if is_conditional_writer(instruction) {
        return 0;
    }
    (instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set())
        & !instruction.rflags_undefined()
        & ARITHMETIC
}

/// Shifts and rotates leave all flags alone when their count is zero, repeated comparisons when
/// theirs is.
fn is_conditional_writer(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    if instruction.is_string_instruction() {
        return true;
    }
    let shifts = matches!(
        instruction.mnemonic(),
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    );
    if !shifts {
        return false;
    }
    let count = instruction.op_count() - 1;
    match instruction.op_kind(count) {
        OpKind::Register => true,
        _ => instruction.immediate(count) & 0x1f == 0,
    }
}
