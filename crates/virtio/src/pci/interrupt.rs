//! Interrupts of the PCI transport: MSI-X vectors, or INTA with the ISR register (§4.1.4.5).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

use ringfence_bus::MsiMessage;
use ringfence_engine::Vm;
use ringfence_pci::NO_VECTOR;
use ringfence_pci::PciFunction;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vmm_sys_util::eventfd::EventFd;

use crate::VirtioInterrupt;

/// ISR bits.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// An event that is to interrupt, and the message that the engine sends for it now.
struct Wire {
    event: Arc<EventFd>,
    message: Option<MsiMessage>,
}

/// What the worker and the registers share without a lock.
pub(crate) struct PciInterrupt {
    function: Arc<PciFunction>,
    isr: AtomicU8,
    status: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// The engine's machine, where it may deliver events itself.
    vm: Option<Arc<dyn Vm>>,
    /// By queue.
    wires: Mutex<BTreeMap<u16, Wire>>,
}

impl std::fmt::Debug for PciInterrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciInterrupt")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl PciInterrupt {
    pub(super) fn new(function: Arc<PciFunction>, queues: usize, vm: Option<Arc<dyn Vm>>) -> Self {
        Self {
            function,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            vm,
            wires: Mutex::default(),
        }
    }

    fn wires(&self) -> MutexGuard<'_, BTreeMap<u16, Wire>> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After the guest may have changed what a vector sends, or where a queue's interrupts go.
    ///
    /// Once a write that masks a vector returns, no event sends its message any more.
    pub(super) fn rewire(&self) {
        for (&index, wire) in &mut *self.wires() {
            let msix = self.function.msix();
            let message = msix.and_then(|msix| msix.message(self.queue_vector(index)));
            self.set_wire(wire, message);
        }
    }

    fn set_wire(&self, wire: &mut Wire, message: Option<MsiMessage>) {
        let Some(vm) = &self.vm else { return };
        if wire.message == message {
            return;
        }
        wire.message = message;
        if vm.set_irq_event(&wire.event, message).is_err() {
            // An engine that delivers no events: whoever hears of them here interrupts.
            wire.message = None;
            let _ = vm.set_irq_event(&wire.event, None);
        }
    }

    /// Reading the ISR acknowledges the wire (§4.1.4.5.1).
    pub(super) fn take_isr(&self) -> u8 {
        let isr = self.isr.swap(0, Ordering::SeqCst);
        self.function.set_intx(false);
        isr
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Adds status bits.
    pub(super) fn raise_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// A vector that the function doesn't have reads back as none (§4.1.4.3.1).
    fn checked(&self, vector: u16) -> u16 {
        let vectors = self.function.msix().map_or(0, |msix| msix.vectors());
        if vector < vectors { vector } else { NO_VECTOR }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.checked(vector), Ordering::SeqCst);
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.checked(vector), Ordering::SeqCst);
        }
    }

    /// Forgets everything but the generation, which only ever counts on.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.function.set_intx(false);
    }

    pub(super) fn restore(&self, status: u8, generation: u8, isr: u8) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        self.isr.store(isr, Ordering::SeqCst);
    }

    pub(super) fn isr(&self) -> u8 {
        self.isr.load(Ordering::SeqCst)
    }

    fn send(&self, vector: u16, isr_bit: u8) {
        if let Some(msix) = self.function.msix()
            && msix.is_enabled()
        {
            if vector != NO_VECTOR {
                msix.signal(vector);
            }
            return;
        }
        self.isr.fetch_or(isr_bit, Ordering::SeqCst);
        self.function.set_intx(true);
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn queue_used(&self, index: u16) {
        self.send(self.queue_vector(index), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.send(self.config_vector(), ISR_CONFIG);
    }

    fn wire(&self, index: u16, event: Option<Arc<EventFd>>) {
        let mut wires = self.wires();
        if let Some(mut old) = wires.remove(&index) {
            self.set_wire(&mut old, None);
        }
        if let Some(event) = event {
            let message = None;
            wires.insert(index, Wire { event, message });
        }
        drop(wires);
        self.rewire();
    }

    fn needs_reset(&self) {
        self.raise_status(u8::try_from(VIRTIO_CONFIG_S_NEEDS_RESET).unwrap_or(0));
        // §2.1.2: only a driver that is ready is told.
        if u32::from(self.status()) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.config_changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use ringfence_bus::Gsi;
    use ringfence_bus::InterruptController;
    use ringfence_engine::EngineError;
    use ringfence_engine::Vcpu;
    use ringfence_pci::BarKind;
    use ringfence_pci::BarSpec;
    use ringfence_pci::Identity;
    use ringfence_x86::cpuid::CpuidTable;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    struct Nowhere;

    impl InterruptController for Nowhere {
        fn set_line(&self, _: Gsi, _: bool) {}
        fn send_msi(&self, _: MsiMessage) {}
    }

    /// Remembers what an event was wired to last, unless it wires nothing.
    #[derive(Default)]
    struct Wiring {
        refuses: bool,
        last: Mutex<Option<Option<u32>>>,
    }

    impl Vm for Wiring {
        fn create_vcpu(&self, _: u32, _: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
            Err(EngineError::unsupported("vCPUs"))
        }
        fn interrupts(&self) -> Option<Arc<dyn InterruptController>> {
            None
        }
        fn set_irq_event(
            &self,
            _: &EventFd,
            message: Option<MsiMessage>,
        ) -> Result<(), EngineError> {
            if self.refuses {
                return Err(EngineError::unsupported("events"));
            }
            *self.last.lock().expect("test") = Some(message.map(|message| message.data));
            Ok(())
        }
        fn clock_ns(&self) -> Result<u64, EngineError> {
            Ok(0)
        }
        fn set_clock_ns(&self, _: u64) -> Result<(), EngineError> {
            Ok(())
        }
    }

    fn wired(vm: &Arc<Wiring>) -> (Arc<PciFunction>, PciInterrupt) {
        let mut function = PciFunction::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            revision: 1,
            class: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0,
        });
        let bar = BarSpec {
            index: super::super::BAR,
            kind: BarKind::Memory64 {
                prefetchable: false,
            },
            size: 0x8000,
        };
        function.add_bar(bar).expect("a BAR");
        let layout = super::super::caps::msix_layout();
        let added = function.add_msix(Arc::new(Nowhere), 2, layout);
        added.expect("vectors");
        let function = Arc::new(function);
        let vm = Arc::clone(vm) as Arc<dyn Vm>;
        let interrupt = PciInterrupt::new(Arc::clone(&function), 1, Some(vm));
        let event = EventFd::new(EFD_NONBLOCK).expect("an event");
        interrupt.wire(0, Some(Arc::new(event)));
        (function, interrupt)
    }

    fn enable(function: &PciFunction, interrupt: &PciInterrupt, data: u32) {
        let msix = function.msix().expect("vectors");
        msix.write_table(16, &0xfee0_0000_u64.to_le_bytes());
        msix.write_table(24, &data.to_le_bytes());
        msix.write_table(28, &[0; 4]);
        let mut at = [0];
        function.read_config(0x34, &mut at);
        function.write_config(u16::from(at[0]) + 2, &[0, 0x80]);
        interrupt.set_queue_vector(0, 1);
        interrupt.rewire();
    }

    #[test]
    fn an_event_is_wired_to_what_its_vector_sends_now() {
        let vm = Arc::new(Wiring::default());
        let (function, interrupt) = wired(&vm);
        let last = || *vm.last.lock().expect("test");
        assert_eq!(last(), None, "MSI-X is off");
        enable(&function, &interrupt, 0x41);
        assert_eq!(last(), Some(Some(0x41)));
        let msix = function.msix().expect("vectors");
        msix.write_table(28, &1_u32.to_le_bytes());
        interrupt.rewire();
        assert_eq!(last(), Some(None), "masked");
        msix.write_table(28, &[0; 4]);
        msix.write_table(24, &0x42_u32.to_le_bytes());
        interrupt.rewire();
        assert_eq!(last(), Some(Some(0x42)));
        interrupt.wire(0, None);
        assert_eq!(last(), Some(None));
    }

    #[test]
    fn an_engine_without_events_leaves_them_to_the_loop() {
        let vm = Arc::new(Wiring {
            refuses: true,
            ..Wiring::default()
        });
        let (function, interrupt) = wired(&vm);
        enable(&function, &interrupt, 0x41);
        interrupt.wire(0, None);
        assert_eq!(*vm.last.lock().expect("test"), None);
    }
}
