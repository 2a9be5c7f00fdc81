//! A PC's chipset, as far as stock operating systems need it: interrupt controllers for engines
//! that bring none, timers, serial port, clock, keyboard controller, power control.
//!
//! Each device is placed on a bus by the board and keeps to [`ringfence_bus`]'s rules: whatever
//! the guest does, it neither panics nor blocks nor grows the process.

#![forbid(unsafe_code)]

mod irqchip;
mod timer;

pub use irqchip::{
    APIC_TIMER_HZ, ElcrPorts, IOAPIC_LEN, IOAPIC_PINS, IOAPIC_START, IoApicState, IoApicWindow,
    Irqchip, IrqchipState, PIC_ELCR_PORT, PIC_MASTER_PORT, PIC_SLAVE_PORT, PicPorts, PicState,
};
pub use timer::{Timer, Timers};
