//! A virtio device's state in a snapshot.

use std::sync::Arc;

use ringfence_device::Persist;
use ringfence_device::RestoreError;
use ringfence_pci::FunctionState;
use serde::Deserialize;
use serde::Serialize;
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_queue::QueueT;

use super::Slot;
use super::VirtioPci;
use super::common::QueueSetup;

/// Version of [`VirtioPciState`].
const STATE_VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRecord {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    next_avail: u16,
    next_used: u16,
    vector: u16,
}

/// The saved transport, with the device's own state in it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VirtioPciState {
    version: u32,
    kind: u16,
    function: FunctionState,
    status: u8,
    generation: u8,
    isr: u8,
    driver_features: u64,
    selects: [u32; 3],
    config_vector: u16,
    queues: Vec<QueueRecord>,
    device: serde_json::Value,
}

impl Persist for VirtioPci {
    type State = VirtioPciState;

    const NAME: &'static str = "virtio device";

    fn save(&self) -> VirtioPciState {
        let common = self.common();
        let mut slot = self.inner.slot();
        let Slot { device, active } = &mut *slot;
        if let Some(active) = active.as_mut() {
            device.quiesce(active);
        }
        let queues = common.queues.iter().zip(0_u16..).map(|(setup, index)| {
            let ring = active
                .as_ref()
                .and_then(|active| active.queues.get(usize::from(index))?.as_ref());
            QueueRecord {
                size: setup.size,
                enabled: setup.enabled,
                descriptors: setup.descriptors,
                driver: setup.driver,
                device: setup.device,
                next_avail: ring.map_or(0, |queue| queue.ring().next_avail()),
                next_used: ring.map_or(0, |queue| queue.ring().next_used()),
                vector: self.interrupt.queue_vector(index),
            }
        });
        VirtioPciState {
            version: STATE_VERSION,
            kind: device.kind().id(),
            function: self.function.save(),
            status: self.interrupt.status(),
            generation: self.interrupt.generation(),
            isr: self.interrupt.isr(),
            driver_features: common.driver_features(),
            selects: common.selects(),
            config_vector: self.interrupt.config_vector(),
            queues: queues.collect(),
            device: device.save(),
        }
    }

    fn restore(&self, state: VirtioPciState) -> Result<(), RestoreError> {
        self.check(&state)?;
        let mut common = self.common();
        self.function.restore(state.function)?;
        self.inner.slot().device.restore(state.device)?;
        let offered = common.device_features();
        common.set_driver_features(state.driver_features & offered);
        common.set_selects(state.selects);
        for ((setup, record), index) in common.queues.iter_mut().zip(&state.queues).zip(0_u16..) {
            *setup = QueueSetup {
                max_size: setup.max_size,
                size: record.size.min(setup.max_size),
                enabled: record.enabled,
                descriptors: record.descriptors,
                driver: record.driver,
                device: record.device,
                next_avail: record.next_avail,
                next_used: record.next_used,
            };
            self.interrupt.set_queue_vector(index, record.vector);
        }
        self.interrupt.set_config_vector(state.config_vector);
        self.interrupt
            .restore(state.status, state.generation, state.isr);
        if u32::from(state.status) & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start(&mut common);
            self.ring_all();
        }
        Ok(())
    }
}

impl VirtioPci {
    fn check(&self, state: &VirtioPciState) -> Result<(), RestoreError> {
        RestoreError::check_version(Self::NAME, state.version, STATE_VERSION)?;
        let kind = self.inner.slot().device.kind();
        let queues = self.common().queues.len();
        if state.kind != kind.id() || state.queues.len() != queues {
            return Err(RestoreError::Mismatch {
                what: Self::NAME,
                why: format!("this is a {} device with {queues} queues", kind.name()),
            });
        }
        Ok(())
    }

    /// Requests that were rung for before the snapshot wait in the rings.
    fn ring_all(&self) {
        for kick in &self.kicks {
            // Fails only when the counter is full.
            let _ = kick.write(1);
        }
    }

    /// The root complex's handle.
    #[must_use]
    pub fn as_pci(self: &Arc<Self>) -> Arc<dyn ringfence_pci::PciDevice> {
        Arc::clone(self) as Arc<dyn ringfence_pci::PciDevice>
    }
}
