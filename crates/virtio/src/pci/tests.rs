//! The transport through its registers, each test with the rule it holds (virtio 1.2).

use std::sync::Mutex;

use ringfence_device::Persist;
use ringfence_memory::GuestAddress;
use vm_memory::Bytes;

use super::*;
use crate::DeviceKind;
use crate::Outcome;
use crate::chain::Chain;
use crate::testing::ACKNOWLEDGE;
use crate::testing::DRIVER;
use crate::testing::DRIVER_OK;
use crate::testing::FEATURES_OK;
use crate::testing::NEEDS_RESET;
use crate::testing::Segment;
use crate::testing::TestDriver;

/// Answers a request with its own bytes, reversed.
struct Mirror {
    served: u64,
    config: Arc<Mutex<[u8; 8]>>,
}

impl Mirror {
    fn boxed() -> Box<Self> {
        Box::new(Self {
            served: 0,
            config: Arc::default(),
        })
    }
}

fn mirror(memory: &GuestMemory, chain: &Chain) -> u32 {
    let mut data = chain.reader(memory).read_rest().expect("in memory");
    data.reverse();
    let mut writer = chain.writer(memory);
    let len = data.len().min(writer.remaining());
    writer.write_all(&data[..len]).expect("fits");
    writer.written()
}

impl VirtioDevice for Mirror {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_bytes(&*self.config.lock().expect("test"), offset, data);
    }
    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        active.serve(index, |session, chain| {
            self.served += 1;
            Outcome::Done(mirror(&session.memory, chain))
        });
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("served", self.served)]
    }
}

fn started() -> TestDriver {
    TestDriver::start(Mirror::boxed())
}

fn served(driver: &TestDriver) -> u64 {
    driver.pci.counters()[0].1
}

#[test]
fn a_request_is_answered_and_interrupts_with_its_queues_vector() {
    let mut driver = started();
    assert_eq!(driver.request(1, &[b"abc", b"de"], &[2, 8]), b"edcba");
    assert_eq!(driver.interrupts.take(), [2]);
}

#[test]
fn the_function_is_a_modern_device() {
    let driver = TestDriver::reset(Mirror::boxed());
    let mut id = [0; 4];
    driver.pci.read_config(0, &mut id);
    // §4.1.2.1: 0x1040 + device ID; revision 1 or more.
    assert_eq!(id, [0xf4, 0x1a, 0x44, 0x10]);
    let mut revision = [0];
    driver.pci.read_config(8, &mut revision);
    assert!(revision[0] >= 1);
}

// §4.1.4: each structure has a capability; cap_len, offset and length fit the BAR.
#[test]
fn the_capabilities_name_all_five_structures() {
    let driver = TestDriver::reset(Mirror::boxed());
    let read = |at: u16| {
        let mut data = [0];
        driver.pci.read_config(at, &mut data);
        data[0]
    };
    let mut kinds = Vec::new();
    let mut at = u16::from(read(0x34));
    while at != 0 {
        if read(at) == 9 {
            kinds.push(read(at + 3));
            assert!(read(at + 2) >= 16);
        }
        at = u16::from(read(at + 1));
    }
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
}

// §3.1.1 step 6: FEATURES_OK reads back unset when the device can't do what was chosen.
#[test]
fn features_that_were_not_offered_are_refused() {
    let driver = TestDriver::reset(Mirror::boxed());
    driver.set_status(ACKNOWLEDGE | DRIVER);
    for features in [1 << 32 | 1 << 6, 1 << 5, 0] {
        driver.write_features(features);
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.status() & FEATURES_OK, 0, "{features:#x}");
    }
    driver.write_features(1 << 32 | 1 << 5);
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_ne!(driver.status() & FEATURES_OK, 0);
}

