//! The 8254 interval timer and the port that shows its third counter.
//!
//! Spec: Intel 8254 datasheet (231164-005); port 0x61 as in the 82371SB.
//!
//! Counters are functions of the time since they were loaded, so nothing runs while nobody looks,
//! except a timer for counter 0's interrupt. Counting in BCD is accepted and counts in binary: no
//! PC system software asks for it.

mod counter;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::OnceLock;
use std::sync::PoisonError;

use ringfence_bus::IrqLine;
use ringfence_bus::PioDevice;
use ringfence_clock::monotonic_ns;
use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use crate::Timer;
use crate::Timers;
use counter::Counter;

/// First port: three counters and the control register.
pub const PIT_PORT: u16 = 0x40;
/// Number of ports.
pub const PIT_PORTS: u64 = 4;
/// NMI status and control: counter 2's gate and output.
pub const PIT_GATE_PORT: u16 = 0x61;

/// Interrupts come at most this often, so that a guest can't keep the timer thread busy.
const SHORTEST_PERIOD_NS: u64 = 200_000;
/// The refresh bit of port 0x61 toggles this often.
const REFRESH_NS: u64 = 15_085;

/// Port 0x61 bits.
const GATE_2: u8 = 1 << 0;
const SPEAKER: u8 = 1 << 1;
const REFRESH: u8 = 1 << 4;
const OUT_2: u8 = 1 << 5;

/// The control register's counter field that means "read back".
const READ_BACK: u8 = 3;

/// Version of [`PitState`].
const STATE_VERSION: u32 = 1;

/// The saved state: loading times are relative to the moment of saving.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    version: u32,
    counters: [Counter; 3],
    speaker: bool,
}

#[derive(Debug)]
struct Registers {
    counters: [Counter; 3],
    speaker: bool,
}

/// The timer. Placed at [`PIT_PORT`]; [`PitGate`] is its other port.
#[derive(Debug)]
pub struct Pit {
    registers: Mutex<Registers>,
    irq: IrqLine,
    timer: OnceLock<Arc<Timer>>,
}

impl Pit {
    /// A timer whose counter 0 interrupts by `irq`.
    ///
    /// # Errors
    /// What the host said when it refused a timer.
    pub fn new(irq: IrqLine, timers: &Timers) -> io::Result<Arc<Self>> {
        let pit = Arc::new(Self {
            registers: Mutex::new(Registers {
                counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
                speaker: false,
            }),
            irq,
            timer: OnceLock::new(),
        });
        let owner = Arc::downgrade(&pit);
        let timer = timers.add(move || {
            if let Some(pit) = owner.upgrade() {
                pit.expire();
            }
        })?;
        // Just made: it has none yet.
        let _ = pit.timer.set(timer);
        Ok(pit)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn schedule(&self, registers: &Registers, after_ns: u64) {
        let Some(timer) = self.timer.get() else {
            return;
        };
        match registers.counters[0].next_edge_ns(after_ns) {
            Some(at_ns) => timer.arm(at_ns),
            None => timer.disarm(),
        }
    }

    fn expire(&self) {
        let registers = self.registers();
        let now = monotonic_ns();
        self.schedule(&registers, now.saturating_add(SHORTEST_PERIOD_NS));
        drop(registers);
        self.irq.pulse();
    }

    fn write_control(&self, value: u8) {
        let mut registers = self.registers();
        let now = monotonic_ns();
        let select = usize::from(value >> 6);
        if value >> 6 == READ_BACK {
            for (index, counter) in registers.counters.iter_mut().enumerate() {
                if value >> (index + 1) & 1 != 0 {
                    counter.read_back(value, now);
                }
            }
        } else if let Some(counter) = registers.counters.get_mut(select) {
            counter.write_control(value, now);
            if select == 0 {
                self.schedule(&registers, now);
            }
        }
    }
}

impl PioDevice for Pit {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let mut registers = self.registers();
        let counter = registers.counters.get_mut(usize::from(offset));
        if let ([byte], Some(counter)) = (data, counter) {
            *byte = counter.read(monotonic_ns());
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let &[byte] = data else { return };
        let mut registers = self.registers();
        let now = monotonic_ns();
        let Some(counter) = registers.counters.get_mut(usize::from(offset)) else {
            drop(registers);
            return self.write_control(byte);
        };
        if counter.write(byte, now) && offset == 0 {
            self.schedule(&registers, now);
        }
    }
}

/// Port 0x61: counter 2's gate and output, the refresh toggle.
#[derive(Debug)]
pub struct PitGate(Arc<Pit>);

impl PitGate {
    /// The port of `pit`.
    #[must_use]
    pub fn new(pit: Arc<Pit>) -> Self {
        Self(pit)
    }
}

impl PioDevice for PitGate {
    fn read(&self, _: u16, data: &mut [u8]) {
        let registers = self.0.registers();
        let now = monotonic_ns();
        let counter = &registers.counters[2];
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        data.fill(
            flag(counter.gate(), GATE_2)
                | flag(registers.speaker, SPEAKER)
                | flag(now / REFRESH_NS % 2 == 1, REFRESH)
                | flag(counter.output(now), OUT_2),
        );
    }

