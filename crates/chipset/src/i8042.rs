//! The keyboard controller, with nothing plugged in: what operating systems want of it is its
//! reset line, and answers without waiting.
//!
//! Spec: IBM PC/AT Technical Reference (1984), keyboard controller; commands as in the UPI-42's
//! data sheet. A guest that finds no controller by ACPI doesn't probe; one that probes anyway gets
//! every answer at once, since each unanswered command costs it half a second.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::PioDevice;
use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use crate::PowerEvent;
use crate::PowerEvents;

/// The data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Status: a byte waits; system flag (self-test passed); keyboard not locked.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Commands.
const READ_CONTROL: u8 = 0x20;
const WRITE_CONTROL: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const LOOP_KEYBOARD: u8 = 0xd2;
const LOOP_AUX: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
/// 0xf0 to 0xff pulse the output lines whose bits are clear; line 0 is reset.
const PULSE_FIRST: u8 = 0xf0;
const PULSE_RESET: u8 = 1 << 0;

const SELF_TEST_PASSED: u8 = 0x55;
/// What a missing device makes of a test: its clock line is stuck.
const TEST_FAILED: u8 = 0x01;
/// "Resend": what a byte for a missing device comes back as.
const RESEND: u8 = 0xfe;
/// Control byte after reset: keyboard and mouse off, system flag.
const CONTROL_RESET: u8 = 0x34;
/// Output port: not in reset, A20 on.
const OUTPUT_PORT: u8 = 0x03;

/// The real one holds one byte; more is a guest that doesn't read.
const QUEUE: usize = 16;

/// Version of [`I8042State`].
const STATE_VERSION: u32 = 1;

/// The saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    version: u32,
    registers: Registers,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    control: u8,
    /// The command that the next data byte belongs to.
    pending: Option<u8>,
    output: VecDeque<u8>,
}

impl Registers {
    fn answer(&mut self, byte: u8) {
        if self.output.len() < QUEUE {
            self.output.push_back(byte);
        }
    }

    fn command(&mut self, command: u8) -> bool {
        self.pending = None;
        match command {
            READ_CONTROL => {
                self.output.clear();
                self.answer(self.control);
            }
            WRITE_CONTROL | WRITE_OUTPUT_PORT | LOOP_KEYBOARD | LOOP_AUX | WRITE_AUX => {
                self.pending = Some(command);
            }
            DISABLE_AUX => self.control |= 1 << 5,
            ENABLE_AUX => self.control &= !(1 << 5),
            SELF_TEST => {
                self.output.clear();
                self.control = CONTROL_RESET;
                self.answer(SELF_TEST_PASSED);
            }
            TEST_AUX | TEST_KEYBOARD => self.answer(TEST_FAILED),
            READ_OUTPUT_PORT => self.answer(OUTPUT_PORT),
            PULSE_FIRST..=0xff => return command & PULSE_RESET == 0,
            _ => {}
        }
        false
    }

    fn data(&mut self, byte: u8) -> bool {
        match self.pending.take() {
            Some(WRITE_CONTROL) => self.control = byte,
            Some(WRITE_OUTPUT_PORT) => return byte & PULSE_RESET == 0,
            Some(LOOP_KEYBOARD | LOOP_AUX) => self.answer(byte),
            // For the keyboard or the mouse, which aren't there.
            _ => self.answer(RESEND),
        }
        false
    }
}

/// The controller. [`I8042Port`]s place it on the bus.
pub struct I8042 {
    registers: Mutex<Registers>,
    events: PowerEvents,
}

impl std::fmt::Debug for I8042 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("I8042").field(&self.registers()).finish()
    }
}

impl I8042 {
    /// A controller whose reset line is told to `events`.
    #[must_use]
    pub fn new(events: PowerEvents) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::new(Registers {
                control: CONTROL_RESET,
                pending: None,
                output: VecDeque::new(),
            }),
            events,
        })
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of the controller's two ports.
#[derive(Debug)]
pub struct I8042Port {
    controller: Arc<I8042>,
    is_command: bool,
}

impl I8042Port {
    /// The port at [`I8042_DATA_PORT`].
    #[must_use]
    pub fn data(controller: Arc<I8042>) -> Self {
        Self {
            controller,
            is_command: false,
        }
    }