// §3.1.1: "The driver MUST NOT accept new feature bits after this step."
#[test]
fn features_are_fixed_once_negotiated_and_drivers_cannot_skip_it() {
    let driver = TestDriver::reset(Mirror::boxed());
    driver.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
    assert_eq!(driver.status() & DRIVER_OK, 0);
    driver.write_features(1 << 32);
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    driver.write_features(u64::MAX);
    driver.write_common(8, &0_u32.to_le_bytes());
    let mut data = [0; 4];
    driver.pci.read_bar(0, 0xc, &mut data);
    assert_eq!(data, [0; 4]);
}

// §2.4.1: after a reset the device is as it was, and can be used again.
#[test]
fn a_reset_device_starts_over() {
    let mut driver = started();
    for round in 1..=3 {
        assert_eq!(driver.request(0, &[b"xy"], &[2]), b"yx");
        assert_eq!(served(&driver), round);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.kick_and_run(0);
        driver.set_up(u64::MAX);
    }
}

// §4.1.4.3.2: "The device MUST present a 0 in queue_enable on reset"; a missing queue has size 0.
#[test]
fn queue_registers_start_clean_and_missing_queues_have_size_zero() {
    let driver = started();
    driver.set_status(0);
    assert_eq!(driver.read_common_16(0x1c), 0);
    driver.write_common(0x16, &2_u16.to_le_bytes());
    assert_eq!(driver.read_common_16(0x18), 0);
    driver.write_common(0x16, &0xffff_u16.to_le_bytes());
    assert_eq!(driver.read_common_16(0x18), 0);
}

#[test]
fn queue_sizes_that_are_no_power_of_two_or_too_large_are_dropped() {
    let driver = TestDriver::reset(Mirror::boxed());
    for bad in [0_u16, 3, 17, 32, u16::MAX] {
        driver.write_common(0x18, &bad.to_le_bytes());
        assert_eq!(driver.read_common_16(0x18), 16);
    }
}

// §4.1.4.3.1: a vector that can't be used reads back as NO_VECTOR.
#[test]
fn vectors_past_the_table_read_back_as_none() {
    let driver = TestDriver::reset(Mirror::boxed());
    driver.write_common(0x10, &3_u16.to_le_bytes());
    assert_eq!(driver.read_common_16(0x10), 0xffff);
    driver.write_common(0x10, &2_u16.to_le_bytes());
    assert_eq!(driver.read_common_16(0x10), 2);
}

// §2.7.7.1: with NO_INTERRUPT and no event index, the device sends none.
#[test]
fn the_driver_can_ask_for_no_interrupts_by_flag() {
    let mut driver = TestDriver::start_with(Mirror::boxed(), 1 << 32);
    let memory = driver.memory().clone();
    driver.rings[0].set_available_flags(&memory, 1);
    driver.request(0, &[b"x"], &[1]);
    assert!(driver.interrupts.take().is_empty());
    driver.rings[0].set_available_flags(&memory, 0);
    driver.request(0, &[b"x"], &[1]);
    assert_eq!(driver.interrupts.take(), [1]);
}

// §2.7.8: with the event index, one interrupt when the used index passes used_event.
#[test]
fn the_event_index_holds_interrupts_back_until_it_is_passed() {
    let mut driver = started();
    let memory = driver.memory().clone();
    driver.rings[0].set_used_event(&memory, 2);
    for expected in [&[][..], &[], &[1], &[]] {
        driver.request(0, &[b"x"], &[1]);
        assert_eq!(driver.interrupts.take(), expected);
    }
    assert_eq!(driver.rings[0].available_event(&memory), 4);
}

#[test]
fn indirect_tables_are_followed() {
    let mut driver = started();
    let (data, out) = (driver.allocate(4), driver.allocate(4));
    driver.memory().write_slice(b"wxyz", data).expect("ram");
    let segments = [Segment::read(data.0, 4), Segment::write(out.0, 4)];
    let memory = driver.memory().clone();
    driver.rings[0].add_indirect(&memory, 0x20_0000, &segments);
    driver.kick_and_run(0);
    assert_eq!(driver.take_used(0).expect("done").1, b"zyxw");
}

