//! A PC's chipset, as far as stock operating systems need it: interrupt controllers for engines
//! that bring none, timers, serial port, clock, keyboard controller, power control.
//!
//! Each device is placed on a bus by the board and keeps to [`ringfence_bus`]'s rules: whatever
//! the guest does, it neither panics nor blocks nor grows the process.

#![forbid(unsafe_code)]

mod acpi;
mod i8042;
mod irqchip;
mod pit;
mod power;
mod pvpanic;
mod rtc;
mod serial;
mod timer;

pub use acpi::{
    ACPI_PM_PORT, ACPI_PM_PORTS, ACPI_PM_TIMER, ACPI_PM1_CONTROL, ACPI_PM1_EVENT, ACPI_SLEEP_OFF,
    AcpiPm, AcpiPmState, RESET_CONTROL_PORT, RESET_CONTROL_VALUE, write_reset_control,
};
pub use i8042::{I8042, I8042_COMMAND_PORT, I8042_DATA_PORT, I8042Port, I8042State};
pub use irqchip::{
    APIC_TIMER_HZ, ElcrPorts, IOAPIC_LEN, IOAPIC_PINS, IOAPIC_START, IoApicState, IoApicWindow,
    Irqchip, IrqchipState, PIC_ELCR_PORT, PIC_MASTER_PORT, PIC_SLAVE_PORT, PicPorts, PicState,
};
pub use pit::{PIT_GATE_PORT, PIT_PORT, PIT_PORTS, Pit, PitGate, PitState};
pub use power::{PowerEvent, PowerEvents};
pub use pvpanic::{PVPANIC_PORT, Pvpanic};
pub use rtc::{RTC_CENTURY, RTC_PORT, RTC_PORTS, Rtc, RtcState};
pub use serial::{
    OutputLimits, SERIAL_PORT, SERIAL_PORTS, SerialOutput, SerialPort, SerialPortState,
};
pub use timer::{Timer, Timers};
