//! ACPI's fixed hardware: power button, sleep control, timer; and the reset control register.
//!
//! Spec: ACPI 6.5 §4.8.3 (fixed hardware registers), §4.8.4.2 (sleep states); the reset control
//! register as in the 82371SB. The timer's overflow interrupt is not modelled (nobody waits for
//! it: it wraps every 20 minutes), nor are lid, clock alarm and wake events.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::IrqLine;
use ringfence_bus::PioDevice;
use ringfence_clock::NS_PER_S;
use ringfence_clock::monotonic_ns;
use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use crate::PowerEvent;
use crate::PowerEvents;

/// First port of the block, chosen by the board and told to the guest by the FADT.
pub const ACPI_PM_PORT: u16 = 0x600;
/// Ports of the block.
pub const ACPI_PM_PORTS: u64 = 16;
const BLOCK_BYTES: usize = 16;
/// PM1a event block: status, enable.
pub const ACPI_PM1_EVENT: u16 = 0;
/// PM1a control.
pub const ACPI_PM1_CONTROL: u16 = 4;
/// Timer.
pub const ACPI_PM_TIMER: u16 = 8;
/// What SLP_TYP means soft off (`_S5` in the DSDT).
pub const ACPI_SLEEP_OFF: u8 = 5;

/// The reset control register's port, and what the FADT says to write there.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// Full reset.
pub const RESET_CONTROL_VALUE: u8 = 0x06;
const RESET_CPU: u8 = 1 << 2;

/// Frequency of the timer.
const PM_TIMER_HZ: u64 = 3_579_545;

/// PM1 status and enable: the power button. The others (clock, sleep button, global lock, timer)
/// can be enabled, as drivers check, and never happen.
const POWER_BUTTON: u16 = 1 << 8;
const ENABLE_WRITABLE: u16 = 1 << 10 | 1 << 9 | POWER_BUTTON | 1 << 5 | 1;
/// PM1 control: SCI on, sleep type and sleep enable.
const CONTROL_SCI: u16 = 1 << 0;
const CONTROL_SLEEP_ENABLE: u16 = 1 << 13;
const CONTROL_SLEEP_TYPE_SHIFT: u32 = 10;
const CONTROL_WRITABLE: u16 = CONTROL_SCI | 7 << CONTROL_SLEEP_TYPE_SHIFT;

/// Version of [`AcpiPmState`].
const STATE_VERSION: u32 = 1;

/// The saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    version: u32,
    registers: Registers,
    timer: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

#[derive(Debug)]
struct Block {
    registers: Registers,
    /// Added to the timer, so that it continues after a restore.
    timer_offset: u32,
}

/// The fixed hardware's registers.
pub struct AcpiPm {
    block: Mutex<Block>,
    sci: IrqLine,
    events: PowerEvents,
}

impl std::fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AcpiPm")
            .field("registers", &self.block().registers)
            .finish_non_exhaustive()
    }
}

impl AcpiPm {
    /// The block, in ACPI mode from the start: there is no SMI to switch it on.
    #[must_use]
    pub fn new(sci: IrqLine, events: PowerEvents) -> Arc<Self> {
        Arc::new(Self {
            block: Mutex::new(Block {
                registers: Registers {
                    status: 0,
                    enable: 0,
                    control: CONTROL_SCI,
                },
                timer_offset: 0,
            }),
            sci,
            events,
        })
    }

    fn block(&self) -> MutexGuard<'_, Block> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_sci(&self, registers: &Registers) {
        let asks = registers.status & registers.enable != 0;
        self.sci.set(asks && registers.control & CONTROL_SCI != 0);
    }

    /// Presses the power button: the guest is asked to shut down.
    pub fn press_power_button(&self) {
        let mut block = self.block();
        block.registers.status |= POWER_BUTTON;
        self.update_sci(&block.registers);
    }

    /// A write of the control register: its sleep type, when it asks to sleep.
    fn write_control(block: &mut Block, value: u16) -> Option<u8> {
        block.registers.control = value & CONTROL_WRITABLE;
        let sleep_type = (value >> CONTROL_SLEEP_TYPE_SHIFT).to_le_bytes()[0] & 7;
        (value & CONTROL_SLEEP_ENABLE != 0).then_some(sleep_type)
    }
}

