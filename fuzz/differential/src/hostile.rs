//! A guest that does its worst in ring 0: random privileged instructions on damaged tables.
//!
//! There is no second side to compare with. The engine must come back from every kick, its state
//! must load again, and it must not take the guest's doings for a bug of its own; that the process
//! lives is the rest of the oracle.

use ringfence_engine::EngineError;
use ringfence_engine::ErrorKind;
use ringfence_engine::VcpuExit;
use ringfence_x86::state::CS;
use ringfence_x86::state::Segment;
use ringfence_x86::state::VcpuState;

use crate::encodings::Encodings;
use crate::generate::Generator;
use crate::guest::Guest;
use crate::random::Random;
use crate::recipes::recipe;
use crate::ring0;
use crate::ring0::ARENA;
use crate::ring0::KERNEL;
use crate::state::State;

/// Rounds of code that a machine runs.
const ROUNDS: usize = 6;
/// Exits of a round.
const EXITS: usize = 12;
/// Bytes of code of a round.
const CODE_BYTES: u64 = 0x3000;

/// What the machines of a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Returns of the vCPU that were kicks.
    pub kicks: u64,
    /// Triple faults.
    pub shutdowns: u64,
    /// Other exits.
    pub others: u64,
    /// Code that this engine says it can't run.
    pub refused: u64,
}

/// All encodings, privileged ones too.
#[must_use]
pub fn encodings() -> Generator {
    Generator::with(Encodings::enumerate(|_| true))
}

/// Runs one machine.
///
/// # Errors
/// What the engine said when it took the guest's doings for its own bug.
pub fn run(generator: &Generator, seed: u64, tally: &mut Tally) -> Result<(), EngineError> {
    let mut random = Random::new(seed);
    let mut guest = Guest::new()?;
    guest.kick_all_the_time(true);
    for _ in 0..ROUNDS {
        let code = code(generator, &mut random);
        guest.write(ARENA, &code);
        damage(&guest, &mut random);
        let mut state = guest.vcpu().state()?;
        start(&mut state, &mut random);
        if random.chance(10) {
            guest
                .vcpu()
                .set_debug(random.chance(50), &[KERNEL + ARENA + 8])?;
        }
        match guest.vcpu().set_state(&state) {
            Err(error) if error.kind() == ErrorKind::Config => continue,
            other => other?,
        }
        for _ in 0..EXITS {
            match guest.vcpu().run() {
                Ok(VcpuExit::Kicked) => tally.kicks += 1,
                Ok(VcpuExit::Shutdown) => {
                    tally.shutdowns += 1;
                    break;
                }
                Ok(_) => tally.others += 1,
                Err(error) if error.kind() == ErrorKind::Guest => {
                    tally.refused += 1;
                    break;
                }
                Err(error) => return Err(error),
            }
            let state = guest.vcpu().state()?;
            if random.chance(20) {
                guest.vcpu().set_state(&state)?;
            }
        }
    }
    guest.kick_all_the_time(false);
    Ok(())
}

fn code(generator: &Generator, random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    while (code.len() as u64) < CODE_BYTES {
        match random.below(10) {
            0..=4 => recipe(random, &mut code),
            5..=7 => code.extend(generator.case(random).code()),
            8 => {
                let mut bytes = vec![0; 1 + random.index(12)];
                random.fill(&mut bytes);
                code.extend(bytes);
            }
            // A short jump, either way.
            _ => code.extend([random.pick(&[0xeb, 0x74, 0x75, 0xe2]), random.byte()]),
        }
        // `int3` of cases that end goes on here.
        if code.last() == Some(&0xcc) {
            code.pop();
        }
    }
    code
}

