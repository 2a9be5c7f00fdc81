//! The balloon device (virtio 1.2 §5.5): memory the guest doesn't need goes back to the host.
//!
//! Inflated and reported pages are punched out of the RAM's file, so that the host has them back at
//! once, whoever else maps the RAM. Features: statistics, deflate on out-of-memory, free page
//! reporting. Not offered: page poisoning and free page hinting (which serves live migration).

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_device::Counter;
use ringfence_device::RestoreError;
use ringfence_device::warn_limited;
use ringfence_memory::GuestAddress;
use ringfence_memory::GuestRam;
use serde::Deserialize;
use serde::Serialize;
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::eventfd::EventFd;

use crate::Active;
use crate::DeviceKind;
use crate::Interest;
use crate::Outcome;
use crate::Session;
use crate::StartError;
use crate::VirtioDevice;
use crate::chain::Chain;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;

/// Feature bits (§5.5.3).
const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// Pages of the protocol, whatever the guest's are.
const PAGE_BYTES: u64 = 4096;
/// Most page numbers taken from one request: drivers send 256.
const MAX_PAGES: usize = 4096;
/// Bytes of a statistic: tag and value (§5.5.6.3).
const STAT_BYTES: usize = 10;
/// Most statistics in a report.
const MAX_STATS: usize = 64;
/// Version of the saved state.
const STATE_VERSION: u32 = 1;

/// Statistics by the standard's tags, in its order (§5.5.6.4).
pub const STAT_NAMES: [&str; 10] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
];

#[derive(Debug, Default)]
struct Shared {
    target_pages: u32,
    actual_pages: u32,
    /// The last report, by tag.
    stats: [Option<u64>; STAT_NAMES.len()],
    reports: u64,
    changed: bool,
    wants_stats: bool,
}

/// Steers a balloon from outside.
#[derive(Debug)]
pub struct BalloonHandle {
    shared: Mutex<Shared>,
    wake: EventFd,
}

/// What the guest last said of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonStats {
    /// Number of the report; it grows with each.
    pub report: u64,
    /// Name and value, bytes or counts; those that the guest gave.
    pub values: Vec<(&'static str, u64)>,
}

impl BalloonHandle {
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // Fails only when the counter is full: the device hears of it already.
        let _ = self.wake.write(1);
    }

    /// How many bytes the guest shall give up in all.
    pub fn set_target_bytes(&self, bytes: u64) {
        let mut shared = self.shared();
        shared.target_pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        shared.changed = true;
        drop(shared);
        self.ring();
    }

    /// What it was asked to give up.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        u64::from(self.shared().target_pages) * PAGE_BYTES
    }

    /// What it says it has given up.
    #[must_use]
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.shared().actual_pages) * PAGE_BYTES
    }

    /// Asks the guest for a new report.
    pub fn request_stats(&self) {
        self.shared().wants_stats = true;
        self.ring();
    }

    /// The last report.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        let shared = self.shared();
        let named = STAT_NAMES.iter().zip(shared.stats);
        BalloonStats {
            report: shared.reports,
            values: named
                .filter_map(|(&name, value)| Some((name, value?)))
                .collect(),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct BalloonState {
    version: u32,
    target_pages: u32,
    actual_pages: u32,
    held_stats: Option<u16>,
}

/// The balloon device.
pub struct Balloon {
    ram: GuestRam,
    handle: Arc<BalloonHandle>,
    /// The statistics buffer that the guest lent, by its head.
    held_stats: Option<u16>,
    stats_queue: Option<u16>,
    reporting_queue: Option<u16>,
    inflated: Counter,
    deflated: Counter,
    reported_bytes: Counter,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Balloon")
            .field("handle", &self.handle)
            .finish_non_exhaustive()
    }
}