// §4.1.4.9: the window in configuration space reaches the BAR.
#[test]
fn the_configuration_window_reads_and_writes_the_bar() {
    let driver = started();
    let window = driver.pci.window;
    let set = |offset: u32, len: u32| {
        driver.pci.write_config(window - 12, &[0]);
        driver.pci.write_config(window - 8, &offset.to_le_bytes());
        driver.pci.write_config(window - 4, &len.to_le_bytes());
    };
    set(0x12, 2);
    let mut data = [0; 4];
    driver.pci.read_config(window, &mut data);
    assert_eq!(data[..2], [2, 0]);
    set(0x14, 1);
    driver.pci.write_config(window, &[0, 0, 0, 0]);
    assert_eq!(driver.status(), 0);
    set(0x1, 2);
    driver.pci.read_config(window, &mut data);
    set(u32::MAX, 4);
    driver.pci.read_config(window, &mut data);
    driver.pci.write_config(window, &[0xff; 4]);
}

// §4.1.4.5.1: without MSI-X the ISR says why, and reading it lets the wire go.
#[test]
fn without_msix_the_wire_and_the_isr_are_used() {
    let mut driver = started();
    driver.pci.function.write_config(0x04, &[0, 0]);
    let msix = driver.pci.function.msix().expect("msix").clone();
    msix.reset();
    driver.request(0, &[b"x"], &[1]);
    let mut isr = [0];
    driver.pci.read_bar(0, 0x1000, &mut isr);
    assert_eq!(isr, [1]);
    driver.pci.read_bar(0, 0x1000, &mut isr);
    assert_eq!(isr, [0]);
}