fn timer_now() -> u32 {
    let ticks = u128::from(monotonic_ns()) * u128::from(PM_TIMER_HZ) / u128::from(NS_PER_S);
    let [a, b, c, d, ..] = ticks.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl Block {
    fn bytes(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        let timer = timer_now().wrapping_add(self.timer_offset);
        bytes[0..2].copy_from_slice(&self.registers.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.registers.enable.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.registers.control.to_le_bytes());
        bytes[8..12].copy_from_slice(&timer.to_le_bytes());
        bytes
    }
}

impl PioDevice for AcpiPm {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let bytes = self.block().bytes();
        let start = usize::from(offset);
        match bytes.get(start..start + data.len()) {
            Some(found) => data.copy_from_slice(found),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut block = self.block();
        let mut sleeps = None;
        // Registers have 16 bits; ACPICA writes them whole, and two at once as 32.
        for (index, word) in data.chunks_exact(2).enumerate() {
            let value = u16::from_le_bytes([word[0], word[1]]);
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            match offset.saturating_add(2 * index) {
                ACPI_PM1_EVENT => block.registers.status &= !value,
                2 => block.registers.enable = value & ENABLE_WRITABLE,
                ACPI_PM1_CONTROL => sleeps = Self::write_control(&mut block, value),
                _ => {}
            }
        }
        self.update_sci(&block.registers);
        drop(block);
        if sleeps == Some(ACPI_SLEEP_OFF) {
            (self.events)(PowerEvent::PowerOff);
        }
    }
}

impl Persist for AcpiPm {
    type State = AcpiPmState;

    const NAME: &'static str = "ACPI fixed hardware";

    fn save(&self) -> AcpiPmState {
        let block = self.block();
        AcpiPmState {
            version: STATE_VERSION,
            registers: block.registers.clone(),
            timer: timer_now().wrapping_add(block.timer_offset),
        }
    }

    fn restore(&self, state: AcpiPmState) -> Result<(), RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version {
                what: Self::NAME,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let mut block = self.block();
        block.registers = state.registers;
        block.timer_offset = state.timer.wrapping_sub(timer_now());
        self.update_sci(&block.registers);
        Ok(())
    }
}

/// What a write of `value` to the reset control register does.
pub fn write_reset_control(value: u8, events: &PowerEvents) {
    if value & RESET_CPU != 0 {
        events(PowerEvent::Reset);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::atomic::Ordering;

    use ringfence_bus::Gsi;
    use ringfence_bus::InterruptController;
    use ringfence_bus::MsiMessage;

    use super::*;
    use crate::power::tests::Recorder;

    #[derive(Default)]
    struct Wire(AtomicBool);

    impl InterruptController for Wire {
        fn set_line(&self, _: Gsi, high: bool) {
            self.0.store(high, Ordering::SeqCst);
        }
        fn send_msi(&self, _: MsiMessage) {}
    }

    fn block() -> (Arc<AcpiPm>, Arc<Wire>, Arc<Recorder>) {
        let wire = Arc::new(Wire::default());
        let events = Arc::new(Recorder::default());
        let sci = IrqLine::new(wire.clone(), Gsi(9));
        (AcpiPm::new(sci, events.sink()), wire, events)
    }

    fn read<const N: usize>(block: &AcpiPm, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        block.read(offset, &mut data);
        data
    }

    #[test]
    fn soft_off_turns_the_machine_off() {
        let (block, _, events) = block();
        assert_eq!(read(&block, 4), [1, 0], "ACPI mode is on");
        block.write(4, &(5_u16 << 10).to_le_bytes());
        assert_eq!(events.taken(), []);
        block.write(4, &(5_u16 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(events.taken(), [PowerEvent::PowerOff]);
        block.write(4, &(1_u16 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(events.taken(), [], "other sleep states don't exist");
    }

    #[test]
    fn the_power_button_interrupts_until_it_is_acknowledged() {
        let (block, wire, _) = block();
        block.press_power_button();
        assert!(!wire.0.load(Ordering::SeqCst), "not enabled");
        block.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(wire.0.load(Ordering::SeqCst));
        assert_eq!(read(&block, 0), POWER_BUTTON.to_le_bytes());
        block.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!wire.0.load(Ordering::SeqCst));
    }

    #[test]
    fn status_and_enable_can_be_written_at_once() {
        let (block, wire, _) = block();
        block.press_power_button();
        block.write(0, &[0, 1, 0, 1]);
        assert_eq!(read(&block, 0), [0, 0, 0, 1]);
        assert!(!wire.0.load(Ordering::SeqCst));
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let (block, _, _) = block();
        let count = |block: &AcpiPm| u32::from_le_bytes(read(block, 8));
        let (start, start_ns) = (count(&block), monotonic_ns());
        while monotonic_ns() - start_ns < 3_000_000 {
            std::hint::spin_loop();
        }
        assert!(count(&block).wrapping_sub(start) >= 10_700);
    }

    #[test]
    fn accesses_past_the_block_read_as_ones() {
        let (block, _, _) = block();
        assert_eq!(read(&block, 14), [0xff; 4]);
        block.write(u16::MAX, &[0xff; 4]);
    }

    #[test]
    fn reset_control_resets_by_its_cpu_bit() {
        let events = Arc::new(Recorder::default());
        write_reset_control(0x02, &events.sink());
        assert_eq!(events.taken(), []);
        write_reset_control(RESET_CONTROL_VALUE, &events.sink());
        assert_eq!(events.taken(), [PowerEvent::Reset]);
    }

    #[test]
    fn a_restored_block_keeps_its_wire_and_its_timer() {
        let (one, _, _) = block();
        one.write(2, &POWER_BUTTON.to_le_bytes());
        one.press_power_button();
        let mut state = one.save();
        state.timer = 77;
        let (two, wire, _) = block();
        two.restore(state).expect("fits");
        assert!(wire.0.load(Ordering::SeqCst));
        let timer = u32::from_le_bytes(read(&two, 8));
        assert!((77..77 + 1_000_000_000).contains(&timer));
    }
}
