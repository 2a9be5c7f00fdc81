//! The interrupt chips of a PC: a local APIC a processor, the I/O APIC, and the pair of PICs.
//!
//! For engines that bring none of their own. [`Irqchip`] is the machine's
//! [`InterruptController`]; [`Irqchip::local_apic`] is what a vCPU's engine drives.
//!
//! Input `n` is input `n` of the I/O APIC and, below 16, of the PICs too, but for the interval
//! timer: as on a PC, its input 0 goes to the I/O APIC's input 2, which has no wire of its own (the
//! MADT says so, and KVM's chips are wired alike).

mod apic;
mod apic_timer;
mod delivery;
mod ioapic;
mod page;
mod pic;
mod ports;
mod registers;
mod state;
#[cfg(test)]
mod tests;
mod vectors;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;

use ringfence_bus::Gsi;
use ringfence_bus::InterruptController;
use ringfence_bus::MsiMessage;
use ringfence_clock::Clock;
use ringfence_engine::ApicEvent;
use ringfence_engine::ApicFault;
use ringfence_engine::LocalApic;
use ringfence_engine::VcpuWaker;

use crate::Timers;
use apic::Apic;
use apic::ESR_SEND_ILLEGAL_VECTOR;
use apic::Lvt;
use delivery::Delivery;
use delivery::Destination;
use delivery::Message;
use ioapic::IoApic;
use pic::PIC_INPUTS;
use pic::PicPair;

pub use apic_timer::APIC_TIMER_HZ;
pub use ioapic::{IOAPIC_LEN, IOAPIC_PINS, IOAPIC_START, IoApicState};
pub use pic::{PIC_ELCR_PORT, PIC_MASTER_PORT, PIC_SLAVE_PORT, PicState};
pub use ports::{ElcrPorts, IoApicWindow, PicPorts};
pub use state::IrqchipState;

/// The interval timer's input, and where it goes on the I/O APIC.
const TIMER_INPUT: Gsi = Gsi(0);
const TIMER_PIN: u32 = 2;

/// The interrupt chips of one machine.
///
/// Lock order: the PIC's lock and the I/O APIC's are never held together; local APICs are
/// reached under either.
#[derive(Debug)]
pub struct Irqchip {
    apics: Box<[Arc<Apic>]>,
    ioapic: Mutex<IoApic>,
    pic: Mutex<PicPair>,
}

impl Irqchip {
    /// Chips for `vcpus` processors, whose APIC timers are among `timers`.
    ///
    /// # Errors
    /// What the host said when it refused a timer.
    pub fn new(vcpus: u32, clock: &Arc<Clock>, timers: &Timers) -> io::Result<Arc<Self>> {
        let apics = (0..vcpus)
            .map(|id| Arc::new(Apic::new(id, Arc::clone(clock))))
            .collect::<Box<[_]>>();
        for apic in &apics {
            let owner: Weak<Apic> = Arc::downgrade(apic);
            let timer = timers.add(move || {
                if let Some(apic) = owner.upgrade()
                    && apic.timer.expire()
                {
                    apic.fire(Lvt::Timer, true);
                }
            })?;
            apic.timer.connect(timer);
        }
        Ok(Arc::new(Self {
            apics,
            ioapic: Mutex::new(IoApic::default()),
            pic: Mutex::new(PicPair::default()),
        }))
    }

    /// The local APIC of processor `index`.
    #[must_use]
    pub fn local_apic(self: &Arc<Self>, index: u32) -> Option<Arc<dyn LocalApic>> {
        let apic = self.apics.get(usize::try_from(index).ok()?)?;
        Some(Arc::new(CpuApic {
            chip: Arc::clone(self),
            apic: Arc::clone(apic),
        }))
    }

