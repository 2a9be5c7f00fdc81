//! Random first states.

use crate::layout::CODE;
use crate::layout::DATA;
use crate::layout::PAGE;
use crate::layout::STACK;
use crate::random::Random;
use crate::state::State;
use crate::state::UPPER;
use crate::state::XSTATE_BV;

/// CF PF AF ZF SF OF.
const ARITHMETIC: u64 = 0x8d5;
/// IF and the bit that is always set.
const FIXED: u64 = 0x202;
const DF: u64 = 1 << 10;

/// A number as programs have them, or at some limit.
fn number(random: &mut Random) -> u64 {
    match random.below(10) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => random.pick(&[
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x8080_8080_8080_8080,
        ]),
        4 => random.below(256),
        5 => random.below(1 << 32),
        6 => 0_u64.wrapping_sub(random.below(1 << 16)),
        7 => DATA + random.below(12 * PAGE),
        _ => random.word(),
    }
}

/// Eight bytes of a vector: integers, floating-point numbers of either width, special ones.
fn element(random: &mut Random) -> u64 {
    let number = |random: &mut Random| u16::try_from(random.below(2000)).unwrap_or(0);
    let small = |random: &mut Random| f64::from(number(random)) / 16.0 - 50.0;
    let single = |random: &mut Random| f32::from(number(random)) / 16.0 - 50.0;
    match random.below(8) {
        0 => small(random).to_bits(),
        1 => {
            let (low, high) = (single(random), single(random));
            u64::from(low.to_bits()) | u64::from(high.to_bits()) << 32
        }
        2 => random.pick(&[
            f64::NAN.to_bits(),
            f64::INFINITY.to_bits(),
            0x7ff0_0000_0000_0001,
            0x000f_ffff_ffff_ffff,
            0x7f80_0001_0000_0001,
            0x8000_0000_0000_0000,
            0x007f_ffff_ff80_0000,
        ]),
        3 => 0,
        4 => random.below(16),
        _ => random.word(),
    }
}

/// A random state; RIP is the caller's.
pub fn state(random: &mut Random) -> State {
    let mut state = State::default();
    for value in &mut state.gpr {
        *value = number(random);
    }
    state.gpr[4] = match random.below(12) {
        0 => STACK + random.below(3 * PAGE),
        1 => STACK + PAGE + random.below(80) - 40,
        2 => STACK + random.below(24),
        3 => STACK + 3 * PAGE - random.below(24),
        _ => STACK + PAGE + random.below(PAGE) / 8 * 8,
    };
    state.rflags = random.word() & ARITHMETIC | FIXED;
    if random.chance(6) {
        state.rflags |= DF;
    }
    state.fs_base = segment_base(random);
    state.gs_base = segment_base(random);
    vector(random, &mut state);
    state
}

fn segment_base(random: &mut Random) -> u64 {
    match random.below(6) {
        0 => 0,
        1 | 2 => random.below(300),
        3 => 0_u64.wrapping_sub(random.below(300)),
        4 => CODE,
        _ => DATA + random.below(11 * PAGE),
    }
}

fn vector(random: &mut Random, state: &mut State) {
    let xsave = &mut state.xsave;
    let mut put = |at: usize, bytes: &[u8]| xsave[at..at + bytes.len()].copy_from_slice(bytes);
    let control = match random.below(12) {
        0 => 0x37f & !(1 << random.below(6)),
        1 | 2 => 0x07f | random.below(16) << 8,
        _ => 0x37f,
    };
    put(0, &control.to_le_bytes()[..2]);
    // TOP and the condition codes; no exception waits.
    let status = random.word() & 0x7f00 & if random.chance(50) { 0 } else { 0xffff };
    put(2, &status.to_le_bytes()[..2]);
    let tags = if random.chance(50) { 0 } else { random.byte() };
    put(4, &[tags]);
    let mxcsr = match random.below(12) {
        0 => 0x1f80 & !(1 << (7 + random.below(6))),
        1 | 2 => 0x1f80 | random.below(4) << 13 | random.below(2) << 15 | random.below(2) << 6,
        _ => 0x1f80,
    };
    put(24, &mxcsr.to_le_bytes()[..4]);
    for index in 0..8 {
        let (mantissa, exponent) = match random.below(4) {
            0 => (random.word() | 1 << 63, 0x3fff + random.below(16)),
            1 => (random.word(), random.below(1 << 16)),
            2 => (random.word(), 0xffff),
            _ => (0, 0),
        };
        put(32 + 16 * index, &mantissa.to_le_bytes());
        put(40 + 16 * index, &exponent.to_le_bytes()[..2]);
    }
    let upper = random.chance(60);
    for index in 0..32 {
        put(160 + 8 * index, &element(random).to_le_bytes());
        if upper {
            put(UPPER + 8 * index, &element(random).to_le_bytes());
        }
    }
    put(XSTATE_BV, &[if upper { 7 } else { random.pick(&[3, 7]) }]);
}
