//! The device with a socket as its link.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;
use ringfence_netstack::HEADER_BYTES;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Offloads;

use super::*;
use crate::rate::Limit;
use crate::rate::RateConfig;
use crate::testing::TestDriver;

const MAC: Mac = [2, 0, 0, 0, 0, 7];
const RX: u16 = 0;
const TX: u16 = 1;

/// A link made of datagram sockets: one datagram, one frame with its header.
struct Wire {
    sockets: Vec<UnixDatagram>,
    log: Arc<Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    offloads: Offloads,
    active: u16,
}

impl NetBackend for Wire {
    fn queues(&self) -> u16 {
        u16::try_from(self.sockets.len()).expect("few")
    }
    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: false,
        }
    }
    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.log.lock().expect("test").offloads = offloads;
        Ok(())
    }
    fn set_active_queues(&mut self, queues: u16) -> io::Result<()> {
        self.log.lock().expect("test").active = queues;
        Ok(())
    }
    fn descriptor(&self, queue: u16) -> BorrowedFd<'_> {
        self.sockets[usize::from(queue)].as_fd()
    }
    fn receive(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
        vectored::read(self.descriptor(queue), slices)
    }
    fn send(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        vectored::send(self.descriptor(queue), slices).map(drop)
    }
}

struct Guest {
    driver: TestDriver,
    /// The other ends of the wire.
    peers: Vec<UnixDatagram>,
    log: Arc<Mutex<Log>>,
}

struct Options {
    pairs: usize,
    lock_mac: bool,
    receive_rate: RateConfig,
    send_rate: RateConfig,
    features: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pairs: 1,
            lock_mac: false,
            receive_rate: RateConfig::default(),
            send_rate: RateConfig::default(),
            features: u64::MAX,
        }
    }
}

fn guest_with(options: &Options) -> Guest {
    let log = Arc::new(Mutex::new(Log::default()));
    let (sockets, peers) = (0..options.pairs)
        .map(|_| UnixDatagram::pair().expect("a pair"))
        .unzip::<_, _, Vec<_>, Vec<_>>();
    for socket in sockets.iter().chain(&peers) {
        socket.set_nonblocking(true).expect("a socket");
    }
    let device = Net::new(NetConfig {
        backend: Box::new(Wire {
            sockets,
            log: log.clone(),
        }),
        mac: MAC,
        mtu: Some(1400),
        lock_mac: options.lock_mac,
        receive_rate: options.receive_rate,
        send_rate: options.send_rate,
    });
    let device = device.expect("a device");
    Guest {
        driver: TestDriver::start_with(Box::new(device), options.features),
        peers,
        log,
    }
}

fn guest() -> Guest {
    guest_with(&Options::default())
}

fn frame(source: Mac, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(source);
    frame.extend((0..len).map(|n| n.to_le_bytes()[0]));
    frame
}

impl Guest {
    fn lend(&mut self, count: usize, len: usize) {
        for _ in 0..count {
            self.driver.add(RX, &[], &[len]);
        }
        self.driver.kick_and_run(RX);
    }

    /// The next frame as the guest sees it: pieces joined by `num_buffers`.
    fn received(&mut self) -> Option<Vec<u8>> {
        let (_, mut data) = self.driver.take_used(RX)?;
        let pieces = u16::from_le_bytes([data[10], data[11]]);
        for _ in 1..pieces {
            data.extend(self.driver.take_used(RX).expect("another piece").1);
        }
        data[10..12].fill(0);
        Some(data)
    }

    fn sent(&self) -> Option<Vec<u8>> {
        let mut data = vec![0; 70_000];
        let len = self.peers[0].recv(&mut data).ok()?;
        data.truncate(len);
        Some(data)
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = ringfence_device::Inspect::counters(&*self.driver.pci);
        let found = counters.iter().find(|(known, _)| *known == name);
        found.expect("a counter").1
    }
}

#[test]
fn the_configuration_tells_address_link_and_mtu() {
    let guest = guest();
    let mut config = [0; 12];
    guest.driver.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!((config[6], config[8]), (1, 1));
    assert_eq!(u16::from_le_bytes([config[10], config[11]]), 1400);
}

