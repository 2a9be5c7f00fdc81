//! The device: tag and queues around the file system.

use ringfence_device::RestoreError;

use super::FileSystem;
use crate::Active;
use crate::DeviceKind;
use crate::Outcome;
use crate::StartError;
use crate::VirtioDevice;

/// Longest tag in bytes (§5.11.4).
const TAG_BYTES: usize = 36;

/// The file system device.
#[derive(Debug)]
pub struct Fs {
    tag: [u8; TAG_BYTES],
    system: FileSystem,
}

impl Fs {
    /// Serves `system` as `tag`; `None` for a tag that is empty or longer than 36 bytes.
    #[must_use]
    pub fn new(tag: &str, system: FileSystem) -> Option<Self> {
        let mut bytes = [0; TAG_BYTES];
        if tag.is_empty() || tag.contains('\0') {
            return None;
        }
        bytes.get_mut(..tag.len())?.copy_from_slice(tag.as_bytes());
        Some(Self { tag: bytes, system })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::FileSystem
    }

    fn queue_sizes(&self) -> Vec<u16> {
        // High-priority (FORGET), then requests: long enough for a READ of 256 pages.
        vec![128, 1024]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        config[..TAG_BYTES].copy_from_slice(&self.tag);
        // num_request_queues: requests of one guest mostly come one after another.
        config[TAG_BYTES] = 1;
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        match active.queue(1) {
            Some(_) => Ok(()),
            None => Err(StartError::MissingQueue(1)),
        }
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        active.serve(index, |session, chain| {
            let mut request = chain.reader(&session.memory);
            let reply = chain.writer(&session.memory);
            Outcome::Done(self.system.serve(&mut request, &reply))
        });
    }

    fn stop(&mut self, _: &mut Active) {
        self.system.reset();
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.system.counters;
        vec![
            ("requests", counters.requests.get()),
            ("errors", counters.errors.get()),
            ("bytes_read", counters.bytes_read.get()),
            ("bytes_written", counters.bytes_written.get()),
            ("nodes", self.system.known()),
            ("handles", self.system.handles.open() as u64),
        ]
    }

    fn save(&self) -> serde_json::Value {
        self.system.save()
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        self.system.restore(state)
    }
}
