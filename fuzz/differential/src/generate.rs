//! Random cases.

use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::OpKind;
use iced_x86::Register;

use crate::case::Case;
use crate::case::Fixup;
use crate::case::Piece;
use crate::case::Target;
use crate::encodings::Encodings;
use crate::encodings::Fill;
use crate::encodings::Form;
use crate::encodings::Group;
use crate::encodings::decode;
use crate::encodings::decoder_options;
use crate::encodings::is_comparable;
use crate::idioms::idiom;
use crate::idioms::loop_idiom;
use crate::layout::CODE;
use crate::layout::DATA;
use crate::layout::EDGE;
use crate::layout::PAGE;
use crate::layout::STACK;
use crate::random::Random;
use crate::registers;
use crate::state::State;

/// Most instructions of a case.
const MAX_PIECES: u64 = 14;

/// What the instructions of one case have in common.
struct Style {
    /// Registers that hold addresses.
    pointers: Vec<u8>,
    /// Registers that hold small numbers.
    indices: Vec<u8>,
    /// Displacements stay below this.
    reach: u64,
    /// Counts the rounds of a loop, if the case is one.
    counter: bool,
    /// Which groups instructions come from, in percent: integer, branches, x87, SSE, VEX, refused.
    weights: [u64; 6],
}

/// Makes cases.
pub struct Generator {
    encodings: Encodings,
}

impl Default for Generator {
    fn default() -> Self {
        Self::new()
    }
}

impl Generator {
    /// A generator over all encodings.
    #[must_use]
    pub fn new() -> Self {
        Self::with(Encodings::new())
    }

    /// A generator over these encodings.
    #[must_use]
    pub fn with(encodings: Encodings) -> Self {
        Self { encodings }
    }

    /// The encodings.
    #[must_use]
    pub fn encodings(&self) -> &Encodings {
        &self.encodings
    }

    /// A case; where its code lies is the caller's.
    pub fn case(&self, random: &mut Random) -> Case {
        let style = style(random);
        let mut state = registers::state(random);
        for &pointer in &style.pointers {
            if pointer != 4 {
                state.gpr[usize::from(pointer)] = address(random);
            }
        }
        for &index in &style.indices {
            state.gpr[usize::from(index)] = random.below(5);
        }
        let mut pieces = Vec::new();
        let wanted = 1 + random.below(MAX_PIECES).min(random.below(MAX_PIECES));
        while (pieces.len() as u64) < wanted {
            if random.chance(18) {
                if style.counter {
                    loop_idiom(random, &mut pieces);
                } else {
                    idiom(random, &style.pointers, &mut pieces);
                }
            } else {
                pieces.push(self.instruction(random, &style));
            }
        }
        aim_branches(random, &mut pieces);
        if style.counter {
            state.gpr[15] = 1 + random.below(6);
            pieces.push(Piece::plain(&[0x49, 0xff, 0xcf]));
            pieces.push(Piece::to(&[0x0f, 0x85], Target::Piece(0, 0)));
        }
        Case { pieces, state }
    }

    /// One instruction with every form of it in turn: `number` counts them.
    pub fn enumerated(&self, number: usize, random: &mut Random) -> Case {
        let groups = [
            &self.encodings.integer,
            &self.encodings.x87,
            &self.encodings.sse,
            &self.encodings.vex,
            &self.encodings.refused,
        ];
        let total: usize = groups.iter().map(|group| group.forms.len()).sum();
        let mut number = number % total.max(1);
        let mut forms = &groups[0].forms[0];
        for group in groups {
            if number < group.forms.len() {
                forms = &group.forms[number];
                break;
            }
            number -= group.forms.len();
        }
        let mut style = style(random);
        style.counter = false;
        let mut state = registers::state(random);
        for &pointer in &style.pointers {
            if pointer != 4 {
                state.gpr[usize::from(pointer)] = address(random);
            }
        }
        for &index in &style.indices {
            state.gpr[usize::from(index)] = random.below(5);
        }
        let mut pieces = vec![fit(random, &style, forms), self.instruction(random, &style)];
        aim_branches(random, &mut pieces);
        Case { pieces, state }
    }

