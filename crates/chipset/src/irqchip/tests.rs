//! The chips together, through the traits that engines and devices use.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use ringfence_bus::MmioDevice;
use ringfence_bus::PioDevice;
use ringfence_clock::FrequencySource;
use ringfence_clock::TscFrequency;
use ringfence_clock::monotonic_ns;
use ringfence_device::Persist;
use ringfence_x86::msr::IA32_APIC_BASE;
use ringfence_x86::msr::IA32_TSC_DEADLINE;

use super::*;

mod deadlines;

const X2APIC_ON: u64 = 0xfee0_0c00;
const MS: u64 = 1_000_000;

#[derive(Default)]
struct Wakes(AtomicU32);

impl VcpuWaker for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn kick(&self) {}
}

struct Bench {
    chip: Arc<Irqchip>,
    cpus: Vec<Arc<dyn LocalApic>>,
    wakes: Vec<Arc<Wakes>>,
    clock: Arc<Clock>,
    timers: Arc<Timers>,
}

impl Bench {
    /// Software-enabled xAPICs.
    fn new(vcpus: u32) -> Self {
        let frequency = TscFrequency {
            hz: 1_000_000_000,
            source: FrequencySource::Cpuid,
        };
        let clock = Arc::new(Clock::new(frequency));
        let timers = Timers::new().expect("timers");
        let chip = Irqchip::new(vcpus, &clock, &timers).expect("chips");
        let cpus: Vec<_> = (0..vcpus)
            .map(|index| chip.local_apic(index).expect("an APIC"))
            .collect();
        let wakes: Vec<_> = cpus.iter().map(|_| Arc::new(Wakes::default())).collect();
        for (cpu, waker) in cpus.iter().zip(&wakes) {
            cpu.connect(waker.clone());
            write(&**cpu, 0xf0, 0x1ff);
        }
        Self {
            chip,
            cpus,
            wakes,
            clock,
            timers,
        }
    }

    /// The same as x2APICs.
    fn x2apic(vcpus: u32) -> Self {
        let bench = Self::new(vcpus);
        for cpu in &bench.cpus {
            cpu.write_msr(IA32_APIC_BASE, X2APIC_ON).expect("allowed");
        }
        bench
    }

    fn vectors(&self) -> Vec<Option<u8>> {
        self.cpus.iter().map(|cpu| cpu.acknowledge()).collect()
    }

    fn wakes(&self, cpu: usize) -> u32 {
        self.wakes[cpu].0.load(Ordering::SeqCst)
    }
}

fn write(cpu: &dyn LocalApic, offset: u64, value: u32) {
    cpu.write_page(offset, &value.to_le_bytes());
}

fn read(cpu: &dyn LocalApic, offset: u64) -> u32 {
    let mut data = [0; 4];
    cpu.read_page(offset, &mut data);
    u32::from_le_bytes(data)
}

fn msi(vector: u32, destination: u64) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000 | destination << 12,
        data: vector,
    }
}

/// Waits for what another thread does.
fn eventually(condition: impl Fn() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        if Instant::now() > end {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

#[test]
fn a_message_interrupts_its_processor() {
    let bench = Bench::new(2);
    bench.chip.send_msi(msi(0x51, 1));
    assert!(!bench.cpus[0].has_interrupt());
    assert!(bench.cpus[1].has_interrupt());
    assert_eq!((bench.wakes(0), bench.wakes(1)), (0, 1));
    assert_eq!(bench.cpus[1].acknowledge(), Some(0x51));
    assert!(!bench.cpus[1].has_interrupt());
}

#[test]
fn a_vector_that_waits_already_wakes_nobody_again() {
    let bench = Bench::new(1);
    bench.chip.send_msi(msi(0x51, 0));
    bench.chip.send_msi(msi(0x51, 0));
    assert_eq!(bench.wakes(0), 1);
    assert_eq!(bench.vectors(), [Some(0x51)]);
    assert_eq!(bench.vectors(), [None]);
}

// SDM 3A §11.8.3.1 and §11.8.4.
#[test]
fn vectors_are_served_by_priority_class() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    for vector in [0x31, 0x35, 0x52] {
        bench.chip.send_msi(msi(vector, 0));
    }
    assert_eq!(cpu.acknowledge(), Some(0x52));
    assert_eq!(cpu.acknowledge(), None, "0x35 is of a lower class");
    assert_eq!(read(cpu, 0xa0), 0x50);
    write(cpu, 0xb0, 0);
    assert_eq!(cpu.acknowledge(), Some(0x35));
    assert_eq!(cpu.acknowledge(), None, "0x31 is of the same class");
    write(cpu, 0xb0, 0);
    assert_eq!(cpu.acknowledge(), Some(0x31));
}

#[test]
fn the_task_priority_holds_vectors_back() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    cpu.set_task_priority(5);
    assert_eq!(read(cpu, 0x80), 0x50);
    bench.chip.send_msi(msi(0x5f, 0));
    assert!(!cpu.has_interrupt());
    write(cpu, 0x80, 0x40);
    assert_eq!(cpu.task_priority(), 4);
    assert!(cpu.has_interrupt());
}

