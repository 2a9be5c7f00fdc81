//! The kernel's interrupt chips: lines, messages, and events wired to messages (§4.24 to §4.26,
//! §4.52, §4.70, §4.75).

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use kvm_bindings::KVM_IRQ_ROUTING_IRQCHIP;
use kvm_bindings::KVM_IRQ_ROUTING_MSI;
use kvm_bindings::KVM_IRQCHIP_IOAPIC;
use kvm_bindings::KVM_IRQCHIP_PIC_MASTER;
use kvm_bindings::KVM_IRQCHIP_PIC_SLAVE;
use kvm_bindings::KVM_PIT_SPEAKER_DUMMY;
use kvm_bindings::KvmIrqRouting;
use kvm_bindings::kvm_irq_routing_entry;
use kvm_bindings::kvm_msi;
use kvm_bindings::kvm_pit_config;
use kvm_ioctls::VmFd;
use ringfence_bus::Gsi;
use ringfence_bus::InterruptController;
use ringfence_bus::MsiMessage;
use ringfence_engine::EngineError;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::Counts;

const PIC_PINS: u32 = 8;
const IOAPIC_PINS: u32 = 24;
/// On a PC the PIT's line (input 0) is wired to IOAPIC pin 2; pin 2's own line, the PIC cascade,
/// is not an input.
const TIMER_IOAPIC_PIN: u32 = 2;
/// The most events wired to messages at once; KVM's table has at least 1024 entries.
const MAX_EVENTS: usize = 960;

/// An event wired to a message, by the KVM input between them.
#[derive(Clone, Copy, Debug)]
struct Route {
    input: u32,
    message: MsiMessage,
}

/// The chips of one machine.
#[derive(Debug)]
pub(crate) struct KvmChips {
    vm: Arc<VmFd>,
    counts: Arc<Counts>,
    /// By the descriptor that the caller signals.
    routes: Mutex<BTreeMap<RawFd, Route>>,
}

impl KvmChips {
    /// Makes the chips; before any vCPU, since a vCPU gets its local APIC when it is made.
    pub(crate) fn new(vm: Arc<VmFd>, counts: Arc<Counts>) -> Result<Self, EngineError> {
        vm.create_irq_chip().map_err(|errno| {
            EngineError::host("create KVM's interrupt controllers")(errno.into())
        })?;
        // Port 0x61 too: Linux gates the PIT's channel 2 through it to calibrate.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit)
            .map_err(|errno| EngineError::host("create KVM's interval timer")(errno.into()))?;
        let chips = Self {
            vm,
            counts,
            routes: Mutex::default(),
        };
        chips.load_routes(&BTreeMap::new())?;
        Ok(chips)
    }

    fn routes(&self) -> MutexGuard<'_, BTreeMap<RawFd, Route>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`ringfence_engine::Vm::set_irq_event`].
    pub(crate) fn set_event(
        &self,
        event: &EventFd,
        message: Option<MsiMessage>,
    ) -> Result<(), EngineError> {
        let mut routes = self.routes();
        let key = event.as_raw_fd();
        let old = routes.get(&key).copied();
        let mut wanted = routes.clone();
        match (message, old) {
            (Some(message), _) => {
                let input = match old {
                    Some(route) => route.input,
                    None => free_input(&routes)?,
                };
                wanted.insert(key, Route { input, message });
                self.load_routes(&wanted)?;
                if old.is_none() {
                    self.vm.register_irqfd(event, input).map_err(|errno| {
                        EngineError::host("wire an event to an interrupt")(errno.into())
                    })?;
                }
            }
            (None, Some(route)) => {
                wanted.remove(&key);
                self.vm
                    .unregister_irqfd(event, route.input)
                    .map_err(|errno| {
                        EngineError::host("unwire an event from an interrupt")(errno.into())
                    })?;
                self.load_routes(&wanted)?;
            }
            (None, None) => {}
        }
        *routes = wanted;
        Ok(())
    }

    /// Loads the whole table: the PC's fixed wiring and the messages.
    fn load_routes(&self, routes: &BTreeMap<RawFd, Route>) -> Result<(), EngineError> {
        let mut entries = fixed_wiring();
        entries.extend(routes.values().map(message_entry));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|error| {
            EngineError::Internal(format!("{} interrupt routes: {error}", entries.len()))
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(|errno| EngineError::host("set KVM's interrupt routing")(errno.into()))
    }
}

impl InterruptController for KvmChips {
    fn set_line(&self, gsi: Gsi, high: bool) {
        self.counts.lines.fetch_add(1, Ordering::Relaxed);
        // An input that isn't wired to anything is refused, and lost as on a PC.
        let _ = self.vm.set_irq_line(gsi.0, high);
    }

    fn send_msi(&self, message: MsiMessage) {
        self.counts.messages.fetch_add(1, Ordering::Relaxed);
        let [address_lo, address_hi] = halves(message.address);
        let msi = kvm_msi {
            address_lo,
            address_hi,
            data: message.data,
            ..Default::default()
        };
        // A message to no APIC is refused, and lost as on a PC.
        let _ = self.vm.signal_msi(msi);
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

fn free_input(routes: &BTreeMap<RawFd, Route>) -> Result<u32, EngineError> {
    if routes.len() >= MAX_EVENTS {
        return Err(EngineError::Config(format!(
            "a machine wires at most {MAX_EVENTS} events to interrupts"
        )));
    }
    let taken = |input| routes.values().any(|route| route.input == input);
    (IOAPIC_PINS..)
        .find(|&input| !taken(input))
        .ok_or_else(|| EngineError::Internal("no free KVM interrupt input".into()))
}

fn pin_entry(input: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: input,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn fixed_wiring() -> Vec<kvm_irq_routing_entry> {
    let master = (0..PIC_PINS).map(|pin| pin_entry(pin, KVM_IRQCHIP_PIC_MASTER, pin));
    let slave = (0..PIC_PINS).map(|pin| pin_entry(PIC_PINS + pin, KVM_IRQCHIP_PIC_SLAVE, pin));
    let ioapic = (0..IOAPIC_PINS)
        .filter(|&input| input != TIMER_IOAPIC_PIN)
        .map(|input| {
            let pin = if input == 0 { TIMER_IOAPIC_PIN } else { input };
            pin_entry(input, KVM_IRQCHIP_IOAPIC, pin)
        });
    // The cascade input is the PICs' own affair.
    master
        .filter(|entry| entry.gsi != TIMER_IOAPIC_PIN)
        .chain(slave)
        .chain(ioapic)
        .collect()
}

fn message_entry(route: &Route) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: route.input,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [address_lo, address_hi] = halves(route.message.address);
    entry.u.msi.address_lo = address_lo;
    entry.u.msi.address_hi = address_hi;
    entry.u.msi.data = route.message.data;
    entry
}
