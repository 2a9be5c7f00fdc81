//! Devices for the buses of test guests.

use std::sync::Arc;
use std::sync::Mutex;

use ringfence_bus::MmioDevice;
use ringfence_bus::PioDevice;
use ringfence_engine::VcpuWaker;

/// One access that a device saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// A read of this many bytes at this offset.
    Read(u64, usize),
    /// A write of these bytes at this offset.
    Write(u64, Vec<u8>),
}

/// Records accesses; a read returns the bytes offset + 1, offset + 2 and so on.
#[derive(Default)]
pub struct Recorder(Mutex<Vec<Seen>>);

impl Recorder {
    /// A new one, shared.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What was seen since the last call.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn saw(&self, access: Seen) {
        self.0.lock().unwrap().push(access);
    }

    fn answer(offset: u64, data: &mut [u8]) {
        for (index, byte) in (1..).zip(data) {
            *byte = offset.wrapping_add(index).to_le_bytes()[0];
        }
    }
}

impl PioDevice for Recorder {
    fn read(&self, offset: u16, data: &mut [u8]) {
        self.saw(Seen::Read(offset.into(), data.len()));
        Self::answer(offset.into(), data);
    }
    fn write(&self, offset: u16, data: &[u8]) {
        self.saw(Seen::Write(offset.into(), data.to_vec()));
    }
}

impl MmioDevice for Recorder {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.saw(Seen::Read(offset, data.len()));
        Self::answer(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.saw(Seen::Write(offset, data.to_vec()));
    }
}

/// A port whose write kicks vCPUs: how a guest with interrupts ends.
#[derive(Default)]
pub struct KickPort(Mutex<Vec<Arc<dyn VcpuWaker>>>);

impl KickPort {
    /// A new one, shared.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Also kicks `waker` from now on.
    pub fn add(&self, waker: Arc<dyn VcpuWaker>) {
        self.0.lock().unwrap().push(waker);
    }
}

impl PioDevice for KickPort {
    fn read(&self, _: u16, _: &mut [u8]) {}
    fn write(&self, _: u16, _: &[u8]) {
        for waker in self.0.lock().unwrap().iter() {
            waker.kick();
        }
    }
}

/// A port whose write calls a function with the value.
pub struct CallPort<F>(pub F);

impl<F: Fn(u64) + Send + Sync> PioDevice for CallPort<F> {
    fn read(&self, _: u16, _: &mut [u8]) {}
    fn write(&self, _: u16, data: &[u8]) {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        (self.0)(u64::from_le_bytes(value));
    }
}