#[test]
fn a_disabled_apic_takes_no_vectors() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    write(cpu, 0x320, 0x0_0040);
    write(cpu, 0xf0, 0xff);
    bench.chip.send_msi(msi(0x51, 0));
    assert!(!cpu.has_interrupt());
    assert_eq!(read(cpu, 0x320), 0x1_0040, "its LVT is masked");
    write(cpu, 0xf0, 0x1ff);
    cpu.write_msr(IA32_APIC_BASE, 0xfee0_0000).expect("allowed");
    bench.chip.send_msi(msi(0x51, 0));
    assert!(!cpu.has_interrupt());
}

#[test]
fn logical_destinations_reach_their_set() {
    let bench = Bench::new(4);
    for (index, cpu) in bench.cpus.iter().enumerate() {
        write(&**cpu, 0xd0, 1 << (24 + index));
    }
    let logical = |destination: u64| MsiMessage {
        address: 0xfee0_0004 | destination << 12,
        data: 0x61,
    };
    bench.chip.send_msi(logical(0b1010));
    assert_eq!(bench.vectors(), [None, Some(0x61), None, Some(0x61)]);
}

#[test]
fn lowest_priority_goes_to_the_idlest() {
    let bench = Bench::new(3);
    for (index, cpu) in bench.cpus.iter().enumerate() {
        write(&**cpu, 0xd0, 1 << (24 + index));
    }
    bench.cpus[0].set_task_priority(4);
    bench.cpus[1].set_task_priority(2);
    write(&*bench.cpus[2], 0xf0, 0xff);
    bench.chip.send_msi(MsiMessage {
        address: 0xfee0_0004 | 0xff << 12,
        data: 0x161,
    });
    assert_eq!(bench.vectors(), [None, Some(0x61), None]);
}

#[test]
fn an_ipi_reaches_its_target_and_its_register_reads_back() {
    let bench = Bench::new(3);
    write(&*bench.cpus[0], 0x310, 2 << 24);
    write(&*bench.cpus[0], 0x300, 0x41);
    assert_eq!(bench.vectors(), [None, None, Some(0x41)]);
    assert_eq!(read(&*bench.cpus[0], 0x310), 2 << 24);
    assert_eq!(read(&*bench.cpus[0], 0x300), 0x41);
}

#[test]
fn shorthands_reach_all_all_others_or_self() {
    let bench = Bench::x2apic(3);
    for (icr, expected) in [
        (0x0008_0041, [true, true, true]),
        (0x000c_0041, [false, true, true]),
        (0x0004_0041, [true, false, false]),
    ] {
        bench.cpus[0].write_msr(0x830, icr).expect("allowed");
        let got: Vec<bool> = bench.vectors().iter().map(Option::is_some).collect();
        assert_eq!(got, expected, "{icr:#x}");
        for cpu in &bench.cpus {
            cpu.write_msr(0x80b, 0).expect("allowed");
        }
    }
}

#[test]
fn a_vcpu_is_not_woken_by_itself() {
    let bench = Bench::x2apic(2);
    bench.cpus[0].write_msr(0x83f, 0x41).expect("allowed");
    bench.cpus[0].write_msr(0x830, 0x8_0042).expect("allowed");
    assert!(bench.cpus[0].has_interrupt());
    assert_eq!((bench.wakes(0), bench.wakes(1)), (0, 1));
}

