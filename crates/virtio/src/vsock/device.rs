//! The device: queues and configuration around the multiplexer.

use std::io;
use std::os::unix::net::UnixListener;

use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use super::Handout;
use super::mux::Mux;
use super::packet::HEADER_BYTES;
use super::packet::Header;
use crate::Active;
use crate::DeviceKind;
use crate::Outcome;
use crate::Session;
use crate::StartError;
use crate::VirtioDevice;
use crate::chain::Chain;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
/// VIRTIO_VSOCK_F_STREAM (§5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§5.10.6.7): all connections are gone.
const TRANSPORT_RESET: u32 = 0;
/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// What a vsock device is made of.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context ID, 3 or more.
    pub guest_cid: u32,
    /// Where host programs connect.
    pub listener: Option<UnixListener>,
    /// Where the guest's connections go.
    pub handout: Option<Handout>,
}

#[derive(Serialize, Deserialize)]
struct VsockState {
    version: u32,
}

/// The socket device.
pub struct Vsock {
    mux: Mux,
    /// The guest is to be told that its connections are gone.
    owes_reset_event: bool,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock")
            .field("guest_cid", &self.mux.guest_cid())
            .finish_non_exhaustive()
    }
}

impl Vsock {
    /// The device of `config`.
    ///
    /// # Errors
    /// When the listening socket can't be made non-blocking.
    pub fn new(config: VsockConfig) -> io::Result<Self> {
        let cid = u64::from(config.guest_cid);
        Ok(Self {
            mux: Mux::new(cid, config.listener, config.handout)?,
            owes_reset_event: false,
        })
    }

    fn receive(&mut self, session: &Session, chain: &Chain) -> Outcome {
        let mut data = chain.reader(&session.memory);
        let mut header = [0; HEADER_BYTES];
        if data.read_exact(&mut header).is_ok() {
            let header = Header::parse(&header);
            self.mux.receive(&session.events, &header, &mut data);
        } else {
            self.mux.counters.bad_packets.increment();
        }
        Outcome::Done(0)
    }

    /// Fills the guest's buffers while there is something for it.
    fn send(&mut self, active: &mut Active) {
        if !self.mux.has_packets() {
            return;
        }
        let mux = &mut self.mux;
        active.serve(RX, |session, chain| {
            let buffer = chain.writer(&session.memory);
            if buffer.remaining() < HEADER_BYTES {
                // Too small for anything: give it back, or it would block those behind it.
                return Outcome::Done(0);
            }
            match mux.send(&session.events, &buffer) {
                Some(written) => Outcome::Done(written),
                None => Outcome::Blocked,
            }
        });
    }

    fn send_reset_event(&mut self, active: &mut Active) {
        if !self.owes_reset_event {
            return;
        }
        let owed = &mut self.owes_reset_event;
        active.serve(EVENT, |session, chain| {
            if !std::mem::take(owed) {
                return Outcome::Blocked;
            }
            let mut writer = chain.writer(&session.memory);
            // A buffer too small for an event is given back empty.
            let _ = writer.write_all(&TRANSPORT_RESET.to_le_bytes());
            Outcome::Done(writer.written())
        });
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Socket
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 16]
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.mux.guest_cid().to_le_bytes();
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        for index in [RX, TX] {
            if active.queue(index).is_none() {
                return Err(StartError::MissingQueue(index));
            }
        }
        self.mux.update_listening(&active.session.events);
        Ok(())
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        match index {
            TX => active.serve(TX, |session, chain| self.receive(session, chain)),
            EVENT => self.send_reset_event(active),
            _ => {}
        }
        self.send(active);
    }

    fn event_ready(&mut self, active: &mut Active, token: u32) {
        self.mux.event(&active.session.events, token);
        self.send(active);
    }

    fn stop(&mut self, active: &mut Active) {
        self.mux.clear(&active.session.events);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.mux.counters;
        vec![
            ("open", self.mux.open() as u64),
            ("opened", counters.opened.get()),
            ("refused", counters.refused.get()),
            ("packets_from_guest", counters.packets_in.get()),
            ("packets_to_guest", counters.packets_out.get()),
            ("bytes_from_guest", counters.bytes_in.get()),
            ("bytes_to_guest", counters.bytes_out.get()),
            ("bad_packets", counters.bad_packets.get()),
        ]
    }

    fn save(&self) -> serde_json::Value {
        // Connections end at a snapshot's restore: their host programs are not in it.
        serde_json::json!({ "version": STATE_VERSION })
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        const WHAT: &str = "vsock";
        let state: VsockState = RestoreError::parse(WHAT, state)?;
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        self.owes_reset_event = true;
        Ok(())
    }
}
