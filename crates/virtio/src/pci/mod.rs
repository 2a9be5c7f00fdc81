//! Virtio over PCI, modern devices only (virtio 1.2 §4.1).
//!
//! ```text
//!   vCPU thread                                   event loop thread
//!   config space ──► PciFunction (BAR, MSI-X)     doorbell eventfd ──► Inner::ready ─► device
//!   BAR 0        ──► common ─ isr ─ device cfg                                          │
//!                    notify ──► doorbell eventfd                PciInterrupt ◄──────────┘
//! ```
//!
//! Device status (§2.1): RESET → ACKNOWLEDGE → DRIVER → FEATURES_OK → DRIVER_OK starts the device;
//! writing zero from any state stops it and returns to RESET. A driver that breaks a queue puts it
//! into DEVICE_NEEDS_RESET, where it stays until then.

mod caps;
mod common;
mod interrupt;
mod state;

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::InterruptController;
use ringfence_device::Inspect;
use ringfence_device::warn_limited;
use ringfence_engine::Doorbell;
use ringfence_engine::ErrorKind;
use ringfence_engine::IoSpace;
use ringfence_engine::Vm;
use ringfence_memory::GuestMemory;
use ringfence_pci::BarKind;
use ringfence_pci::BarSpec;
use ringfence_pci::Identity;
use ringfence_pci::IntxPin;
use ringfence_pci::PciDevice;
use ringfence_pci::PciError;
use ringfence_pci::PciFunction;
use ringfence_pci::Window;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::Active;
use crate::EventHandler;
use crate::EventLoop;
use crate::Interest;
use crate::Session;
use crate::VirtioDevice;
use crate::VirtioInterrupt;
use crate::Virtqueue;
use common::Common;
use common::Effect;
use interrupt::PciInterrupt;

pub use state::VirtioPciState;

/// The BAR that everything is in, and what lies where.
pub(crate) const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;
const PART: u64 = 0x1000;
/// Bytes between two queues' doorbells.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues: what the doorbell page and the vector table have room for.
pub(crate) const MAX_QUEUES: usize = 255;

/// Tokens below this one are queue doorbells; the device's own come after.
const DEVICE_TOKENS: u32 = 0x1_0000;

/// Features of the transport and the ring, offered for every device.
pub const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Why a virtio device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The PCI side refused.
    #[error("cannot lay out the virtio device's PCI function")]
    Pci(#[source] PciError),
    /// A doorbell could not be made.
    #[error("cannot create a doorbell for a virtio queue")]
    Doorbell(#[source] io::Error),
    /// The device has more queues than the transport.
    #[error("a virtio device can have at most {MAX_QUEUES} queues, not {0}")]
    Queues(usize),
}

impl TransportError {
    /// Whose fault it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Pci(error) => error.kind(),
            Self::Doorbell(_) => ErrorKind::Host,
            Self::Queues(_) => ErrorKind::Config,
        }
    }
}

/// What a device is connected to.
#[derive(Clone)]
pub struct Connections {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Where messages go.
    pub interrupts: Arc<dyn InterruptController>,
    /// The loop that its worker runs in.
    pub events: Arc<EventLoop>,
    /// The engine's machine, for doorbells that need no exit; without one, the bus write rings.
    pub vm: Option<Arc<dyn Vm>>,
    /// INTA, for drivers without MSI-X.
    pub intx: Option<IntxPin>,
}

/// The device and, while a driver uses it, its queues.
struct Slot {
    device: Box<dyn VirtioDevice>,
    active: Option<Active>,
}

/// What the event loop holds.
struct Inner {
    slot: Mutex<Slot>,
}

