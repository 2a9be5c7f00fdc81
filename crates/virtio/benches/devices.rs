//! What a request costs on this side of the ring: descriptors, parsing, the host call, completion.
//!
//! The driver's own share (writing descriptors) is in every figure, as small as it can be made.

#![expect(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use criterion::Criterion;
use criterion::Throughput;
use criterion::criterion_group;
use criterion::criterion_main;
use ringfence_block::RawDisk;
use ringfence_virtio::Active;
use ringfence_virtio::DeviceKind;
use ringfence_virtio::Outcome;
use ringfence_virtio::VirtioDevice;
use ringfence_virtio::block::Block;
use ringfence_virtio::block::BlockConfig;
use ringfence_virtio::fs::Cache;
use ringfence_virtio::fs::FileSystem;
use ringfence_virtio::fs::Fs;
use ringfence_virtio::fs::Ids;
use ringfence_virtio::fs::Layout;
use ringfence_virtio::fs::Limits;
use ringfence_virtio::fs::Share;
use ringfence_virtio::fs::Xattrs;
use ringfence_virtio::rate::RateConfig;
use ringfence_virtio::testing::Segment;
use ringfence_virtio::testing::TestDriver;

/// Completes everything, touching nothing: the ring alone.
struct Null;

impl VirtioDevice for Null {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256]
    }
    fn features(&self) -> u64 {
        0
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn queue_ready(&mut self, active: &mut Active, index: u16) {
        active.serve(index, |_, chain| {
            black_box(chain.writable_len());
            Outcome::Done(0)
        });
    }
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Serves `segments` as one request, `batch` times for each doorbell.
fn serve(driver: &mut TestDriver, queue: u16, segments: &[Segment], batch: usize) {
    for _ in 0..batch {
        driver.add_segments(queue, segments);
    }
    driver.kick(queue);
    driver.events.run_once(-1).expect("an event loop");
    let ring = &mut driver.rings[usize::from(queue)];
    while ring.take_used_len(driver.ram.memory()).is_some() {}
}

fn rings(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    let batch = 64;
    group.throughput(Throughput::Elements(batch));
    for buffers in [1_usize, 3, 16] {
        let mut driver = TestDriver::start(Box::new(Null));
        let segments: Vec<Segment> = (0..buffers)
            .map(|n| Segment::write(0x40_0000 + n as u64 * 4096, 4096))
            .collect();
        let batch = (64 / buffers).max(1);
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(format!("{buffers} buffers"), |b| {
            b.iter(|| serve(&mut driver, 0, &segments, batch));
        });
    }
    group.finish();
}

/// One FUSE request at a fixed place in memory.
struct FuseRequest {
    segments: Vec<Segment>,
}

impl FuseRequest {
    fn new(driver: &mut TestDriver, code: u32, node: u64, payload: &[u8], room: usize) -> Self {
        let len = u32::try_from(40 + payload.len()).expect("small");
        let mut bytes = [&len.to_le_bytes()[..], &code.to_le_bytes()].concat();
        bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(payload);
        let at = driver.allocate(bytes.len());
        vm_memory::Bytes::write_slice(driver.memory(), &bytes, at).expect("ram");
        let mut segments = vec![Segment::read(at.0, bytes.len())];
        let head = driver.allocate(16);
        segments.push(Segment::write(head.0, 16));
        let mut rest = room;
        while rest > 0 {
            let len = rest.min(4096);
            let page = driver.allocate(4096);
            segments.push(Segment::write(page.0, len));
            rest -= len;
        }
        Self { segments }
    }
}

fn read_payload(size: u32) -> Vec<u8> {
    let mut payload = vec![0; 40];
    payload[16..20].copy_from_slice(&size.to_le_bytes());
    payload
}

fn mounted(dir: &std::path::Path) -> TestDriver {
    let layout = Layout::single(Share {
        file: File::open(dir).expect("a directory"),
        read_only: true,
        ids: Ids::Host,
        cache: Cache::Auto,
        hide: Vec::new(),
    });
    let limits = Limits::default();
    let system = FileSystem::new(layout.expect("a layout"), Xattrs::Off, limits);
    let device = Fs::new("bench", system.expect("a system")).expect("a tag");
    let mut driver = TestDriver::start(Box::new(device));
    let mut init = [7_u32, 38, 1 << 20, u32::MAX]
        .map(u32::to_le_bytes)
        .concat();
    init.truncate(16);
    let request = FuseRequest::new(&mut driver, 26, 0, &init, 64);
    serve(&mut driver, 1, &request.segments, 1);
    driver
}

fn fs(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("file"), vec![1; 1 << 20]).expect("a file");
    let mut driver = mounted(dir.path());
    let lookup = FuseRequest::new(&mut driver, 1, 1, b"file\0", 128);
    serve(&mut driver, 1, &lookup.segments, 1);
    let missing = FuseRequest::new(&mut driver, 1, 1, b"none\0", 128);
    let getattr = FuseRequest::new(&mut driver, 3, 2, &[0; 16], 104);
    let small = FuseRequest::new(&mut driver, 15, 2, &read_payload(4096), 4096);
    let large = FuseRequest::new(&mut driver, 15, 2, &read_payload(1 << 17), 1 << 17);
    let list = FuseRequest::new(&mut driver, 44, 1, &read_payload(4096), 4096);
    let mut group = c.benchmark_group("fs");
    for (name, request, bytes) in [
        ("lookup", &lookup, 0),
        ("lookup of nothing", &missing, 0),
        ("getattr", &getattr, 0),
        ("read 4 KiB", &small, 4096),
        ("read 128 KiB", &large, 1 << 17),
        ("readdirplus", &list, 0),
    ] {
        if bytes > 0 {
            group.throughput(Throughput::Bytes(bytes));
        } else {
            group.throughput(Throughput::Elements(1));
        }
        group.bench_function(name, |b| {
            b.iter(|| serve(&mut driver, 1, &request.segments, 1));
        });
    }
    group.finish();
}