#[test]
fn x2apic_ids_and_logical_ids_are_fixed() {
    let bench = Bench::x2apic(18);
    let cpu = &*bench.cpus[17];
    assert_eq!(cpu.read_msr(0x802), Ok(17));
    assert_eq!(cpu.read_msr(0x80d), Ok(0x0001_0002));
    assert_eq!(cpu.write_msr(0x80d, 0), Err(ApicFault));
    bench.cpus[0]
        .write_msr(0x830, 0x0001_0002 << 32 | 1 << 11 | 0x41)
        .expect("allowed");
    assert_eq!(cpu.acknowledge(), Some(0x41));
    assert!(!bench.cpus[1].has_interrupt());
}

// SDM 3A §11.12.1.3 and table 11-6.
#[test]
fn reserved_x2apic_registers_and_bits_fault() {
    let bench = Bench::x2apic(1);
    let cpu = &*bench.cpus[0];
    for msr in [0x800, 0x80e, 0x831, 0x840, 0x8ff] {
        assert_eq!(cpu.read_msr(msr), Err(ApicFault), "{msr:#x}");
        assert_eq!(cpu.write_msr(msr, 0), Err(ApicFault), "{msr:#x}");
    }
    for (msr, value) in [
        (0x80b, 1),
        (0x828, 1),
        (0x808, 0x100),
        (0x80f, 1 << 12),
        (0x832, 1 << 13),
        (0x830, 1 << 12),
        (0x838, 1 << 32),
        (0x802, 0),
        (0x80a, 0),
    ] {
        assert_eq!(cpu.write_msr(msr, value), Err(ApicFault), "{msr:#x}");
    }
    assert_eq!(Bench::new(1).cpus[0].read_msr(0x802), Err(ApicFault));
}

#[test]
fn read_only_bits_of_lvt_entries_may_be_written_and_stay_clear() {
    let bench = Bench::x2apic(1);
    let cpu = &*bench.cpus[0];
    cpu.write_msr(0x835, 0x5700).expect("allowed");
    assert_eq!(cpu.read_msr(0x835), Ok(0x700));
}

// SDM 3A figure 11-27.
#[test]
fn the_apic_base_takes_legal_transitions_only() {
    let bench = Bench::new(2);
    let cpu = &*bench.cpus[0];
    assert_eq!(cpu.read_msr(IA32_APIC_BASE), Ok(0xfee0_0900));
    assert_eq!(bench.cpus[1].read_msr(IA32_APIC_BASE), Ok(0xfee0_0800));
    for (value, allowed) in [
        (0xfee0_0400, false),
        (0xfee0_0c00, true),
        (0xfee0_0800, false),
        (0xfee0_0000, true),
        (0xfee0_0c00, false),
        (0xfee0_0800, true),
        (0xfee0_0801, false),
    ] {
        assert_eq!(
            cpu.write_msr(IA32_APIC_BASE, value).is_ok(),
            allowed,
            "{value:#x}"
        );
    }
    assert_eq!(
        cpu.read_msr(IA32_APIC_BASE),
        Ok(0xfee0_0900),
        "the BSP bit stays"
    );
}

// SDM 3A §9.4.3: INIT, SIPI, SIPI.
#[test]
fn an_application_processor_starts_once() {
    let bench = Bench::x2apic(2);
    let (bsp, ap) = (&*bench.cpus[0], &*bench.cpus[1]);
    let send = |low: u64| bsp.write_msr(0x830, 1 << 32 | low).expect("allowed");
    ap.set_waits_for_start_up(false);
    send(0x4608);
    assert_eq!(ap.take_event(), None, "a running processor ignores SIPI");
    send(0x4500);
    assert_eq!(ap.take_event(), Some(ApicEvent::Init));
    assert!(ap.waits_for_start_up());
    send(0x4608);
    assert_eq!(ap.take_event(), Some(ApicEvent::Sipi(8)));
    send(0x4608);
    assert_eq!(ap.take_event(), None);
    assert!(!ap.waits_for_start_up());
}

