//! What an engine without interrupt chips of its own needs from the board's local APIC.

use std::sync::Arc;

use crate::VcpuWaker;

/// An event other than an interrupt (SDM 3A §11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicEvent {
    /// Back to the state after INIT, then wait for SIPI.
    Init,
    /// Start at `vector << 12` in real mode.
    Sipi(u8),
    /// Non-maskable interrupt.
    Nmi,
}

/// The access is architecturally invalid: the guest gets #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid APIC access")]
pub struct ApicFault;

/// One vCPU's local APIC.
///
/// The vCPU thread calls everything but [`Self::connect`]; devices and other vCPUs reach the APIC
/// by the board's [`InterruptController`](ringfence_bus::InterruptController), which calls the
/// waker when something new waits here.
///
/// The waker isn't called for what the vCPU does to itself: after a write to a register, an MSR or
/// the task priority, and after [`Self::poll_timer`], the engine asks [`Self::has_interrupt`] and
/// [`Self::take_event`] again (a vCPU may send itself an interrupt, end one that held back
/// another, or arm its timer for a time that has passed).
pub trait LocalApic: Send + Sync {
    /// Names the vCPU to wake.
    fn connect(&self, waker: Arc<dyn VcpuWaker>);

    /// Whether [`Self::acknowledge`] would return a vector now (IRR against PPR, the virtual wire
    /// from the PIC included). Cheap: asked at every chance to interrupt.
    fn has_interrupt(&self) -> bool;

    /// Takes the deliverable interrupt of highest priority into service and returns its vector.
    fn acknowledge(&self) -> Option<u8>;

    /// Takes the next INIT, SIPI or NMI. A SIPI comes only after an INIT that was taken, or to an
    /// application processor after power-up; an NMI only to a processor that isn't waiting for
    /// SIPI.
    fn take_event(&self) -> Option<ApicEvent>;

    /// Whether the processor waits for SIPI: after INIT, and an application processor after
    /// power-up.
    fn waits_for_start_up(&self) -> bool;

    /// Sets [`Self::waits_for_start_up`], to agree with a vCPU state that was loaded.
    fn set_waits_for_start_up(&self, waits: bool);

    /// When the timer fires next, in nanoseconds of CLOCK_MONOTONIC. A halted vCPU may sleep until
    /// then and call [`Self::poll_timer`], which spares it the wait for the timer thread.
    fn timer_due_ns(&self) -> Option<u64>;

    /// Fires the timer if it is due.
    fn poll_timer(&self);

    /// Reads a register of the 4 KiB xAPIC page (SDM 3A §11.4.1).
    fn read_page(&self, offset: u64, data: &mut [u8]);

    /// Writes a register of the xAPIC page.
    fn write_page(&self, offset: u64, data: &[u8]);

    /// RDMSR of 0x800 to 0x8ff, the TSC deadline or the APIC base.
    ///
    /// # Errors
    /// [`ApicFault`] where the processor raises #GP.
    fn read_msr(&self, msr: u32) -> Result<u64, ApicFault>;

    /// WRMSR of the same. A TSC deadline is in terms of the machine's counter (the host's plus the
    /// machine's offset): an engine whose vCPU has an offset of its own takes that out first.
    ///
    /// # Errors
    /// [`ApicFault`] where the processor raises #GP.
    fn write_msr(&self, msr: u32, value: u64) -> Result<(), ApicFault>;

    /// CR8: the task priority, 0 to 15.
    fn task_priority(&self) -> u8;

    /// MOV to CR8.
    fn set_task_priority(&self, priority: u8);

    /// The register page for a snapshot, 1024 bytes (KVM_GET_LAPIC's form).
    fn save(&self) -> Vec<u8>;

    /// Loads [`Self::save`]'s page.
    ///
    /// # Errors
    /// [`ApicFault`] for a page of the wrong length.
    fn restore(&self, page: &[u8]) -> Result<(), ApicFault>;
}