    fn instruction(&self, random: &mut Random, style: &Style) -> Piece {
        let groups: [&Group; 6] = [
            &self.encodings.integer,
            &self.encodings.branches,
            &self.encodings.x87,
            &self.encodings.sse,
            &self.encodings.vex,
            &self.encodings.refused,
        ];
        let mut dice = random.below(100);
        let mut group = groups[0];
        for (candidate, weight) in groups.iter().zip(style.weights) {
            group = candidate;
            if dice < weight {
                break;
            }
            dice -= weight;
        }
        if group.forms.is_empty() {
            return Piece::plain(&[0x90]);
        }
        let forms = &group.forms[random.index(group.forms.len())];
        fit(random, style, forms)
    }
}

fn style(random: &mut Random) -> Style {
    let mut pointers = vec![6, 7];
    for _ in 0..1 + random.below(3) {
        let pointer = u8::try_from(random.below(16)).unwrap_or(0);
        if !pointers.contains(&pointer) {
            pointers.push(pointer);
        }
    }
    if random.chance(60) && !pointers.contains(&4) {
        pointers.push(4);
    }
    let mut indices = Vec::new();
    for _ in 0..2 {
        let index = u8::try_from(random.below(16)).unwrap_or(0);
        if !pointers.contains(&index) && index != 4 {
            indices.push(index);
        }
    }
    if random.chance(70) && !pointers.contains(&1) {
        indices.push(1);
    }
    let weights = random.pick(&[
        [80, 8, 0, 6, 6, 0],
        [50, 5, 10, 15, 19, 1],
        [40, 0, 60, 0, 0, 0],
        [20, 0, 0, 79, 0, 1],
        [20, 0, 0, 10, 69, 1],
        [94, 6, 0, 0, 0, 0],
    ]);
    Style {
        pointers,
        indices,
        reach: random.pick(&[8, 64, 64, 300, 4096]),
        counter: random.chance(10),
        weights,
    }
}

/// An address that a case may well use; now and then with bits that make it unusable.
fn address(random: &mut Random) -> u64 {
    let high = if random.chance(3) {
        random.word() << 47
    } else {
        0
    };
    high ^ usable_address(random)
}

fn usable_address(random: &mut Random) -> u64 {
    match random.below(20) {
        // Anywhere in the data, and at its pages' ends.
        0..=7 => DATA + random.below(12 * PAGE),
        8..=11 => DATA + random.below(4 * PAGE) / 64 * 64,
        12..=15 => DATA + (1 + random.below(11)) * PAGE - random.below(72),
        16 => EDGE + random.below(2 * PAGE),
        17 => STACK + random.below(3 * PAGE),
        18 => DATA + 5 * PAGE + random.below(PAGE),
        _ => DATA + random.below(PAGE),
    }
}

/// An instruction of one of `forms`, fitted to the style.
fn fit(random: &mut Random, style: &Style, forms: &[Form]) -> Piece {
    for _ in 0..40 {
        let form = random.pick(forms);
        if let Some(piece) = attempt(random, style, form) {
            return piece;
        }
    }
    Piece::plain(&[0x90])
}

fn bit(random: &mut Random, set: u8) -> u8 {
    loop {
        let bit = u8::try_from(random.below(8)).unwrap_or(0);
        if set & (1 << bit) != 0 {
            return bit;
        }
    }
}

