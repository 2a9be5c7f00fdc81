//! Lending, with a mover that remembers what it was lent.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::MutexGuard;

use ringfence_memory::UnheardWriter;
use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;
use ringfence_netstack::FrameMover;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Offloads;

use super::*;
use crate::net::NetConfig;
use crate::rate::Limit;
use crate::rate::RateConfig;
use crate::testing::NEEDS_RESET;
use crate::testing::TestDriver;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const TX: u16 = 1;

/// What a pair was lent with.
struct Loan {
    features: u64,
    next: [u16; 2],
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    broken: EventFd,
    /// As the kernel has it.
    _right: Option<UnheardWriter>,
}

#[derive(Default)]
struct Book {
    loans: Vec<Option<Loan>>,
    /// Where the rings are said to stand at the end; nowhere, when not given.
    ends_at: Option<[u16; 2]>,
    memory: Option<ringfence_memory::GuestMemory>,
}

/// A link of sockets, and a mover that only keeps its book.
struct Link {
    sockets: Vec<UnixDatagram>,
    book: Arc<Mutex<Book>>,
}

impl Link {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("test")
    }
}

impl NetBackend for Link {
    fn queues(&self) -> u16 {
        u16::try_from(self.sockets.len()).expect("few")
    }
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    fn set_guest_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_active_queues(&mut self, _: u16) -> io::Result<()> {
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
    fn mover(&mut self) -> Option<&mut dyn FrameMover> {
        Some(self)
    }
}

impl FrameMover for Link {
    fn start(&mut self, pair: u16, features: u64, rings: [LentRing<'_>; 2]) -> io::Result<()> {
        let mut book = self.book();
        let right = match &book.memory {
            Some(memory) => Some(UnheardWriter::admit(memory).map_err(io::Error::other)?),
            None => None,
        };
        let copy = |event: &EventFd| event.try_clone().expect("a descriptor");
        book.loans[usize::from(pair)] = Some(Loan {
            features,
            next: rings.map(|ring| ring.next),
            kicks: rings.map(|ring| copy(ring.kick)),
            calls: rings.map(|ring| copy(ring.call)),
            broken: copy(rings[0].broken),
            _right: right,
        });
        Ok(())
    }

    fn stop(&mut self, pair: u16) -> io::Result<[u16; 2]> {
        let mut book = self.book();
        book.loans[usize::from(pair)] = None;
        book.ends_at.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

struct Guest {
    driver: TestDriver,
    peers: Vec<UnixDatagram>,
    book: Arc<Mutex<Book>>,
}

fn guest_with(pairs: usize, rate: RateConfig) -> Guest {
    let (sockets, peers): (Vec<_>, Vec<_>) = (0..pairs)
        .map(|_| UnixDatagram::pair().expect("a pair"))
        .unzip();
    for socket in sockets.iter().chain(&peers) {
        socket.set_nonblocking(true).expect("a socket");
    }
    let book = Arc::new(Mutex::new(Book {
        loans: (0..pairs).map(|_| None).collect(),
        ends_at: Some([0, 0]),
        memory: None,
    }));
    let device = Net::new(NetConfig {
        backend: Box::new(Link {
            sockets,
            book: Arc::clone(&book),
        }),
        mac: MAC,
        mtu: None,
        lock_mac: true,
        receive_rate: rate,
        send_rate: rate,
    });
    let mut driver = TestDriver::reset(Box::new(device.expect("a device")));
    book.lock().expect("test").memory = Some(driver.memory().clone());
    driver.set_up(u64::MAX);
    Guest {
        driver,
        peers,
        book,
    }
}

fn guest() -> Guest {
    guest_with(1, RateConfig::default())
}

fn frame() -> Vec<u8> {
    [&[0; 12][..], &[0xff; 6], &MAC, &[9; 50]].concat()
}

impl Guest {
    fn lent(&self) -> Vec<bool> {
        let book = self.book.lock().expect("test");
        book.loans.iter().map(Option::is_some).collect()
    }

    /// What `look` sees of the first pair's loan.
    fn loan<T>(&self, look: impl FnOnce(&Loan) -> T) -> T {
        let book = self.book.lock().expect("test");
        look(book.loans[0].as_ref().expect("lent"))
    }

    fn ends_at(&self, positions: Option<[u16; 2]>) {
        self.book.lock().expect("test").ends_at = positions;
    }

    fn sent(&self) -> Option<Vec<u8>> {
        let mut data = vec![0; 2000];
        let len = self.peers[0].recv(&mut data).ok()?;
        data.truncate(len);
        Some(data)
    }

    fn vhost_pairs(&self) -> u64 {
        let counters = ringfence_device::Inspect::counters(&*self.driver.pci);
        let found = counters.iter().find(|(name, _)| *name == "vhost_pairs");
        found.expect("a counter").1
    }
}

#[test]
fn a_started_pair_is_lent_with_its_doorbells_and_features() {
    let mut guest = guest();
    assert_eq!((guest.lent(), guest.vhost_pairs()), (vec![true], 1));
    assert_eq!(
        guest.loan(|loan| (loan.features >> 32 & 1, loan.next)),
        (1, [0, 0])
    );
    guest.driver.add(TX, &[&frame()], &[]);
    guest.driver.kick_and_run(TX);
    assert!(guest.sent().is_none(), "the mover's to send");
    let rung = guest.loan(|loan| [loan.kicks[0].read().is_ok(), loan.kicks[1].read().is_ok()]);
    assert_eq!(rung, [false, true], "nobody here took the ring away");
}

#[test]
fn the_mover_interrupts_the_guest() {
    let guest = guest();
    guest.driver.interrupts.take();
    guest.loan(|loan| loan.calls[1].write(1).expect("a bell"));
    guest.driver.run();
    assert_eq!(guest.driver.interrupts.take(), [2]);
}

#[test]
fn a_reset_takes_the_pair_back_and_a_start_lends_it_again() {
    let mut guest = guest();
    guest.driver.set_status(0);
    assert_eq!((guest.lent(), guest.vhost_pairs()), (vec![false], 0));
    guest.driver.set_up(u64::MAX);
    assert_eq!(guest.lent(), [true]);
}

#[test]
fn pairs_are_lent_as_the_guest_uses_them() {
    let mut guest = guest_with(3, RateConfig::default());
    assert_eq!(guest.lent(), [true, false, false]);
    for (pairs, lent) in [
        (3, [true; 3]),
        (2, [true, true, false]),
        (1, [true, false, false]),
    ] {
        assert_eq!(guest.driver.request(6, &[&[4, 0, pairs, 0]], &[1]), [0]);
        assert_eq!(guest.lent(), lent);
    }
}

#[test]
fn a_broken_ring_stops_the_device() {
    let mut guest = guest_with(2, RateConfig::default());
    assert_eq!(guest.driver.request(4, &[&[4, 0, 2, 0]], &[1]), [0]);
    guest.loan(|loan| loan.broken.write(1).expect("a bell"));
    guest.driver.run();
    assert_eq!(guest.lent(), [false, false]);
    assert_ne!(guest.driver.status() & NEEDS_RESET, 0);
    guest.driver.set_up(u64::MAX);
    assert_eq!(guest.lent(), [true, false]);
}

#[test]
fn a_control_queue_that_breaks_takes_the_pairs_back_too() {
    let mut guest = guest();
    let nowhere = crate::testing::Segment::read(1 << 60, 2);
    guest.driver.add_segments(2, &[nowhere]);
    guest.driver.kick_and_run(2);
    assert_ne!(guest.driver.status() & NEEDS_RESET, 0);
    assert_eq!(guest.lent(), [false]);
}

#[test]
fn a_snapshot_finds_the_rings_at_rest_where_the_mover_left_them() {
    let guest = guest();
    guest.driver.interrupts.take();
    guest.ends_at(Some([7, 5]));
    guest.loan(|loan| loan.calls[0].write(1).expect("a bell"));
    let state = ringfence_device::Persist::save(&*guest.driver.pci);
    assert_eq!(guest.lent(), [false]);
    assert_eq!(
        guest.driver.interrupts.take(),
        [1],
        "said before the snapshot"
    );
    let queues = serde_json::to_value(&state).expect("a state")["queues"].clone();
    assert_eq!(
        (&queues[0]["next_avail"], &queues[1]["next_avail"]),
        (&7.into(), &5.into())
    );
    // A machine that goes on has it lent again by whatever happens first.
    guest.driver.run();
    assert_eq!((guest.lent(), guest.vhost_pairs()), (vec![false], 1));
    guest.peers[0].send(&frame()).expect("room");
    guest.driver.run();
    assert_eq!(guest.loan(|loan| loan.next), [7, 5]);
}

#[test]
fn a_doorbell_wakes_a_parked_pair_and_a_reset_forgets_it() {
    let guest = guest();
    ringfence_device::Persist::save(&*guest.driver.pci);
    guest.driver.kick_and_run(TX);
    assert_eq!(guest.lent(), [true]);
    ringfence_device::Persist::save(&*guest.driver.pci);
    guest.driver.set_status(0);
    guest.peers[0].send(&frame()).expect("room");
    guest.driver.run();
    assert_eq!((guest.lent(), guest.vhost_pairs()), (vec![false], 0));
}

#[test]
fn while_pages_are_logged_the_device_serves_the_pair_itself() {
    let mut guest = guest();
    assert!(
        guest.driver.ram.set_logging(true).is_err(),
        "the mover isn't heard"
    );
    ringfence_device::Persist::save(&*guest.driver.pci);
    guest.driver.ram.set_logging(true).expect("it rests");
    guest.driver.add(TX, &[&frame()], &[]);
    guest.driver.kick_and_run(TX);
    assert_eq!((guest.lent(), guest.vhost_pairs()), (vec![false], 0));
    assert_eq!(guest.sent().expect("sent here"), frame());
    guest.driver.add(TX, &[&frame()], &[]);
    guest.driver.kick_and_run(TX);
    assert!(guest.sent().is_some());
}

#[test]
fn a_mover_that_does_not_say_where_it_stopped_costs_the_guest_a_reset() {
    let guest = guest();
    guest.ends_at(None);
    ringfence_device::Persist::save(&*guest.driver.pci);
    assert_ne!(guest.driver.status() & NEEDS_RESET, 0);
}

#[test]
fn what_is_bounded_is_not_lent() {
    let operations = Some(Limit {
        per_second: 1000,
        burst: 1000,
    });
    let bytes = None;
    let mut guest = guest_with(1, RateConfig { bytes, operations });
    assert_eq!(guest.lent(), [false]);
    guest.driver.request(TX, &[&frame()], &[]);
    assert_eq!(guest.sent().expect("sent here"), frame());
}