fn block(c: &mut Criterion) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(64 << 20).expect("a size");
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; 1 << 20], 0).expect("room");
    let disk = RawDisk::new(file, false).expect("a disk");
    let device = Block::new(BlockConfig {
        disk: Arc::new(disk),
        serial: String::new(),
        queues: 1,
        rate: RateConfig::default(),
        thread_start: None,
    });
    let mut driver = TestDriver::start(Box::new(device.expect("a device")));
    let mut group = c.benchmark_group("block");
    for (name, kind, bytes) in [
        ("read 4 KiB cached", 0_u32, 4096_usize),
        ("read 128 KiB cached", 0, 1 << 17),
        ("write 4 KiB", 1, 4096),
        ("write 128 KiB", 1, 1 << 17),
    ] {
        let head = driver.allocate(16);
        let mut bytes_of = kind.to_le_bytes().to_vec();
        bytes_of.resize(16, 0);
        vm_memory::Bytes::write_slice(driver.memory(), &bytes_of, head).expect("ram");
        let mut segments = vec![Segment::read(head.0, 16)];
        for _ in 0..bytes / 4096 {
            let page = driver.allocate(4096);
            segments.push(match kind {
                0 => Segment::write(page.0, 4096),
                _ => Segment::read(page.0, 4096),
            });
        }
        segments.push(Segment::write(driver.allocate(1).0, 1));
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |b| {
            b.iter(|| serve(&mut driver, 0, &segments, 1));
        });
    }
    group.finish();
}

/// From the doorbell to the used ring with the loop in a thread of its own: what a guest waits for.
fn round_trip(c: &mut Criterion) {
    let mut driver = TestDriver::start(Box::new(Null));
    let events = Arc::clone(&driver.events);
    let worker = std::thread::spawn(move || events.run());
    let segments = [Segment::write(0x40_0000, 4096)];
    c.bench_function("round trip to the loop's thread", |b| {
        b.iter(|| {
            driver.add_segments(0, &segments);
            driver.kick(0);
            let ring = &mut driver.rings[0];
            while ring.take_used_len(driver.ram.memory()).is_none() {
                std::hint::spin_loop();
            }
        });
    });
    driver.events.stop();
    worker.join().expect("no panic").expect("a clean end");
}

criterion_group!(benches, rings, fs, block, round_trip);
criterion_main!(benches);
