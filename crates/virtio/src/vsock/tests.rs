//! Connections both ways, flow control, endings and hostile packets.

use std::io::IoSliceMut;
use std::io::Read;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;

use rustix::net::AddressFamily;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::recvmsg;
use rustix::net::socketpair;

use super::packet::SHUTDOWN_RECEIVE;
use super::packet::SHUTDOWN_SEND;
use super::packet::TYPE_STREAM;
use super::packet::op;
use super::*;
use crate::testing::TestDriver;

const CID: u32 = 7;
const RX: u16 = 0;
const TX: u16 = 1;
/// The window that the test's guest advertises.
const GUEST_WINDOW: u32 = 64 << 10;

struct Guest {
    driver: TestDriver,
    handouts: OwnedFd,
    socket: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vsock");
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("a socket pair");
        let device = Vsock::new(VsockConfig {
            guest_cid: CID,
            listener: Some(UnixListener::bind(&socket).expect("a listener")),
            handout: Some(Handout::new(theirs)),
        });
        let mut guest = Self {
            driver: TestDriver::start(Box::new(device.expect("a device"))),
            handouts: ours,
            socket,
            _dir: dir,
        };
        guest.lend(64);
        guest
    }

    /// Gives the device buffers to send in.
    fn lend(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.add(RX, &[], &[HEADER_BYTES, 4096]);
        }
        self.driver.kick_and_run(RX);
    }

    fn packet(&self, op: u16, host: u32, guest: u32) -> Header {
        Header {
            source_cid: u64::from(CID),
            destination_cid: HOST_CID,
            source_port: guest,
            destination_port: host,
            kind: TYPE_STREAM,
            op,
            buffer: GUEST_WINDOW,
            ..Header::default()
        }
    }

    fn send_raw(&mut self, header: &Header, data: &[u8]) {
        self.driver.add(TX, &[&header.to_bytes(), data], &[]);
        self.driver.kick_and_run(TX);
        self.driver.take_used(TX).expect("taken");
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("small");
        self.send_raw(&Header { len, ..header }, data);
    }

    /// The next packet for the guest; its buffer is lent again.
    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.driver.run();
        let (_, bytes) = self.driver.take_used(RX)?;
        self.lend(1);
        let (header, data) = bytes.split_at(HEADER_BYTES);
        let header = Header::parse(header.try_into().expect("44 bytes"));
        Some((header, data.to_vec()))
    }

    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.next().expect("a packet");
        assert_eq!(header.op, op);
        assert_eq!(header.source_cid, HOST_CID);
        assert_eq!(header.destination_cid, u64::from(CID));
        (header, data)
    }

    /// A host program connects to guest port `port`, and the guest accepts.
    fn connect_in(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(&self.socket).expect("the listener");
        writeln!(stream, "CONNECT {port}").expect("room");
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!(request.destination_port, port);
        self.send(self.packet(op::RESPONSE, request.source_port, port), &[]);
        let mut line = vec![0; format!("OK {}\n", request.source_port).len()];
        stream.read_exact(&mut line).expect("the answer");
        assert!(line.starts_with(b"OK "));
        stream.set_nonblocking(true).expect("a socket");
        (stream, request.source_port)
    }

    /// The guest connects to host port `port`.
    fn connect_out(&mut self, port: u32, guest: u32) -> UnixStream {
        self.send(self.packet(op::REQUEST, port, guest), &[]);
        self.expect(op::RESPONSE);
        let (message, stream) = self.take_handout().expect("a connection");
        assert_eq!(message, [port, guest]);
        stream.set_nonblocking(true).expect("a socket");
        stream
    }

    fn take_handout(&self) -> Option<([u32; 2], UnixStream)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut message = [0; HANDOUT_BYTES];
        recvmsg(
            &self.handouts,
            &mut [IoSliceMut::new(&mut message)],
            &mut ancillary,
            RecvFlags::DONTWAIT,
        )
        .ok()?;
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })?;
        let word = |at: usize| u32::from_le_bytes(message[at..at + 4].try_into().expect("4"));
        Some(([word(0), word(4)], UnixStream::from(fd)))
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = ringfence_device::Inspect::counters(&*self.driver.pci);
        let found = counters.iter().find(|(known, _)| *known == name);
        found.expect("a counter").1
    }
}

fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = vec![0; 1 << 20];
    match stream.read(&mut data) {
        Ok(len) => data.truncate(len),
        Err(_) => data.clear(),
    }
    data
}

#[test]
fn the_guest_learns_its_context_id() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.driver.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
}

#[test]
fn a_host_program_talks_to_a_guest_port() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1024);
    stream.write_all(b"hello guest").expect("room");
    let (header, data) = guest.expect(op::RW);
    assert_eq!((header.len, data.as_slice()), (11, &b"hello guest"[..]));
    guest.send(guest.packet(op::RW, host, 1024), b"hello host");
    assert_eq!(read_some(&mut stream), b"hello host");
}

#[test]
fn a_guest_connection_is_handed_out_with_its_port() {
    let mut guest = Guest::new();
    let mut stream = guest.connect_out(5000, 77);
    guest.send(guest.packet(op::RW, 5000, 77), b"out");
    assert_eq!(read_some(&mut stream), b"out");
    stream.write_all(b"in").expect("room");
    assert_eq!(guest.expect(op::RW).1, b"in");
}

#[test]
fn a_guest_connection_that_nobody_takes_is_refused() {
    let mut guest = Guest::new();
    rustix::net::shutdown(&guest.handouts, rustix::net::Shutdown::Both).expect("a socket");
    guest.send(guest.packet(op::REQUEST, 5000, 77), &[]);
    guest.expect(op::RST);
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_guest_port_that_nobody_listens_on_hangs_up() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(&guest.socket).expect("the listener");
    writeln!(stream, "CONNECT 9").expect("room");
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.packet(op::RST, request.source_port, 9), &[]);
    assert_eq!(stream.read(&mut [0; 8]).expect("end"), 0);
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn handshakes_may_come_in_pieces_and_wrong_ones_are_hung_up_on() {
    let mut guest = Guest::new();
    let mut slow = UnixStream::connect(&guest.socket).expect("the listener");
    slow.write_all(b"CONN").expect("room");
    assert!(guest.next().is_none());
    slow.write_all(b"ECT 80\nearly bytes").expect("room");
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.packet(op::RESPONSE, request.source_port, 80), &[]);
    assert_eq!(guest.expect(op::RW).1, b"early bytes");
    for wrong in [
        "GET / HTTP/1.1\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "\n",
    ] {
        let mut stream = UnixStream::connect(&guest.socket).expect("the listener");
        stream.write_all(wrong.as_bytes()).expect("room");
        guest.driver.run();
        assert_eq!(stream.read(&mut [0; 8]).unwrap_or(0), 0, "{wrong}");
    }
    let mut long = UnixStream::connect(&guest.socket).expect("the listener");
    long.write_all(&[b'C'; 100]).expect("room");
    guest.driver.run();
    assert_eq!(long.read(&mut [0; 8]).unwrap_or(0), 0);
}

// §5.10.6.3: "The sender MUST NOT send more than the receiver's free buffer space".
#[test]
fn bytes_for_the_guest_stop_at_its_credit_and_go_on_when_it_grows() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1);
    let mut sent = 0;
    while let Ok(len) = stream.write(&[7; 4096]) {
        sent += len;
        if sent > 3 * GUEST_WINDOW as usize {
            break;
        }
    }
    let mut received = 0;
    while let Some((header, _)) = guest.next() {
        assert_eq!(header.op, op::RW);
        received += header.len;
    }
    assert_eq!(received, GUEST_WINDOW);
    let update = Header {
        forwarded: 10_000,
        ..guest.packet(op::CREDIT_UPDATE, host, 1)
    };
    guest.send(update, &[]);
    while let Some((header, _)) = guest.next() {
        received += header.len;
    }
    assert_eq!(received, GUEST_WINDOW + 10_000);
}

#[test]
fn bytes_from_the_guest_are_kept_up_to_the_window_and_arrive_whole() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1);
    let mut total = 0_usize;
    let mut expected = Vec::new();
    while guest.counter("open") == 1 && total < (WINDOW_BYTES as usize) {
        let piece: Vec<u8> = (0..4096)
            .map(|n| (total + n).to_le_bytes()[0] ^ 0x5a)
            .collect();
        guest.send(guest.packet(op::RW, host, 1), &piece);
        expected.extend(piece);
        total += 4096;
    }
    let mut got = Vec::new();
    while got.len() < expected.len() {
        let piece = read_some(&mut stream);
        guest.driver.run();
        got.extend(piece);
    }
    assert!(got == expected, "the bytes differ");
    let told = std::iter::from_fn(|| guest.next())
        .filter(|(header, _)| header.op == op::CREDIT_UPDATE)
        .map(|(header, _)| header.forwarded)
        .last();
    assert!(told.expect("a credit update") > WINDOW_BYTES / 2);
}

