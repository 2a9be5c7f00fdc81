//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM 3A §11.5.4).
//!
//! It counts at 1 GHz before division, so one count at divisor 1 is a nanosecond. CPUID's crystal
//! leaf says the same frequency.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;

use ringfence_clock::Clock;
use ringfence_clock::monotonic_ns;

use crate::Timer;

/// Frequency of the timer's input.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;
/// A periodic timer calls at most this often: a guest that asks for more can't keep the timer
/// thread busy.
const SHORTEST_PERIOD_NS: u64 = 200_000;

/// LVT timer mode, bits 17 and 18.
const MODE_SHIFT: u32 = 17;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    OneShot,
    Periodic,
    Deadline,
}

impl Mode {
    fn of(lvt: u32) -> Self {
        match lvt >> MODE_SHIFT & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            // 3 is reserved; the register's write mask keeps it from being stored.
            _ => Self::Deadline,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    mode: Mode,
    initial: u32,
    divide: u32,
    deadline_tsc: u64,
    /// When it fires next.
    due_ns: Option<u64>,
}

impl State {
    /// Nanoseconds that one count takes.
    fn count_ns(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        // 0 to 6 divide by 2 to 128, 7 by 1 (figure 11-10).
        1 << ((code + 1) & 7)
    }

    fn span_ns(&self) -> u64 {
        u64::from(self.initial) * self.count_ns()
    }
}

/// The timer of one local APIC.
#[derive(Debug)]
pub(super) struct ApicTimer {
    clock: Arc<Clock>,
    timer: OnceLock<Arc<Timer>>,
    state: Mutex<State>,
}

impl ApicTimer {
    pub(super) fn new(clock: Arc<Clock>) -> Self {
        Self {
            clock,
            timer: OnceLock::new(),
            state: Mutex::new(State::default()),
        }
    }

    /// Gives it the timer that calls [`Self::expire`].
    pub(super) fn connect(&self, timer: Arc<Timer>) {
        // Made once with its machine.
        let _ = self.timer.set(timer);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn schedule(&self, state: &mut State, due_ns: Option<u64>) {
        state.due_ns = due_ns;
        if let Some(timer) = self.timer.get() {
            match due_ns {
                Some(at_ns) => timer.arm(at_ns),
                None => timer.disarm(),
            }
        }
    }

    /// Whether it fires now. Called by the timer thread and by a vCPU that woke by itself;
    /// whoever comes first is told so.
    pub(super) fn expire(&self) -> bool {
        let mut state = self.state();
        let now = monotonic_ns();
        let Some(due_ns) = state.due_ns.filter(|&due_ns| due_ns <= now) else {
            return false;
        };
        if state.deadline_tsc > self.clock.guest_tsc() {
            // The two clocks differ by some parts per million: never fire before the counter.
            let due = self.clock.monotonic_ns_at(state.deadline_tsc);
            self.schedule(&mut state, Some(due));
            return false;
        }
        state.deadline_tsc = 0;
        let next = (state.mode == Mode::Periodic && state.initial != 0).then(|| {
            let period = state.span_ns().max(SHORTEST_PERIOD_NS);
            // Periods that were missed meanwhile are not made up for.
            due_ns.saturating_add(period).max(now)
        });
        self.schedule(&mut state, next);
        true
    }

    /// When it fires next, in nanoseconds of the monotonic clock.
    pub(super) fn due_ns(&self) -> Option<u64> {
        self.state().due_ns
    }

    /// Stops it and forgets its setting, on INIT.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        *state = State::default();
        self.schedule(&mut state, None);
    }

    /// The LVT entry was written: a change to or from TSC-deadline mode disarms (§11.5.4.1).
    pub(super) fn set_mode(&self, lvt: u32) {
        let mut state = self.state();
        let mode = Mode::of(lvt);
        if (state.mode == Mode::Deadline) != (mode == Mode::Deadline) {
            state.deadline_tsc = 0;
            state.initial = 0;
            self.schedule(&mut state, None);
        }
        state.mode = mode;
    }

    /// Starts counting down, but for TSC-deadline mode, where the register is ignored.
    pub(super) fn set_initial_count(&self, count: u32) {
        let mut state = self.state();
        if state.mode == Mode::Deadline {
            return;
        }
        state.initial = count;
        let due = (count != 0).then(|| monotonic_ns().saturating_add(state.span_ns()));
        self.schedule(&mut state, due);
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.state().initial
    }

    pub(super) fn current_count(&self) -> u32 {
        let state = self.state();
        if state.mode == Mode::Deadline {
            return 0;
        }
        let left_ns = state
            .due_ns
            .map_or(0, |due_ns| due_ns.saturating_sub(monotonic_ns()));
        u32::try_from(left_ns / state.count_ns()).unwrap_or(u32::MAX)
    }

    /// Changes the divisor; the count that is under way keeps its value.
    pub(super) fn set_divide(&self, divide: u32) {
        let left = self.current_count();
        let mut state = self.state();
        state.divide = divide & 0b1011;
        if state.mode != Mode::Deadline && state.due_ns.is_some() {
            let span = u64::from(left) * state.count_ns();
            let due = monotonic_ns().saturating_add(span);
            self.schedule(&mut state, Some(due));
        }
    }

    pub(super) fn divide(&self) -> u32 {
        self.state().divide
    }

    /// IA32_TSC_DEADLINE; zero when disarmed or fired.
    pub(super) fn deadline_tsc(&self) -> u64 {
        self.state().deadline_tsc
    }

    /// Arms for a value of the guest's counter; zero disarms; ignored in the other modes. `true`
    /// when the value has passed: it fires at once, without the timer thread.
    pub(super) fn set_deadline_tsc(&self, deadline_tsc: u64) -> bool {
        let mut state = self.state();
        if state.mode != Mode::Deadline {
            return false;
        }
        let passed = deadline_tsc <= self.clock.guest_tsc();
        if deadline_tsc == 0 || passed {
            state.deadline_tsc = 0;
            self.schedule(&mut state, None);
            return deadline_tsc != 0;
        }
        state.deadline_tsc = deadline_tsc;
        let due = self.clock.monotonic_ns_at(deadline_tsc);
        self.schedule(&mut state, Some(due));
        false
    }

    /// Continues a count, on restore.
    pub(super) fn restore_counts(&self, initial: u32, current: u32, divide: u32) {
        let mut state = self.state();
        state.divide = divide & 0b1011;
        state.initial = initial;
        if state.mode != Mode::Deadline {
            let left = u64::from(current) * state.count_ns();
            let due = (current != 0).then(|| monotonic_ns().saturating_add(left));
            self.schedule(&mut state, due);
        }
    }
}