impl Inner {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventHandler for Inner {
    fn ready(&self, token: u32) {
        let mut slot = self.slot();
        let Slot { device, active } = &mut *slot;
        // Stopped between the event and its turn: nobody is left to tell.
        let Some(active) = active else { return };
        if let Some(token) = token.checked_sub(DEVICE_TOKENS) {
            device.event_ready(active, token);
        } else if let Ok(index) = u16::try_from(token)
            && let Some(Some(queue)) = active.queues.get(usize::from(index))
        {
            // Before anything else, and in a broken device too: a doorbell that stays rung would
            // keep the loop busy. Empty when it was drained already: one turn too many is harmless.
            let _ = queue.kick().read();
            if !active.broken {
                device.queue_ready(active, index);
            }
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    function: Arc<PciFunction>,
    interrupt: Arc<PciInterrupt>,
    common: Mutex<Common>,
    inner: Arc<Inner>,
    kicks: Vec<Arc<EventFd>>,
    connections: Connections,
    /// Offset of the PCI configuration access capability's data (§4.1.4.9).
    window: u16,
    /// The doorbells that the engine rings, by BAR address.
    doorbells: Mutex<Option<u64>>,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci")
            .field("common", &*self.common())
            .finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts `device` behind PCI.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        connections: Connections,
    ) -> Result<Arc<Self>, TransportError> {
        let sizes = device.queue_sizes();
        if sizes.len() > MAX_QUEUES {
            return Err(TransportError::Queues(sizes.len()));
        }
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()
            .map_err(TransportError::Doorbell)?;
        let (function, window) =
            build_function(&*device, &connections, sizes.len()).map_err(TransportError::Pci)?;
        let function = Arc::new(function);
        let interrupt = PciInterrupt::new(
            Arc::clone(&function),
            sizes.len(),
            connections.vm.as_ref().map(Arc::clone),
        );
        let interrupt = Arc::new(interrupt);
        let features = device.features() | TRANSPORT_FEATURES;
        let common = Common::new(features, &sizes, Arc::clone(&interrupt));
        Ok(Arc::new(Self {
            function,
            interrupt,
            common: Mutex::new(common),
            inner: Arc::new(Inner {
                slot: Mutex::new(Slot {
                    device,
                    active: None,
                }),
            }),
            kicks,
            connections,
            window,
            doorbells: Mutex::new(None),
        }))
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        self.common().read(offset, data);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut common = self.common();
        match common.write(offset, data) {
            Effect::None => {}
            Effect::Start => self.start(&mut common),
            Effect::Reset => self.stop(&mut common),
        }
    }

    /// DRIVER_OK: gives the device its queues (§3.1.1 step 8).
    fn start(&self, common: &mut Common) {
        if let Err(error) = self.try_start(common) {
            warn_limited!(%error, "a virtio device could not start: it needs a reset");
            self.interrupt.needs_reset();
        }
    }

    fn try_start(&self, common: &Common) -> Result<(), Box<dyn std::error::Error>> {
        let mut slot = self.inner.slot();
        let events = self
            .connections
            .events
            .register(Arc::clone(&self.inner) as Arc<dyn EventHandler>);
        let mut queues = Vec::with_capacity(self.kicks.len());
        for (index, kick) in (0_u16..).zip(&self.kicks) {
            let queue = self.build_queue(common, index, kick)?;
            if queue.is_some() {
                events.add(&**kick, u32::from(index), Interest::Read)?;
            }
            queues.push(queue);
        }
        let mut active = Active {
            queues,
            session: Session {
                memory: self.connections.memory.clone(),
                features: common.driver_features(),
                interrupt: Arc::clone(&self.interrupt) as Arc<dyn VirtioInterrupt>,
                events: events.with_first_token(DEVICE_TOKENS),
            },
            broken: false,
        };
        slot.device.start(&mut active)?;
        slot.active = Some(active);
        Ok(())
    }

    fn build_queue(
        &self,
        common: &Common,
        index: u16,
        kick: &Arc<EventFd>,
    ) -> Result<Option<Virtqueue>, Box<dyn std::error::Error>> {
        let Some(mut queue) = common.queue(index)? else {
            return Ok(None);
        };
        queue.set_event_idx(common.driver_features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        if !queue.is_valid(&self.connections.memory) {
            return Err(format!("queue {index} lies outside memory").into());
        }
        let interrupt = Arc::clone(&self.interrupt) as Arc<dyn VirtioInterrupt>;
        Ok(Some(Virtqueue::new(
            index,
            queue,
            Arc::clone(kick),
            interrupt,
        )))
    }

    /// Status zero: takes the queues away and forgets the negotiation (§2.4).
    fn stop(&self, common: &mut Common) {
        let mut slot = self.inner.slot();
        let Slot { device, active } = &mut *slot;
        if let Some(mut active) = active.take() {
            device.stop(&mut active);
        }
        drop(slot);
        for kick in &self.kicks {
            // Rings meant for the queues that are gone.
            let _ = kick.read();
        }
        common.reset();
        self.interrupt.reset();
    }

    fn ring(&self, offset: u64) {
        let index = usize::try_from(offset / u64::from(NOTIFY_MULTIPLIER)).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(index) {
            // Fails only when the counter is full: the doorbell is ringing already.
            let _ = kick.write(1);
        }
    }

    fn doorbell(index: usize, bar_address: u64) -> Doorbell {
        Doorbell {
            space: IoSpace::Mmio,
            address: bar_address + NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER),
            width: 0,
            value: None,
        }
    }

    fn remove_doorbells(&self, vm: &dyn Vm, address: u64, count: usize) {
        for (index, kick) in self.kicks.iter().enumerate().take(count) {
            // Fails only for a doorbell that isn't there.
            let _ = vm.remove_doorbell(Self::doorbell(index, address), kick);
        }
    }

    /// Through the window of the PCI configuration access capability (§4.1.4.9).
    fn window_target(&self) -> Option<(u64, usize)> {
        let mut fields = [0; 16];
        for (index, piece) in (0_u16..).zip(fields.chunks_exact_mut(4)) {
            self.function
                .read_config(self.window - 16 + index * 4, piece);
        }
        let word = |at: usize| {
            u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]])
        };
        let (bar, offset, len) = (fields[4], word(8), word(12));
        let valid = bar == BAR && matches!(len, 1 | 2 | 4) && offset % len == 0;
        valid.then_some((u64::from(offset), len as usize))
    }
}

