//! The device through its queue.

use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use ringfence_block::RawDisk;

use super::*;
use crate::rate::Limit;
use crate::rate::RateConfig;
use crate::testing::TestDriver;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const SIZE: u64 = 4 << 20;

struct Guest {
    driver: TestDriver,
    file: File,
}

fn guest_with(read_only: bool, rate: RateConfig, queues: u16) -> Guest {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(SIZE).expect("a size");
    let copy = file.try_clone().expect("a descriptor");
    let disk = RawDisk::new(copy, read_only).expect("a disk");
    let config = BlockConfig {
        disk: std::sync::Arc::new(disk),
        serial: "root".to_owned(),
        queues,
        rate,
        thread_start: None,
    };
    Guest {
        driver: TestDriver::start(Box::new(Block::new(config).expect("a device"))),
        file,
    }
}

fn guest() -> Guest {
    guest_with(false, RateConfig::default(), 1)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

impl Guest {
    /// One request; returns its data and status.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: usize) -> (Vec<u8>, u8) {
        let header = header(kind, sector);
        self.driver.add(0, &[&header, data], &[room, 1]);
        self.driver.kick(0);
        let (_, written) = self.wait(0);
        self.status_of(written, room)
    }

    fn wait(&mut self, queue: u16) -> (u16, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.driver.take_used(queue) {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "no answer");
            self.driver.events.run_once(10).expect("loop");
        }
    }

    /// The used length says how much was written; the status comes after all room.
    fn status_of(&mut self, mut data: Vec<u8>, room: usize) -> (Vec<u8>, u8) {
        // A short answer: the status byte lies past what was counted as written.
        if data.len() <= room {
            let at = self.driver.last_writable();
            let mut status = [0];
            vm_memory::Bytes::read_slice(self.driver.memory(), &mut status, at).expect("ram");
            return (Vec::new(), status[0]);
        }
        let status = data.pop().expect("a status");
        (data, status)
    }
}

#[test]
fn what_is_written_is_read_back_and_in_the_file() {
    use std::os::unix::fs::FileExt;
    let mut guest = guest();
    let data: Vec<u8> = (0..4096_u32).map(|n| n.to_le_bytes()[0]).collect();
    assert_eq!(guest.request(WRITE, 7, &data, 0).1, OK);
    assert_eq!(guest.request(READ, 7, &[], 4096), (data.clone(), OK));
    let mut stored = vec![0; 4096];
    guest
        .file
        .read_exact_at(&mut stored, 7 * 512)
        .expect("file");
    assert_eq!(stored, data);
    assert_eq!(guest.request(FLUSH, 0, &[], 0).1, OK);
    let counters = ringfence_device::Inspect::counters(&*guest.driver.pci);
    assert_eq!(counters[0], ("reads", 1));
    assert_eq!(counters[5], ("written_bytes", 4096));
}

#[test]
fn the_configuration_tells_size_limits_and_topology() {
    let guest = guest();
    let mut config = [0; 60];
    guest.driver.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("4"));
    assert_eq!(u64::from(word(0)), SIZE / 512);
    assert_eq!((word(12), word(20)), (254, 512));
    assert!(word(36) > 0 && word(48) > 0);
    assert_eq!(config[34], 1);
}

#[test]
fn the_serial_number_is_told() {
    let mut guest = guest();
    let (serial, status) = guest.request(GET_ID, 0, &[], 20);
    assert_eq!(status, OK);
    assert_eq!(&serial[..5], b"root\0");
    assert_eq!(guest.request(GET_ID, 0, &[], 4).1, IO_ERROR);
}

#[test]
fn discards_and_zeroes_reach_the_disk() {
    let mut guest = guest();
    guest.request(WRITE, 0, &[9; 16_384], 0);
    let zeroes = [segment(0, 8, 0), segment(16, 8, 1)].concat();
    assert_eq!(guest.request(WRITE_ZEROES, 0, &zeroes, 0).1, OK);
    assert_eq!(guest.request(DISCARD, 0, &segment(24, 8, 0), 0).1, OK);
    let (data, _) = guest.request(READ, 0, &[], 16_384);
    assert!(data[..4096].iter().all(|&byte| byte == 0));
    assert!(data[4096..8192].iter().all(|&byte| byte == 9));
    assert!(data[8192..12_288].iter().all(|&byte| byte == 0));
}

