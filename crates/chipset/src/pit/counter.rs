//! One of the 8254's counters, as a function of time.

use ringfence_clock::NS_PER_S;
use serde::Deserialize;
use serde::Serialize;

/// The counters' input.
const PIT_HZ: u64 = 1_193_182;

/// Read-back command bits (datasheet, figure 10): zero asks.
const READ_BACK_NO_COUNT: u8 = 1 << 5;
const READ_BACK_NO_STATUS: u8 = 1 << 4;

/// Status byte.
const STATUS_OUTPUT: u8 = 1 << 7;
const STATUS_NULL_COUNT: u8 = 1 << 6;

/// How the 16 bits of a count pass the 8-bit port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    Both,
}

/// A counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counter {
    mode: u8,
    access: Access,
    /// The count as written; zero is 65,536.
    reload: u16,
    /// When the count was loaded; `None` before a first count.
    loaded_ns: Option<u64>,
    gate: bool,
    /// The first byte of two was written, or read.
    half_written: Option<u8>,
    half_read: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

fn ticks(ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(PIT_HZ) / u128::from(NS_PER_S);
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn tick_ns(ticks: u64) -> u64 {
    let ns = u128::from(ticks) * u128::from(NS_PER_S) / u128::from(PIT_HZ);
    u64::try_from(ns).unwrap_or(u64::MAX)
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            access: Access::Both,
            reload: 0,
            loaded_ns: None,
            gate,
            half_written: None,
            half_read: false,
            latched: None,
            latched_status: None,
        }
    }

    /// The length of the count, 1 to 65,536.
    fn count(&self) -> u64 {
        match self.reload {
            0 => 0x1_0000,
            count => u64::from(count),
        }
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.loaded_ns
            .map_or(0, |loaded| ticks(now.saturating_sub(loaded)))
    }

    /// The control word for this counter: a latch command, or mode and access.
    pub(super) fn write_control(&mut self, value: u8, now: u64) {
        let access = match value >> 4 & 3 {
            0 => return self.latch_count(now),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = match value >> 1 & 7 {
            // Bit 2 is not looked at for modes 2 and 3.
            mode @ 6..=7 => mode - 4,
            mode => mode,
        };
        *self = Self {
            mode,
            access,
            ..Self::new(self.gate)
        };
    }

    pub(super) fn read_back(&mut self, value: u8, now: u64) {
        if value & READ_BACK_NO_COUNT == 0 {
            self.latch_count(now);
        }
        if value & READ_BACK_NO_STATUS == 0 && self.latched_status.is_none() {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::Both => 3,
            };
            let output = if self.output(now) { STATUS_OUTPUT } else { 0 };
            let null = match self.loaded_ns {
                Some(_) => 0,
                None => STATUS_NULL_COUNT,
            };
            self.latched_status = Some(output | null | access << 4 | self.mode << 1);
        }
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    /// A byte of the count; `true` when it is complete and loaded.
    pub(super) fn write(&mut self, byte: u8, now: u64) -> bool {
        let count = match (self.access, self.half_written.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::Both, None) => {
                self.half_written = Some(byte);
                return false;
            }
        };
        self.reload = count;
        // Modes 1 and 5 start at the gate's rising edge.
        self.loaded_ns = (!matches!(self.mode, 1 | 5)).then_some(now);
        true
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.value(now));
        let [low, high] = value.to_le_bytes();
        let second = std::mem::take(&mut self.half_read);
        let byte = match self.access {
            Access::Low => low,
            Access::High => high,
            Access::Both if second => high,
            Access::Both => {
                self.half_read = true;
                return low;
            }
        };
        self.latched = None;
        byte
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// A rising gate starts a new count in every mode but 0 and 4, which it only lets go on.
    pub(super) fn set_gate(&mut self, gate: bool, now: u64) {
        let rises = gate && !self.gate;
        self.gate = gate;
        if rises && !matches!(self.mode, 0 | 4) {
            self.loaded_ns = Some(now);
        }
    }

    /// The counting element (datasheet, "Mode Definitions").
    fn value(&self, now: u64) -> u16 {
        let (count, elapsed) = (self.count(), self.elapsed(now));
        let value = match self.mode {
            2 => count - elapsed % count,
            3 => count - elapsed.wrapping_mul(2) % count,
            // The others go on past zero.
            _ => count.wrapping_sub(elapsed),
        };
        let [low, high, ..] = value.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// The output pin.
    pub(super) fn output(&self, now: u64) -> bool {
        if self.loaded_ns.is_none() {
            return self.mode != 0;
        }
        let (count, elapsed) = (self.count(), self.elapsed(now));
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// When the output rises next, at `after_ns` or later.
    pub(super) fn next_edge_ns(&self, after_ns: u64) -> Option<u64> {
        let loaded = self.loaded_ns?;
        let count = self.count();
        let edges = match self.mode {
            2 | 3 => self.elapsed(after_ns) / count + 1,
            _ => 1,
        };
        let at_ns = loaded.saturating_add(tick_ns(count.saturating_mul(edges)));
        (matches!(self.mode, 2 | 3) || at_ns >= after_ns).then_some(at_ns)
    }

    /// With the loading time as its age, for a snapshot.
    pub(super) fn age(&self, now: u64) -> Self {
        Self {
            loaded_ns: self.loaded_ns.map(|loaded| now.saturating_sub(loaded)),
            ..self.clone()
        }
    }

    /// Back from [`Self::age`].
    pub(super) fn rejuvenate(self, now: u64) -> Self {
        Self {
            loaded_ns: self.loaded_ns.map(|age| now.saturating_sub(age)),
            mode: self.mode % 6,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1_000_000_000;

    fn loaded(control: u8, count: u16) -> Counter {
        let mut counter = Counter::new(true);
        counter.write_control(control, START);
        for byte in count.to_le_bytes() {
            counter.write(byte, START);
        }
        counter
    }

    fn read_count(counter: &mut Counter, now: u64) -> u16 {
        u16::from_le_bytes([counter.read(now), counter.read(now)])
    }

    fn after(ticks: u64) -> u64 {
        // Rounded up, so that the tick has passed.
        START + tick_ns(ticks) + 1
    }

    #[test]
    fn mode_0_counts_down_once_and_goes_on() {
        let mut counter = loaded(0x30, 1000);
        assert_eq!(read_count(&mut counter, after(1)), 999);
        assert!(!counter.output(after(999)));
        assert!(counter.output(after(1000)));
        assert_eq!(read_count(&mut counter, after(1001)), 0xffff);
        assert!(counter.output(after(100_000)));
        assert_eq!(counter.next_edge_ns(after(1001)), None);
    }

    #[test]
    fn mode_2_is_low_for_one_tick() {
        let counter = loaded(0x34, 1000);
        assert!(counter.output(after(998)));
        assert!(!counter.output(after(999)));
        assert!(counter.output(after(1000)));
        assert_eq!(counter.next_edge_ns(START), Some(START + tick_ns(1000)));
        assert_eq!(
            counter.next_edge_ns(after(1000)),
            Some(START + tick_ns(2000))
        );
    }

    #[test]
    fn mode_3_is_a_square_wave_and_counts_by_two() {
        let mut counter = loaded(0x36, 1000);
        assert!(counter.output(after(499)));
        assert!(!counter.output(after(500)));
        assert_eq!(read_count(&mut counter, after(100)), 800);
    }

    #[test]
    fn a_count_of_zero_is_the_longest() {
        let counter = loaded(0x34, 0);
        assert_eq!(counter.next_edge_ns(START), Some(START + tick_ns(0x1_0000)));
    }

    #[test]
    fn a_latched_count_stands_still() {
        let mut counter = loaded(0x34, 1000);
        counter.write_control(0x00, after(10));
        assert_eq!(read_count(&mut counter, after(500)), 990);
        assert_eq!(read_count(&mut counter, after(500)), 500);
    }

    #[test]
    fn status_is_read_back_before_the_count() {
        let mut counter = loaded(0x34, 1000);
        counter.read_back(0xc2, after(10));
        assert_eq!(counter.read(after(500)), 0x80 | 3 << 4 | 2 << 1);
        assert_eq!(read_count(&mut counter, after(500)), 990);
        let mut fresh = Counter::new(true);
        fresh.write_control(0x30, START);
        fresh.read_back(0xe2, START);
        assert_eq!(fresh.read(START), STATUS_NULL_COUNT | 3 << 4);
    }

    #[test]
    fn single_byte_access_loads_at_once() {
        let mut counter = Counter::new(true);
        counter.write_control(0x20, START);
        assert!(counter.write(0x12, START));
        assert_eq!(counter.read(START), 0x12);
    }

    #[test]
    fn a_gate_edge_starts_mode_1() {
        let mut counter = loaded(0x32, 1000);
        assert_eq!(counter.next_edge_ns(START), None);
        counter.set_gate(false, START);
        counter.set_gate(true, START);
        assert!(counter.next_edge_ns(START).is_some());
    }
}
