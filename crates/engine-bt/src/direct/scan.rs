//! Which places in a page of code tell of the host and don't trap.
//!
//! These are CPUID, LAR, LSL (the vDSO asks for the processor's number that way), XGETBV, RDTSCP,
//! RDPID, RDPKRU and WRPKRU, SYSENTER, and XSAVE and its relatives, whose areas are as large as the host's
//! state and not the guest's. (Of XSAVEC, too: not every processor knows what isn't in use.) Their bytes
//! are looked for; where they are found, the code before them is decoded, since most are parts of
//! other instructions. Code is decoded from many places: wherever it begins, it is read alike after a few
//! instructions. Code that jumps into the midst of its own instructions to hide one of these is not
//! caught; all that it learns is what processor the host has.
//!
//! Data may look like one, too, and reads itself otherwise once that is made to trap: what is around a place
//! says what it is among ([`super::surroundings`]). The vDSO is known by its name: it has such places
//! among its data, and nothing but the kernel reads these.

use std::ops::Range;

use iced_x86::Decoder;
use iced_x86::Instruction;
use iced_x86::Mnemonic;
use memchr::memchr;
use memchr::memmem;

use super::surroundings::Surroundings;
use super::surroundings::surroundings;
use crate::step::decoder_options;

/// Bytes of the next page that an instruction at this one's end may need.
pub(crate) const TAIL: usize = 14;
/// Bytes before a suspicious place from which decoding begins, and how many beginnings are tried.
pub(super) const RUN_UP: usize = 192;
const BEGINNINGS: usize = 16;
const VDSO_NAME: &[u8] = b"linux-vdso.so.1\0";
/// So many places in one page are no data.
const SURELY_CODE: usize = 3;
/// Bytes of the page before that are wanted.
pub(crate) const LEAD: usize = RUN_UP + BEGINNINGS;
/// First byte of every one of these instructions' opcodes, prefixes apart.
const ESCAPE: u8 = 0x0f;
/// Behind [`ESCAPE`] it makes UD2, whatever prefixes there are.
pub(crate) const UNDEFINED: u8 = 0x0b;

/// What a page of code holds of such instructions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Where in the page [`UNDEFINED`] makes one trap.
    pub(crate) places: Vec<usize>,
    /// There may be one that can't be told from other code, or that reaches into the next page.
    pub(crate) unclear: bool,
    /// There is what looks like one, among what doesn't read as code.
    pub(crate) among_data: bool,
}

/// How a page of code may run directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As it is.
    Itself,
    /// As a copy in which the places trap.
    Copy,
    /// Not at all.
    Not,
}

impl Found {
    /// Nothing.
    pub(crate) fn is_nothing(&self) -> bool {
        self.places.is_empty() && !self.unclear && !self.among_data
    }

    /// What becomes of the page.
    ///
    /// Programs that write their code keep data beside it, and read that. So one or two places of a
    /// page that is `writable` may be data; and what is among data is data.
    pub(crate) fn verdict(&self, writable: bool) -> Verdict {
        let refused = self.unclear || self.among_data && !writable;
        match self.places.len() {
            _ if refused => Verdict::Not,
            0 => Verdict::Itself,
            1..SURELY_CODE if writable => Verdict::Not,
            _ => Verdict::Copy,
        }
    }
}

/// What the part `page` of `code` holds; the rest is what comes before and behind it.
pub(crate) fn search(code: &[u8], page: Range<usize>) -> Found {
    let mut all = Found::default();
    let is_vdso = memmem::find(&code[page.clone()], VDSO_NAME).is_some();
    let mut at = page.start;
    while let Some(found) = memchr(ESCAPE, &code[at..page.end]) {
        at += found;
        let sensitive = if is_suspicious(code, at) {
            is_sensitive(code, at)
        } else {
            Some(false)
        };
        if sensitive != Some(false) {
            let around = if is_vdso {
                Surroundings::Code
            } else {
                surroundings(code, at)
            };
            match around {
                Surroundings::Data => all.among_data = true,
                Surroundings::Code if sensitive == Some(true) && at + 2 < page.end => {
                    all.places.push(at + 1 - page.start);
                }
                Surroundings::Code | Surroundings::Odd => all.unclear = true,
            }
        }
        at += 1;
    }
    all
}

/// Whether the bytes at `at` look like one of the instructions. What reaches into a page that isn't
/// there doesn't: it can't run before that page is there, and is then found from it.
fn is_suspicious(code: &[u8], at: usize) -> bool {
    let (Some(opcode), Some(operand)) = (code.get(at + 1), code.get(at + 2)) else {
        return code.get(at + 1) == Some(&0xa2);
    };
    let extension = operand >> 3 & 7;
    match opcode {
        // CPUID, LAR, LSL, SYSENTER.
        0xa2 | 0x02 | 0x03 | 0x34 => true,
        // XGETBV, RDTSCP, RDPKRU, WRPKRU.
        0x01 => matches!(operand, 0xd0 | 0xf9 | 0xee | 0xef),
        // XSAVE, XSAVEOPT; XSAVEC; RDPID.
        0xae => *operand < 0xc0 && matches!(extension, 4 | 6),
        0xc7 => extension == if *operand < 0xc0 { 4 } else { 7 },
        _ => false,
    }
}

