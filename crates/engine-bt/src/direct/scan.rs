//! Which pages of code may run directly: those without an instruction that tells of the host and
//! doesn't trap.
//!
//! These are CPUID (unless the processor lets it trap), LAR and LSL (the vDSO asks for the processor's
//! number that way), XGETBV, RDTSCP, RDPID, and XSAVE and its relatives, whose areas are as large as
//! the host's state and not the guest's. Their bytes are looked for; where they are found, the code before
//! them is decoded, since most are parts of other instructions. Code is decoded from many places:
//! wherever it begins, it is read alike after a few instructions. Code that jumps into the midst of its
//! own instructions to hide one of these is not caught; all that it learns is what processor the host has.

use iced_x86::Decoder;
use iced_x86::Instruction;
use iced_x86::Mnemonic;

use crate::step::decoder_options;

/// Bytes of the next page that an instruction at this one's end may need.
pub(crate) const TAIL: usize = 14;
/// Bytes before a suspicious place from which decoding begins, and how many beginnings are tried.
const RUN_UP: usize = 64;
const BEGINNINGS: usize = 16;

/// What a page of code may hold, the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Content {
    /// Nothing that tells of the host.
    Plain,
    /// CPUID, which can be made to trap.
    Cpuid,
    /// An instruction that can't.
    Sensitive,
}

/// What `code` holds in its first `len` bytes, a page; the rest is what follows it.
pub(crate) fn content(code: &[u8], len: usize) -> Content {
    const ESCAPE: u8 = 0x0f;
    let mut worst = Content::Plain;
    let mut at = 0;
    while let Some(found) = code[at..len].iter().position(|&byte| byte == ESCAPE) {
        at += found;
        if is_suspicious(code, at) {
            worst = worst.max(content_at(code, at));
        }
        at += 1;
    }
    worst
}

/// Whether the bytes at `at` look like one of the instructions.
fn is_suspicious(code: &[u8], at: usize) -> bool {
    let opcode = code.get(at + 1);
    let operand = code.get(at + 2);
    let (Some(opcode), Some(operand)) = (opcode, operand) else {
        return true;
    };
    let extension = operand >> 3 & 7;
    match opcode {
        // CPUID, LAR, LSL.
        0xa2 | 0x02 | 0x03 => true,
        // XGETBV, RDTSCP.
        0x01 => matches!(operand, 0xd0 | 0xf9),
        // XSAVE, XRSTOR, XSAVEOPT; XRSTORS, XSAVEC, XSAVES, RDPID.
        0xae => *operand < 0xc0 && matches!(extension, 4..=6),
        0xc7 => extension >= 3,
        _ => false,
    }
}

/// What the instruction is that covers the byte at `at`, as code from some beginning is read.
fn content_at(code: &[u8], at: usize) -> Content {
    if at + 2 >= code.len() {
        return Content::Sensitive;
    }
    (0..BEGINNINGS)
        .map(|shift| {
            let begin = at.saturating_sub(RUN_UP + shift);
            // At the start of the page there is no run-up: every place there is a beginning.
            let begin = if begin == 0 { shift.min(at) } else { begin };
            covering(code, begin, at).map_or(Content::Plain, |instruction| of(&instruction))
        })
        .max()
        .unwrap_or(Content::Sensitive)
}

fn covering(code: &[u8], begin: usize, at: usize) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(64, &code[begin..], begin as u64, decoder_options(false));
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.next_ip() > at as u64 {
            return Some(instruction);
        }
    }
    None
}

fn of(instruction: &Instruction) -> Content {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Cpuid => Content::Cpuid,
        M::Lar | M::Lsl | M::Xgetbv | M::Rdtscp | M::Rdpid => Content::Sensitive,
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => {
            Content::Sensitive
        }
        M::Xrstor | M::Xrstor64 => Content::Sensitive,
        _ => Content::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut page = vec![0x90; 4096 + TAIL];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn sensitive_instructions_are_found_wherever_they_begin() {
        let all: [&[u8]; 8] = [
            &[0x0f, 0xa2],
            &[0x0f, 0x03, 0xc0],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0xae, 0x64, 0x24, 0x40],
            &[0x0f, 0xc7, 0x64, 0x24, 0x40],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0x02, 0xc0],
        ];
        for bytes in all {
            for at in [0, 1, 30, 2000, 4096 - bytes.len(), 4095 - 1] {
                let found = content(&page_with(at, bytes), 4096);
                assert_ne!(found, Content::Plain, "{bytes:x?} at {at}");
            }
        }
    }

    #[test]
    fn ordinary_code_is_plain() {
        let all: [&[u8]; 7] = [
            &[0x0f, 0x05],
            &[0x0f, 0xae, 0xe8],
            &[0x0f, 0xc7, 0x0f],
            &[0x0f, 0x31],
            &[0x0f, 0x1f, 0x44, 0, 0],
            // mov eax, 0xa20f; lea rax, [rip + 0x30f]
            &[0xb8, 0x0f, 0xa2, 0, 0],
            &[0x48, 0x8d, 0x05, 0x0f, 0x03, 0, 0],
        ];
        for bytes in all {
            let found = content(&page_with(100, bytes), 4096);
            assert_eq!(found, Content::Plain, "{bytes:x?}");
        }
    }

    #[test]
    fn an_instruction_may_reach_into_the_next_page() {
        assert_eq!(
            content(&page_with(4095, &[0x0f, 0xa2]), 4096),
            Content::Cpuid
        );
        assert_eq!(
            content(&page_with(4095, &[0x0f, 0x05]), 4096),
            Content::Plain
        );
        let alone = page_with(4095, &[0x0f]);
        assert_eq!(content(&alone[..4096], 4096), Content::Sensitive);
    }
}
