//! What a virtio device is, seen from its transport.

use std::sync::Arc;

use ringfence_device::RestoreError;
use ringfence_device::warn_limited;
use ringfence_memory::GuestMemory;

use crate::Outcome;
use crate::QueueError;
use crate::Registration;
use crate::VirtioInterrupt;
use crate::Virtqueue;
use crate::chain::Chain;

/// Which device it is (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// §5.1
    Net,
    /// §5.2
    Block,
    /// §5.3
    Console,
    /// §5.4
    Entropy,
    /// §5.5
    Balloon,
    /// §5.10
    Socket,
    /// §5.11
    FileSystem,
}

impl DeviceKind {
    /// The standard's device ID.
    #[must_use]
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Socket => 19,
            Self::FileSystem => 26,
        }
    }

    /// PCI class code: a hint, the device ID is what drivers bind to.
    #[must_use]
    pub fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Console | Self::Socket => 0x07_80_00,
            Self::Entropy => 0x10_00_00,
            Self::Balloon => 0x05_00_00,
            Self::FileSystem => 0x01_80_00,
        }
    }

    /// Name in logs and `inspect`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Entropy => "rng",
            Self::Balloon => "balloon",
            Self::Socket => "vsock",
            Self::FileSystem => "fs",
        }
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The driver left a queue out that the device can't do without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(u16),
    /// The host refused something.
    #[error("cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// What a driver's start gave the device: memory, features and the ways to be heard.
pub struct Session {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The negotiated features.
    pub features: u64,
    /// To the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
    /// Where the device registers its own descriptors: [`VirtioDevice::event_ready`] hears of them.
    pub events: Registration,
}

impl Session {
    /// Whether all of `features` were negotiated.
    #[must_use]
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }
}

/// A device that a driver has started, and its queues.
///
/// The transport owns it, so that reset, save and restore are its business alone.
pub struct Active {
    /// The queues; `None` where the driver set none up.
    pub queues: Vec<Option<Virtqueue>>,
    /// Everything else.
    pub session: Session,
    /// The driver broke a queue: nothing is served until it resets the device.
    pub(crate) broken: bool,
}

impl Active {
    /// Queue `index`, when the driver set it up and hasn't broken the device.
    pub fn queue(&mut self, index: u16) -> Option<&mut Virtqueue> {
        if self.broken {
            return None;
        }
        self.queues.get_mut(usize::from(index))?.as_mut()
    }

    /// Queue `index` and the session, both at once.
    pub fn split(&mut self, index: u16) -> Option<(&mut Virtqueue, &Session)> {
        if self.broken {
            return None;
        }
        let queue = self.queues.get_mut(usize::from(index))?.as_mut()?;
        Some((queue, &self.session))
    }

    /// Shows the device the requests of queue `index`: see [`Virtqueue::serve`].
    pub fn serve(&mut self, index: u16, mut device: impl FnMut(&Session, &Chain) -> Outcome) {
        let Some((queue, session)) = self.split(index) else {
            return;
        };
        let result = queue.serve(&session.memory, |chain| device(session, chain));
        self.check(index, result);
    }

    /// Takes the next request of queue `index`; `None` too when the driver broke it.
    pub fn pop(&mut self, index: u16) -> Option<Chain> {
        let (queue, session) = self.split(index)?;
        let result = queue.pop(&session.memory);
        self.check(index, result).flatten()
    }

    /// Returns a request of queue `index` to the driver, without an interrupt yet.
    pub fn complete(&mut self, index: u16, head: u16, written: u32) {
        if let Some((queue, session)) = self.split(index) {
            let result = queue.complete(&session.memory, head, written);
            self.check(index, result);
        }
    }

    /// Interrupts the driver for what was completed on queue `index`.
    pub fn notify(&mut self, index: u16) {
        if let Some((queue, session)) = self.split(index) {
            queue.notify(&session.memory);
        }
    }

    /// Unwraps a queue's result; an error stops the device until it is reset.
    pub fn check<T>(&mut self, index: u16, result: Result<T, QueueError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.fail(index, error);
                None
            }
        }
    }

    fn fail(&mut self, queue: u16, error: QueueError) {
        warn_limited!(queue, %error, "the driver broke a virtqueue: the device needs a reset");
        self.broken = true;
        // Nobody serves them any more: a descriptor that stays ready would keep the loop busy.
        self.session.events.clear();
        self.session.interrupt.needs_reset();
    }
}

/// A virtio device.
///
/// The transport calls every method under one lock: configuration accesses from vCPU threads, the
/// rest from the device's event loop. No method may block for long.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn kind(&self) -> DeviceKind;

    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Device-specific feature bits that it offers (0 to 23, 50 and up).
    fn features(&self) -> u64;

    /// The driver reads device configuration. `data` is zeroed before.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes device configuration.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready (DRIVER_OK): register descriptors, remember what was negotiated.
    ///
    /// # Errors
    /// [`StartError`]; the driver is told that the device needs a reset.
    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        let _ = active;
        Ok(())
    }

    /// The driver rang queue `index`.
    fn queue_ready(&mut self, active: &mut Active, index: u16);

    /// A descriptor that the device registered as `token` is ready.
    fn event_ready(&mut self, active: &mut Active, token: u32) {
        let _ = (active, token);
    }

    /// The driver resets the device: forget its requests. Called before its queues go.
    fn stop(&mut self, active: &mut Active) {
        let _ = active;
    }

    /// Finish what is in flight: a snapshot follows.
    fn quiesce(&mut self, active: &mut Active) {
        let _ = active;
    }

    /// Live counters, in display order.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// The device's own state for a snapshot; queues and negotiation are the transport's.
    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// [`RestoreError`] when the state isn't this device's.
    fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        match state {
            serde_json::Value::Null => Ok(()),
            _ => Err(RestoreError::Mismatch {
                what: self.kind().name(),
                why: "it has no state of its own".to_owned(),
            }),
        }
    }
}

/// Reads from the byte image of a configuration structure: past its end, zeros.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(rest) = config.get(start..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}