#[test]
fn frames_go_out_as_they_are() {
    let mut guest = guest();
    let frame = frame(MAC, 100);
    guest
        .driver
        .request(TX, &[&frame[..HEADER_BYTES], &frame[HEADER_BYTES..]], &[]);
    assert_eq!(guest.sent().expect("sent"), frame);
    assert_eq!(guest.counter("tx_frames"), 1);
}

#[test]
fn frames_come_in_and_large_ones_are_spread_over_buffers() {
    let mut guest = guest();
    guest.lend(64, 1526);
    for len in [50, 1400, 20_000, 60_000] {
        let frame = frame([4; 6], len);
        guest.peers[0].send(&frame).expect("room");
        guest.driver.run();
        assert!(guest.received().expect("received") == frame, "{len}");
        guest.lend(40, 1526);
    }
    assert!(guest.driver.interrupts.take().contains(&1));
}

// §5.1.6.4: without MRG_RXBUF each frame lies in one buffer.
#[test]
fn without_merging_each_frame_has_its_own_buffer() {
    let mut guest = guest_with(&Options {
        features: 1 << 32 | feature::MAC,
        ..Options::default()
    });
    guest.lend(4, 2000);
    for len in [40, 1200] {
        let frame = frame([4; 6], len);
        guest.peers[0].send(&frame).expect("room");
        guest.driver.run();
        assert_eq!(guest.received().expect("received"), frame);
    }
    assert_eq!(
        guest.log.lock().expect("test").offloads,
        Offloads::default()
    );
}

#[test]
fn frames_wait_while_the_guest_has_no_buffers() {
    let mut guest = guest();
    let frame = frame([4; 6], 99);
    guest.peers[0].send(&frame).expect("room");
    guest.driver.run();
    assert!(guest.received().is_none());
    guest.lend(64, 1526);
    assert_eq!(guest.received().expect("received"), frame);
}

#[test]
fn frames_larger_than_all_buffers_are_dropped_and_counted() {
    let mut guest = guest();
    guest.lend(1, 100);
    guest.peers[0].send(&frame([4; 6], 5000)).expect("room");
    guest.driver.run();
    assert!(guest.received().is_none());
    assert_eq!(guest.counter("rx_dropped"), 1);
    let small = frame([4; 6], 10);
    guest.peers[0].send(&small).expect("room");
    guest.driver.run();
    assert_eq!(guest.received().expect("the buffer is still there"), small);
}

// Found by fuzzing: reading a frame into no bytes at all leaves it waiting, and the loop turning.
#[test]
fn buffers_of_no_size_are_given_back() {
    let mut guest = guest_with(&Options {
        features: 1 << 32,
        ..Options::default()
    });
    guest.driver.add(RX, &[b"only readable"], &[]);
    guest.driver.add(RX, &[], &[11]);
    guest.peers[0].send(&frame([4; 6], 40)).expect("room");
    guest.driver.kick_and_run(RX);
    for _ in 0..2 {
        assert!(guest.driver.take_used(RX).expect("given back").1.is_empty());
    }
    guest.lend(1, 1526);
    assert_eq!(guest.received().expect("received"), frame([4; 6], 40));
}

#[test]
fn frames_that_cannot_be_are_dropped() {
    let mut guest = guest();
    for bad in [vec![], vec![0; 11], vec![0; 25], vec![0; 70_000]] {
        guest.driver.request(TX, &[&bad], &[]);
    }
    assert!(guest.sent().is_none());
    assert_eq!(guest.counter("tx_dropped"), 4);
}

#[test]
fn a_locked_address_can_be_neither_forged_nor_changed() {
    let mut guest = guest_with(&Options {
        lock_mac: true,
        ..Options::default()
    });
    guest.driver.request(TX, &[&frame([6; 6], 40)], &[]);
    guest.driver.request(TX, &[&frame(MAC, 40)], &[]);
    assert_eq!(guest.sent().expect("its own"), frame(MAC, 40));
    assert!(guest.sent().is_none());
    let set = [&[1, 1][..], &[6; 6]].concat();
    assert_eq!(guest.driver.request(2, &[&set], &[1]), [1]);
}

