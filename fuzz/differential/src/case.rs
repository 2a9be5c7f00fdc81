//! A piece of code and the registers that it starts with.

use crate::encodings::decode;
use crate::state::State;

/// Where a displacement in an instruction leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To a piece of the case (one past the last is its end), plus some bytes.
    Piece(usize, i64),
    /// To an address.
    Address(u64),
}

/// A displacement, relative to the end of its instruction.
#[derive(Clone, Copy, Debug)]
pub struct Fixup {
    /// Where in the instruction it lies.
    pub at: usize,
    /// Bytes: 1 or 4.
    pub len: usize,
    /// Where it leads.
    pub target: Target,
}

/// One instruction; without bytes, one that was taken out.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its displacement.
    pub fixup: Option<Fixup>,
}

impl Piece {
    /// An instruction as it is.
    #[must_use]
    pub fn plain(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            fixup: None,
        }
    }

    /// One whose last four bytes are a displacement.
    #[must_use]
    pub fn to(bytes: &[u8], target: Target) -> Self {
        let mut all = bytes.to_vec();
        all.extend([0; 4]);
        Self {
            fixup: Some(Fixup {
                at: bytes.len(),
                len: 4,
                target,
            }),
            bytes: all,
        }
    }
}

/// A case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its instructions.
    pub pieces: Vec<Piece>,
    /// Its registers; RIP says where it lies.
    pub state: State,
}

/// `mov byte ptr [rip + ...], ...`: with a piece's second byte as its target, it changes code.
pub const PATCH: [u8; 2] = [0xc6, 0x05];
/// `int3`: the end of every case.
pub const END_BYTE: u8 = 0xcc;

impl Case {
    /// Bytes of code, with the end.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces
            .iter()
            .map(|piece| piece.bytes.len())
            .sum::<usize>()
            + 1
    }

    /// Whether nothing is left but the end.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 1
    }

    /// Offsets of the bytes that the case means to change.
    #[must_use]
    pub fn patched(&self) -> Vec<usize> {
        let start = |number: usize| -> usize {
            let before = self.pieces.iter().take(number);
            before.map(|piece| piece.bytes.len()).sum()
        };
        self.pieces
            .iter()
            .filter(|piece| piece.bytes.starts_with(&PATCH))
            .filter_map(|piece| match piece.fixup?.target {
                Target::Piece(number, 1) => Some(start(number) + 1),
                _ => None,
            })
            .collect()
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> Vec<u8> {
        let mut starts = Vec::with_capacity(self.pieces.len() + 1);
        let mut at = self.state.rip;
        for piece in &self.pieces {
            starts.push(at);
            at += piece.bytes.len() as u64;
        }
        starts.push(at);
        let mut code = Vec::new();
        for (index, piece) in self.pieces.iter().enumerate() {
            let mut bytes = piece.bytes.clone();
            if let Some(fixup) = piece.fixup.filter(|_| !bytes.is_empty()) {
                let target = match fixup.target {
                    Target::Piece(number, plus) => {
                        starts[number.min(self.pieces.len())].wrapping_add_signed(plus)
                    }
                    Target::Address(address) => address,
                };
                let distance = target.wrapping_sub(starts[index] + bytes.len() as u64);
                bytes[fixup.at..fixup.at + fixup.len]
                    .copy_from_slice(&distance.to_le_bytes()[..fixup.len]);
            }
            code.extend(bytes);
        }
        code.push(END_BYTE);
        code
    }

    /// The code as text.
    #[must_use]
    pub fn listing(&self) -> String {
        let code = self.code();
        let mut at = 0;
        let mut text = String::new();
        while at < code.len() {
            let ip = self.state.rip + at as u64;
            let instruction = decode(&code[at..], ip);
            let len = instruction.len().max(1);
            let bytes: Vec<_> = code[at..(at + len).min(code.len())]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let mut shown = String::new();
            iced_x86::FastFormatter::new().format(&instruction, &mut shown);
            text += &format!("  {ip:#x}  {:30} {shown}\n", bytes.join(""));
            at += len;
        }
        text
    }
}
