//! Frames written to a file as they pass (pcap, with nanoseconds).

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::time::SystemTime;

use rustix::io::Errno;

use crate::wire::VNET_BYTES;

/// Nanosecond timestamps, this host's byte order.
const MAGIC: u32 = 0xa1b2_3c4d;
const LINKTYPE_ETHERNET: u32 = 1;
const SNAP_BYTES: usize = 262_144;
/// Bytes that wait for a slow reader.
const MAX_WAITING: usize = 4 << 20;

#[derive(Debug)]
struct Writer {
    fd: OwnedFd,
    /// The link's name; all links when `None`.
    port: Option<String>,
    waiting: Vec<u8>,
}

/// Captures under way.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    writers: Vec<Writer>,
    pub(crate) frames: u64,
    pub(crate) dropped: u64,
}

impl Capture {
    pub(crate) fn is_on(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Begins to write to `fd`.
    pub(crate) fn start(&mut self, fd: OwnedFd, port: Option<String>) -> std::io::Result<()> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        let mut header = Vec::with_capacity(24);
        header.extend(MAGIC.to_ne_bytes());
        header.extend(2_u16.to_ne_bytes());
        header.extend(4_u16.to_ne_bytes());
        header.extend([0; 8]);
        header.extend(u32::try_from(SNAP_BYTES).unwrap_or(u32::MAX).to_ne_bytes());
        header.extend(LINKTYPE_ETHERNET.to_ne_bytes());
        self.writers.push(Writer {
            fd,
            port,
            waiting: header,
        });
        Ok(())
    }

    pub(crate) fn stop(&mut self) {
        self.flush();
        self.writers.clear();
    }

    /// Adds a frame, its virtio header first.
    pub(crate) fn frame(&mut self, port: &str, parts: &[IoSlice<'_>]) {
        let len: usize = parts.iter().map(|part| part.len()).sum::<usize>() - VNET_BYTES;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let since = since.unwrap_or_default();
        let seconds = u32::try_from(since.as_secs()).unwrap_or(u32::MAX);
        let len_field = u32::try_from(len).unwrap_or(u32::MAX);
        for writer in &mut self.writers {
            if writer.port.as_deref().is_some_and(|wanted| wanted != port) {
                continue;
            }
            if writer.waiting.len() + len > MAX_WAITING {
                self.dropped += 1;
                continue;
            }
            self.frames += 1;
            for field in [seconds, since.subsec_nanos(), len_field, len_field] {
                writer.waiting.extend(field.to_ne_bytes());
            }
            let mut skip = VNET_BYTES;
            for part in parts {
                let cut = skip.min(part.len());
                writer.waiting.extend_from_slice(&part[cut..]);
                skip -= cut;
            }
        }
    }

    /// Writes what waits, as far as the readers take it.
    pub(crate) fn flush(&mut self) {
        self.writers.retain_mut(|writer| {
            while !writer.waiting.is_empty() {
                match rustix::io::write(&writer.fd, &writer.waiting) {
                    Ok(len) => drop(writer.waiting.drain(..len)),
                    Err(Errno::AGAIN) => return true,
                    Err(Errno::INTR) => {}
                    // The reader is gone or the disk is full: the capture ends.
                    Err(_) => return false,
                }
            }
            true
        });
    }
}
