//! Virtio 1.2 devices over PCI.
//!
//! - [`queue`], [`chain`]: what a device does with a virtqueue (split ring, indirect descriptors,
//!   event index).
//! - [`device`]: what a device is, [`VirtioDevice`].
//! - [`events`]: the loop that device workers run in.
//! - [`pci`]: the transport, "virtio over PCI bus" (virtio 1.2 §4.1), modern only.
//! - one folder or file a device.
//!
//! The guest is hostile. What it puts in a queue is read once, checked, and then used; a queue
//! that breaks the rules of the ring stops the device (`DEVICE_NEEDS_RESET`), never the machine.

#![forbid(unsafe_code)]

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod events;
pub mod fs;
pub mod interrupt;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rate;
pub mod rng;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod vsock;

pub use chain::{Chain, ChainReader, ChainWriter};
pub use device::{Active, DeviceKind, Session, StartError, VirtioDevice};
pub use events::{EventHandler, EventLoop, Interest, Registration};
pub use interrupt::VirtioInterrupt;
pub use queue::{Outcome, QueueError, Virtqueue};
