//! When user code runs directly.
//!
//! An address space earns it by being found at work by timer interrupts or by having new code, which
//! would have to be translated, and loses it when its code
//! comes out of the space so often that coming and going takes longer than the code does: then
//! translation is faster, which takes two to five times as long for the code and hardly anything for
//! its exits. What coming and going take differs by ten times between hosts, so it is measured: the least
//! that was seen counts, since other programs of the host may have come between.
//!
//! Short programs end before they are judged, and the next one has new code again. So it is learned
//! over all address spaces of a vCPU how much new code is worth it.

/// Interrupts that must have found user code at work.
const EARNED: i32 = 2;
/// Blocks whose translation counts as one interrupt: new code is run faster than it is translated.
const FEWEST_BLOCKS: u32 = 16;
const MOST_BLOCKS: u32 = 256;
/// Visits that are judged together.
const VISITS: u64 = 64;
/// Of so many visits that only had a page shown, one is judged.
const FILLS_FORGIVEN: u32 = 4;
/// Interrupts that an address space works off after it was judged not worthwhile; twice as many each
/// time.
const FIRST_PENALTY: i32 = 4;
const MOST_PENALTY: i32 = 256;

/// What a vCPU has learned from all visits.
#[derive(Debug)]
pub(crate) struct Experience {
    /// Blocks of new code that count as one interrupt: fewer where they were worth it.
    blocks: u32,
    /// The least ticks of the time-stamp counter that a visit took inside the space and beside that:
    /// what it takes to come and go.
    inside: u64,
    beside: u64,
}

impl Default for Experience {
    fn default() -> Self {
        Self {
            blocks: FEWEST_BLOCKS,
            inside: u64::MAX,
            beside: u64::MAX,
        }
    }
}

impl Experience {
    fn note_visit(&mut self, inside: u64, beside: u64) {
        self.inside = self.inside.min(inside);
        self.beside = self.beside.min(beside);
    }

    /// Takes into account how code fared that ran directly because it was new.
    fn note_trial(&mut self, worthwhile: bool) {
        self.blocks = if worthwhile {
            (self.blocks / 2).max(FEWEST_BLOCKS)
        } else {
            (2 * self.blocks).min(MOST_BLOCKS)
        };
    }
}

/// Visits that are judged together.
#[derive(Debug, Default)]
struct Batch {
    visits: u64,
    /// Ticks inside the space.
    inside: u64,
}

impl Batch {
    fn add(&mut self, inside: u64) {
        self.visits += 1;
        self.inside = self.inside.saturating_add(inside);
    }

    /// Whether the guest's code took longer than coming and going.
    fn is_worthwhile(&self, experience: &Experience) -> bool {
        let coming = experience.inside.saturating_mul(self.visits);
        let going = experience.beside.saturating_mul(self.visits);
        self.inside.saturating_sub(coming) >= coming.saturating_add(going)
    }
}

/// How an address space is doing.
#[derive(Debug)]
pub(crate) struct Pace {
    earned: i32,
    penalty: i32,
    blocks: u32,
    batch: Batch,
    fills: u32,
    /// All visits so far, of code that runs directly because it is new and that wasn't judged yet.
    trial: Option<Batch>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            earned: 0,
            penalty: FIRST_PENALTY,
            blocks: 0,
            batch: Batch::default(),
            fills: 0,
            trial: None,
        }
    }
}

impl Pace {
    /// An interrupt found user code at work.
    pub(crate) fn note_work(&mut self) {
        self.earned = self.earned.saturating_add(1).min(EARNED);
    }

    /// A block of user code was translated. True when code runs directly from here on.
    pub(crate) fn note_translation(&mut self, experience: &Experience) -> bool {
        self.blocks += 1;
        if self.blocks < experience.blocks {
            return false;
        }
        self.blocks = 0;
        let before = self.is_earned();
        self.note_work();
        let begins = !before && self.is_earned();
        if begins {
            self.trial = Some(Batch::default());
        }
        begins
    }

    /// Whether to run directly.
    pub(crate) fn is_earned(&self) -> bool {
        self.earned >= EARNED
    }