/// Whether the instruction whose opcode begins at `at` is one of these, if code reads alike from
/// wherever it is begun.
fn is_sensitive(code: &[u8], at: usize) -> Option<bool> {
    let begin = |shift: usize| {
        let begin = at.saturating_sub(RUN_UP + shift);
        // At the start of what is known there is no run-up: every place there is a beginning.
        if begin == 0 { shift.min(at) } else { begin }
    };
    // Where the first reading has instructions, counted back from `at`: another that meets it goes
    // the same way from there.
    let mut starts = [false; LEAD + 1];
    let first = read(code, begin(0), at, |start| {
        starts[at - start] = true;
        false
    });
    (1..BEGINNINGS)
        .all(|shift| {
            read(code, begin(shift), at, |start| starts[at - start])
                .is_none_or(|other| Some(other) == first)
        })
        .then_some(first?)
}

/// Whether the instruction at `at` is one of these when code is read from `begin`; nothing where
/// `meets` another reading.
fn read(
    code: &[u8],
    begin: usize,
    at: usize,
    mut meets: impl FnMut(usize) -> bool,
) -> Option<bool> {
    let mut decoder = Decoder::with_ip(64, &code[begin..], begin as u64, decoder_options(false));
    let mut instruction = Instruction::default();
    let mut start = begin;
    while decoder.can_decode() {
        if meets(start) {
            return None;
        }
        decoder.decode_out(&mut instruction);
        let next = start + instruction.len();
        if next > at {
            return Some(is_listed(&instruction) && has_escape(code, &instruction, at));
        }
        start = next;
    }
    Some(false)
}

/// Whether the instruction's opcode begins at `at`: there are prefixes alone before it.
fn has_escape(code: &[u8], instruction: &Instruction, at: usize) -> bool {
    let start = usize::try_from(instruction.ip()).unwrap_or(usize::MAX);
    let prefixes = code.get(start..at);
    prefixes.is_some_and(|prefixes| {
        prefixes.iter().all(|byte| {
            matches!(
                byte,
                0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
            ) || byte & 0xf0 == 0x40
        })
    })
}