#[test]
fn a_guest_that_overruns_the_window_is_cut_off() {
    let mut guest = Guest::new();
    let (_stream, host) = guest.connect_in(1);
    let piece = vec![1; 16 << 10];
    for _ in 0..200 {
        guest.send(guest.packet(op::RW, host, 1), &piece);
    }
    let last = std::iter::from_fn(|| guest.next()).find(|(header, _)| header.op == op::RST);
    assert!(last.is_some());
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn half_close_by_the_host_lets_the_guest_go_on() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1);
    stream.write_all(b"last words").expect("room");
    stream.shutdown(std::net::Shutdown::Write).expect("open");
    assert_eq!(guest.expect(op::RW).1, b"last words");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send(guest.packet(op::RW, host, 1), b"reply");
    assert_eq!(read_some(&mut stream), b"reply");
}

#[test]
fn half_close_by_the_guest_lets_the_host_go_on() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1);
    guest.send(guest.packet(op::RW, host, 1), b"last words");
    let shut = Header {
        flags: SHUTDOWN_SEND,
        ..guest.packet(op::SHUTDOWN, host, 1)
    };
    guest.send(shut, &[]);
    assert_eq!(read_some(&mut stream), b"last words");
    assert_eq!(stream.read(&mut [0; 1]).expect("the end"), 0);
    stream.write_all(b"reply").expect("still open");
    assert_eq!(guest.expect(op::RW).1, b"reply");
    guest.send(guest.packet(op::RW, host, 1), b"broken promise");
    guest.expect(op::RST);
}

