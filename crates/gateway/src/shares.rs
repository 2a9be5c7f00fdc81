//! Who has how many of something that is bounded.

use std::collections::HashMap;
use std::hash::Hash;

/// Counts by who has them. Whatever one of several takes, it leaves the others some.
#[derive(Debug)]
pub(crate) struct Shares<K> {
    counts: HashMap<K, usize>,
    total: usize,
}

impl<K> Default for Shares<K> {
    fn default() -> Self {
        Self {
            counts: HashMap::new(),
            total: 0,
        }
    }
}

impl<K: Clone + Eq + Hash> Shares<K> {
    /// Whether one may have one more: of several, none has more than there are left.
    pub(crate) fn admits(&self, who: &K, limit: usize, several: bool) -> bool {
        let own = self.counts.get(who).copied().unwrap_or(0);
        let left = limit.saturating_sub(self.total);
        left > 0 && (!several || own < left)
    }

    pub(crate) fn add(&mut self, who: &K) {
        *self.counts.entry(who.clone()).or_default() += 1;
        self.total += 1;
    }

    pub(crate) fn remove(&mut self, who: &K) {
        if let Some(own) = self.counts.get_mut(who) {
            *own -= 1;
            self.total -= 1;
            if *own == 0 {
                self.counts.remove(who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(shares: &mut Shares<u8>, who: u8, several: bool) -> usize {
        let mut taken = 0;
        while shares.admits(&who, 1000, several) {
            shares.add(&who);
            taken += 1;
        }
        taken
    }

    #[test]
    fn one_alone_may_have_all() {
        let mut shares = Shares::default();
        assert_eq!(take_all(&mut shares, 1, false), 1000);
        shares.remove(&1);
        assert_eq!(take_all(&mut shares, 1, false), 1);
    }

    #[test]
    fn each_of_several_leaves_the_others_some() {
        let mut shares = Shares::default();
        assert_eq!(take_all(&mut shares, 1, true), 500);
        assert_eq!(take_all(&mut shares, 2, true), 250);
        assert_eq!(take_all(&mut shares, 3, true), 125);
        assert_eq!(take_all(&mut shares, 1, true), 0);
        for _ in 0..500 {
            shares.remove(&1);
        }
        assert!(shares.admits(&2, 1000, true));
        // What nobody has is nobody's to give back.
        shares.remove(&1);
        assert_eq!(take_all(&mut shares, 3, false), 625);
    }
}