/// ModRM.rm's part of an operand: ModRM without reg, SIB, REX.X and B.
fn memory_operand(random: &mut Random, style: &Style, vector_index: bool) -> (u8, u8, u8) {
    if random.chance(5) && !vector_index {
        // RIP-relative: aimed later.
        return (0x05, 0, u8::from(random.chance(10)));
    }
    let base = if random.chance(93) {
        random.pick(&style.pointers)
    } else {
        u8::try_from(random.below(16)).unwrap_or(0)
    };
    let index = if vector_index {
        Some(u8::try_from(random.below(16)).unwrap_or(0))
    } else if random.chance(35) && !style.indices.is_empty() {
        Some(random.pick(&style.indices))
    } else if random.chance(3) {
        Some(u8::try_from(random.below(16)).unwrap_or(0)).filter(|&index| index != 4)
    } else {
        None
    };
    let mode = match random.below(10) {
        0..=2 => 0_u8,
        3..=7 => 1,
        _ => 2,
    };
    let sib_only = base & 7 == 4 || index.is_some() || random.chance(2);
    let mode = if base & 7 == 5 && mode == 0 && !random.chance(10) {
        1
    } else {
        mode
    };
    let rex = base >> 3 | index.map_or(0, |index| index >> 3 << 1);
    if !sib_only {
        return (mode << 6 | base & 7, 0, rex);
    }
    let scale = u8::try_from(random.below(4)).unwrap_or(0);
    let sib = scale << 6 | index.map_or(4, |index| index & 7) << 3 | base & 7;
    (mode << 6 | 4, sib, rex)
}

fn displacement(random: &mut Random, style: &Style, short: bool) -> [u8; 4] {
    let reach = if short {
        style.reach.min(120)
    } else {
        style.reach
    };
    let value = match random.below(20) {
        0 => random.word().to_le_bytes(),
        1..=4 => (0_u64.wrapping_sub(random.below(32))).to_le_bytes(),
        _ => random.below(reach).to_le_bytes(),
    };
    [value[0], value[1], value[2], value[3]]
}

fn immediate(random: &mut Random) -> [u8; 8] {
    match random.below(8) {
        0 => 0,
        1 => 1,
        2 => random.below(64),
        3 => u64::MAX,
        4 => 0x8000_0000_8000_8080,
        _ => random.word(),
    }
    .to_le_bytes()
}

fn prefixes(random: &mut Random, form: &Form) -> Vec<u8> {
    let mut before = Vec::new();
    if random.chance(5) {
        before.push(0x67);
    }
    if form.memory && random.chance(8) {
        before.push(random.pick(&[0x64, 0x65, 0x64, 0x65, 0x2e, 0x36]));
    }
    if !form.vex && random.chance(4) {
        before.push(0xf0);
    }
    if !form.vex && form.prefix == 0 && random.chance(3) {
        before.push(random.pick(&[0xf2, 0xf3, 0x66]));
    }
    before
}

fn attempt(random: &mut Random, style: &Style, form: Form) -> Option<Piece> {
    let reg = bit(random, form.regs);
    let (modrm, sib, rex) = if form.memory {
        memory_operand(random, style, form.rms == 1 << 4)
    } else {
        let extended = u8::from(random.chance(30));
        (0xc0 | bit(random, form.rms), 0, extended)
    };
    let rex = rex | u8::from(random.chance(30)) << 2;
    let before = prefixes(random, &form);
    let vvvv = if !form.vex || random.chance(60) {
        u8::try_from(random.below(16)).unwrap_or(0)
    } else {
        0
    };
    let bytes = form.bytes(&Fill {
        before: &before,
        modrm: modrm | reg << 3,
        sib,
        rxb: rex,
        vvvv,
        rest: immediate(random),
        displacement: displacement(random, style, modrm >> 6 == 1),
    });
    let instruction = decode(&bytes, CODE);
    let invalid_on_purpose = random.chance(1);
    if (instruction.is_invalid() && !invalid_on_purpose) || bytes.len() < instruction.len() {
        return None;
    }
    // PAUSE with REX.B is XCHG to the processor, and prefixes of branches are its own business.
    let odd = (instruction.mnemonic() == Mnemonic::Pause && rex & 1 != 0)
        || (instruction.flow_control() != FlowControl::Next
            && (form.prefix != 0
                || before.contains(&0xf2)
                || before.contains(&0xf3)
                || before.contains(&0x66)));
    if odd || !is_comparable(&instruction) || (style.counter && names_counter(&instruction)) {
        return None;
    }
    if instruction.is_invalid() && !is_reliably_invalid(&bytes) {
        return None;
    }
    let len = if instruction.is_invalid() {
        bytes.len().min(15)
    } else {
        instruction.len()
    };
    let mut piece = Piece::plain(&bytes[..len]);
    aim_operand(random, &instruction, &mut piece);
    Some(piece)
}