fn is_listed(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Cpuid
            | M::Lar
            | M::Lsl
            | M::Sysenter
            | M::Xgetbv
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpkru
            | M::Wrpkru
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Range<usize> = LEAD..LEAD + 4096;

    /// A page of NOPs between others, with `bytes` in it.
    fn page_with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut page = vec![0x90; LEAD + 4096 + TAIL];
        page[LEAD + at..LEAD + at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn sensitive_instructions_are_found_wherever_they_begin() {
        let all: [&[u8]; 11] = [
            &[0x0f, 0xa2],
            &[0x0f, 0x03, 0xc0],
            &[0x48, 0x0f, 0x03, 0xc0],
            &[0x0f, 0x01, 0xd0],
            &[0x0f, 0x01, 0xf9],
            &[0x0f, 0x01, 0xef],
            &[0x0f, 0x34],
            &[0x0f, 0xae, 0x64, 0x24, 0x40],
            &[0x0f, 0xc7, 0x64, 0x24, 0x40],
            &[0xf3, 0x0f, 0xc7, 0xf8],
            &[0x0f, 0x02, 0xc0],
        ];
        for bytes in all {
            for at in [0, 1, 30, 2000, 4096 - bytes.len(), 4095 - 1] {
                let found = search(&page_with(at, bytes), PAGE);
                let escape = bytes.iter().position(|&byte| byte == ESCAPE).expect("one");
                let place = at + escape + 1;
                if place + 1 < 4096 {
                    assert_eq!(found.places, [place], "{bytes:x?} at {at}");
                    assert!(!found.unclear);
                } else {
                    assert!(found.unclear, "{bytes:x?} at {at}");
                }
            }
        }
    }

    #[test]
    fn ordinary_code_is_nothing() {
        let all: [&[u8]; 8] = [
            &[0x0f, 0x05],
            &[0x0f, 0xae, 0x6c, 0x24, 0x40],
            &[0x0f, 0xae, 0xe8],
            &[0x0f, 0xc7, 0x0f],
            &[0x0f, 0x31],
            &[0x0f, 0x1f, 0x44, 0, 0],
            // mov eax, 0xa20f; lea rax, [rip + 0x30f]
            &[0xb8, 0x0f, 0xa2, 0, 0],
            &[0x48, 0x8d, 0x05, 0x0f, 0x03, 0, 0],
        ];
        for bytes in all {
            let found = search(&page_with(100, bytes), PAGE);
            assert!(found.is_nothing(), "{bytes:x?}");
        }
    }

    #[test]
    fn the_end_of_an_instruction_of_the_page_before_is_no_instruction() {
        // lea rax, [rip + 0x3a20f], whose last four bytes would begin with CPUID.
        let mut page = page_with(0, &[0x0f, 0xa2, 3, 0]);
        page[LEAD - 3..LEAD].copy_from_slice(&[0x48, 0x8d, 0x05]);
        assert!(search(&page, PAGE).is_nothing());
    }

    #[test]
    fn what_reads_differently_from_different_places_is_unclear() {
        // The first bytes that are known: CPUID, or the immediate of what began a byte earlier.
        let mut page = vec![0x90; 4096];
        page[..5].copy_from_slice(&[0xb8, 0x0f, 0xa2, 0, 0]);
        assert!(search(&page, 0..4096).unclear);
    }

    #[test]
    fn what_stands_among_data_is_taken_for_data() {
        let mut random = 7_u32;
        let mut told = 0;
        for _ in 0..500 {
            let data = std::iter::repeat_with(|| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                random.to_be_bytes()[0]
            });
            let mut data: Vec<u8> = data.take(256).collect();
            // Only the first or the last part of it is data, the rest NOPs.
            let at = if told % 2 == 0 { 8 } else { 240 };
            data[at..at + 4].copy_from_slice(&[0x90, 0x0f, 0xa2, 0x90]);
            let found = search(&page_with(1000, &data), PAGE);
            told += usize::from(!found.places.contains(&(1000 + at + 2)));
        }
        assert!(told >= 490, "{told}");
    }

    #[test]
    fn what_is_behind_the_end_of_code_is_no_part_of_it() {
        // xlatb, behind CPUID and RET or behind CPUID alone.
        let page = page_with(1000, &[0x0f, 0xa2, 0xc3, 0xd7, 0xd7, 0xd7, 0xd7]);
        assert_eq!(search(&page, PAGE).places, [1001]);
        let page = page_with(1000, &[0x0f, 0xa2, 0x90, 0xd7, 0xd7, 0xd7, 0xd7]);
        assert!(search(&page, PAGE).among_data);
        let page = page_with(1000, &[0x0f, 0xa2, 0x90, 0xd7]);
        assert!(search(&page, PAGE).unclear);
        let mut page = page_with(1000, &[0x0f, 0xa2, 0x90]);
        page[LEAD + 1003..].fill(0);
        assert_eq!(search(&page, PAGE).places, [1001]);
    }

    #[test]
    fn breakpoints_and_system_calls_stand_among_code() {
        // int 3; int 0x80, as in Go's runtime and in programs in assembly.
        for interrupt in [0x03, 0x80] {
            let page = page_with(1000, &[0xcd, interrupt, 0x0f, 0xa2, 0xcd, interrupt]);
            assert_eq!(search(&page, PAGE).places, [1003]);
        }
        assert!(search(&page_with(1000, &[0xcd, 0x20, 0x0f, 0xa2]), PAGE).unclear);
    }

    #[test]
    fn a_page_that_can_be_written_gets_a_copy_for_several_places_alone() {
        let found = |count: usize, unclear: bool, among_data: bool| Found {
            places: vec![7; count],
            unclear,
            among_data,
        };
        for (found, writable, verdict) in [
            (found(0, false, false), true, Verdict::Itself),
            (found(0, false, true), true, Verdict::Itself),
            (found(0, false, true), false, Verdict::Not),
            (found(1, false, false), false, Verdict::Copy),
            (found(2, false, false), true, Verdict::Not),
            (found(3, false, true), true, Verdict::Copy),
            (found(3, false, true), false, Verdict::Not),
            (found(3, true, false), true, Verdict::Not),
        ] {
            assert_eq!(found.verdict(writable), verdict, "{found:?}, {writable}");
        }
    }

    #[test]
    fn the_vdsos_instructions_are_known_among_its_data() {
        let mut page = page_with(1000, &[0xd7, 0x0f, 0xa2, 0xd7]);
        assert!(search(&page, PAGE).unclear);
        page[LEAD + 3000..][..VDSO_NAME.len()].copy_from_slice(VDSO_NAME);
        assert_eq!(search(&page, PAGE).places, [1002]);
    }

    #[test]
    fn an_instruction_may_reach_into_the_next_page() {
        assert!(search(&page_with(4095, &[0x0f, 0xa2]), PAGE).unclear);
        assert!(search(&page_with(4095, &[0x0f, 0x05]), PAGE).is_nothing());
        let alone = page_with(4095, &[0x0f]);
        assert!(search(&alone[..LEAD + 4096], PAGE).is_nothing());
    }
}
