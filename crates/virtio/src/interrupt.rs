//! How a device interrupts its driver, whatever the transport.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// A device's interrupts. All calls may come from any thread and never block on a vCPU.
pub trait VirtioInterrupt: Send + Sync {
    /// Queue `index` has used buffers.
    fn queue_used(&self, index: u16);
    /// The device configuration changed.
    fn config_changed(&self);
    /// The device can't go on until the driver resets it (virtio 1.2 §2.1.2).
    fn needs_reset(&self);

    /// For queues that are served outside the process: `event` interrupts as [`Self::queue_used`]
    /// does whenever it is signalled, by itself where the engine and the guest's set-up allow it.
    /// Where they don't, it stays readable for somebody here to hear of. `None` ends that.
    fn wire(&self, index: u16, event: Option<Arc<EventFd>>);
}