/// Invalid for this decoder and for the processor: a LOCK that isn't allowed.
fn is_reliably_invalid(bytes: &[u8]) -> bool {
    let without: Vec<u8> = bytes.iter().copied().filter(|&byte| byte != 0xf0).collect();
    let instruction = decode(&without, CODE);
    bytes.contains(&0xf0) && !instruction.is_invalid() && is_comparable(&instruction)
}

fn names_counter(instruction: &Instruction) -> bool {
    let operands = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand).full_register() == Register::R15
    });
    operands || instruction.flow_control() != FlowControl::Next
}

/// Aims RIP-relative and absolute operands at something.
fn aim_operand(random: &mut Random, instruction: &Instruction, piece: &mut Piece) {
    let offsets = {
        let mut decoder = iced_x86::Decoder::with_ip(64, &piece.bytes, CODE, decoder_options());
        let again = decoder.decode();
        decoder.get_constant_offsets(&again)
    };
    if instruction.is_invalid() || !offsets.has_displacement() {
        return;
    }
    let at = offsets.displacement_offset();
    if instruction.is_ip_rel_memory_operand() {
        let target = if random.chance(10) {
            Target::Piece(random.index(8), 0)
        } else {
            Target::Address(address(random))
        };
        piece.fixup = Some(Fixup { at, len: 4, target });
    } else if offsets.displacement_size() == 8 {
        piece.bytes[at..at + 8].copy_from_slice(&address(random).to_le_bytes());
    } else if offsets.displacement_size() == 4
        && instruction.memory_base() == Register::None
        && !instruction.is_vsib()
    {
        piece.bytes[at..at + 4].copy_from_slice(&address(random).to_le_bytes()[..4]);
    }
}

/// Makes direct branches lead ahead.
fn aim_branches(random: &mut Random, pieces: &mut [Piece]) {
    let count = pieces.len();
    for (index, piece) in pieces.iter_mut().enumerate() {
        if piece.fixup.is_some() || piece.bytes.is_empty() {
            continue;
        }
        let instruction = decode(&piece.bytes, CODE);
        let near = matches!(
            instruction.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
        if !near || instruction.is_invalid() {
            continue;
        }
        let mut decoder = iced_x86::Decoder::with_ip(64, &piece.bytes, CODE, decoder_options());
        let again = decoder.decode();
        let offsets = decoder.get_constant_offsets(&again);
        if !offsets.has_immediate() {
            continue;
        }
        let ahead = index + 1 + random.index(count - index);
        piece.fixup = Some(Fixup {
            at: offsets.immediate_offset(),
            len: offsets.immediate_size(),
            target: Target::Piece(ahead, 0),
        });
    }
}

/// A case of any bytes, as long as both sides can be compared.
#[must_use]
pub fn raw_case(code: &[u8], state: State) -> Option<Case> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < code.len() && pieces.len() < 24 {
        let instruction = decode(&code[at..], CODE);
        if instruction.is_invalid() || !is_comparable(&instruction) {
            break;
        }
        let next = FlowControl::Next;
        if instruction.flow_control() != next {
            break;
        }
        pieces.push(Piece::plain(&code[at..at + instruction.len()]));
        at += instruction.len();
    }
    (!pieces.is_empty()).then_some(Case { pieces, state })
}
