//! All connections of a device, and the packets that wait for the guest.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;

use ringfence_device::Counter;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::poll;
use rustix::net::SendFlags;
use rustix::net::send;

use super::Handout;
use super::LARGE_WINDOWS;
use super::MAX_CONNECTIONS;
use super::SMALL_WINDOW_BYTES;
use super::WINDOW_BYTES;
use super::connection::Connection;
use super::connection::Ports;
use super::connection::Pull;
use super::connection::State;
use super::handshake::Handshake;
use super::packet::HEADER_BYTES;
use super::packet::HOST_CID;
use super::packet::Header;
use super::packet::TYPE_STREAM;
use super::packet::op;
use crate::ChainReader;
use crate::ChainWriter;
use crate::Interest;
use crate::Registration;

/// The listening socket's token; others count up from here.
pub(super) const LISTENER: u32 = 0;
/// Host ports that we choose start here, far from those that programs listen on.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Answers that wait for a guest buffer and belong to no connection. More are dropped: the guest
/// that sends wrong packets without taking the answers gets none.
const MAX_STRAY_RESETS: usize = 256;
/// Host programs that connected and haven't said to which port.
const MAX_HANDSHAKES: usize = 64;

/// Counters of the device.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) packets_in: Counter,
    pub(super) packets_out: Counter,
    pub(super) bytes_in: Counter,
    pub(super) bytes_out: Counter,
    pub(super) bad_packets: Counter,
    pub(super) refused: Counter,
    pub(super) opened: Counter,
}

/// The multiplexer.
pub(super) struct Mux {
    guest_cid: u64,
    listener: Option<UnixListener>,
    handout: Option<Handout>,
    connections: HashMap<u32, Connection>,
    by_ports: HashMap<Ports, u32>,
    handshakes: HashMap<u32, Handshake>,
    /// Tokens of connections with something for the guest, each once, in turn.
    waiting: VecDeque<u32>,
    stray_resets: VecDeque<Header>,
    next_token: u32,
    next_host_port: u32,
    listening: bool,
    pub(super) counters: Counters,
}