    /// A visit to the space ended, which took `whole` ticks, `inside` of them for the guest's code;
    /// `filled` if it only had a page shown. True when it was the last for some time.
    pub(crate) fn note_visit(
        &mut self,
        experience: &mut Experience,
        inside: u64,
        whole: u64,
        filled: bool,
    ) -> bool {
        experience.note_visit(inside, whole.saturating_sub(inside));
        if let Some(trial) = &mut self.trial {
            trial.add(inside);
        }
        if filled && !self.judges_fill() {
            return false;
        }
        self.batch.add(inside);
        if self.batch.visits < VISITS {
            return false;
        }
        self.end_trial(experience);
        let worthwhile = std::mem::take(&mut self.batch).is_worthwhile(experience);
        if worthwhile {
            self.penalty = FIRST_PENALTY;
        } else {
            self.earned = -self.penalty;
            self.penalty = (2 * self.penalty).min(MOST_PENALTY);
        }
        !worthwhile
    }

    /// Whether a visit that only had a page shown is to be judged. Most aren't, since none that
    /// follow will have to ask again; yet a space that is emptied all the time is of no use.
    fn judges_fill(&mut self) -> bool {
        self.fills = (self.fills + 1) % FILLS_FORGIVEN;
        self.fills == 0
    }

    /// The address space is gone.
    pub(crate) fn end(&mut self, experience: &mut Experience) {
        self.end_trial(experience);
        *self = Self::default();
    }

    fn end_trial(&mut self, experience: &mut Experience) {
        if let Some(trial) = self.trial.take() {
            experience.note_trial(trial.is_worthwhile(experience));
        }
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

    /// Visits that come and go in 9,000 ticks, 3,000 of them inside.
    fn experience() -> Experience {
        let mut experience = Experience::default();
        experience.note_visit(3_000, 6_000);
        experience
    }

    /// Visits with `work` ticks for the guest's code. The number of the one that was the last for
    /// some time.
    fn visits(pace: &mut Pace, experience: &mut Experience, work: u64) -> Option<u64> {
        (1..=3 * VISITS).find(|_| pace.note_visit(experience, 3_000 + work, 9_000 + work, false))
    }

    #[test]
    fn short_visits_lose_it_and_work_earns_it_again() {
        let mut pace = earned();
        assert_eq!(visits(&mut pace, &mut experience(), 8_000), Some(VISITS));
        for _ in 0..FIRST_PENALTY + EARNED {
            assert!(!pace.is_earned());
            pace.note_work();
        }
        assert!(pace.is_earned());
    }

    #[test]
    fn long_visits_keep_it() {
        let mut pace = earned();
        assert_eq!(visits(&mut pace, &mut experience(), 10_000), None);
        assert!(pace.is_earned());
    }

    #[test]
    fn of_visits_that_had_a_page_shown_one_in_four_is_judged() {
        let mut pace = earned();
        let mut experience = experience();
        let judged = (1..1_000).find(|_| pace.note_visit(&mut experience, 4_000, 9_000, true));
        assert_eq!(judged, Some(VISITS * u64::from(FILLS_FORGIVEN)));
    }

    /// Blocks until new code earns it.
    fn blocks_to_earn(pace: &mut Pace, experience: &Experience) -> Option<u32> {
        (1..10_000).find(|_| pace.note_translation(experience))
    }

    #[test]
    fn new_code_earns_it() {
        let mut pace = Pace::default();
        let blocks = blocks_to_earn(&mut pace, &experience());
        assert_eq!(blocks, Some(2 * FEWEST_BLOCKS));
        assert!(pace.is_earned());
    }

    #[test]
    fn programs_that_end_before_it_was_worth_it_make_new_code_worth_less() {
        let mut experience = experience();
        let mut program = |work: u64| {
            let mut pace = Pace::default();
            let blocks = blocks_to_earn(&mut pace, &experience);
            for filled in [false, true, true, true, false] {
                pace.note_visit(&mut experience, 3_000 + work, 9_000 + work, filled);
            }
            pace.end(&mut experience);
            blocks
        };
        let short: Vec<_> = (0..6).map(|_| program(4_000)).collect();
        assert_eq!(short, [32, 64, 128, 256, 512, 512].map(Some));
        let long: Vec<_> = (0..6).map(|_| program(90_000)).collect();
        assert_eq!(long, [512, 256, 128, 64, 32, 32].map(Some));
    }

    #[test]
    fn work_that_was_found_says_nothing_of_new_code() {
        let mut experience = experience();
        let mut pace = earned();
        pace.note_visit(&mut experience, 3_001, 9_000, false);
        pace.end(&mut experience);
        assert!(!pace.is_earned());
        let blocks = blocks_to_earn(&mut pace, &experience);
        assert_eq!(blocks, Some(2 * FEWEST_BLOCKS));
    }
}