impl Balloon {
    /// A balloon in `ram`.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new(ram: GuestRam) -> std::io::Result<Self> {
        Ok(Self {
            ram,
            handle: Arc::new(BalloonHandle {
                shared: Mutex::default(),
                wake: EventFd::new(EFD_NONBLOCK)?,
            }),
            held_stats: None,
            stats_queue: None,
            reporting_queue: None,
            inflated: Counter::new(),
            deflated: Counter::new(),
            reported_bytes: Counter::new(),
        })
    }

    /// To steer it with.
    #[must_use]
    pub fn handle(&self) -> Arc<BalloonHandle> {
        Arc::clone(&self.handle)
    }

    fn discard(&self, start: u64, len: u64) {
        if let Err(error) = self.ram.discard(GuestAddress(start), len) {
            warn_limited!(%error, "the host does not take guest pages back");
        }
    }

    /// Gives back the pages of one request, neighbours together.
    fn inflate(&self, session: &Session, chain: &Chain) {
        let mut pages = page_numbers(session, chain);
        pages.sort_unstable();
        pages.dedup();
        self.inflated.add(pages.len() as u64);
        let mut rest = pages.as_slice();
        while let Some(&first) = rest.first() {
            let run = rest
                .iter()
                .zip(u64::from(first)..)
                .take_while(|&(&page, expected)| u64::from(page) == expected)
                .count();
            self.discard(u64::from(first) * PAGE_BYTES, run as u64 * PAGE_BYTES);
            rest = &rest[run..];
        }
    }

    fn report_free(&self, session: &Session, chain: &Chain) {
        let _ = session;
        for buffer in &chain.writable {
            self.reported_bytes.add(u64::from(buffer.len));
            self.discard(buffer.address.0, u64::from(buffer.len));
        }
    }

    fn take_stats(&mut self, active: &mut Active, index: u16) {
        while let Some(chain) = active.pop(index) {
            self.read_stats(&active.session, &chain);
            if let Some(old) = self.held_stats.replace(chain.head()) {
                // The driver lends one buffer; should it lend more, it gets the old ones back.
                active.complete(index, old, 0);
            }
        }
    }

    fn read_stats(&self, session: &Session, chain: &Chain) {
        let mut reader = chain.reader(&session.memory);
        let mut shared = self.handle.shared();
        let mut any = false;
        for _ in 0..MAX_STATS {
            let mut record = [0; STAT_BYTES];
            if reader.read_exact(&mut record).is_err() {
                break;
            }
            let [t0, t1, value @ ..] = record;
            let tag = usize::from(u16::from_le_bytes([t0, t1]));
            if let Some(slot) = shared.stats.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(value));
                any = true;
            }
        }
        if any {
            shared.reports += 1;
        }
    }

    fn heed_handle(&mut self, active: &mut Active) {
        // Empty when the ring was taken already.
        let _ = self.handle.wake.read();
        let mut shared = self.handle.shared();
        let changed = std::mem::take(&mut shared.changed);
        let wants_stats = std::mem::take(&mut shared.wants_stats);
        drop(shared);
        if changed {
            active.session.interrupt.config_changed();
        }
        if wants_stats && let (Some(queue), Some(head)) = (self.stats_queue, self.held_stats.take())
        {
            // §5.5.6.3: returning the buffer asks for a new report.
            active.complete(queue, head, 0);
            active.notify(queue);
        }
    }
}

