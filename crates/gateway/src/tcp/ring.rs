//! Bytes on their way, in a ring that grows while there is memory to spare.

use std::io::IoSlice;
use std::io::IoSliceMut;

use crate::world::Budget;

/// The first size; each connection may have this much, whatever others have.
const LEAST: usize = 16 << 10;

/// A growing ring of bytes.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    data: Vec<u8>,
    start: usize,
    len: usize,
}

impl Ring {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn capacity(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.data.len() - self.len
    }

    /// Grows to twice its size, at most `limit`.
    pub(crate) fn grow(&mut self, limit: usize, budget: &mut Budget) -> bool {
        let wanted = (self.data.len() * 2).max(LEAST).min(limit.max(LEAST));
        if wanted <= self.data.len() {
            return false;
        }
        let more = wanted - self.data.len();
        if self.data.is_empty() {
            budget.force(more);
        } else if !budget.take(more) {
            return false;
        }
        let mut data = vec![0; wanted];
        let (first, second) = self.slices(0, self.len);
        data[..first.len()].copy_from_slice(first);
        data[first.len()..first.len() + second.len()].copy_from_slice(second);
        self.data = data;
        self.start = 0;
        true
    }

    /// Gives its memory back.
    pub(crate) fn release(&mut self, budget: &mut Budget) {
        budget.give(self.data.len());
        *self = Self::default();
    }

    /// `len` bytes from `offset` on.
    pub(crate) fn slices(&self, offset: usize, len: usize) -> (&[u8], &[u8]) {
        let len = len.min(self.len.saturating_sub(offset));
        if len == 0 {
            return (&[], &[]);
        }
        let start = (self.start + offset) % self.data.len();
        let first = len.min(self.data.len() - start);
        (&self.data[start..start + first], &self.data[..len - first])
    }

    /// [`Self::slices`] to write from.
    pub(crate) fn io_slices(&self, offset: usize, len: usize) -> [IoSlice<'_>; 2] {
        let (first, second) = self.slices(offset, len);
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// Its free part, at most `limit` bytes.
    pub(crate) fn free_slices(&mut self, limit: usize) -> [IoSliceMut<'_>; 2] {
        let free = self.free().min(limit);
        if free == 0 {
            return [IoSliceMut::new(&mut []), IoSliceMut::new(&mut [])];
        }
        let size = self.data.len();
        let end = (self.start + self.len) % size;
        let first = free.min(size - end);
        let (low, high) = self.data.split_at_mut(end);
        [
            IoSliceMut::new(&mut high[..first]),
            IoSliceMut::new(&mut low[..free - first]),
        ]
    }

    /// `len` bytes were put into the free part.
    pub(crate) fn commit(&mut self, len: usize) {
        self.len += len.min(self.free());
    }

    /// Forgets the first `len` bytes.
    pub(crate) fn consume(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        self.start = if self.len == 0 {
            0
        } else {
            (self.start + len) % self.data.len()
        };
    }

    /// Adds what fits of `bytes`, growing to `limit`; returns how much that was.
    pub(crate) fn push(&mut self, bytes: &[u8], limit: usize, budget: &mut Budget) -> usize {
        while self.free() < bytes.len() && self.grow(limit, budget) {}
        let mut taken = 0;
        for mut slice in self.free_slices(bytes.len()) {
            let part = slice.len();
            slice.copy_from_slice(&bytes[taken..taken + part]);
            taken += part;
        }
        self.commit(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(ring: &Ring) -> Vec<u8> {
        let (first, second) = ring.slices(0, ring.len());
        [first, second].concat()
    }

    #[test]
    fn bytes_come_out_as_they_went_in_around_the_end_and_after_growing() {
        let mut budget = Budget {
            used: 0,
            limit: 1 << 20,
        };
        let mut ring = Ring::default();
        let mut model = Vec::new();
        let mut next = 0_u8;
        for round in 0..2000 {
            let bytes: Vec<u8> = (0..(round * 37) % 700)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            let taken = ring.push(&bytes, 64 << 10, &mut budget);
            model.extend_from_slice(&bytes[..taken]);
            let out = (round * 13) % 690;
            ring.consume(out);
            model.drain(..out.min(model.len()));
            assert!(content(&ring) == model, "{round}");
        }
        assert!(ring.capacity() <= 64 << 10);
        ring.release(&mut budget);
        assert_eq!(budget.used, 0);
    }

    #[test]
    fn without_memory_it_keeps_its_least() {
        let mut budget = Budget { used: 0, limit: 0 };
        let mut ring = Ring::default();
        assert_eq!(ring.push(&[1; 100_000], 1 << 20, &mut budget), LEAST);
        assert_eq!(ring.push(&[1; 1], 1 << 20, &mut budget), 0);
    }
}
