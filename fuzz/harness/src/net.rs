//! The network device.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;

use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Offloads;
use ringfence_virtio::net::Net;
use ringfence_virtio::net::NetConfig;
use ringfence_virtio::rate::RateConfig;

use crate::script;
use crate::script::Input;
use crate::script::Request;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A link of datagram sockets.
struct Wire([UnixDatagram; 2]);

impl NetBackend for Wire {
    fn queues(&self) -> u16 {
        2
    }
    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: true,
        }
    }
    fn set_guest_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn set_active_queues(&mut self, queues: u16) -> io::Result<()> {
        assert!((1..=2).contains(&queues), "the device checks the number");
        Ok(())
    }
    fn descriptor(&self, queue: u16) -> BorrowedFd<'_> {
        self.0[usize::from(queue)].as_fd()
    }
    fn receive(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
        vectored::read(self.descriptor(queue), slices)
    }
    fn send(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        vectored::send(self.descriptor(queue), slices).map(drop)
    }
}

/// The network device with a locked address. Oracle: no frame leaves with another one.
///
/// # Panics
/// When an oracle fails.
pub fn net(data: &[u8]) {
    let pair = || {
        let (one, two) = UnixDatagram::pair().expect("a pair");
        one.set_nonblocking(true).expect("a socket");
        two.set_nonblocking(true).expect("a socket");
        (one, two)
    };
    let ((one, peer), (two, _other)) = (pair(), pair());
    let device = Net::new(NetConfig {
        backend: Box::new(Wire([one, two])),
        mac: MAC,
        mtu: Some(1500),
        lock_mac: true,
        receive_rate: RateConfig::default(),
        send_rate: RateConfig::default(),
    });
    let device = Box::new(device.expect("a device"));
    script::run(data, device, frame, &mut |input, driver| {
        let len = input.len() % 60_000;
        // Lost when the link is full, as frames are.
        let _ = peer.send(&vec![input.u8(); len]);
        driver.run();
        check_sent(&peer);
    });
    check_sent(&peer);
}

fn check_sent(peer: &UnixDatagram) {
    let mut frame = vec![0; 70_000];
    while let Ok(len) = peer.recv(&mut frame) {
        assert!(len >= 26, "a frame has a header");
        assert_eq!(frame[18..24], MAC, "the source address is locked");
    }
}

fn frame(input: &mut Input<'_>) -> (u16, Request) {
    let queue = input.u16() % 5;
    if queue == 4 {
        let len = usize::from(input.u8() % 16);
        return (queue, (input.bytes(len).to_vec(), vec![1]));
    }
    let mut frame = input.bytes(12).to_vec();
    frame.extend([0xff; 6]);
    let own = input.u8().is_multiple_of(2);
    frame.extend(if own { MAC } else { [6; 6] });
    let len = usize::from(input.u8());
    frame.extend(input.bytes(len));
    let room = input.len() % 4096;
    (
        queue,
        (frame, vec![room; usize::from(queue.is_multiple_of(2))]),
    )
}
