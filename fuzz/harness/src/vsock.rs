//! The socket device.

use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;

use ringfence_virtio::vsock::HOST_CID;
use ringfence_virtio::vsock::Handout;
use ringfence_virtio::vsock::Header;
use ringfence_virtio::vsock::Vsock;
use ringfence_virtio::vsock::VsockConfig;
use rustix::net::AddressFamily;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::socketpair;

use crate::script;
use crate::script::Input;
use crate::script::Request;

const CID: u32 = 3;
/// Host programs at a time.
const MAX_STREAMS: usize = 16;

/// The socket device with host programs that come, talk and go.
///
/// # Panics
/// When an oracle fails.
pub fn vsock(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).expect("a listener");
    let (_handouts, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .expect("a pair");
    let device = Vsock::new(VsockConfig {
        guest_cid: CID,
        listener: Some(listener),
        handout: Some(Handout::new(theirs)),
    });
    let device = Box::new(device.expect("a device"));
    let mut streams: Vec<UnixStream> = Vec::new();
    script::run(data, device, packet, &mut |input, driver| {
        talk(input, &path, &mut streams);
        driver.run();
    });
}

fn talk(input: &mut Input<'_>, path: &std::path::Path, streams: &mut Vec<UnixStream>) {
    match input.u8() % 4 {
        0 if streams.len() < MAX_STREAMS => {
            let Ok(mut stream) = UnixStream::connect(path) else {
                return;
            };
            stream.set_nonblocking(true).expect("a socket");
            // A refused program finds its end closed.
            let _ = writeln!(stream, "CONNECT {}", input.u8() % 4);
            streams.push(stream);
        }
        1 => {
            if !streams.is_empty() {
                streams.swap_remove(input.below(streams.len()));
            }
        }
        _ => {
            for stream in streams.iter_mut() {
                let _ = stream.write(input.bytes(8));
                let _ = stream.read(&mut [0; 4096]);
            }
        }
    }
}

fn packet(input: &mut Input<'_>) -> (u16, Request) {
    let queue = input.u16() % 3;
    if queue != 1 {
        return (queue, (Vec::new(), vec![44, input.len() % 8192]));
    }
    let len = usize::from(input.u8());
    let liar = input.u8().is_multiple_of(8);
    let header = Header {
        source_cid: if liar { input.u64() } else { u64::from(CID) },
        destination_cid: HOST_CID,
        source_port: u32::from(input.u8() % 4),
        // Host ports of accepted programs count up from 2^30.
        destination_port: (1 << 30) * u32::from(input.u8() % 2) + u32::from(input.u8() % 8),
        len: if liar {
            input.u32()
        } else {
            u32::try_from(len).unwrap_or(0)
        },
        kind: 1 + u16::from(liar),
        op: u16::from(input.u8() % 9),
        flags: u32::from(input.u8() % 4),
        buffer: input.u32(),
        forwarded: input.u32(),
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend(vec![7; len]);
    (queue, (bytes, Vec::new()))
}