// §2.1.2: a device in error says so and tells the driver by a configuration change.
fn assert_broken(driver: &TestDriver) {
    driver.kick_and_run(0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    assert!(driver.interrupts.take().contains(&0));
}

#[test]
fn an_available_index_that_ran_ahead_breaks_the_device_until_reset() {
    let mut driver = started();
    let memory = driver.memory().clone();
    driver.rings[0].set_available_index(&memory, 17);
    assert_broken(&driver);
    driver.add(1, &[b"x"], &[1]);
    driver.kick_and_run(1);
    assert!(driver.take_used(1).is_none(), "nothing is served before");
    driver.set_up(u64::MAX);
    assert_eq!(driver.request(0, &[b"ab"], &[2]), b"ba");
}

#[test]
fn buffers_outside_memory_break_the_device() {
    for address in [crate::testing::RAM_BYTES - 4, 1 << 40, u64::MAX - 2] {
        let mut driver = started();
        driver.add_segments(0, &[Segment::read(address, 8)]);
        assert_broken(&driver);
    }
}

#[test]
fn a_readable_buffer_after_a_writable_one_breaks_the_device() {
    let mut driver = started();
    driver.add_segments(0, &[Segment::write(0x1000, 8), Segment::read(0x2000, 8)]);
    assert_broken(&driver);
}

// §2.7.5.1: descriptors must not form a loop.
#[test]
fn a_descriptor_loop_ends() {
    let mut driver = started();
    let memory = driver.memory().clone();
    let ring = &mut driver.rings[0];
    ring.write_descriptor(&memory, 0, Segment::read(0x1000, 1), 1, 1);
    ring.write_descriptor(&memory, 1, Segment::read(0x1000, 1), 1, 0);
    ring.make_available(&memory, 0);
    driver.kick_and_run(0);
    assert_eq!(served(&driver), 1);
}

#[test]
fn an_indirect_table_that_is_too_long_or_inside_another_ends() {
    let mut driver = started();
    let memory = driver.memory().clone();
    let segments = vec![Segment::read(0x1000, 1); 2000];
    driver.rings[0].add_indirect(&memory, 0x20_0000, &segments);
    assert_broken(&driver);
    driver.set_up(u64::MAX);
    let ring = &mut driver.rings[0];
    ring.write_descriptor(&memory, 0, Segment::read(0x20_0000, 16), 4, 0);
    memory
        .write_slice(&[0; 32], GuestAddress(0x20_0000))
        .expect("ram");
    memory
        .write_obj(4_u16, GuestAddress(0x20_000c))
        .expect("ram");
    ring.make_available(&memory, 0);
    assert_broken(&driver);
}

#[test]
fn rings_outside_memory_or_unaligned_keep_the_device_from_starting() {
    for (register, address) in [(0x20, 1_u64 << 40), (0x28, u64::MAX - 1), (0x20, 8)] {
        let driver = TestDriver::reset(Mirror::boxed());
        driver.set_status(ACKNOWLEDGE | DRIVER);
        driver.write_features(1 << 32);
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        driver.write_common(register, &address.to_le_bytes());
        driver.write_common(0x1c, &1_u16.to_le_bytes());
        driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_ne!(driver.status() & NEEDS_RESET, 0, "{address:#x}");
        driver.kick_and_run(0);
    }
}

#[test]
fn a_storm_of_doorbells_costs_one_turn() {
    let mut driver = started();
    driver.add(0, &[b"x"], &[1]);
    for _ in 0..100_000 {
        driver.kick(0);
    }
    driver.kick(200);
    assert_eq!(driver.events.run_once(0).expect("loop"), 1);
    assert_eq!(driver.events.run_once(0).expect("loop"), 0);
    assert_eq!(served(&driver), 1);
}

#[test]
fn queues_may_overlap_without_harm() {
    let mut driver = started();
    driver.set_status(0);
    driver.set_status(ACKNOWLEDGE | DRIVER);
    driver.write_features(1 << 32);
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for register in [0x20, 0x28, 0x30] {
        driver.write_common(register, &0x10_0000_u64.to_le_bytes());
    }
    driver.write_common(0x1c, &1_u16.to_le_bytes());
    driver.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    for index in 0..=u16::MAX {
        let at = GuestAddress(0x10_0002);
        driver.memory().write_obj(index, at).expect("ram");
        driver.kick(0);
        driver.events.run_once(0).expect("loop");
    }
    driver.run();
    driver.set_up(u64::MAX);
    assert_eq!(driver.request(0, &[b"ab"], &[2]), b"ba");
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_was() {
    let mut one = started();
    one.request(0, &[b"ab"], &[2]);
    one.add(0, &[b"cd"], &[2]);
    one.rings[0].set_used_event(one.ram.memory(), 1);
    let state = serde_json::to_value(one.pci.save()).expect("plain");
    let two = TestDriver::reset(Mirror::boxed());
    let mut ram = vec![0; 9 << 20];
    one.memory()
        .read_slice(&mut ram, GuestAddress(0))
        .expect("ram");
    two.memory()
        .write_slice(&ram, GuestAddress(0))
        .expect("ram");
    let state = serde_json::from_value(state).expect("plain");
    two.pci.restore(state).expect("same device");
    two.run();
    assert_eq!(served(&two), 1, "the waiting request was served");
    let mut ring = std::mem::take(&mut one.rings).remove(0);
    assert_eq!(ring.take_used(two.memory()).expect("done").1, b"dc");
    assert_eq!(two.interrupts.take(), [1]);
}

#[test]
fn another_devices_state_is_refused() {
    let state = started().pci.save();
    let other = TestDriver::reset(Box::new(crate::rng::Rng::default()));
    let refused = other.pci.restore(state);
    assert!(matches!(
        refused,
        Err(ringfence_device::RestoreError::Mismatch { .. })
    ));
}

// Resets from one thread while another serves: nothing hangs, nothing is served after the reset.
#[test]
fn resets_race_with_the_worker_without_harm() {
    let mut driver = started();
    let events = driver.events.clone();
    let worker = std::thread::spawn(move || events.run());
    for _ in 0..200 {
        for _ in 0..8 {
            driver.add(0, &[b"x"], &[1]);
            driver.kick(0);
        }
        driver.set_up(u64::MAX);
    }
    driver.events.stop();
    worker.join().expect("no panic").expect("clean end");
    driver.set_up(u64::MAX);
    assert_ne!(driver.status() & DRIVER_OK, 0);
}