fn page_numbers(session: &Session, chain: &Chain) -> Vec<u32> {
    let mut reader = chain.reader(&session.memory);
    let count = (reader.remaining() / 4).min(MAX_PAGES);
    (0..count)
        .map_while(|_| reader.read_value::<u32>().ok())
        .collect()
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128, 16, 128]
    }

    fn features(&self) -> u64 {
        STATS | DEFLATE_ON_OOM | REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = self.handle.shared();
        let mut config = [0; 8];
        config[..4].copy_from_slice(&shared.target_pages.to_le_bytes());
        config[4..].copy_from_slice(&shared.actual_pages.to_le_bytes());
        crate::device::read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.handle.shared().actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn start(&mut self, active: &mut Active) -> Result<(), StartError> {
        // §5.5.2: queues of features that weren't negotiated don't exist; the rest move up.
        let mut next = DEFLATE;
        let mut place = |feature| {
            active.session.has(feature).then(|| {
                next += 1;
                next
            })
        };
        self.stats_queue = place(STATS);
        self.reporting_queue = place(REPORTING);
        active
            .session
            .events
            .add(&self.handle.wake, 0, Interest::Read)
            .map_err(|source| StartError::Host {
                action: "watch for balloon commands",
                source,
            })
    }

    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        if Some(index) == self.stats_queue {
            self.take_stats(active, index);
        } else if Some(index) == self.reporting_queue {
            active.serve(index, |session, chain| {
                self.report_free(session, chain);
                Outcome::Done(0)
            });
        } else if index == INFLATE {
            active.serve(index, |session, chain| {
                self.inflate(session, chain);
                Outcome::Done(0)
            });
        } else {
            active.serve(index, |session, chain| {
                // Pages come back by being touched.
                self.deflated.add(page_numbers(session, chain).len() as u64);
                Outcome::Done(0)
            });
        }
    }

    fn event_ready(&mut self, active: &mut Active, _: u32) {
        self.heed_handle(active);
    }

    fn stop(&mut self, _: &mut Active) {
        self.held_stats = None;
        self.handle.shared().actual_pages = 0;
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("target_bytes", self.handle.target_bytes()),
            ("actual_bytes", self.handle.actual_bytes()),
            ("inflated_pages", self.inflated.get()),
            ("deflated_pages", self.deflated.get()),
            ("reported_bytes", self.reported_bytes.get()),
        ]
    }

    fn save(&self) -> serde_json::Value {
        let shared = self.handle.shared();
        serde_json::json!({
            "version": STATE_VERSION,
            "target_pages": shared.target_pages,
            "actual_pages": shared.actual_pages,
            "held_stats": self.held_stats,
        })
    }

    fn restore(&mut self, state: serde_json::Value) -> Result<(), RestoreError> {
        const WHAT: &str = "balloon";
        let state: BalloonState = RestoreError::parse(WHAT, state)?;
        RestoreError::check_version(WHAT, state.version, STATE_VERSION)?;
        let mut shared = self.handle.shared();
        shared.target_pages = state.target_pages;
        shared.actual_pages = state.actual_pages;
        self.held_stats = state.held_stats;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::testing::Segment;
    use crate::testing::TestDriver;

    struct Guest {
        driver: TestDriver,
        ram: GuestRam,
        handle: Arc<BalloonHandle>,
    }

    fn guest_with(features: u64) -> Guest {
        let ram = GuestRam::new(8 << 20, ringfence_memory::HugePages::Off).expect("ram");
        let balloon = Balloon::new(ram.clone()).expect("a balloon");
        let handle = balloon.handle();
        Guest {
            driver: TestDriver::start_with(Box::new(balloon), features),
            ram,
            handle,
        }
    }

    fn guest() -> Guest {
        guest_with(u64::MAX)
    }

    impl Guest {
        fn used_pages(&self) -> u64 {
            use std::os::unix::fs::MetadataExt;
            self.ram.file().metadata().expect("a file").blocks() / 8
        }

        fn touch(&self, first: u64, count: u64) {
            for page in first..first + count {
                let at = GuestAddress(page * PAGE_BYTES);
                self.ram.memory().write_obj(1_u8, at).expect("ram");
            }
        }
    }

    fn numbers(pages: &[u32]) -> Vec<u8> {
        pages.iter().flat_map(|page| page.to_le_bytes()).collect()
    }

    #[test]
    fn inflated_pages_go_back_to_the_host() {
        let mut guest = guest();
        guest.touch(0, 100);
        assert_eq!(guest.used_pages(), 100);
        let pages = numbers(&[12, 10, 11, 50, 10]);
        guest.driver.request(INFLATE, &[&pages], &[]);
        assert_eq!(guest.used_pages(), 96);
        guest.driver.request(DEFLATE, &[&pages], &[]);
        guest.touch(10, 1);
        assert_eq!(guest.used_pages(), 97);
    }

    #[test]
    fn pages_that_are_not_ram_are_nobodys() {
        let mut guest = guest();
        guest.touch(0, 3);
        let pages = numbers(&[u32::MAX, 1 << 20, 0xfee00, 2048]);
        guest.driver.request(INFLATE, &[&pages, b"odd"], &[]);
        guest.driver.request(INFLATE, &[&[0xff; 100_000]], &[]);
        assert_eq!(guest.used_pages(), 3);
    }

    #[test]
    fn a_target_is_told_and_the_guest_says_how_far_it_is() {
        let mut guest = guest();
        guest.handle.set_target_bytes(64 << 20);
        guest.driver.run();
        assert_eq!(guest.driver.interrupts.take(), [0]);
        let mut target = [0; 4];
        guest.driver.read_config(0, &mut target);
        assert_eq!(u32::from_le_bytes(target), 16_384);
        guest.driver.write_config(4, &100_u32.to_le_bytes());
        assert_eq!(guest.handle.actual_bytes(), 100 * PAGE_BYTES);
        guest.driver.set_up(u64::MAX);
        assert_eq!(guest.handle.actual_bytes(), 0, "a reset guest has all back");
    }

    #[test]
    fn free_pages_are_reported() {
        let mut guest = guest();
        guest.touch(0, 64);
        // The reporting queue: its buffers are the free ranges.
        let free = Segment::write(16 * PAGE_BYTES, 0x1_0000);
        guest.driver.add_segments(3, &[free]);
        guest.driver.kick_and_run(3);
        assert!(guest.driver.take_used(3).is_some());
        assert_eq!(guest.used_pages(), 48);
    }

    // §5.5.2: without statistics the reporting queue is the third.
    #[test]
    fn queues_of_refused_features_do_not_count() {
        let mut guest = guest_with(1 << 32 | REPORTING);
        guest.touch(0, 64);
        guest.driver.add_segments(2, &[Segment::write(0, 0x1_0000)]);
        guest.driver.kick_and_run(2);
        assert_eq!(guest.used_pages(), 48);
    }

    #[test]
    fn statistics_come_when_asked_for() {
        let mut guest = guest();
        let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let report = [stat(4, 1000), stat(5, 2000), stat(77, 1)].concat();
        guest.driver.add(2, &[&report], &[]);
        guest.driver.kick_and_run(2);
        assert!(guest.driver.take_used(2).is_none(), "kept until asked");
        let stats = guest.handle.stats();
        assert_eq!(stats.report, 1);
        assert_eq!(
            stats.values,
            [("free_memory", 1000), ("total_memory", 2000)]
        );
        guest.handle.request_stats();
        guest.driver.run();
        assert!(guest.driver.take_used(2).is_some(), "asked");
        guest.driver.add(2, &[&stat(4, 900)], &[]);
        guest.driver.kick_and_run(2);
        assert_eq!(guest.handle.stats().values[0], ("free_memory", 900));
    }
}
