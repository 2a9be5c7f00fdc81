//! Entropy, console, balloon and block.

use std::fs::File;
use std::sync::Arc;

use ringfence_block::RawDisk;
use ringfence_memory::GuestRam;
use ringfence_memory::HugePages;
use ringfence_virtio::balloon::Balloon;
use ringfence_virtio::block::Block;
use ringfence_virtio::block::BlockConfig;
use ringfence_virtio::console::Console;
use ringfence_virtio::rate::RateConfig;
use ringfence_virtio::rng::Rng;

use crate::script;
use crate::script::Input;
use crate::script::Request;

fn any(input: &mut Input<'_>, queues: usize) -> (u16, Request) {
    let queue = u16::try_from(input.below(queues)).unwrap_or(0);
    let len = usize::from(input.u8());
    let readable = input.bytes(len).to_vec();
    let writable = (0..input.below(4)).map(|_| input.len() % 65_536);
    (queue, (readable, writable.collect()))
}

/// The entropy device.
pub fn rng(data: &[u8]) {
    let requests = |input: &mut Input<'_>| any(input, 1);
    script::run(data, Box::<Rng>::default(), requests, &mut |_, _| {});
}

/// The console, with a pipe that nobody empties behind it.
///
/// # Panics
/// When an oracle fails; so for all bodies.
pub fn console(data: &[u8]) {
    let (typed, keyboard) = rustix::pipe::pipe().expect("a pipe");
    let (_screen, output) = rustix::pipe::pipe().expect("a pipe");
    rustix::io::write(&keyboard, b"typed text\n").expect("room");
    let console = Console::new(Some(File::from(typed)), Some(File::from(output)));
    let console = console.expect("a console");
    let handle = console.handle();
    let requests = |input: &mut Input<'_>| any(input, 2);
    script::run(data, Box::new(console), requests, &mut |input, _| {
        handle.resize(input.u16(), input.u16());
    });
}

/// The balloon. What it gives back must lie in RAM: anything else would be refused by the kernel,
/// and a counter of refusals doesn't exist because there are none.
///
/// # Panics
/// See [`console`].
pub fn balloon(data: &[u8]) {
    let ram = GuestRam::new(4 << 20, HugePages::Off).expect("ram");
    let balloon = Balloon::new(ram).expect("a balloon");
    let handle = balloon.handle();
    let requests = |input: &mut Input<'_>| any(input, 4);
    script::run(data, Box::new(balloon), requests, &mut |input, _| {
        handle.set_target_bytes(input.u64());
        handle.request_stats();
    });
}

/// The block device on a small raw disk. Oracle: the disk's size never changes.
///
/// # Panics
/// See [`console`].
pub fn block(data: &[u8]) {
    const SIZE: u64 = 1 << 20;
    let file = tempfile::tempfile().expect("a file");
    file.set_len(SIZE).expect("a size");
    let disk = RawDisk::new(file.try_clone().expect("a descriptor"), false);
    let block = Block::new(BlockConfig {
        disk: Arc::new(disk.expect("a disk")),
        serial: "fuzz".to_owned(),
        queues: 2,
        rate: RateConfig::default(),
        thread_start: None,
    });
    let block = block.expect("a device");
    script::run(data, Box::new(block), block_request, &mut |_, _| {});
    assert_eq!(file.metadata().expect("a file").len(), SIZE);
}

fn block_request(input: &mut Input<'_>) -> (u16, Request) {
    const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, 99];
    let queue = u16::from(input.u8() % 2);
    let kind = KINDS[input.below(KINDS.len())];
    let sector = match input.u8() % 4 {
        0 => input.u64(),
        _ => u64::from(input.u16() % 2100),
    };
    let mut readable = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let len = usize::from(input.u8() % 4) * 512;
    readable.extend(vec![input.u8(); len]);
    readable.extend(input.bytes(usize::from(kind >= 11) * 16));
    let room = usize::from(input.u8() % 4) * 512;
    (queue, (readable, vec![room, 1]))
}
