//! A set of 256 vectors that several threads add to.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

const WORDS: usize = 8;

/// IRR, ISR or TMR: a bit a vector, and a summary of which words have any.
///
/// Any thread inserts; only the vCPU's own thread removes.
#[derive(Debug, Default)]
pub(super) struct VectorSet {
    words: [AtomicU32; WORDS],
    summary: AtomicU32,
}

fn place(vector: u8) -> (usize, u32) {
    (usize::from(vector >> 5), 1 << (vector & 31))
}

impl VectorSet {
    /// Adds a vector; `true` when it wasn't in the set.
    pub(super) fn insert(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        let before = self.words[word].fetch_or(bit, Ordering::SeqCst);
        self.summary.fetch_or(1 << word, Ordering::SeqCst);
        before & bit == 0
    }

    /// Takes a vector out. Only for the vCPU's own thread.
    pub(super) fn remove(&self, vector: u8) {
        let (word, bit) = place(vector);
        let left = self.words[word].fetch_and(!bit, Ordering::SeqCst) & !bit;
        if left == 0 {
            self.summary.fetch_and(!(1 << word), Ordering::SeqCst);
            // Somebody may have inserted between the two: then the word's bit is due again.
            if self.words[word].load(Ordering::SeqCst) != 0 {
                self.summary.fetch_or(1 << word, Ordering::SeqCst);
            }
        }
    }

    /// Puts a vector in or out, from any thread, for sets whose highest vector nobody asks for.
    pub(super) fn set(&self, vector: u8, present: bool) {
        let (word, bit) = place(vector);
        if present {
            self.words[word].fetch_or(bit, Ordering::SeqCst);
        } else {
            self.words[word].fetch_and(!bit, Ordering::SeqCst);
        }
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        let (word, bit) = place(vector);
        self.words[word].load(Ordering::Relaxed) & bit != 0
    }

    /// The highest vector, which is the one of highest priority.
    pub(super) fn highest(&self) -> Option<u8> {
        let mut summary = self.summary.load(Ordering::SeqCst);
        while let Some(word) = summary.checked_ilog2() {
            let bits = self
                .words
                .get(word as usize)
                .map_or(0, |bits| bits.load(Ordering::SeqCst));
            if let Some(bit) = bits.checked_ilog2() {
                return u8::try_from(word * 32 + bit).ok();
            }
            summary &= !(1 << word);
        }
        None
    }

    /// 32 vectors, as the register page shows them.
    pub(super) fn word(&self, index: usize) -> u32 {
        self.words
            .get(index)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Loads 32 vectors, on restore.
    pub(super) fn set_word(&self, index: usize, value: u32) {
        if let Some(word) = self.words.get(index) {
            word.store(value, Ordering::SeqCst);
            let bit = 1 << index;
            if value == 0 {
                self.summary.fetch_and(!bit, Ordering::SeqCst);
            } else {
                self.summary.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    pub(super) fn clear(&self) {
        for index in 0..WORDS {
            self.set_word(index, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_comes_first() {
        let set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [0x31, 0xff, 0x20, 0x40] {
            assert!(set.insert(vector));
        }
        assert!(!set.insert(0x40));
        let mut order = Vec::new();
        while let Some(vector) = set.highest() {
            set.remove(vector);
            order.push(vector);
        }
        assert_eq!(order, [0xff, 0x40, 0x31, 0x20]);
    }

    #[test]
    fn nothing_is_lost_between_inserting_and_removing_threads() {
        let set = VectorSet::default();
        let rounds = 20_000_u32;
        let taken = std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..rounds {
                    let vector = 0x20 + (round % 8) as u8;
                    while !set.insert(vector) {
                        std::thread::yield_now();
                    }
                }
            });
            let mut taken = 0;
            while taken < rounds {
                match set.highest() {
                    Some(vector) => {
                        set.remove(vector);
                        taken += 1;
                    }
                    None => std::thread::yield_now(),
                }
            }
            taken
        });
        assert_eq!((taken, set.highest()), (rounds, None));
    }
}
