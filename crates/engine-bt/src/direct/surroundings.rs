//! Whether a place in a page of code is among code or among data.
//!
//! Data reads as instructions that compilers don't write.

use iced_x86::Code;
use iced_x86::Decoder;
use iced_x86::DecoderError;
use iced_x86::FlowControl;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use iced_x86::Register;

use super::scan::RUN_UP;
use crate::step::decoder_options;

/// Bytes before and behind a place that say whether it is among code.
const NEIGHBOURHOOD: usize = 96;
/// Instructions there that compilers don't write: fewer may be somebody's.
const MANY: usize = 4;
/// So many zeros behind a place end its code.
const PADDING: [u8; 16] = [0; 16];

/// What the neighbourhood of a place reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surroundings {
    Code,
    Data,
    /// As code with some instructions that compilers don't write.
    Odd,
}

/// What is around the instruction at `at`: before it, and behind it up to where that goes elsewhere.
pub(super) fn surroundings(code: &[u8], at: usize) -> Surroundings {
    let begin = at.saturating_sub(RUN_UP);
    let mut decoder = Decoder::with_ip(64, &code[begin..], begin as u64, decoder_options(false));
    let mut instruction = Instruction::default();
    let mut start = begin;
    let mut odd = 0;
    while start < at + NEIGHBOURHOOD && decoder.can_decode() {
        if start > at && code[start..].starts_with(&PADDING) {
            break;
        }
        decoder.decode_out(&mut instruction);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        let judged = start + NEIGHBOURHOOD >= at || begin == 0;
        odd += usize::from(judged && !is_written_by_compilers(&instruction, &code[start..]));
        start += instruction.len();
        let leaves = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
        );
        if leaves && start > at {
            break;
        }
    }
    match odd {
        0 => Surroundings::Code,
        1..MANY => Surroundings::Odd,
        _ => Surroundings::Data,
    }
}

/// Whether compilers and the authors of libraries write such an instruction for 64-bit programs. Of
/// random ones a quarter isn't.
fn is_written_by_compilers(instruction: &Instruction, bytes: &[u8]) -> bool {
    use Mnemonic as M;
    let odd_prefix = matches!(
        instruction.segment_prefix(),
        Register::ES | Register::CS | Register::SS | Register::DS
    );
    let pads = matches!(instruction.mnemonic(), M::Nop | M::Jmp | M::Call);
    !(instruction.code() == Code::INVALID
        || instruction.is_privileged()
        || bytes.starts_with(&[0, 0])
        || odd_prefix && !pads
        || instruction.is_string_instruction()
            && !instruction.has_rep_prefix()
            && !instruction.has_repne_prefix()
        || matches!(bytes[0], 0xd8..=0xdf)
        || bytes[0] == 0xcd && !matches!(bytes.get(1), Some(0x03 | 0x80))
        || matches!(
            instruction.mnemonic(),
            M::In
                | M::Out
                | M::Enter
                | M::Loop
                | M::Loope
                | M::Loopne
                | M::Xlatb
                | M::Sahf
                | M::Lahf
                | M::Cmc
                | M::Retf
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Int1
                | M::Wait
                | M::Lss
                | M::Lfs
                | M::Lgs
        ))
}
