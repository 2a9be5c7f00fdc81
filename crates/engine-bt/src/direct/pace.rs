//! When user code runs directly.
//!
//! An address space earns it by being found at work by timer interrupts or by having new code, which
//! would have to be translated, and loses it when its code
//! comes out of the space so often that coming and going takes longer than the code does: then
//! translation is faster, which takes two to five times as long for the code and hardly anything for
//! its exits. What coming and going take differs by ten times between hosts, so it is measured: the least
//! that was seen counts, since other programs of the host may have come between.

/// Interrupts that must have found user code at work.
const EARNED: i32 = 2;
/// Blocks whose translation counts as one: new code is run faster than it is translated.
const BLOCKS: u32 = 16;
/// Visits that are judged together.
const VISITS: u32 = 64;
/// Of so many visits that only had a page shown, one is judged.
const FILLS_FORGIVEN: u32 = 4;
/// Interrupts that an address space works off after it was judged not worthwhile; twice as many each
/// time.
const FIRST_PENALTY: i32 = 4;
const MOST_PENALTY: i32 = 256;

/// How an address space is doing.
#[derive(Debug)]
pub(crate) struct Pace {
    earned: i32,
    penalty: i32,
    blocks: u32,
    visits: u32,
    fills: u32,
    /// Ticks of the time-stamp counter for the guest's code.
    inside: u64,
    /// The least that a visit took beside that.
    beside: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            earned: 0,
            penalty: FIRST_PENALTY,
            blocks: 0,
            visits: 0,
            fills: 0,
            inside: 0,
            beside: u64::MAX,
        }
    }
}

impl Pace {
    /// An interrupt found user code at work.
    pub(crate) fn note_work(&mut self) {
        self.earned = self.earned.saturating_add(1).min(EARNED);
    }

    /// A block of user code was translated. True when code runs directly from here on.
    pub(crate) fn note_translation(&mut self) -> bool {
        self.blocks += 1;
        if self.blocks < BLOCKS {
            return false;
        }
        self.blocks = 0;
        let before = self.is_earned();
        self.note_work();
        !before && self.is_earned()
    }

    /// Whether to run directly.
    pub(crate) fn is_earned(&self) -> bool {
        self.earned >= EARNED
    }

    /// Whether a visit that only had a page shown is to be judged. Most aren't, since none that
    /// follow will have to ask again; yet a space that is emptied all the time is of no use.
    pub(crate) fn judges_fill(&mut self) -> bool {
        self.fills = (self.fills + 1) % FILLS_FORGIVEN;
        self.fills == 0
    }

    /// A visit to the space ended, which took `whole` ticks, `inside` of them for the guest's code.
    /// True when it was the last for some time.
    pub(crate) fn note_visit(&mut self, inside: u64, whole: u64) -> bool {
        self.visits += 1;
        self.inside = self.inside.saturating_add(inside);
        self.beside = self.beside.min(whole.saturating_sub(inside));
        if self.visits < VISITS {
            return false;
        }
        let worthwhile = self.inside >= self.beside.saturating_mul(VISITS.into());
        self.visits = 0;
        self.inside = 0;
        if worthwhile {
            self.penalty = FIRST_PENALTY;
        } else {
            self.earned = -self.penalty;
            self.penalty = (2 * self.penalty).min(MOST_PENALTY);
        }
        !worthwhile
    }

    /// Whether it is for good that code doesn't run directly.
    pub(crate) fn is_given_up(&self) -> bool {
        self.earned < -MOST_PENALTY
    }

    /// Never again, as far as interrupts can count.
    pub(crate) fn give_up(&mut self) {
        self.earned = i32::MIN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn earned() -> Pace {
        let mut pace = Pace::default();
        for _ in 0..EARNED {
            assert!(!pace.is_earned());
            pace.note_work();
        }
        pace
    }

    #[test]
    fn short_visits_lose_it_and_work_earns_it_again() {
        let mut pace = earned();
        assert!(pace.is_earned());
        for _ in 1..VISITS {
            assert!(!pace.note_visit(3_000, 9_000));
        }
        assert!(pace.note_visit(3_000, 9_000));
        for _ in 0..FIRST_PENALTY + EARNED {
            assert!(!pace.is_earned());
            pace.note_work();
        }
        assert!(pace.is_earned());
    }

    #[test]
    fn new_code_earns_it() {
        let mut pace = Pace::default();
        let blocks = (1..100).find(|_| pace.note_translation());
        assert_eq!(blocks, Some(2 * BLOCKS));
        assert!(pace.is_earned());
    }

    #[test]
    fn long_visits_keep_it() {
        let mut pace = earned();
        for _ in 0..3 * VISITS {
            assert!(!pace.note_visit(30_000, 36_000));
        }
        assert!(pace.is_earned());
    }
}