    fn ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the PICs and tells the bootstrap processor their output.
    fn with_pic<T>(&self, change: impl FnOnce(&mut PicPair) -> T) -> T {
        let mut pic = self.pic.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut pic);
        if let Some(bsp) = self.apics.first() {
            // Under the lock, so that levels arrive in their order.
            bsp.set_pic_wire(pic.output());
        }
        result
    }

    fn send(&self, message: Message, sender: Option<&Apic>) {
        let is_sender = |apic: &Apic| sender.is_some_and(|sender| sender.id == apic.id);
        let deliver = |apic: &Apic| {
            let announce = !is_sender(apic);
            apic.deliver(message.delivery, message.vector, message.level, announce);
        };
        if let (Destination::Physical(id), Some(apic)) = (
            message.destination,
            self.physical_destination(message.destination),
        ) {
            debug_assert_eq!(apic.id, id);
            return deliver(apic);
        }
        let matches = |apic: &&Arc<Apic>| match message.destination {
            Destination::All => true,
            Destination::AllButSelf => !is_sender(apic),
            Destination::Itself => is_sender(apic),
            Destination::Physical(_) => false,
            Destination::Logical(id) => apic.logical_id().matches(id),
        };
        let targets = self.apics.iter().filter(matches);
        if message.delivery == Delivery::LowestPriority {
            let lowest = targets
                .filter_map(|apic| Some((apic.arbitration_priority()?, apic)))
                .min_by_key(|&(priority, _)| priority);
            if let Some((_, apic)) = lowest {
                deliver(apic);
            }
        } else {
            targets.for_each(|apic| deliver(apic));
        }
    }

    /// APIC IDs are the processors' numbers.
    fn physical_destination(&self, destination: Destination) -> Option<&Apic> {
        match destination {
            Destination::Physical(id) => self.apics.get(usize::try_from(id).ok()?).map(|a| &**a),
            _ => None,
        }
    }

    fn send_icr(&self, apic: &Apic, icr: u64) {
        apic.icr.store(icr, std::sync::atomic::Ordering::Relaxed);
        let Some(message) = Message::from_icr(icr, apic.is_x2apic()) else {
            return;
        };
        let takes_vector = matches!(message.delivery, Delivery::Fixed | Delivery::LowestPriority);
        if takes_vector && message.vector < 16 {
            apic.error(ESR_SEND_ILLEGAL_VECTOR);
            return;
        }
        self.send(message, Some(apic));
    }

    fn send_self(&self, apic: &Apic, vector: u8) {
        if vector < 16 {
            apic.error(ESR_SEND_ILLEGAL_VECTOR);
        }
        apic.deliver(Delivery::Fixed, vector, false, false);
    }

    fn end_of_interrupt(&self, apic: &Apic) {
        if let Some(vector) = apic.end_of_interrupt() {
            let again = self.ioapic().end_of_interrupt(vector);
            for message in again {
                self.send(message, None);
            }
        }
    }
}

impl InterruptController for Irqchip {
    fn set_line(&self, gsi: Gsi, high: bool) {
        if gsi.0 < PIC_INPUTS {
            self.with_pic(|pic| pic.set_line(gsi.0, high));
        }
        let pin = match gsi {
            TIMER_INPUT => TIMER_PIN,
            Gsi(TIMER_PIN) => return,
            Gsi(pin) => pin,
        };
        let mut ioapic = self.ioapic();
        if let Some(message) = ioapic.set_line(pin, high) {
            self.send(message, None);
        }
    }

    fn send_msi(&self, message: MsiMessage) {
        if let Some(message) = Message::from_msi(message) {
            self.send(message, None);
        }
    }
}

/// A vCPU's hold on its local APIC and, behind it, the other chips.
struct CpuApic {
    chip: Arc<Irqchip>,
    apic: Arc<Apic>,
}

impl LocalApic for CpuApic {
    fn connect(&self, waker: Arc<dyn VcpuWaker>) {
        self.apic.connect(waker);
    }

    fn has_interrupt(&self) -> bool {
        self.apic.has_interrupt()
    }

    fn acknowledge(&self) -> Option<u8> {
        if self.apic.pic_interrupts() {
            return Some(self.chip.with_pic(PicPair::acknowledge));
        }
        self.apic.acknowledge()
    }

    fn take_event(&self) -> Option<ApicEvent> {
        self.apic.take_event()
    }

    fn waits_for_start_up(&self) -> bool {
        self.apic.waits_for_start_up()
    }

    fn set_waits_for_start_up(&self, waits: bool) {
        self.apic.set_waits_for_start_up(waits);
    }

    fn timer_due_ns(&self) -> Option<u64> {
        self.apic.timer.due_ns()
    }

    fn poll_timer(&self) {
        if self.apic.timer.expire() {
            self.apic.fire(Lvt::Timer, false);
        }
    }

    fn read_page(&self, offset: u64, data: &mut [u8]) {
        self.chip.read_page(&self.apic, offset, data);
    }

    fn write_page(&self, offset: u64, data: &[u8]) {
        self.chip.write_page(&self.apic, offset, data);
    }

    fn read_msr(&self, msr: u32) -> Result<u64, ApicFault> {
        self.chip.read_msr(&self.apic, msr)
    }

    fn write_msr(&self, msr: u32, value: u64) -> Result<(), ApicFault> {
        self.chip.write_msr(&self.apic, msr, value)
    }

    fn task_priority(&self) -> u8 {
        let tpr = self.apic.tpr.load(std::sync::atomic::Ordering::Relaxed);
        (tpr.to_le_bytes()[0]) >> 4
    }

    fn set_task_priority(&self, priority: u8) {
        self.apic.set_tpr(u32::from(priority) << 4);
    }

    fn save(&self) -> Vec<u8> {
        self.apic.save_page()
    }

    fn restore(&self, page: &[u8]) -> Result<(), ApicFault> {
        self.apic.restore_page(page)
    }
}