    /// The port at [`I8042_COMMAND_PORT`].
    #[must_use]
    pub fn command(controller: Arc<I8042>) -> Self {
        Self {
            controller,
            is_command: true,
        }
    }
}

impl PioDevice for I8042Port {
    fn read(&self, _: u16, data: &mut [u8]) {
        let mut registers = self.controller.registers();
        let value = if self.is_command {
            let full = match registers.output.is_empty() {
                true => 0,
                false => STATUS_OUTPUT_FULL,
            };
            full | STATUS_SYSTEM | STATUS_UNLOCKED
        } else {
            registers.output.pop_front().unwrap_or(0)
        };
        data.fill(value);
    }

    fn write(&self, _: u16, data: &[u8]) {
        let &[byte] = data else { return };
        let mut registers = self.controller.registers();
        let resets = if self.is_command {
            registers.command(byte)
        } else {
            registers.data(byte)
        };
        drop(registers);
        if resets {
            (self.controller.events)(PowerEvent::Reset);
        }
    }
}

impl Persist for I8042 {
    type State = I8042State;

    const NAME: &'static str = "keyboard controller";

    fn save(&self) -> I8042State {
        I8042State {
            version: STATE_VERSION,
            registers: self.registers().clone(),
        }
    }

    fn restore(&self, state: I8042State) -> Result<(), RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version {
                what: Self::NAME,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let mut registers = state.registers;
        registers.output.truncate(QUEUE);
        *self.registers() = registers;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::power::tests::Recorder;

    struct Bench {
        data: I8042Port,
        command: I8042Port,
        events: Arc<Recorder>,
    }

    fn bench() -> Bench {
        let events = Arc::new(Recorder::default());
        let controller = I8042::new(events.sink());
        Bench {
            data: I8042Port::data(controller.clone()),
            command: I8042Port::command(controller),
            events,
        }
    }

    impl Bench {
        fn status(&self) -> u8 {
            let mut byte = [0];
            self.command.read(0, &mut byte);
            byte[0]
        }

        /// What a driver does: a command, and its answer when there is one.
        fn ask(&self, command: u8) -> Option<u8> {
            self.command.write(0, &[command]);
            self.answer()
        }

        fn answer(&self) -> Option<u8> {
            let mut byte = [0];
            (self.status() & STATUS_OUTPUT_FULL != 0).then(|| {
                self.data.read(0, &mut byte);
                byte[0]
            })
        }
    }

    #[test]
    fn the_reset_line_resets_the_machine() {
        let bench = bench();
        bench.command.write(0, &[0xfe]);
        bench.command.write(0, &[0xd1]);
        bench.data.write(0, &[0xfe]);
        assert_eq!(bench.events.taken(), [PowerEvent::Reset; 2]);
    }

    #[test]
    fn other_lines_do_not() {
        let bench = bench();
        bench.command.write(0, &[0xff]);
        bench.command.write(0, &[0xd1]);
        bench.data.write(0, &[0xdf]);
        bench.data.write(0, &[0xfe]);
        assert_eq!(bench.events.taken(), []);
    }

    #[test]
    fn a_probing_driver_gets_its_answers_at_once() {
        let bench = bench();
        assert_eq!(bench.ask(SELF_TEST), Some(SELF_TEST_PASSED));
        assert_eq!(bench.ask(READ_CONTROL), Some(CONTROL_RESET));
        bench.command.write(0, &[WRITE_CONTROL]);
        bench.data.write(0, &[0x65]);
        assert_eq!(bench.ask(READ_CONTROL), Some(0x65));
        bench.command.write(0, &[LOOP_AUX]);
        bench.data.write(0, &[0x5a]);
        assert_eq!(bench.answer(), Some(0x5a));
        bench.data.write(0, &[0xf2]);
        assert_eq!(bench.answer(), Some(RESEND));
        assert_eq!(bench.answer(), None);
    }

    #[test]
    fn a_guest_that_never_reads_does_not_grow_it() {
        let bench = bench();
        for _ in 0..1000 {
            bench.data.write(0, &[0]);
        }
        let answers = std::iter::from_fn(|| bench.answer()).count();
        assert_eq!(answers, QUEUE);
    }
}