// §5.2.6.2: "the device MUST set the status byte to VIRTIO_BLK_S_UNSUPP for discard … if the unmap
// flag is set", and for unknown flags.
#[test]
fn requests_that_cannot_be_are_refused_by_status() {
    let mut guest = guest();
    let end = SIZE / 512;
    for (kind, sector, data, room, expected) in [
        (READ, end, vec![], 512, IO_ERROR),
        (READ, end - 1, vec![], 1024, IO_ERROR),
        (READ, u64::MAX, vec![], 512, IO_ERROR),
        (READ, 0, vec![], 100, IO_ERROR),
        (WRITE, end, vec![0; 512], 0, IO_ERROR),
        (WRITE, u64::MAX / 512, vec![0; 512], 0, IO_ERROR),
        (WRITE, 0, vec![0; 513], 0, IO_ERROR),
        (99, 0, vec![], 0, UNSUPPORTED),
        (DISCARD, 0, segment(0, 8, 1), 0, UNSUPPORTED),
        (DISCARD, 0, segment(end, 8, 0), 0, IO_ERROR),
        (DISCARD, 0, segment(0, u32::MAX, 0), 0, IO_ERROR),
        (DISCARD, 0, vec![], 0, IO_ERROR),
        (WRITE_ZEROES, 0, segment(0, 8, 2), 0, UNSUPPORTED),
        (WRITE_ZEROES, 0, segment(u64::MAX, 8, 0), 0, IO_ERROR),
        (WRITE_ZEROES, 0, segment(0, 8, 0).repeat(65), 0, IO_ERROR),
    ] {
        let (_, status) = guest.request(kind, sector, &data, room);
        assert_eq!(status, expected, "{kind} at {sector}");
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_changes() {
    let mut guest = guest_with(true, RateConfig::default(), 1);
    assert_ne!(guest.driver.offered_features() & 1 << 5, 0);
    assert_eq!(guest.driver.offered_features() & 1 << 13, 0);
    assert_eq!(guest.request(WRITE, 0, &[1; 512], 0).1, IO_ERROR);
    assert_eq!(guest.request(DISCARD, 0, &segment(0, 8, 0), 0).1, IO_ERROR);
    assert_eq!(guest.request(READ, 0, &[], 512), (vec![0; 512], OK));
}

#[test]
fn chains_that_are_no_requests_are_given_back_empty() {
    let mut guest = guest();
    for (readable, writable) in [(&b"short"[..], &[1][..]), (&[0; 16], &[]), (b"", &[512])] {
        guest.driver.add(0, &[readable], writable);
        guest.driver.kick(0);
        assert!(guest.wait(0).1.is_empty());
    }
}

#[test]
fn many_requests_on_many_queues_are_all_answered() {
    let mut guest = guest_with(false, RateConfig::default(), 4);
    let read = header(READ, 3);
    for queue in 0..4 {
        for _ in 0..60 {
            guest.driver.add(queue, &[&read], &[512, 1]);
        }
        guest.driver.kick(queue);
    }
    for queue in 0..4 {
        for _ in 0..60 {
            assert_eq!(guest.wait(queue).1.len(), 513);
        }
    }
}

#[test]
fn a_rate_limit_spreads_requests_over_time() {
    let rate = RateConfig {
        bytes: None,
        operations: Some(Limit {
            per_second: 100,
            burst: 2,
        }),
    };
    let mut guest = guest_with(false, rate, 1);
    let start = Instant::now();
    for _ in 0..12 {
        assert_eq!(guest.request(READ, 0, &[], 512).1, OK);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(90), "{took:?}");
}

/// A disk whose flush waits until it's let go.
struct Slow(std::sync::Arc<AtomicBool>);

impl ringfence_block::Disk for Slow {
    fn geometry(&self) -> ringfence_block::Geometry {
        ringfence_block::Geometry {
            size_bytes: SIZE,
            physical_block_bytes: 512,
            discard_bytes: 512,
        }
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(
        &self,
        _: &[ringfence_memory::vectored::GuestSlice<'_>],
        _: u64,
    ) -> Result<(), ringfence_block::DiskError> {
        Ok(())
    }
    fn write(
        &self,
        _: &[ringfence_memory::vectored::GuestSlice<'_>],
        _: u64,
    ) -> Result<(), ringfence_block::DiskError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), ringfence_block::DiskError> {
        while !self.0.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), ringfence_block::DiskError> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), ringfence_block::DiskError> {
        Ok(())
    }
}

// A driver may not use descriptors again before they come back: else what waits here had no bound.
#[test]
fn requests_beyond_the_queues_size_break_the_device() {
    let released = std::sync::Arc::new(AtomicBool::new(false));
    let config = BlockConfig {
        disk: std::sync::Arc::new(Slow(released.clone())),
        serial: String::new(),
        queues: 1,
        rate: RateConfig::default(),
        thread_start: None,
    };
    let device = Block::new(config).expect("a device");
    let mut driver = TestDriver::start(Box::new(device));
    let memory = driver.memory().clone();
    let head = driver.add(0, &[&header(FLUSH, 0)], &[1]);
    for _ in 0..300 {
        driver.kick_and_run(0);
        driver.rings[0].make_available(&memory, head);
    }
    assert_ne!(driver.status() & crate::testing::NEEDS_RESET, 0);
    released.store(true, Ordering::SeqCst);
    driver.set_up(u64::MAX);
    driver.add(0, &[&header(WRITE, 0), &[0; 512]], &[1]);
    driver.kick_and_run(0);
    assert_eq!(driver.take_used(0).expect("serving again").1, [OK]);
}

// A reset waits for what is in flight: nothing may write to guest memory afterwards.
#[test]
fn a_reset_during_a_flush_waits_for_it_and_forgets_the_rest() {
    let released = std::sync::Arc::new(AtomicBool::new(false));
    let config = BlockConfig {
        disk: std::sync::Arc::new(Slow(released.clone())),
        serial: String::new(),
        queues: 1,
        rate: RateConfig::default(),
        thread_start: None,
    };
    let device = Block::new(config).expect("a device");
    let mut driver = TestDriver::start(Box::new(device));
    for _ in 0..20 {
        driver.add(0, &[&header(FLUSH, 0)], &[1]);
    }
    driver.kick_and_run(0);
    let release = std::thread::spawn(move || released.store(true, Ordering::SeqCst));
    driver.set_up(u64::MAX);
    release.join().expect("no panic");
    driver.run();
    assert!(driver.take_used(0).is_none());
    driver.add(0, &[&header(WRITE, 0), &[0; 512]], &[1]);
    driver.kick_and_run(0);
    assert_eq!(driver.take_used(0).expect("serving again").1, [OK]);
}
