//! Every encoding of every mode, one instruction at a time, by the monitor: whatever it is, it is
//! executed or raises an exception.

use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use ringfence_x86::state::CS;
use ringfence_x86::state::DS;

use crate::guest::Guest;
use crate::guest::enter_long_mode;
use crate::random::Random;
use crate::ring0;
use crate::ring0::ARENA;
use crate::ring0::KERNEL;

/// Bytes before the opcode.
const PREFIXES: [&[u8]; 8] = [
    &[],
    &[0x66],
    &[0xf3],
    &[0xf2],
    &[0x67],
    &[0x0f],
    &[0x66, 0x0f],
    &[0xf3, 0x0f],
];

/// Executes every opcode with every ModRM byte's register field in code of `bits` bits, with a memory
/// and a register operand.
///
/// # Errors
/// What the engine took for its own bug, for each instruction that it did.
pub fn run(bits: u32) -> Result<Vec<String>, EngineError> {
    let mut guest = Guest::new()?;
    guest.vcpu().set_debug(true, &[])?;
    let mut random = Random::new(u64::from(bits));
    let mut bugs = Vec::new();
    for prefix in PREFIXES {
        for opcode in 0..=255 {
            for modrm in (0..=0x38).step_by(8).flat_map(|reg| [reg | 6, reg | 0xc0]) {
                let mut bytes = prefix.to_vec();
                bytes.extend([opcode, modrm]);
                let mut rest = [0; 12];
                random.fill(&mut rest);
                bytes.extend(rest);
                if let Err(error) = step(&mut guest, bits, &bytes) {
                    if error.kind() != ErrorKind::Internal {
                        return Err(error);
                    }
                    bugs.push(format!("{:02x?}: {error}", &bytes[..prefix.len() + 2]));
                    guest = Guest::new()?;
                    guest.vcpu().set_debug(true, &[])?;
                }
            }
        }
    }
    Ok(bugs)
}

fn step(guest: &mut Guest, bits: u32, bytes: &[u8]) -> Result<(), EngineError> {
    guest.write(ARENA, bytes);
    let mut state = guest.vcpu().state()?;
    enter_long_mode(&mut state, KERNEL + ARENA);
    state.regs.gpr = [KERNEL + ARENA + 0x1000; 16];
    state.regs.gpr[1] = 2;
    state.regs.rflags = 2;
    if bits != 64 {
        // Compatibility mode's code can't reach the kernel's half: no paging instead.
        state.sregs.cr0 &= !ringfence_x86::paging::CR0_PG;
        state.sregs.efer = 0;
        let access = if bits == 32 { 0xc09b } else { 0x809b };
        state.sregs.segments[CS].access = access;
        for segment in &mut state.sregs.segments {
            if segment.selector == 0 {
                *segment = state_data();
            }
        }
        state.sregs.segments[DS] = state_data();
        state.sregs.segments[CS].base = if bits == 16 { ARENA } else { 0 };
        state.regs.rip = if bits == 16 { 0 } else { ARENA };
        state.regs.gpr = [ARENA + 0x1000; 16];
        state.regs.gpr[1] = 2;
    }
    guest.vcpu().set_state(&state)?;
    match guest.vcpu().run() {
        Err(error) if error.kind() == ErrorKind::Guest => Ok(()),
        other => other.map(|_| ()),
    }
}

/// A flat data segment.
fn state_data() -> ringfence_x86::state::Segment {
    ringfence_x86::state::Segment {
        selector: u16::try_from(ring0::KERNEL_DATA).unwrap_or(0),
        base: 0,
        limit: u32::MAX,
        access: 0xc093,
    }
}