impl Mux {
    pub(super) fn new(
        guest_cid: u64,
        listener: Option<UnixListener>,
        handout: Option<Handout>,
    ) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self {
            guest_cid,
            listener,
            handout,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            handshakes: HashMap::new(),
            waiting: VecDeque::new(),
            stray_resets: VecDeque::new(),
            next_token: LISTENER + 1,
            next_host_port: FIRST_HOST_PORT,
            listening: false,
            counters: Counters::default(),
        })
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Open connections, for `inspect`.
    pub(super) fn open(&self) -> usize {
        self.connections.len()
    }

    /// Forgets every connection: their host programs see the end.
    pub(super) fn clear(&mut self, events: &Registration) {
        for connection in self.connections.values() {
            events.remove(&connection.stream);
        }
        for handshake in self.handshakes.values() {
            events.remove(handshake.stream());
        }
        if let Some(listener) = &self.listener {
            events.remove(listener);
        }
        self.connections.clear();
        self.by_ports.clear();
        self.handshakes.clear();
        self.waiting.clear();
        self.stray_resets.clear();
        self.listening = false;
    }

    /// Starts or stops accepting, as there is room.
    pub(super) fn update_listening(&mut self, events: &Registration) {
        let room = self.connections.len() + self.handshakes.len() < MAX_CONNECTIONS
            && self.handshakes.len() < MAX_HANDSHAKES;
        let Some(listener) = &self.listener else {
            return;
        };
        if room && !self.listening {
            self.listening = events.add(listener, LISTENER, Interest::Read).is_ok();
        } else if !room && self.listening {
            events.remove(listener);
            self.listening = false;
        }
    }

    fn new_token(&mut self) -> u32 {
        loop {
            let token = self.next_token;
            // Half of the token space is the device's.
            self.next_token = (token + 1) % (1 << 31);
            let free = token != LISTENER
                && !self.connections.contains_key(&token)
                && !self.handshakes.contains_key(&token);
            if free {
                return token;
            }
        }
    }

    /// A descriptor is ready.
    pub(super) fn event(&mut self, events: &Registration, token: u32) {
        if token == LISTENER {
            self.accept(events);
        } else if self.handshakes.contains_key(&token) {
            self.handshake(events, token);
        } else {
            self.stream_ready(events, token);
        }
        self.update_listening(events);
    }

    fn accept(&mut self, events: &Registration) {
        while self.handshakes.len() < MAX_HANDSHAKES
            && self.connections.len() + self.handshakes.len() < MAX_CONNECTIONS
        {
            let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) else {
                return;
            };
            let token = self.new_token();
            if events.add(&stream, token, Interest::Read).is_ok() {
                self.handshakes.insert(token, Handshake::new(stream));
            }
        }
    }

    /// A program that doesn't say where it wants to is hung up on.
    fn handshake(&mut self, events: &Registration, token: u32) {
        let Some(handshake) = self.handshakes.get_mut(&token) else {
            return;
        };
        let port = match handshake.read() {
            Ok(None) => return,
            Ok(Some(port)) => Some(port),
            Err(_) => None,
        };
        let Some(handshake) = self.handshakes.remove(&token) else {
            return;
        };
        let stream = handshake.into_stream();
        events.remove(&stream);
        if let Some(guest) = port {
            let host = self.new_host_port(guest);
            let ports = Ports { host, guest };
            if let Some(token) = self.open_stream(events, ports, stream, State::Requested) {
                self.owe(token, |connection| connection.owed.request = true);
            }
        }
    }

    fn new_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = match host.checked_add(1) {
                // The last port means "any" (§5.10.6.2 leaves it to the sockets API).
                None | Some(u32::MAX) => FIRST_HOST_PORT,
                Some(next) => next,
            };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn open_stream(
        &mut self,
        events: &Registration,
        ports: Ports,
        stream: UnixStream,
        state: State,
    ) -> Option<u32> {
        let window = if self.connections.len() < LARGE_WINDOWS {
            WINDOW_BYTES
        } else {
            SMALL_WINDOW_BYTES
        };
        let token = self.new_token();
        let mut connection = Connection::new(ports, stream, state, window);
        connection.interest = connection.wanted_interest();
        events
            .add(&connection.stream, token, connection.interest)
            .ok()?;
        self.by_ports.insert(ports, token);
        self.connections.insert(token, connection);
        self.counters.opened.increment();
        Some(token)
    }

    fn stream_ready(&mut self, events: &Registration, token: u32) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.has_backlog() {
            connection.flush();
            connection.pass_on_end();
        }
        connection.readable |= connection.may_send();
        if is_hung_up(&connection.stream) {
            // It would be reported without end. What is left of its bytes waits for the guest's credit.
            events.remove(&connection.stream);
            if !connection.may_send() {
                connection.host_is_gone();
                connection.readable = false;
            }
        }
        self.settle(events, token);
    }

    /// After any change: what the connection owes, what to watch, whether it's over.
    fn settle(&mut self, events: &Registration, token: u32) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if connection.is_over() {
            connection.owed.reset = true;
        }
        let wanted = connection.wanted_interest();
        if wanted != connection.interest {
            connection.interest = wanted;
            // Fails when it was removed after a hang-up.
            let _ = events.modify(&connection.stream, token, wanted);
        }
        let sendable = connection.readable && connection.may_send() && connection.credit() > 0;
        if (sendable || connection.owed.any()) && !connection.queued {
            connection.queued = true;
            self.waiting.push_back(token);
        }
    }

    fn owe(&mut self, token: u32, change: impl FnOnce(&mut Connection)) {
        if let Some(connection) = self.connections.get_mut(&token) {
            change(connection);
            if !connection.queued {
                connection.queued = true;
                self.waiting.push_back(token);
            }
        }
    }

    fn close(&mut self, events: &Registration, token: u32) {
        if let Some(connection) = self.connections.remove(&token) {
            events.remove(&connection.stream);
            self.by_ports.remove(&connection.ports);
        }
        self.update_listening(events);
    }

    /// A packet from the guest; `data` is its payload and may be longer than it says.
    pub(super) fn receive(
        &mut self,
        events: &Registration,
        header: &Header,
        data: &mut ChainReader<'_>,
    ) {
        self.counters.packets_in.increment();
        // §5.10.6.2: packets that aren't the guest's own, or not for the host, are dropped.
        let len = header.len as usize;
        if header.source_cid != self.guest_cid
            || header.destination_cid != HOST_CID
            || len > data.remaining()
        {
            self.counters.bad_packets.increment();
            return;
        }
        let ports = Ports {
            host: header.destination_port,
            guest: header.source_port,
        };
        let known = self.by_ports.get(&ports).copied();
        match (known, header.op) {
            // §5.10.6.4.1: unknown types are answered with RST.
            _ if header.kind != TYPE_STREAM => self.reset_stray(header),
            (None, op::REQUEST) => self.connect_out(events, header, ports),
            (None, op::RST) => {}
            (None, _) => self.reset_stray(header),
            (Some(token), op::RST) => self.refused_or_closed(events, token),
            (Some(token), _) => self.deliver(events, token, header, data),
        }
    }

    fn refused_or_closed(&mut self, events: &Registration, token: u32) {
        self.close(events, token);
    }

    fn connect_out(&mut self, events: &Registration, header: &Header, ports: Ports) {
        let room = self.connections.len() < MAX_CONNECTIONS;
        let stream = self
            .handout
            .as_ref()
            .filter(|_| room)
            .and_then(|handout| handout.open(ports.host, ports.guest).ok());
        let token =
            stream.and_then(|stream| self.open_stream(events, ports, stream, State::Established));
        let Some(token) = token else {
            self.counters.refused.increment();
            self.reset_stray(header);
            return;
        };
        self.owe(token, |connection| {
            connection.set_peer(header.buffer, header.forwarded);
            connection.owed.response = true;
        });
        self.update_listening(events);
    }

    fn deliver(
        &mut self,
        events: &Registration,
        token: u32,
        header: &Header,
        data: &mut ChainReader<'_>,
    ) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        connection.set_peer(header.buffer, header.forwarded);
        let valid = match (header.op, connection.state) {
            (op::RESPONSE, State::Requested) => answer_connect(connection),
            (op::RW, State::Established) => {
                let len = header.len;
                self.counters.bytes_in.add(u64::from(len));
                connection.push(data, len as usize)
            }
            (op::SHUTDOWN, State::Established) => {
                connection.guest_shuts(header.flags);
                // One that hung up before isn't heard of again.
                if is_hung_up(&connection.stream) && !connection.may_send() {
                    connection.host_is_gone();
                    connection.readable = false;
                }
                true
            }
            (op::CREDIT_UPDATE, _) => true,
            (op::CREDIT_REQUEST, _) => {
                connection.owed.credit = true;
                true
            }
            _ => false,
        };
        if !valid {
            // §5.10.6.5: an invalid packet for a connection ends it.
            self.counters.bad_packets.increment();
            connection.owed.reset = true;
        }
        self.settle(events, token);
    }

    /// Answers a packet that belongs to no connection with RST (§5.10.6.5).
    fn reset_stray(&mut self, header: &Header) {
        if self.stray_resets.len() < MAX_STRAY_RESETS {
            self.stray_resets.push_back(Header {
                source_cid: HOST_CID,
                destination_cid: self.guest_cid,
                source_port: header.destination_port,
                destination_port: header.source_port,
                kind: header.kind,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    /// Whether there is something for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.stray_resets.is_empty() || !self.waiting.is_empty()
    }

    /// Fills one guest buffer. `None` leaves it unused: nothing to say, or no room for a header.
    pub(super) fn send(&mut self, events: &Registration, buffer: &ChainWriter<'_>) -> Option<u32> {
        let mut payload = buffer.clone();
        let mut head = buffer.clone();
        head.limit(HEADER_BYTES);
        if payload.remaining() < HEADER_BYTES {
            return None;
        }
        payload.advance(HEADER_BYTES);
        let header = match self.stray_resets.pop_front() {
            Some(header) => header,
            None => self.next_header(events, &mut payload)?,
        };
        head.write_all(&header.to_bytes()).ok()?;
        self.counters.packets_out.increment();
        self.counters.bytes_out.add(u64::from(header.len));
        Some(u32::try_from(HEADER_BYTES).unwrap_or(0) + header.len)
    }

    /// The next waiting connection that really has a packet.
    fn next_header(
        &mut self,
        events: &Registration,
        payload: &mut ChainWriter<'_>,
    ) -> Option<Header> {
        while let Some(token) = self.waiting.pop_front() {
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            connection.queued = false;
            let header = next_packet(connection, self.guest_cid, payload);
            match header {
                Some(header) if header.op == op::RST => self.close(events, token),
                _ => self.settle(events, token),
            }
            if header.is_some() {
                return header;
            }
        }
        None
    }
}

/// What `connection` has to say, most urgent first.
fn next_packet(
    connection: &mut Connection,
    guest_cid: u64,
    payload: &mut ChainWriter<'_>,
) -> Option<Header> {
    let owed = &mut connection.owed;
    let (op, flags, len) = if std::mem::take(&mut owed.reset) {
        (op::RST, 0, 0)
    } else if std::mem::take(&mut owed.request) {
        (op::REQUEST, 0, 0)
    } else if std::mem::take(&mut owed.response) {
        (op::RESPONSE, 0, 0)
    } else if let Some(len) = pull(connection, payload) {
        (op::RW, 0, len)
    } else if std::mem::take(&mut connection.owed.shutdown) {
        (op::SHUTDOWN, connection.ours, 0)
    } else if std::mem::take(&mut connection.owed.credit) {
        (op::CREDIT_UPDATE, 0, 0)
    } else {
        return None;
    };
    let (buffer, forwarded) = connection.tell_credit();
    Some(Header {
        source_cid: HOST_CID,
        destination_cid: guest_cid,
        source_port: connection.ports.host,
        destination_port: connection.ports.guest,
        len,
        kind: TYPE_STREAM,
        op,
        flags,
        buffer,
        forwarded,
    })
}

/// Bytes from the host, when there are some and the guest has room.
fn pull(connection: &mut Connection, payload: &mut ChainWriter<'_>) -> Option<u32> {
    if !connection.readable
        || !connection.may_send()
        || connection.credit() == 0
        || payload.remaining() == 0
    {
        return None;
    }
    match connection.pull(payload) {
        Pull::Bytes(len) => Some(len),
        Pull::Idle => {
            connection.readable = false;
            None
        }
        Pull::End => {
            connection.readable = false;
            connection.host_ended();
            if is_hung_up(&connection.stream) {
                connection.host_is_gone();
            }
            None
        }
    }
}

/// The guest accepted: says so to the host program.
fn answer_connect(connection: &mut Connection) -> bool {
    let line = format!("OK {}\n", connection.ports.host);
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    // A new socket has room for a line, so this fails only when the program is gone.
    if send(&connection.stream, line.as_bytes(), flags) != Ok(line.len()) {
        return false;
    }
    connection.state = State::Established;
    true
}

fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|_| fds[0].revents().contains(PollFlags::HUP))
}