#[test]
fn a_guest_that_closes_both_ways_gets_its_reset() {
    let mut guest = Guest::new();
    let (_stream, host) = guest.connect_in(1);
    let shut = Header {
        flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE,
        ..guest.packet(op::SHUTDOWN, host, 1)
    };
    guest.send(shut, &[]);
    guest.expect(op::RST);
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_host_program_that_goes_away_shuts_both_ways() {
    let mut guest = Guest::new();
    let (stream, host) = guest.connect_in(1);
    drop(stream);
    let mut flags = 0;
    while let Some((header, _)) = guest.next() {
        assert_eq!(header.op, op::SHUTDOWN);
        flags = header.flags;
    }
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(guest.packet(op::RST, host, 1), &[]);
    assert_eq!(guest.counter("open"), 0);
    assert_eq!(guest.driver.events.run_once(0).expect("loop"), 0);
}

// Found by fuzzing: the hang-up was reported without end, and the devices' thread did nothing else.
#[test]
fn a_host_program_that_goes_away_waits_for_credit_in_silence() {
    let mut guest = Guest::new();
    let (mut stream, host) = guest.connect_in(1);
    let none = Header {
        buffer: 0,
        ..guest.packet(op::CREDIT_UPDATE, host, 1)
    };
    guest.send(none, &[]);
    stream.write_all(b"last words").expect("still open");
    drop(stream);
    guest.driver.run();
    assert_eq!(guest.driver.events.run_once(0).expect("loop"), 0);
    guest.send(guest.packet(op::CREDIT_UPDATE, host, 1), &[]);
    assert_eq!(guest.expect(op::RW).1, b"last words");
    let mut flags = 0;
    while let Some((header, _)) = guest.next() {
        assert_eq!(header.op, op::SHUTDOWN);
        flags = header.flags;
    }
    assert_eq!(flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
}

// §5.10.6.5: packets for no connection are answered with RST, and RST never is.
#[test]
fn packets_for_no_connection_are_reset() {
    let mut guest = Guest::new();
    for code in [op::RW, op::RESPONSE, op::SHUTDOWN, op::CREDIT_REQUEST, 99] {
        guest.send(guest.packet(code, 1, 2), &[]);
        guest.expect(op::RST);
    }
    guest.send(guest.packet(op::RST, 1, 2), &[]);
    assert!(guest.next().is_none());
    let unknown_kind = Header {
        kind: 2,
        ..guest.packet(op::REQUEST, 1, 2)
    };
    guest.send(unknown_kind, &[]);
    guest.expect(op::RST);
}

#[test]
fn packets_that_lie_about_who_they_are_or_how_long_are_dropped() {
    let mut guest = Guest::new();
    let honest = guest.packet(op::REQUEST, 1, 2);
    let liars = [
        Header {
            source_cid: 3,
            ..honest
        },
        Header {
            destination_cid: 9,
            ..honest
        },
        Header { len: 1, ..honest },
        Header {
            len: u32::MAX,
            ..honest
        },
    ];
    for liar in liars {
        guest.send_raw(&liar, &[]);
    }
    guest.driver.add(TX, &[b"short"], &[]);
    guest.driver.kick_and_run(TX);
    assert!(guest.next().is_none());
    assert_eq!(guest.counter("bad_packets"), 5);
}

#[test]
fn resets_without_buffers_for_the_answers_are_bounded() {
    let mut guest = Guest::new();
    for port in 0..2000 {
        guest.send(guest.packet(op::RW, port, 2), &[]);
    }
    let mut answers = 0;
    loop {
        while guest.driver.take_used(RX).is_some() {
            answers += 1;
        }
        let before = answers;
        guest.lend(32);
        while guest.driver.take_used(RX).is_some() {
            answers += 1;
        }
        if answers == before {
            break;
        }
    }
    assert!((256..400).contains(&answers), "{answers}");
}

#[test]
fn buffers_too_small_for_a_header_are_given_back() {
    let mut guest = Guest::new();
    guest.use_up_buffers();
    guest.driver.add(RX, &[], &[10]);
    guest.send(guest.packet(op::RW, 1, 2), &[]);
    assert_eq!(guest.driver.take_used(RX).expect("given back").1, b"");
    assert_eq!(guest.expect_after_lending(), op::RST);
}

impl Guest {
    /// Leaves the device without buffers.
    fn use_up_buffers(&mut self) {
        while self.driver.rings[0].in_flight() > 0 {
            self.send(self.packet(op::RW, 1, 2), &[]);
            while self.driver.take_used(RX).is_some() {}
        }
    }

    fn expect_after_lending(&mut self) -> u16 {
        self.lend(1);
        self.next().expect("a packet").0.op
    }
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    let (mut one, _) = guest.connect_in(1);
    let (mut two, _) = guest.connect_in(2);
    guest.use_up_buffers();
    one.write_all(&[1; 40_000]).expect("room");
    two.write_all(&[2; 40_000]).expect("room");
    guest.driver.run();
    guest.lend(64);
    let ports: Vec<u32> = std::iter::from_fn(|| guest.next())
        .map(|(header, _)| header.destination_port)
        .collect();
    let last_one = ports.iter().rposition(|&port| port == 1);
    let first_two = ports.iter().position(|&port| port == 2);
    assert!(first_two < last_one, "{ports:?}");
}

#[test]
fn hundreds_of_connections_work_at_once_and_all_end_with_a_reset_device() {
    let mut guest = Guest::new();
    let mut streams: Vec<UnixStream> = (0..300).map(|n| guest.connect_out(80, n)).collect();
    for (n, stream) in streams.iter_mut().enumerate() {
        write!(stream, "{n}").expect("room");
    }
    let mut heard = 0;
    while let Some((header, data)) = guest.next() {
        assert_eq!(data, header.destination_port.to_string().as_bytes());
        heard += 1;
    }
    assert_eq!(heard, 300);
    guest.driver.set_up(u64::MAX);
    for stream in &mut streams {
        assert_eq!(stream.read(&mut [0; 1]).expect("the end"), 0);
    }
    assert_eq!(guest.counter("open"), 0);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let guest = Guest::new();
    let state = ringfence_device::Persist::save(&*guest.driver.pci);
    let mut other = Guest::new();
    other.driver.set_status(0);
    ringfence_device::Persist::restore(&*other.driver.pci, state).expect("same device");
    other.driver.add(2, &[], &[4]);
    other.driver.kick_and_run(2);
    assert_eq!(other.driver.take_used(2).expect("told").1, [0; 4]);
}