/// Changes some words of tables.
fn damage(guest: &Guest, random: &mut Random) {
    for _ in 0..random.below(6) {
        let table = random.pick(&[
            ring0::GDT,
            ring0::IDT,
            ring0::TSS,
            ring0::TABLES,
            ring0::TABLES + 0x1000,
            ring0::TABLES + 0x2000,
            ring0::TABLES + 0x3000,
        ]);
        let at = table + random.below(16) * 8 + if random.chance(30) { 0xf00 } else { 0 };
        let value = match random.below(4) {
            0 => random.word(),
            1 => random.below(0x40_0000) & !0xfff | random.below(0x200) | 1,
            2 => 0,
            _ => 0x00cf_9300_0000_ffff ^ (1 << random.below(64)),
        };
        guest.write(at, &value.to_le_bytes());
    }
    // Handlers inside of the random code.
    for vector in 0..32 {
        if random.chance(40) {
            let handler = KERNEL + ARENA + random.below(CODE_BYTES);
            let low = handler & 0xffff
                | ring0::KERNEL_CODE << 16
                | random.below(3) << 32
                | random.pick(&[0x8e, 0xee, 0x8f, 0x8c]) << 40
                | (handler >> 16 & 0xffff) << 48;
            guest.write(ring0::IDT + vector * 16, &low.to_le_bytes());
        }
    }
}

/// An address that code may well use.
fn address(random: &mut Random) -> u64 {
    let near = random.pick(&[
        KERNEL + ring0::GDT,
        KERNEL + ring0::IDT,
        KERNEL + ring0::TSS,
        KERNEL + ring0::TABLES,
        KERNEL + ARENA,
        KERNEL + ARENA + 0x4000,
        KERNEL + ring0::RAM_BYTES - 0x1000,
        crate::layout::DATA,
        ARENA,
        u64::MAX - 0xfff,
        0x7fff_ffff_f000,
        0,
    ]);
    near.wrapping_add(random.below(0x1010)).wrapping_sub(8)
}

fn start(state: &mut VcpuState, random: &mut Random) {
    state.msrs.clear();
    state.xsave.clear();
    state.lapic.clear();
    state.events = ringfence_x86::state::PendingEvents::default();
    let registers: State = crate::registers::state(random);
    for value in &mut state.regs.gpr {
        *value = if random.chance(60) {
            address(random)
        } else {
            registers.gpr[random.index(16)]
        };
    }
    state.regs.rflags = random.word() & 0x3f_7fd5 & !0x2_0000 | 2;
    if !random.chance(5) {
        state.regs.rflags &= !0x100;
    }
    if random.chance(25) {
        // Goes on from wherever the last round ended, if the vCPU still can.
        return;
    }
    crate::guest::enter_long_mode(state, KERNEL + ARENA + random.below(64));
    state.regs.gpr[4] = KERNEL + ARENA + 0x8000;
    match random.below(10) {
        0..=5 => {}
        6 | 7 => {
            // User code.
            state.sregs.segments[CS] = segment(ring0::USER_CODE, 0xa0fb);
            state.sregs.segments[ringfence_x86::state::SS] = segment(ring0::USER_DATA, 0xc0f3);
            state.regs.rip = crate::layout::CODE + random.below(64);
            state.regs.gpr[4] = crate::layout::STACK + 0x1000;
        }
        8 => {
            // 32-bit code without paging.
            state.sregs.segments[CS] = segment(ring0::KERNEL_CODE, 0xc09b);
            state.sregs.cr0 &= !ringfence_x86::paging::CR0_PG;
            state.sregs.cr0 |= 1;
            state.sregs.efer = 0;
            state.regs.rip = ARENA + random.below(64);
            state.regs.gpr[4] = ARENA + 0x8000;
        }
        _ => {
            // Real mode.
            state.sregs.cr0 = 0x10;
            state.sregs.cr4 = 0;
            state.sregs.efer = 0;
            for segment in &mut state.sregs.segments {
                *segment = real(0x1000, 0x93);
            }
            state.sregs.segments[CS] = real(0x2000, 0x9b);
            state.regs.rip = 0x100;
        }
    }
}

fn segment(selector: u64, access: u32) -> Segment {
    Segment {
        selector: u16::try_from(selector).unwrap_or(0),
        base: 0,
        limit: u32::MAX,
        access,
    }
}

fn real(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        access,
    }
}
