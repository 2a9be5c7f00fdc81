//! The user-space gateway: whatever frames a machine sends, it goes on and stays within bounds.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use ringfence_gateway::Gateway;
use ringfence_netstack::LinkNotice;
use ringfence_netstack::Offloads;

use crate::script::Input;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 8];
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = 12;
/// Bytes that all connections together may keep.
const MOST_BUFFERED: usize = 8 << 20;

/// No way outside, so that nothing of a fuzzed guest leaves this host; its own names are there.
const DOCUMENT: &str = r#"{
    "version": 1, "name": "fuzz", "mac": "02:00:00:00:00:01", "ipv4": "10.0.2.2/24",
    "ipv6": "fd00::2/64", "uplink": false, "names": {"box": ["10.0.2.9", "fd00::9"]},
    "limits": {"connections": 64, "flows": 64, "buffer_bytes": 4194304},
    "policy": {"default": "deny", "rules": [{"action": "allow", "domain": "*.example"}]}
}"#;

/// Frames of a machine, and of one beside it. Oracles: the gateway goes on, keeps within its
/// bounds, and hands nobody a frame in another's name.
///
/// # Panics
/// When an oracle fails.
pub fn gateway(data: &[u8]) {
    let mut gateway = Gateway::for_tests(DOCUMENT).expect("a good document");
    let own = add(&mut gateway, "own", MAC, ["10.0.2.9", "fd00::9"]);
    let other = add(&mut gateway, "other", OTHER, ["10.0.2.8", "fd00::8"]);
    let mut input = Input::new(data);
    let all = LinkNotice::GuestOffloads(Offloads {
        checksum: true,
        tso4: true,
        ..Offloads::default()
    });
    own.send(&all.encode()).expect("room");
    let mut sequence = 0;
    while !input.is_empty() {
        let frame = frame(&mut input, &mut sequence);
        // Lost when the link is full, as frames are.
        let _ = own.send(&frame);
        gateway.turn(Some(Duration::ZERO)).expect("it goes on");
        drain(&other);
        sequence = drain(&own).unwrap_or(sequence);
        assert!(gateway.buffered() <= MOST_BUFFERED, "bounded");
    }
    // The neighbour is still served.
    other.send(&arp(OTHER, [10, 0, 2, 8])).expect("room");
    for _ in 0..4 {
        gateway.turn(Some(Duration::ZERO)).expect("it goes on");
    }
    let mut answer = [0; 2048];
    let answered = std::iter::from_fn(|| {
        other
            .recv(&mut answer)
            .ok()
            .map(|len| answer[..len].to_vec())
    })
    .any(|frame| frame[HEADER + 12..HEADER + 14] == [8, 6]);
    assert!(answered, "the neighbour's question is answered");
}

fn add(gateway: &mut Gateway, name: &str, mac: [u8; 6], addresses: [&str; 2]) -> UnixDatagram {
    let (ours, theirs) = UnixDatagram::pair().expect("a pair");
    ours.set_nonblocking(true).expect("a socket");
    let addresses = addresses.map(|text| text.parse().expect("an address"));
    gateway
        .add_test_port(name, mac, &addresses, OwnedFd::from(theirs))
        .expect("a port");
    ours
}

/// Reads all frames; each must come from the gateway or a machine in its own name. Returns the
/// number that the last TCP segment acknowledges as its own next.
fn drain(socket: &UnixDatagram) -> Option<u32> {
    let mut buffer = vec![0; 70_000];
    let mut next = None;
    while let Ok(len) = socket.recv(&mut buffer) {
        let frame = &buffer[HEADER.min(len)..len];
        assert!(frame.len() >= 14, "a whole frame");
        let source = &frame[6..12];
        assert!([GATEWAY, MAC, OTHER].iter().any(|mac| mac == source));
        if frame[12..14] == [8, 0] && source == MAC {
            assert!(
                [[10, 0, 2, 9], [0; 4]]
                    .iter()
                    .any(|ip| ip[..] == frame[26..30]),
                "in its own name"
            );
        }
        if frame[12..14] == [8, 0] && frame[23] == 6 && frame.len() >= 54 {
            let number: [u8; 4] = frame[38..42].try_into().expect("four");
            next = Some(u32::from_be_bytes(number).wrapping_add(1));
        }
    }
    next
}

