//! The common configuration structure (virtio 1.2 §4.1.4.3).

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::Queue;
use virtio_queue::QueueState;

use super::interrupt::PciInterrupt;

/// Bytes of the structure: up to `queue_reset`, which this device doesn't offer but drivers of
/// 1.2 look for the room of.
pub(super) const COMMON_BYTES: usize = 0x40;

/// Device status bits (§2.1).
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// What a write asks the transport to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// DRIVER_OK was set.
    Start,
    /// Zero was written to the status.
    Reset,
}

/// A queue as the driver describes it, before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    /// Where the rings stand: zero but after a restore.
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// The registers.
#[derive(Debug)]
pub(super) struct Common {
    device_features: u64,
    driver_features: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
    interrupt: Arc<PciInterrupt>,
}

/// One half of a 64-bit register.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, new: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(new),
        1 => *value = *value & 0xffff_ffff | u64::from(new) << 32,
        _ => {}
    }
}

impl Common {
    pub(super) fn new(features: u64, sizes: &[u16], interrupt: Arc<PciInterrupt>) -> Self {
        Self {
            device_features: features,
            driver_features: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            queues: sizes.iter().map(|&size| QueueSetup::new(size)).collect(),
            interrupt,
        }
    }

    pub(super) fn driver_features(&self) -> u64 {
        self.driver_features
    }

    pub(super) fn device_features(&self) -> u64 {
        self.device_features
    }

    pub(super) fn set_driver_features(&mut self, features: u64) {
        self.driver_features = features;
    }

    pub(super) fn selects(&self) -> [u32; 3] {
        [
            self.device_select,
            self.driver_select,
            u32::from(self.queue_select),
        ]
    }

    pub(super) fn set_selects(&mut self, [device, driver, queue]: [u32; 3]) {
        (self.device_select, self.driver_select) = (device, driver);
        self.queue_select = u16::try_from(queue).unwrap_or(u16::MAX);
    }

    pub(super) fn reset(&mut self) {
        self.driver_features = 0;
        (self.device_select, self.driver_select, self.queue_select) = (0, 0, 0);
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }

    /// The ring that the driver set up as queue `index`.
    pub(super) fn queue(&self, index: u16) -> Result<Option<Queue>, virtio_queue::Error> {
        let setup = self.queues.get(usize::from(index));
        let Some(setup) = setup.filter(|setup| setup.enabled) else {
            return Ok(None);
        };
        let state = QueueState {
            max_size: setup.max_size,
            next_avail: setup.next_avail,
            next_used: setup.next_used,
            event_idx_enabled: false,
            size: setup.size,
            ready: true,
            desc_table: setup.descriptors,
            avail_ring: setup.driver,
            used_ring: setup.device,
        };
        Queue::try_from(state).map(Some)
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        crate::device::read_config_bytes(&image, offset, data);
    }

    /// The structure as bytes. Reads are rare (set-up only), so clarity wins over speed.
    fn image(&self) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_select.to_le_bytes());
        put(
            0x04,
            &half(self.device_features, self.device_select).to_le_bytes(),
        );
        put(0x08, &self.driver_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_select).to_le_bytes(),
        );
        put(0x10, &self.interrupt.config_vector().to_le_bytes());
        let queues = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        put(0x12, &queues.to_le_bytes());
        put(
            0x14,
            &[self.interrupt.status(), self.interrupt.generation()],
        );
        put(0x16, &self.queue_select.to_le_bytes());
        // §4.1.4.3.1: a queue that isn't there has size zero.
        if let Some(queue) = self.selected() {
            put(0x18, &queue.size.to_le_bytes());
            let vector = self.interrupt.queue_vector(self.queue_select);
            put(0x1a, &vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        } else {
            put(0x1a, &ringfence_pci::NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// Writes one field, in its own width (§4.1.3.1); others are dropped.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match *data {
            [value] if offset == 0x14 => return self.write_status(value),
            [a, b] => self.write_16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_32(offset.wrapping_add(4), u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Effect::None
    }

    fn write_16(&mut self, offset: u64, value: u16) {
        let select = self.queue_select;
        match offset {
            0x10 => self.interrupt.set_config_vector(value),
            0x16 => self.queue_select = value,
            0x1a => {
                self.interrupt.set_queue_vector(select, value);
                self.interrupt.rewire();
            }
            0x18 | 0x1c => self.write_queue(|queue| match offset {
                0x18 if value <= queue.max_size && value.is_power_of_two() => queue.size = value,
                // §4.1.4.3.2: the driver doesn't write zero; only a reset disables a queue.
                0x1c if value == 1 => queue.enabled = true,
                _ => {}
            }),
            _ => {}
        }
    }

    fn write_32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            0x0c if self.interrupt.status() & FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_select, value);
            }
            0x20..0x38 => {
                let high = u32::from(offset & 4 != 0);
                self.write_queue(|queue| {
                    let register = match offset & !4 {
                        0x20 => &mut queue.descriptors,
                        0x28 => &mut queue.driver,
                        0x30 => &mut queue.device,
                        _ => return,
                    };
                    set_half(register, high, value);
                });
            }
            _ => {}
        }
    }

    /// Changes the selected queue, unless it is in use: the driver fixes it before enabling it.
    fn write_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let index = usize::from(self.queue_select);
        if let Some(queue) = self.queues.get_mut(index)
            && !queue.enabled
        {
            change(queue);
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let before = self.interrupt.status();
        let mut bits = value;
        // §3.1.1 step 6: FEATURES_OK reads back only when the device can work with the choice.
        if bits & FEATURES_OK != 0 && before & FEATURES_OK == 0 && !self.features_are_usable() {
            bits &= !FEATURES_OK;
        }
        let negotiated = (before | bits) & FEATURES_OK != 0;
        if bits & DRIVER_OK != 0 && !negotiated {
            bits &= !DRIVER_OK;
        }
        self.interrupt.raise_status(bits);
        if bits & DRIVER_OK != 0 && before & DRIVER_OK == 0 {
            Effect::Start
        } else {
            Effect::None
        }
    }

    /// A subset of the offer, with VERSION_1: this is not a transitional device (§6.2).
    fn features_are_usable(&self) -> bool {
        self.driver_features & !self.device_features == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }
}
