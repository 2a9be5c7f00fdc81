//! Privileged instructions with what they need.

use crate::random::Random;

/// Model-specific registers that exist, and some that don't.
const MSRS: [u32; 30] = [
    0x10,
    0x1b,
    0x3a,
    0x3b,
    0x8b,
    0xfe,
    0x174,
    0x175,
    0x176,
    0x179,
    0x17a,
    0x1a0,
    0x200,
    0x201,
    0x250,
    0x26f,
    0x277,
    0x2ff,
    0x6e0,
    0x802,
    0x830,
    0x838,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0084,
    0xc000_0100,
    0xc000_0102,
    0x4b56_4d00,
    0x4b56_4d01,
];

/// Adds one.
pub(crate) fn recipe(random: &mut Random, code: &mut Vec<u8>) {
    match random.below(9) {
        0 => model_specific(random, code),
        1 => control_register(random, code),
        2 => table(random, code),
        3 => selector(random, code),
        4 => frame(random, code),
        5 => store(random, code),
        6 => patch(random, code),
        7 => processor_state(random, code),
        _ => short(random, code),
    }
}

/// `mov rax, value`.
fn load(code: &mut Vec<u8>, value: u64) {
    code.extend([0x48, 0xb8]);
    code.extend(value.to_le_bytes());
}

fn model_specific(random: &mut Random, code: &mut Vec<u8>) {
    let value = match random.below(4) {
        0 => random.word(),
        1 => 0,
        2 => random.below(0x1000),
        _ => 0xffff_8000_0000_0000 | random.below(1 << 32),
    };
    let number = random.pick(&MSRS).to_le_bytes();
    code.push(0xb9);
    code.extend(number);
    code.push(0xba);
    code.extend(&value.to_le_bytes()[4..]);
    code.push(0xb8);
    code.extend(&value.to_le_bytes()[..4]);
    code.extend([0x0f, random.pick(&[0x30, 0x30, 0x32])]);
}

/// MOV to CR0, CR2, CR3, CR4, CR8 or a debug register.
fn control_register(random: &mut Random, code: &mut Vec<u8>) {
    let bits = if random.chance(80) { 23 } else { 64 };
    let flip = 1 << random.below(bits);
    let (number, usual) = random.pick(&[
        (0_u8, 0x8005_0033_u64),
        (0, 0x11),
        (2, 0),
        (3, 0x1_0000),
        (3, 0x1_1000),
        (4, 0x5_0620),
        (4, 0x2_0620),
        (8, 5),
    ]);
    load(code, usual ^ flip);
    if random.chance(15) {
        code.extend([0x0f, 0x23, 0xc0 | random.byte() & 0x38]);
    } else if number == 8 {
        code.extend([0x44, 0x0f, 0x22, 0xc0]);
    } else {
        code.extend([0x0f, 0x22, 0xc0 | number << 3]);
    }
}

/// LGDT, LIDT, SGDT, SIDT, INVLPG, LMSW of what RSI points to; LTR and LLDT.
fn table(random: &mut Random, code: &mut Vec<u8>) {
    match random.below(3) {
        0 => code.extend([0x0f, 0x01, 0x06 | random.byte() & 0x38]),
        1 => {
            code.extend([0x66, 0xb8]);
            code.extend([random.byte() & 0x7f, 0]);
            code.extend([0x0f, 0x00, 0xc0 | random.byte() & 0x38]);
        }
        _ => code.extend([0x66, 0x0f, 0x38, 0x82, 0x06]),
    }
}

/// Loads of segment registers; LAR and LSL.
fn selector(random: &mut Random, code: &mut Vec<u8>) {
    code.extend([0xb8, random.byte() & 0x7f, 0, 0, 0]);
    match random.below(4) {
        0 | 1 => code.extend([0x8e, 0xc0 | random.byte() & 0x38]),
        2 => code.extend([0x0f, random.pick(&[0x02, 0x03]), 0xc8]),
        _ => code.extend([0x48, 0x0f, random.pick(&[0xb2, 0xb4, 0xb5]), 0x06]),
    }
}

/// A frame on the stack and a return through it.
fn frame(random: &mut Random, code: &mut Vec<u8>) {
    for _ in 0..5 {
        if random.chance(50) {
            code.extend([0x6a, random.byte() & 0x7f]);
        } else {
            code.push(0x50 | random.byte() & 7);
        }
    }
    let returns: [&[u8]; 9] = [
        &[0x48, 0xcf],
        &[0xcf],
        &[0x66, 0xcf],
        &[0x48, 0xcb],
        &[0xcb],
        &[0x48, 0x0f, 0x07],
        &[0x0f, 0x07],
        &[0x0f, 0x35],
        &[0x48, 0xff, 0x2e],
    ];
    code.extend(random.pick(&returns));
}

/// Writes to where RDI or RSI points: tables, perhaps.
fn store(random: &mut Random, code: &mut Vec<u8>) {
    let value = match random.below(3) {
        0 => random.word(),
        1 => random.below(0x40_0000) & !0xfff | 0x67,
        _ => 1 << random.below(64),
    };
    load(code, value);
    let to = random.pick(&[0x06_u8, 0x07]);
    let stores: [&[u8]; 4] = [
        &[0x48, 0x89],
        &[0x48, 0x31],
        &[0xf0, 0x48, 0x01],
        &[0x48, 0x87],
    ];
    code.extend(random.pick(&stores));
    code.push(to);
    if random.chance(30) {
        code.extend([0x0f, 0x01, 0x38 | to]);
    }
}

/// A change of code nearby.
fn patch(random: &mut Random, code: &mut Vec<u8>) {
    code.extend([0xc6, 0x05]);
    let distance = i32::try_from(random.below(200)).unwrap_or(0) - 100;
    code.extend(distance.to_le_bytes());
    code.push(random.byte());
}

/// XSETBV, and the areas of XSAVE and FXSAVE at RSI, aligned or not.
fn processor_state(random: &mut Random, code: &mut Vec<u8>) {
    if random.chance(50) {
        code.extend([0x48, 0x83, 0xe6, 0xc0]);
    }
    code.extend([0x31, 0xd2, 0xb8, random.byte(), 0, 0, 0]);
    if random.chance(20) {
        code.extend([0x31, 0xc9, 0x0f, 0x01, 0xd1]);
    } else {
        let group = random.pick(&[0xae, 0xc7]);
        code.extend([0x48, 0x0f, group, 0x06 | random.byte() & 0x38]);
    }
}

fn short(random: &mut Random, code: &mut Vec<u8>) {
    let all: [&[u8]; 22] = [
        &[0xf4],
        &[0xfa],
        &[0xfb],
        &[0x9d],
        &[0x9c],
        &[0x0f, 0xa2],
        &[0xec],
        &[0xee],
        &[0x6c],
        &[0xf3, 0x6e],
        &[0x0f, 0x06],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x05],
        &[0x0f, 0x34],
        &[0x0f, 0x01, 0xd9],
        &[0x0f, 0x01, 0xc1],
        &[0xf3, 0x48, 0xab],
        &[0xf3, 0xa4],
        &[0xc8, 0x10, 0x00, 0x03],
        &[0xf1],
        &[0x0f, 0xaa],
    ];
    code.extend(random.pick(&all));
    if random.chance(20) {
        code.extend([0xcd, random.byte()]);
    }
}