fn build_function(
    device: &dyn VirtioDevice,
    connections: &Connections,
    queues: usize,
) -> Result<(PciFunction, u16), PciError> {
    let kind = device.kind();
    let mut function = PciFunction::new(&Identity {
        // §4.1.2: vendor 0x1af4, device 0x1040 + ID, revision 1 or higher, subsystem from 0x40 on.
        vendor: 0x1af4,
        device: 0x1040 + kind.id(),
        revision: 1,
        class: kind.pci_class(),
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    });
    function.add_bar(BarSpec {
        index: BAR,
        kind: BarKind::Memory64 {
            prefetchable: false,
        },
        size: BAR_BYTES,
    })?;
    let window = caps::add(&mut function, queues)?;
    let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
    function.add_msix(
        Arc::clone(&connections.interrupts),
        vectors,
        caps::msix_layout(),
    )?;
    if let Some(pin) = &connections.intx {
        function.add_intx(pin.clone());
    }
    Ok((function, window))
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if (self.window..self.window + 4).contains(&offset)
            && let Some((at, len)) = self.window_target()
        {
            let mut value = [0; 4];
            self.read_bar(BAR, at, &mut value[..len]);
            let skip = usize::from(offset - self.window);
            for (byte, &source) in data.iter_mut().zip(&value[skip..]) {
                *byte = source;
            }
            return;
        }
        self.function.read_config(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.function.write_config(offset, data);
        self.interrupt.rewire();
        if offset == self.window
            && let Some((at, len)) = self.window_target()
            && let Some(value) = data.get(..len)
        {
            self.write_bar(BAR, at, value);
        }
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.function.bars().to_vec()
    }

    fn windows(&self) -> Vec<Window> {
        self.function.windows()
    }

    fn read_bar(&self, _: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset & !(PART - 1), offset & (PART - 1)) {
            (COMMON, at) => self.read_common(at, data),
            (ISR, 0) => data[0] = self.interrupt.take_isr(),
            (DEVICE, at) => self.inner.slot().device.read_config(at, data),
            (MSIX_TABLE.., _) => self.read_msix(offset, data),
            _ => {}
        }
    }

    fn write_bar(&self, _: u8, offset: u64, data: &[u8]) {
        match (offset & !(PART - 1), offset & (PART - 1)) {
            (COMMON, at) => self.write_common(at, data),
            (DEVICE, at) => self.inner.slot().device.write_config(at, data),
            (NOTIFY, at) => self.ring(at),
            (MSIX_TABLE.., _) if offset < MSIX_PBA => {
                if let Some(msix) = self.function.msix() {
                    msix.write_table(offset - MSIX_TABLE, data);
                    self.interrupt.rewire();
                }
            }
            _ => {}
        }
    }

    fn bar_placed(&self, _: u8, address: Option<u64>) {
        let Some(vm) = &self.connections.vm else {
            return;
        };
        let mut placed = self
            .doorbells
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = placed.take() {
            self.remove_doorbells(&**vm, old, self.kicks.len());
        }
        let Some(address) = address else { return };
        for (index, kick) in self.kicks.iter().enumerate() {
            let added = vm.add_doorbell(Self::doorbell(index, address), kick);
            if added.is_err() {
                // Without doorbells the bus write rings: slower, not wrong.
                self.remove_doorbells(&**vm, address, index);
                return;
            }
        }
        *placed = Some(address);
    }

    fn reset(&self) {
        let mut common = self.common();
        self.stop(&mut common);
        drop(common);
        self.function.reset();
    }
}

impl VirtioPci {
    fn read_msix(&self, offset: u64, data: &mut [u8]) {
        let Some(msix) = self.function.msix() else {
            return;
        };
        match offset.checked_sub(MSIX_PBA) {
            Some(at) => msix.read_pba(at, data),
            None => msix.read_table(offset - MSIX_TABLE, data),
        }
    }

    /// The name of the device behind it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.inner.slot().device.kind().name()
    }
}

impl Inspect for VirtioPci {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.inner.slot().device.counters()
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        // The loop holds the slot by the registration inside it: break that circle.
        let mut slot = self.inner.slot();
        let Slot { device, active } = &mut *slot;
        if let Some(mut active) = active.take() {
            device.stop(&mut active);
        }
    }
}

#[cfg(test)]
mod tests;
