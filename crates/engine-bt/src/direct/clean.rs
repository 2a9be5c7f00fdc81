//! Code in which nothing was found: the same libraries are shown in one space after another.

use std::collections::HashSet;
use std::hash::BuildHasher;

use foldhash::quality::RandomState;

/// Pages that are remembered. All are forgotten together.
const MOST: usize = 16 << 10;

/// A hash of code, of a kind of this process's own: a guest can't look for code that has another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Digest(u64);

/// The code that was searched and found to have nothing.
#[derive(Debug, Default)]
pub(crate) struct Clean {
    kind: RandomState,
    known: HashSet<Digest, RandomState>,
}

impl Clean {
    /// Of `code`, in which the page begins at `start`.
    pub(crate) fn digest(&self, code: &[u8], start: usize) -> Digest {
        Digest(self.kind.hash_one((start, code)))
    }

    pub(crate) fn has(&self, digest: Digest) -> bool {
        self.known.contains(&digest)
    }

    pub(crate) fn add(&mut self, digest: Digest) {
        if self.known.len() == MOST {
            self.known.clear();
        }
        self.known.insert(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_known_by_every_byte_and_where_its_page_begins() {
        let mut clean = Clean::default();
        let mut code = vec![0x90; 4096];
        clean.add(clean.digest(&code, 16));
        assert!(clean.has(clean.digest(&code, 16)));
        assert!(!clean.has(clean.digest(&code, 0)));
        for at in 0..code.len() {
            code[at] = 0x0f;
            assert!(!clean.has(clean.digest(&code, 16)), "{at}");
            code[at] = 0x90;
        }
    }

    #[test]
    fn it_is_bounded() {
        let mut clean = Clean::default();
        for number in 0..3 * MOST {
            clean.add(clean.digest(&number.to_le_bytes(), 0));
            assert!(clean.known.len() <= MOST);
        }
    }
}
