//! What must be the same on both sides.

use iced_x86::CpuidFeature;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::state::State;
use crate::state::UPPER;
use crate::state::XSTATE_BV;

/// The exception that a case's last instruction, `int3`, raises.
pub const END: u64 = 3;
/// First address that no program of the host's has.
const TASK_END: u64 = 0x7fff_ffff_f000;
const PAGE_FAULT: u64 = 14;
/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;
/// DF, NT, AC and ID.
const OTHERS: u64 = 1 << 10 | 1 << 14 | 1 << 18 | 1 << 21;

/// MXCSR's exception flags. VCVTPS2PH, the only store that computes, sets them on some processors
/// before its page fault, and then again.
const MXCSR_FLAGS: u64 = 0x3f;

/// A state's differences to the native one, in words; empty when there are none. `last` is the
/// instruction that the native one ended at.
#[must_use]
pub fn differences(native: &State, guest: &State, last: Option<&Instruction>) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, native: u64, guest: u64| {
        if native != guest {
            found.push(format!("{what}: native {native:#x}, bt {guest:#x}"));
        }
    };
    compare("exception", native.trap, guest.trap);
    let short = native.trap != END && last.is_some_and(is_short_string);
    for (index, (&native, &guest)) in (0_u32..).zip(native.gpr.iter().zip(&guest.gpr)) {
        let register = Register::RAX + index;
        let moves = matches!(register, Register::RCX | Register::RSI | Register::RDI);
        let bits = if short && moves {
            0xffff_ffff
        } else {
            u64::MAX
        };
        compare(&format!("{register:?}"), native & bits, guest & bits);
    }
    compare("RIP", native.rip, guest.rip);
    // An exception shows flags that the code behind it overwrites; there bt may show others.
    let flags = if native.trap == END {
        ARITHMETIC | OTHERS
    } else {
        OTHERS
    };
    compare("flags", native.rflags & flags, guest.rflags & flags);
    compare("FS base", native.fs_base, guest.fs_base);
    compare("GS base", native.gs_base, guest.gs_base);
    if native.trap == guest.trap && has_error(native.trap) {
        // What the kernel's half maps for itself is the host's business, and so is the last page
        // below it, which no program may have.
        let present = u64::from(native.trap == PAGE_FAULT && native.cr2 >= TASK_END);
        compare(
            "error code",
            native.error & !present,
            guest.error & !present,
        );
    }
    if native.trap == PAGE_FAULT && guest.trap == PAGE_FAULT {
        // Masked moves name the page, but not always its first byte that they want.
        let known = if last.is_some_and(is_masked_move) {
            !0xfff
        } else {
            u64::MAX
        };
        compare("CR2", native.cr2 & known, guest.cr2 & known);
    }
    let converts =
        native.trap != END && last.is_some_and(|last| last.mnemonic() == Mnemonic::Vcvtps2ph);
    let mxcsr = |state| word(state, 24, 4) & !if converts { MXCSR_FLAGS } else { 0 };
    compare("MXCSR", mxcsr(native), mxcsr(guest));
    let enters_mmx = native.trap != END && last.is_some_and(is_mmx);
    x87_differences(native, guest, enters_mmx, &mut found);
    vector_differences(native, guest, &mut found);
    found
}

/// A string instruction with 32-bit registers. When it faults before its first element, some processors
/// have cleared the upper halves already.
fn is_short_string(instruction: &Instruction) -> bool {
    let short = (0..instruction.op_count()).any(|operand| {
        matches!(
            instruction.op_kind(operand),
            OpKind::MemoryESEDI | OpKind::MemorySegESI | OpKind::MemorySegEDI
        )
    });
    instruction.is_string_instruction() && short
}

fn is_masked_move(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
    )
}

/// Goes over to MMX state: TOP becomes 0, all registers valid (SDM 1 §9.5.1). When it faults, that
/// has happened on some processors and not on others; the same instruction does it again.
fn is_mmx(instruction: &Instruction) -> bool {
    let register = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_mm()
    });
    register || instruction.cpuid_features().contains(&CpuidFeature::MMX)
}

fn has_error(trap: u64) -> bool {
    matches!(trap, 8 | 10..=14 | 17)
}

fn word(state: &State, at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&state.xsave[at..at + len]);
    u64::from_le_bytes(bytes)
}

/// A word of a component; one that isn't marked as in use has its first value.
fn component(state: &State, component: u8, at: usize, len: usize) -> u64 {
    if state.xsave[XSTATE_BV] & (1 << component) != 0 {
        word(state, at, len)
    } else if component == 0 && at == 0 {
        0x37f
    } else {
        0
    }
}

/// With `enters_mmx`, TOP and tags may differ; the registers are compared where they lie.
fn x87_differences(native: &State, guest: &State, enters_mmx: bool, found: &mut Vec<String>) {
    const TOP: u64 = 7 << 11;
    let value = |state: &State, at, len| component(state, 0, at, len);
    let mut compare = |what: String, native: u64, guest: u64| {
        if native != guest {
            found.push(format!("{what}: native {native:#x}, bt {guest:#x}"));
        }
    };
    let fixed = if enters_mmx { !TOP } else { u64::MAX };
    compare("FCW".to_owned(), value(native, 0, 2), value(guest, 0, 2));
    let status = |state| value(state, 2, 2) & fixed;
    compare("FSW".to_owned(), status(native), status(guest));
    if !enters_mmx {
        compare("FTW".to_owned(), value(native, 4, 1), value(guest, 4, 1));
    }
    // The area holds them from the top on; register `index` of those that don't move is at:
    let place = |state: &State, index: usize| {
        let top = usize::try_from((value(state, 2, 2) & TOP) >> 11).unwrap_or(0);
        32 + 16 * ((index + 8 - top) % 8)
    };
    for index in 0..8 {
        let (native_at, guest_at) = (place(native, index), place(guest, index));
        let name = format!("R{index}");
        compare(
            format!("{name} exponent"),
            value(native, native_at + 8, 2),
            value(guest, guest_at + 8, 2),
        );
        compare(name, value(native, native_at, 8), value(guest, guest_at, 8));
    }
}

fn vector_differences(native: &State, guest: &State, found: &mut Vec<String>) {
    let mut compare = |what: String, number: u8, at: usize, len: usize| {
        let (native, guest) = (
            component(native, number, at, len),
            component(guest, number, at, len),
        );
        if native != guest {
            found.push(format!("{what}: native {native:#x}, bt {guest:#x}"));
        }
    };
    for index in 0..16 {
        for half in 0..2 {
            compare(
                format!("XMM{index}.{half}"),
                1,
                160 + 16 * index + 8 * half,
                8,
            );
            compare(
                format!("YMM{index}.{half}"),
                2,
                UPPER + 16 * index + 8 * half,
                8,
            );
        }
    }
}
