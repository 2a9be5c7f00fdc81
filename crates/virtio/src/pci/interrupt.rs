//! Interrupts of the PCI transport: MSI-X vectors, or INTA with the ISR register (§4.1.4.5).

use std::sync::Arc;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

use ringfence_pci::NO_VECTOR;
use ringfence_pci::PciFunction;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;

use crate::VirtioInterrupt;

/// ISR bits.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the worker and the registers share without a lock.
pub(crate) struct PciInterrupt {
    function: Arc<PciFunction>,
    isr: AtomicU8,
    status: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl std::fmt::Debug for PciInterrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciInterrupt")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl PciInterrupt {
    pub(super) fn new(function: Arc<PciFunction>, queues: usize) -> Self {
        Self {
            function,
            isr: AtomicU8::new(0),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
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

    fn needs_reset(&self) {
        self.raise_status(u8::try_from(VIRTIO_CONFIG_S_NEEDS_RESET).unwrap_or(0));
        // §2.1.2: only a driver that is ready is told.
        if u32::from(self.status()) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.config_changed();
        }
    }
}
