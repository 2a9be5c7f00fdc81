//! How a device interrupts its driver, whatever the transport.

/// A device's interrupts. All calls may come from any thread and never block on a vCPU.
pub trait VirtioInterrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue_used(&self, index: u16);
    /// The device configuration changed.
    fn config_changed(&self);
    /// The device can't go on until the driver resets it (virtio 1.2 §2.1.2).
    fn needs_reset(&self);
}