fn arp(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ip);
    frame.extend([0; 6]);
    frame.extend([10, 0, 2, 2]);
    frame
}

/// A frame that is good up to a layer of the input's choice, and the input's own from there on.
fn frame(input: &mut Input<'_>, sequence: &mut u32) -> Vec<u8> {
    let kind = input.u8();
    let depth = kind & 7;
    let mut frame = if kind & 8 == 0 {
        vec![0; HEADER]
    } else {
        input.bytes(HEADER).to_vec()
    };
    if depth == 0 {
        let len = usize::from(input.u8());
        frame.extend(input.bytes(len));
        return frame;
    }
    frame.extend(match input.u8() % 4 {
        0 => [0xff; 6],
        1 => OTHER,
        _ => GATEWAY,
    });
    frame.extend(if input.u8().is_multiple_of(8) {
        OTHER
    } else {
        MAC
    });
    let len = usize::from(input.u16() % 1600);
    match depth {
        1 => frame.extend(input.bytes(len.max(2))),
        2 => {
            frame.extend([8, 6]);
            frame.extend(input.bytes(28));
        }
        3 => {
            frame.extend([0x86, 0xdd]);
            v6(input, len, &mut frame);
        }
        _ => {
            frame.extend([8, 0]);
            v4(input, depth, len, sequence, &mut frame);
        }
    }
    frame
}

fn v4(input: &mut Input<'_>, depth: u8, len: usize, sequence: &mut u32, frame: &mut Vec<u8>) {
    let protocol = match depth {
        4 => input.u8(),
        5 => 17,
        _ => 6,
    };
    let mut body = Vec::new();
    match depth {
        5 => {
            let to = [53, 67, 9][usize::from(input.u8() % 3)];
            body.extend(4000_u16.to_be_bytes());
            body.extend(u16::to_be_bytes(to));
            let payload = input.bytes(len).to_vec();
            body.extend(
                u16::try_from(payload.len() + 8)
                    .expect("short")
                    .to_be_bytes(),
            );
            body.extend([0, 0]);
            body.extend(payload);
        }
        6 | 7 => {
            // To the name server by TCP; the numbers often as they should be.
            let flags = [2, 0x10, 0x18, 0x11, 4, 0x12][usize::from(input.u8() % 6)];
            let near = u32::from(input.u8() % 4);
            body.extend((4000 + u16::from(input.u8() % 8)).to_be_bytes());
            body.extend(53_u16.to_be_bytes());
            body.extend((1 + near).to_be_bytes());
            body.extend(sequence.to_be_bytes());
            body.extend([0x50, flags]);
            body.extend(input.bytes(2));
            body.extend([0; 4]);
            body.extend(input.bytes(len));
        }
        _ => body.extend(input.bytes(len)),
    }
    let total = u16::try_from(body.len() + 20).expect("short").to_be_bytes();
    frame.extend([0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend(if input.u8().is_multiple_of(8) {
        [10, 0, 2, 8]
    } else {
        [10, 0, 2, 9]
    });
    frame.extend(match input.u8() % 4 {
        0 => [192, 0, 2, 1],
        1 => [10, 0, 2, 8],
        _ => [10, 0, 2, 2],
    });
    frame.extend(body);
}

fn v6(input: &mut Input<'_>, len: usize, frame: &mut Vec<u8>) {
    let next = [58, 17, 6, 0, 43, 44, 60, 59][usize::from(input.u8() % 8)];
    let body = input.bytes(len).to_vec();
    let size = u16::try_from(body.len()).expect("short").to_be_bytes();
    frame.extend([0x60, 0, 0, 0, size[0], size[1], next, 255]);
    let mut address = [0; 16];
    address[0] = 0xfd;
    address[15] = 9;
    frame.extend(address);
    address[15] = 2;
    frame.extend(address);
    frame.extend(body);
}
