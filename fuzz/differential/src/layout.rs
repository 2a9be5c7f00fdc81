//! The memory that cases see, at the same addresses natively and in the guest.
//!
//! | address | pages | access |
//! |---|---|---|
//! | [`CODE`] | [`CODE_PAGES`] | all: cases may write over code |
//! | [`DATA`] | 12, two of them absent and one read-only | read, write |
//! | [`STACK`] | 3 | read, write |
//! | [`EDGE`] | 2, the last below 4 GiB and the first above | read, write |

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The same, to count memory with.
pub const PAGE_BYTES: usize = 4096;
/// Where cases' code lies.
pub const CODE: u64 = 0x2000_0000;
/// Pages of code.
pub const CODE_PAGES: usize = 16;
/// Where cases' data lies.
pub const DATA: u64 = 0x3000_0000;
/// Where cases' stack lies.
pub const STACK: u64 = 0x3800_0000;
/// The pages around 4 GiB.
pub const EDGE: u64 = 0xffff_f000;

/// What a case may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: it isn't there.
    Absent,
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Everything.
    All,
}

/// Pages that lie in a row.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// What each page allows.
    pub pages: &'static [Access],
}

/// All areas. Their pages, absent ones too, lie one after the other in the arena.
pub const AREAS: [Area; 4] = {
    use Access::Absent as N;
    use Access::All as X;
    use Access::Read as R;
    use Access::Write as W;
    [
        Area {
            start: CODE,
            pages: &[X; CODE_PAGES],
        },
        Area {
            start: DATA,
            pages: &[W, W, W, W, N, R, W, W, N, W, W, W],
        },
        Area {
            start: STACK,
            pages: &[W, W, W],
        },
        Area {
            start: EDGE,
            pages: &[W, W],
        },
    ]
};

/// Pages of the arena: the memory behind all areas.
pub const ARENA_PAGES: usize = {
    let mut pages = 0;
    let mut index = 0;
    while index < AREAS.len() {
        pages += AREAS[index].pages.len();
        index += 1;
    }
    pages
};
/// Bytes of the arena.
pub const ARENA_BYTES: usize = ARENA_PAGES * PAGE_BYTES;
/// Bytes of code, at the arena's start.
pub const CODE_BYTES: usize = CODE_PAGES * PAGE_BYTES;

/// Every page: its address, its place in the arena in bytes, its access.
pub fn pages() -> impl Iterator<Item = (u64, u64, Access)> {
    AREAS
        .iter()
        .flat_map(|area| {
            let addresses = (area.start..).step_by(PAGE_BYTES);
            addresses.zip(area.pages)
        })
        .zip((0..).step_by(PAGE_BYTES))
        .map(|((address, &access), place)| (address, place, access))
}