#[test]
fn a_start_up_message_right_after_init_is_kept() {
    let bench = Bench::x2apic(2);
    let (bsp, ap) = (&*bench.cpus[0], &*bench.cpus[1]);
    ap.set_waits_for_start_up(false);
    bsp.write_msr(0x830, 1 << 32 | 0x4500).expect("allowed");
    bsp.write_msr(0x830, 1 << 32 | 0x4609).expect("allowed");
    assert_eq!(ap.take_event(), Some(ApicEvent::Init));
    assert_eq!(ap.take_event(), Some(ApicEvent::Sipi(9)));
}

#[test]
fn init_resets_registers_but_not_mode() {
    let bench = Bench::x2apic(2);
    let ap = &*bench.cpus[1];
    bench.chip.send_msi(msi(0x51, 1));
    ap.write_msr(0x832, 0x40).expect("allowed");
    bench.cpus[0]
        .write_msr(0x830, 1 << 32 | 0x4500)
        .expect("allowed");
    ap.take_event();
    assert!(!ap.has_interrupt());
    assert_eq!(ap.read_msr(0x832), Ok(0x1_0000));
    assert_eq!(ap.read_msr(0x80f), Ok(0xff));
    assert_eq!(ap.read_msr(0x802), Ok(1));
}

#[test]
fn an_nmi_waits_for_a_processor_that_runs() {
    let bench = Bench::x2apic(2);
    let ap = &*bench.cpus[1];
    let nmi = 1 << 32 | 0x4400;
    bench.cpus[0].write_msr(0x830, nmi).expect("allowed");
    assert_eq!(ap.take_event(), None);
    ap.set_waits_for_start_up(false);
    assert_eq!(ap.take_event(), Some(ApicEvent::Nmi));
    assert_eq!(ap.take_event(), None);
}

// SDM 3A §11.5.3.
#[test]
fn errors_are_recorded_and_shown_by_a_write() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    write(cpu, 0x370, 0xfe);
    write(cpu, 0x300, 0x4_0003);
    bench.chip.send_msi(msi(0x0f, 0));
    read(cpu, 0x3f8);
    assert_eq!(read(cpu, 0x280), 0);
    write(cpu, 0x280, 0);
    assert_eq!(read(cpu, 0x280), 1 << 5 | 1 << 6);
    assert_eq!(cpu.acknowledge(), Some(0xfe));
    write(cpu, 0x280, 0);
    assert_eq!(read(cpu, 0x280), 0);
}

#[test]
fn an_error_interrupt_with_a_bad_vector_does_not_recurse() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    write(cpu, 0x370, 0x05);
    bench.chip.send_msi(msi(0x05, 0));
    assert!(!cpu.has_interrupt());
    write(cpu, 0x280, 0);
    assert_eq!(read(cpu, 0x280), 1 << 6);
}

#[test]
fn unaligned_and_wide_page_accesses_do_nothing() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    cpu.write_page(0x80, &[0xff; 8]);
    cpu.write_page(0x81, &[0xff; 4]);
    cpu.write_page(0xffff_ffff_ffff_fff0, &[0xff; 4]);
    assert_eq!(read(cpu, 0x80), 0);
    let mut wide = [0xaa; 64];
    cpu.read_page(0xf0, &mut wide);
    assert_eq!(wide, [0; 64]);
    let mut byte = [0];
    cpu.read_page(0xf1, &mut byte);
    assert_eq!(byte, [1]);
}

#[test]
fn isa_interrupts_reach_the_ioapic_and_the_pic() {
    let bench = Bench::new(1);
    let window = IoApicWindow::new(bench.chip.clone());
    window.write(0, &[0x10 + 2 * 4]);
    window.write(0x10, &0x44_u32.to_le_bytes());
    bench.chip.set_line(Gsi(4), true);
    assert_eq!(
        bench.cpus[0].acknowledge(),
        Some(0x44),
        "the PIC starts masked"
    );
    PicPorts::master(bench.chip.clone()).write(1, &[0]);
    assert!(bench.cpus[0].has_interrupt());
}

