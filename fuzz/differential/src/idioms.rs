//! A few instructions that belong together, as programs have them.

use crate::case::Fixup;
use crate::case::PATCH;
use crate::case::Piece;
use crate::case::Target;
use crate::random::Random;

/// What an idiom has to choose from.
struct Choice<'a> {
    random: &'a mut Random,
    /// Number of the first piece.
    here: usize,
    /// A register but for RSP, by its low bits.
    low: u8,
    /// REX.B.
    rex: u8,
    pointers: &'a [u8],
}

type Idiom = fn(&mut Choice<'_>, &mut Vec<Piece>);

const IDIOMS: [Idiom; 9] = [
    push_and_pop,
    push_and_pop,
    call_and_return,
    indirect,
    frame,
    flags,
    patch,
    structure,
    string,
];

/// Adds an idiom whose memory operands are at `pointers`.
pub(crate) fn idiom(random: &mut Random, pointers: &[u8], pieces: &mut Vec<Piece>) {
    let low = register(random);
    let rex = u8::from(random.chance(30));
    let chosen = random.pick(&IDIOMS);
    let mut choice = Choice {
        random,
        here: pieces.len(),
        low,
        rex,
        pointers,
    };
    chosen(&mut choice, pieces);
}

/// An idiom for the inside of a loop.
pub(crate) fn loop_idiom(random: &mut Random, pieces: &mut Vec<Piece>) {
    let low = register(random);
    pieces.push(Piece::plain(&[0x50 | low]));
    pieces.push(Piece::plain(&[0x58 | low]));
}

/// A register but for RSP.
fn register(random: &mut Random) -> u8 {
    random.pick(&[0, 1, 2, 3, 5, 6, 7])
}

fn push_and_pop(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let (low, rex) = (choice.low, choice.rex);
    pieces.push(Piece::plain(&[0x40 | rex, 0x50 | low]));
    pieces.push(Piece::plain(&[0x40 | rex, 0x58 | low]));
}

/// A call, over a jump, and back.
fn call_and_return(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let here = choice.here;
    pieces.push(Piece::to(&[0xe8], Target::Piece(here + 2, 0)));
    pieces.push(Piece::to(&[0xe9], Target::Piece(here + 4, 0)));
    pieces.push(Piece::plain(&[0x48, 0xff, 0xc0 | choice.low]));
    pieces.push(Piece::plain(&[0xc3]));
}

/// An indirect jump or call to what follows.
fn indirect(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let (low, rex) = (choice.low, choice.rex);
    let lea = [0x48 | rex << 2, 0x8d, 0x05 | low << 3];
    pieces.push(Piece::to(&lea, Target::Piece(choice.here + 2, 0)));
    let transfer = choice.random.pick(&[0xe0, 0xd0]);
    pieces.push(Piece::plain(&[0x40 | rex, 0xff, transfer | low]));
}

fn frame(_choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    pieces.push(Piece::plain(&[0x55]));
    pieces.push(Piece::plain(&[0x48, 0x89, 0xe5]));
    pieces.push(Piece::plain(&[0x48, 0x83, 0xec, 0x20]));
    pieces.push(Piece::plain(&[0x89, 0x45, 0xf8]));
    pieces.push(Piece::plain(&[0x48, 0x8b, 0x55, 0xf8]));
    pieces.push(Piece::plain(&[0xc9]));
}

/// Flags by way of the stack; TF now and then.
fn flags(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let random = &mut choice.random;
    let trap = if random.chance(10) { 0x100 } else { 0 };
    let flags = random.below(0x1_0000) & 0x0cd5 | trap | 0x202;
    let mut push = vec![0x68];
    push.extend(&flags.to_le_bytes()[..4]);
    pieces.push(Piece::plain(&push));
    pieces.push(Piece::plain(&[0x9d]));
}

/// Code that changes the next instruction or the one after.
fn patch(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let skip = choice.random.index(2);
    let value = choice.random.byte();
    pieces.push(Piece {
        bytes: [&PATCH[..], &[0, 0, 0, 0, value]].concat(),
        fixup: Some(Fixup {
            at: 2,
            len: 4,
            target: Target::Piece(choice.here + 1 + skip, 1),
        }),
    });
    if skip == 1 {
        let exchange = [0x40 | choice.rex, 0x87, 0xc0 | choice.low << 3];
        pieces.push(Piece::plain(&exchange));
    }
    pieces.push(Piece::plain(&[0xb8 | choice.low, 1, 2, 3, 4]));
}

/// A structure's fields.
fn structure(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let random = &mut choice.random;
    let base = random.pick(choice.pointers);
    for _ in 0..3 + random.below(3) {
        let reg = register(random);
        let disp = u8::try_from(random.below(10) * 8).unwrap_or(0);
        let opcode = random.pick(&[0x8b, 0x89, 0x03, 0x01, 0x8b, 0x3b]);
        let mut bytes = vec![0x48 | base >> 3, opcode, 0x40 | reg << 3 | base & 7];
        if base & 7 == 4 {
            bytes.push(0x24);
        }
        bytes.push(disp);
        pieces.push(Piece::plain(&bytes));
    }
}

/// A repeated string instruction.
fn string(choice: &mut Choice<'_>, pieces: &mut Vec<Piece>) {
    let random = &mut choice.random;
    let prefix = random.pick(&[0xf3, 0xf2]);
    let opcode = random.pick(&[0xa4, 0xa5, 0xaa, 0xab, 0xa6, 0xa7, 0xac, 0xae, 0xaf]);
    let wide = u8::from(random.chance(40)) << 3;
    pieces.push(Piece::plain(&[prefix, 0x40 | wide, opcode]));
}