#[test]
fn control_commands_change_address_and_offloads() {
    let mut guest = guest();
    let set_mac = [&[1, 1][..], &[6; 6]].concat();
    assert_eq!(guest.driver.request(2, &[&set_mac], &[1]), [0]);
    let mut mac = [0; 6];
    guest.driver.read_config(0, &mut mac);
    assert_eq!(mac, [6; 6]);
    let offloads = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    let only_checksum = offloads(feature::GUEST_CSUM);
    assert_eq!(guest.driver.request(2, &[&only_checksum], &[1]), [0]);
    let now = guest.log.lock().expect("test").offloads;
    assert!(now.checksum && !now.tso4);
    let unknown = offloads(1 << 40);
    assert_eq!(guest.driver.request(2, &[&unknown], &[1]), [1]);
    for wrong in [&[][..], &[4], &[4, 0], &[4, 0, 9, 0], &[99, 0], &[1, 1, 1]] {
        assert_eq!(guest.driver.request(2, &[wrong], &[1]), [1], "{wrong:?}");
    }
    assert_eq!(guest.driver.request(2, &[&[0, 0, 1]], &[1]), [0]);
}

// §5.1.5: only the first pair is used until the driver asks for more.
#[test]
fn more_queues_are_used_when_asked_for() {
    let mut guest = guest_with(&Options {
        pairs: 4,
        ..Options::default()
    });
    assert_eq!(guest.log.lock().expect("test").active, 1);
    assert_eq!(guest.driver.request(8, &[&[4, 0, 3, 0]], &[1]), [0]);
    assert_eq!(guest.log.lock().expect("test").active, 3);
    let frame = frame(MAC, 60);
    guest.driver.request(5, &[&frame], &[]);
    let mut data = vec![0; 200];
    let len = guest.peers[2].recv(&mut data).expect("the third link");
    assert_eq!(data[..len], frame);
}

#[test]
fn a_full_link_holds_frames_back_and_loses_none() {
    let mut guest = guest();
    let frame = frame(MAC, 1000);
    for _ in 0..200 {
        guest.driver.add(TX, &[&frame], &[]);
    }
    guest.driver.kick_and_run(TX);
    let mut got = 0;
    while guest.sent().is_some() {
        got += 1;
        guest.driver.run();
    }
    assert_eq!(got, 200);
    let done = std::iter::from_fn(|| guest.driver.take_used(TX)).count();
    assert_eq!(done, 200);
}

#[test]
fn a_link_that_is_gone_leaves_the_worker_idle() {
    let mut guest = guest();
    guest.lend(64, 1526);
    rustix::net::shutdown(&guest.peers[0], rustix::net::Shutdown::Both).expect("a socket");
    guest.peers.clear();
    guest.driver.request(TX, &[&frame(MAC, 60)], &[]);
    guest.driver.run();
    assert_eq!(guest.counter("tx_errors"), 1);
}

#[test]
fn rate_limits_hold_each_way() {
    let slow = RateConfig {
        bytes: None,
        operations: Some(Limit {
            per_second: 200,
            burst: 1,
        }),
    };
    let mut guest = guest_with(&Options {
        receive_rate: slow,
        send_rate: slow,
        ..Options::default()
    });
    guest.lend(128, 1526);
    let frame = frame(MAC, 60);
    for _ in 0..20 {
        guest.driver.add(TX, &[&frame], &[]);
        guest.peers[0].send(&frame).expect("room");
    }
    let start = Instant::now();
    guest.driver.kick(TX);
    let (mut out, mut came) = (0, 0);
    while out < 20 || came < 20 {
        assert!(start.elapsed() < Duration::from_secs(10), "{out} {came}");
        guest.driver.events.run_once(20).expect("loop");
        while guest.sent().is_some() {
            out += 1;
        }
        while guest.received().is_some() {
            came += 1;
        }
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(90), "{took:?}");
}

#[test]
fn a_snapshot_gives_back_the_buffers_that_were_taken_in_advance() {
    let mut guest = guest();
    guest.lend(64, 1526);
    guest.peers[0].send(&frame([4; 6], 40)).expect("room");
    guest.driver.run();
    guest.received().expect("received");
    ringfence_device::Persist::save(&*guest.driver.pci);
    let frame = frame([4; 6], 50_000);
    guest.peers[0].send(&frame).expect("room");
    guest.driver.run();
    assert!(guest.received().expect("received") == frame);
}