#[test]
fn the_timer_goes_to_input_2_of_the_ioapic() {
    let bench = Bench::new(1);
    let window = IoApicWindow::new(bench.chip.clone());
    window.write(0, &[0x10 + 2 * 2]);
    window.write(0x10, &0x42_u32.to_le_bytes());
    bench.chip.set_line(Gsi(2), true);
    assert_eq!(bench.vectors(), [None]);
    bench.chip.set_line(Gsi(0), true);
    assert_eq!(bench.vectors(), [Some(0x42)]);
}

#[test]
fn the_pic_interrupts_by_lint0_until_it_is_masked() {
    let bench = Bench::new(2);
    let cpu = &*bench.cpus[0];
    let master = PicPorts::master(bench.chip.clone());
    for (port, word) in [(0, 0x11), (1, 0x30), (1, 4), (1, 1), (1, 0)] {
        master.write(port, &[word]);
    }
    write(cpu, 0x350, 0x700);
    bench.chip.set_line(Gsi(4), true);
    assert!(cpu.has_interrupt());
    assert!(!bench.cpus[1].has_interrupt());
    assert_eq!(bench.wakes(0), 1);
    write(cpu, 0x350, 0x1_0700);
    assert!(!cpu.has_interrupt());
    write(cpu, 0x350, 0x700);
    assert_eq!(cpu.acknowledge(), Some(0x34));
    assert!(!cpu.has_interrupt());
}

#[test]
fn a_level_interrupt_comes_again_until_its_device_is_served() {
    let bench = Bench::new(1);
    let cpu = &*bench.cpus[0];
    let window = IoApicWindow::new(bench.chip.clone());
    window.write(0, &[0x10 + 2 * 16]);
    window.write(0x10, &0x8055_u32.to_le_bytes());
    bench.chip.set_line(Gsi(16), true);
    assert_eq!(cpu.acknowledge(), Some(0x55));
    assert_eq!(cpu.acknowledge(), None);
    write(cpu, 0xb0, 0);
    assert_eq!(cpu.acknowledge(), Some(0x55), "still high");
    bench.chip.set_line(Gsi(16), false);
    write(cpu, 0xb0, 0);
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn a_saved_page_restores_what_waits_and_what_counts() {
    let one = Bench::new(1);
    let cpu = &*one.cpus[0];
    one.chip.send_msi(msi(0x51, 0));
    cpu.acknowledge();
    one.chip.send_msi(msi(0x61, 0));
    write(cpu, 0xd0, 5 << 24);
    write(cpu, 0x3e0, 0b1011);
    write(cpu, 0x320, 1 << 17 | 0x40);
    write(cpu, 0x380, u32::MAX);
    let page = cpu.save();
    assert_eq!(page.len(), 1024);

    let two = Bench::new(1);
    let restored = &*two.cpus[0];
    restored.restore(&page).expect("a page");
    assert_eq!(read(restored, 0xa0), 0x50);
    assert_eq!(read(restored, 0xd0), 5 << 24);
    assert!(restored.timer_due_ns().is_some());
    assert!(read(restored, 0x390) < u32::MAX);
    assert_eq!(restored.acknowledge(), Some(0x61));
    assert!(restored.restore(&page[..1023]).is_err());
}

#[test]
fn saved_chips_restore_their_wires() {
    let one = Bench::new(1);
    let window = IoApicWindow::new(one.chip.clone());
    window.write(0, &[0x10 + 2 * 16]);
    window.write(0x10, &0x1_8055_u32.to_le_bytes());
    one.chip.set_line(Gsi(16), true);
    let state = one.chip.save();

    let two = Bench::new(1);
    two.chip.restore(state.clone()).expect("fits");
    let window = IoApicWindow::new(two.chip.clone());
    window.write(0x10, &0x8055_u32.to_le_bytes());
    assert_eq!(two.cpus[0].acknowledge(), Some(0x55));

    let mut text = serde_json::to_value(state).expect("plain data");
    text["version"] = 2.into();
    let newer = serde_json::from_value(text).expect("plain data");
    assert!(matches!(
        two.chip.restore(newer),
        Err(ringfence_device::RestoreError::Version { found: 2, .. })
    ));
}
