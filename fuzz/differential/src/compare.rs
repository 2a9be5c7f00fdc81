//! What must be the same on both sides.

use iced_x86::Register;

use crate::state::State;
use crate::state::UPPER;
use crate::state::XSTATE_BV;

/// The exception that a case's last instruction, `int3`, raises.
pub const END: u64 = 3;
const PAGE_FAULT: u64 = 14;
/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;
/// DF, NT, AC and ID.
const OTHERS: u64 = 1 << 10 | 1 << 14 | 1 << 18 | 1 << 21;

/// A state's differences to the native one, in words; empty when there are none.
#[must_use]
pub fn differences(native: &State, guest: &State) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, native: u64, guest: u64| {
        if native != guest {
            found.push(format!("{what}: native {native:#x}, bt {guest:#x}"));
        }
    };
    compare("exception", native.trap, guest.trap);
    for (index, (&native, &guest)) in (0_u32..).zip(native.gpr.iter().zip(&guest.gpr)) {
        let name = format!("{:?}", Register::RAX + index);
        compare(&name, native, guest);
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
        // What the kernel's half maps for itself is the host's business.
        let present = u64::from(native.trap == PAGE_FAULT && native.cr2 >> 47 != 0);
        compare(
            "error code",
            native.error & !present,
            guest.error & !present,
        );
    }
    if native.trap == PAGE_FAULT && guest.trap == PAGE_FAULT {
        compare("CR2", native.cr2, guest.cr2);
    }
    vector_differences(native, guest, &mut found);
    found
}

fn has_error(trap: u64) -> bool {
    matches!(trap, 8 | 10..=14 | 17)
}

fn word(state: &State, at: usize, len: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..len].copy_from_slice(&state.xsave[at..at + len]);
    u64::from_le_bytes(bytes)
}

/// A component that isn't marked as in use has its first value.
fn vector_differences(native: &State, guest: &State, found: &mut Vec<String>) {
    let value = |state: &State, component: u8, at: usize, len: usize| {
        if state.xsave[XSTATE_BV] & (1 << component) != 0 {
            word(state, at, len)
        } else if component == 0 && at == 0 {
            0x37f
        } else {
            0
        }
    };
    let mut compare = |what: String, component: u8, at: usize, len: usize| {
        let (native, guest) = (
            value(native, component, at, len),
            value(guest, component, at, len),
        );
        if native != guest {
            found.push(format!("{what}: native {native:#x}, bt {guest:#x}"));
        }
    };
    compare("FCW".to_owned(), 0, 0, 2);
    compare("FSW".to_owned(), 0, 2, 2);
    compare("FTW".to_owned(), 0, 4, 1);
    for index in 0..8 {
        compare(format!("ST{index}"), 0, 32 + 16 * index, 8);
        compare(format!("ST{index} exponent"), 0, 40 + 16 * index, 2);
    }
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
    let (native, guest) = (word(native, 24, 4), word(guest, 24, 4));
    if native != guest {
        found.push(format!("MXCSR: native {native:#x}, bt {guest:#x}"));
    }
}
