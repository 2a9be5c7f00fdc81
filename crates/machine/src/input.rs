//! Feeds a serial port from a file, as fast as the guest reads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::OnceLock;

use ringfence_chipset::SerialPort;
use ringfence_virtio::EventHandler;
use ringfence_virtio::EventLoop;
use ringfence_virtio::Interest;
use ringfence_virtio::Registration;
use rustix::io::Errno;

/// More than the port takes at once.
const CHUNK_BYTES: usize = 256;

/// The input of one serial port.
pub(crate) struct SerialInput {
    file: OwnedFd,
    port: Arc<SerialPort>,
    /// None for a file that can't be polled because it never waits (a regular file, /dev/null).
    registration: OnceLock<Registration>,
}

impl SerialInput {
    /// Starts feeding.
    pub(crate) fn start(
        file: OwnedFd,
        port: &Arc<SerialPort>,
        events: &Arc<EventLoop>,
    ) -> io::Result<()> {
        let input = Arc::new(Self {
            file,
            port: Arc::clone(port),
            registration: OnceLock::new(),
        });
        let registration = events.register(Arc::clone(&input) as Arc<dyn EventHandler>);
        match registration.add(&input.file, 0, Interest::Read) {
            Ok(()) => drop(input.registration.set(registration)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => input.feed(),
            Err(error) => return Err(error),
        }
        port.on_drained(Box::new(move || input.drained()));
        Ok(())
    }

    /// The guest has read everything: there is room again.
    fn drained(&self) {
        match self.registration.get() {
            // Fails only after the end of the file was seen: then there is nothing to hear of.
            Some(registration) => drop(registration.modify(&self.file, 0, Interest::Read)),
            None => self.feed(),
        }
    }

    fn feed(&self) {
        let room = self.port.receive_capacity().min(CHUNK_BYTES);
        let mut chunk = [0; CHUNK_BYTES];
        if room == 0 {
            self.hold();
            return;
        }
        match rustix::io::read(&self.file, &mut chunk[..room]) {
            Ok(0) => self.finish(),
            Ok(count) => drop(self.port.receive(&chunk[..count])),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.finish(),
        }
    }

    /// Doesn't listen until the guest has read: a full port and a ready file would keep the loop
    /// busy.
    fn hold(&self) {
        if let Some(registration) = self.registration.get() {
            // Fails only when it isn't registered any more.
            let _ = registration.modify(&self.file, 0, Interest::Hangup);
        }
    }

    fn finish(&self) {
        if let Some(registration) = self.registration.get() {
            registration.remove(&self.file);
        }
    }
}

impl EventHandler for SerialInput {
    fn ready(&self, _: u32) {
        self.feed();
    }
}
