//! What a translation consists of: its code, and what is known of places inside it.

use crate::hot::Gate;
use crate::mode::Mode;
use crate::translate::crossing::Routine;
use crate::translate::plan::MAX_BORROWED;

/// Bytes of a block before its body: see [`crate::translate::entry`].
pub(crate) const POLL_ENTRY: u32 = 16;
/// Where the body starts.
pub(crate) const BODY_ENTRY: u32 = 28;
/// Identifies a page's translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageKey {
    /// Guest physical address of the page.
    pub gpa: u64,
    pub mode: Mode,
}

/// What a site in translated code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SiteKind {
    /// A memory access: retried once its page is filled.
    Memory { bytes: u16, write: bool },
    /// A copied instruction that may raise an exception by itself.
    Copied,
    /// An instruction for the monitor.
    Step,
    /// A string instruction on host addresses: R11 says how far RDI is from the guest's, R10 how
    /// far RSI is, if there is a source.
    String { source: bool },
    /// The end of an indirect transfer, or one to another page; its target is in
    /// [`crate::hot::Hot::spill`]`[3]`.
    Jump,
}

/// A guest instruction that may call the monitor, and its host code. Some hundred thousand are kept,
/// so its numbers are as small as they can be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site {
    pub kind: SiteKind,
    /// The probe is for a group's range.
    pub range: Option<SiteRange>,
    /// A host register that the operation borrowed; it waits in [`crate::hot::Hot::spill`]`[0]`.
    pub transient: Option<u8>,
    /// The flags wait in RAX during the probe.
    pub flags_parked: bool,
    /// Registers that groups have borrowed, and their slots, in the order of borrowing.
    pub held: [Option<(u8, u8)>; MAX_BORROWED],
    /// How many of them are borrowed before the probe; the rest only behind it.
    pub held_at_start: u8,
    /// Offset of the instruction in its guest page.
    pub guest: u16,
    /// First byte of host code, relative to the block; where a retry starts.
    pub start: u32,
    /// One past its last byte.
    pub end: u32,
}

/// What a group's probe covers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SiteRange {
    /// Where in the range the probing access lies.
    pub delta: u16,
    /// Something in the range is written.
    pub writes: bool,
}

/// A direct jump within the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    /// Offset of the target in the guest page.
    pub target: u16,
    /// The target doesn't lie ahead: the jump must pass a poll.
    pub backward: bool,
    /// The target is to be translated without groups.
    pub plain: bool,
    /// Place of the displacement, relative to the block.
    pub place: u32,
}

/// A translated block, ready to be installed.
#[derive(Default)]
pub(crate) struct NewBlock {
    pub code: Vec<u8>,
    /// Where the code begins that is rarely run.
    pub hot_len: usize,
    /// Branches within the code: the places of their displacements, and where they go.
    pub branches: Vec<(usize, usize)>,
    pub guest: u16,
    /// 64-byte parts of the page that the translation depends on.
    pub parts: u64,
    pub sites: Vec<Site>,
    pub links: Vec<Link>,
    /// Places of immediates that name a site or link of this block by number, to be rebased.
    pub site_places: Vec<usize>,
    pub link_places: Vec<usize>,
    /// Places of jump displacements to a gate.
    pub gate_places: Vec<(usize, Gate)>,
    /// Places of jump displacements to a routine.
    pub routine_places: Vec<(usize, Routine)>,
}

/// Where a block lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub key: PageKey,
    pub guest: u16,
    pub start: u32,
    pub len: u32,
    /// Where the part that is rarely run lies, and its length.
    pub cold: u32,
    pub cold_len: u32,
    pub first_site: u32,
}

/// A slot or count of borrowed registers, which are less than ten, as a [`Site`] has it.
pub(crate) fn small(number: usize) -> u8 {
    u8::try_from(number).unwrap_or(u8::MAX)
}

impl Block {
    /// A block of no page, in one piece.
    pub(crate) fn at(start: u32, len: u32) -> Self {
        Self {
            key: PageKey {
                gpa: u64::MAX,
                mode: Mode::default(),
            },
            guest: 0,
            start,
            len,
            cold: u32::MAX,
            cold_len: 0,
            first_site: 0,
        }
    }

    pub(crate) fn of(self, key: PageKey, guest: u16) -> Self {
        Self { key, guest, ..self }
    }

    /// Place in the cache of byte `inside`, counted as if the block were one piece.
    pub(crate) fn place(&self, inside: u32) -> u32 {
        if inside < self.len {
            self.start + inside
        } else {
            self.cold + (inside - self.len)
        }
    }

    /// The inverse of [`Self::place`].
    pub(crate) fn inside(&self, place: u32) -> Option<u32> {
        if (self.start..self.start + self.len).contains(&place) {
            return Some(place - self.start);
        }
        let cold = (self.cold..self.cold + self.cold_len).contains(&place);
        cold.then(|| place - self.cold + self.len)
    }
}

/// Which 64-byte parts of a page `len` bytes at `first` touch.
pub(crate) fn parts(first: u16, len: u16) -> u64 {
    let from = u32::from(first) / 64;
    let to = (u32::from(first) + u32::from(len.max(1)) - 1).min(4095) / 64;
    (u64::MAX >> (63 - (to - from))) << from
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_what_a_range_touches() {
        assert_eq!(parts(0, 1), 1);
        assert_eq!(parts(63, 2), 0b11);
        assert_eq!(parts(64, 64), 0b10);
        assert_eq!(parts(0, 4096), u64::MAX);
        assert_eq!(parts(4095, 1), 1 << 63);
        assert_eq!(parts(4032, 200), 1 << 63);
    }

    #[test]
    fn sites_are_small() {
        assert!(size_of::<Site>() <= 36, "{}", size_of::<Site>());
    }
}
