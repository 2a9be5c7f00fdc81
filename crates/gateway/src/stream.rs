//! What is done with every TCP socket of the host.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::SendFlags;

/// Sends what the socket takes now; returns how much that was. `writable` becomes false when it takes
/// no more.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], writable: &mut bool) -> Result<usize, Errno> {
    let mut done = 0;
    while *writable && done < bytes.len() {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(&socket, &bytes[done..], flags) {
            Ok(len) => done += len,
            Err(Errno::AGAIN) => *writable = false,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