    fn write(&self, _: u16, data: &[u8]) {
        if let &[byte] = data {
            let mut registers = self.0.registers();
            registers.speaker = byte & SPEAKER != 0;
            registers.counters[2].set_gate(byte & GATE_2 != 0, monotonic_ns());
        }
    }
}

impl Persist for Pit {
    type State = PitState;

    const NAME: &'static str = "interval timer";

    fn save(&self) -> PitState {
        let registers = self.registers();
        let now = monotonic_ns();
        PitState {
            version: STATE_VERSION,
            counters: registers.counters.each_ref().map(|c| c.age(now)),
            speaker: registers.speaker,
        }
    }

    fn restore(&self, state: PitState) -> Result<(), RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version {
                what: Self::NAME,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let now = monotonic_ns();
        let mut registers = self.registers();
        registers.counters = state.counters.map(|counter| counter.rejuvenate(now));
        registers.speaker = state.speaker;
        self.schedule(&registers, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering;
    use std::time::Duration;
    use std::time::Instant;

    use ringfence_bus::Gsi;
    use ringfence_bus::InterruptController;
    use ringfence_bus::MsiMessage;

    use super::*;

    #[derive(Default)]
    struct Edges(AtomicU32);

    impl InterruptController for Edges {
        fn set_line(&self, _: Gsi, high: bool) {
            self.0.fetch_add(u32::from(high), Ordering::SeqCst);
        }
        fn send_msi(&self, _: MsiMessage) {}
    }

    fn pit() -> (Arc<Pit>, Arc<Edges>, Arc<Timers>) {
        let edges = Arc::new(Edges::default());
        let timers = Timers::new().expect("timers");
        let irq = IrqLine::new(edges.clone(), Gsi(0));
        (Pit::new(irq, &timers).expect("a timer"), edges, timers)
    }

    fn program(pit: &Pit, control: u8, count: u16) {
        let [low, high] = count.to_le_bytes();
        pit.write(3, &[control]);
        pit.write(u16::from(control >> 6), &[low]);
        pit.write(u16::from(control >> 6), &[high]);
    }

    #[test]
    fn counter_0_interrupts_periodically() {
        let (pit, edges, timers) = pit();
        let run = timers.clone();
        let thread = std::thread::spawn(move || run.run());
        program(&pit, 0x34, 1193);
        let end = Instant::now() + Duration::from_secs(20);
        while edges.0.load(Ordering::SeqCst) < 3 && Instant::now() < end {
            std::thread::yield_now();
        }
        assert!(edges.0.load(Ordering::SeqCst) >= 3);
        // Mode 0 without a count: stopped.
        pit.write(3, &[0x30]);
        timers.stop();
        thread.join().expect("no panic").expect("no error");
    }

    #[test]
    fn the_shortest_count_does_not_flood() {
        let (pit, edges, _timers) = pit();
        program(&pit, 0x34, 1);
        pit.expire();
        let next = pit.timer.get().and_then(|timer| timer.due_ns());
        assert!(next.expect("periodic") >= monotonic_ns() + SHORTEST_PERIOD_NS / 2);
        assert_eq!(edges.0.load(Ordering::SeqCst), 1);
    }

    // As Linux's quick calibration does: mode 0 on counter 2, output polled at port 0x61.
    #[test]
    fn counter_2_raises_its_output_after_the_count() {
        let (pit, _, _timers) = pit();
        let gate = PitGate::new(pit.clone());
        gate.write(0, &[GATE_2]);
        let start = Instant::now();
        program(&pit, 0xb0, 11932);
        let mut port = [0];
        while port[0] & OUT_2 == 0 {
            gate.read(0, &mut port);
        }
        assert!(start.elapsed() >= Duration::from_millis(9));
        assert_eq!(port[0] & (GATE_2 | SPEAKER), GATE_2);
    }

    #[test]
    fn a_restored_timer_continues_its_count() {
        let (one, _, _timers) = pit();
        program(&one, 0x34, 0xffff);
        let (two, _, _timers2) = pit();
        two.restore(one.save()).expect("fits");
        two.write(3, &[0x00]);
        let mut low = [0];
        let mut high = [0];
        two.read(0, &mut low);
        two.read(0, &mut high);
        assert_ne!([low, high], [[0], [0]]);
        assert!(two.timer.get().expect("made").due_ns().is_some());
    }
}
