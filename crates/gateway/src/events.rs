//! What is watched, and which part of the gateway an event is for.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use rustix::event::Timespec;
use rustix::event::epoll;
use rustix::event::epoll::EventData;
use rustix::event::epoll::EventFlags;

use crate::slab::Id;

/// Who an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Link,
    Tcp,
    Udp,
    Ping,
    /// A name server outside.
    Resolver,
    /// A guest's TCP connection to our name server.
    NameStream,
    TcpPublish,
    UdpPublish,
    ControlListener,
    Control,
    /// Where the host's kernel leads connections that are to be looked at.
    RelayListener,
    /// The guest's side of one.
    RelayNear,
    /// The other side.
    RelayFar,
}

const SOURCES: [Source; 13] = [
    Source::Link,
    Source::Tcp,
    Source::Udp,
    Source::Ping,
    Source::Resolver,
    Source::NameStream,
    Source::TcpPublish,
    Source::UdpPublish,
    Source::ControlListener,
    Source::Control,
    Source::RelayListener,
    Source::RelayNear,
    Source::RelayFar,
];

fn encode(source: Source, id: Id) -> u64 {
    (source as u64) << 56 | u64::from(id.generation) << 32 | u64::from(id.index)
}

fn decode(token: u64) -> Option<(Source, Id)> {
    let source = SOURCES.get(usize::from(token.to_be_bytes()[0]))?;
    let [_, a, b, c, d, e, f, g] = token.to_be_bytes();
    let id = Id {
        generation: u32::from_be_bytes([0, a, b, c]),
        index: u32::from_be_bytes([d, e, f, g]),
    };
    Some((*source, id))
}

/// One event.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) source: Source,
    pub(crate) id: Id,
    pub(crate) flags: EventFlags,
}

/// The set of watched descriptors.
pub(crate) struct Events {
    epoll: OwnedFd,
    buffer: Vec<epoll::Event>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// Events in one turn.
const BATCH: usize = 256;

impl Events {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            buffer: Vec::with_capacity(BATCH),
        })
    }

    fn add(&self, fd: impl AsFd, source: Source, id: Id, flags: EventFlags) -> io::Result<()> {
        let data = EventData::new_u64(encode(source, id));
        Ok(epoll::add(&self.epoll, fd, data, flags)?)
    }

    /// Reports each change to readable, writable or hung up, once.
    pub(crate) fn watch_edges(&self, fd: impl AsFd, source: Source, id: Id) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.add(fd, source, id, flags)
    }

    /// Reports while it is readable.
    pub(crate) fn watch_readable(&self, fd: impl AsFd, source: Source, id: Id) -> io::Result<()> {
        self.add(fd, source, id, EventFlags::IN)
    }

    pub(crate) fn forget(&self, fd: impl AsFd) {
        // It may be gone already.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits for events, `None` without end.
    pub(crate) fn wait(&mut self, timeout: Option<std::time::Duration>) -> io::Result<Vec<Event>> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        self.buffer.clear();
        let buffer = rustix::buffer::spare_capacity(&mut self.buffer);
        match epoll::wait(&self.epoll, buffer, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = self.buffer.iter().filter_map(|event| {
            let data = event.data;
            let (source, id) = decode(data.u64())?;
            Some(Event {
                source,
                id,
                flags: event.flags,
            })
        });
        Ok(events.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip() {
        for (number, &source) in SOURCES.iter().enumerate() {
            assert_eq!(source as usize, number);
            let id = Id {
                index: 0x1234_5678,
                generation: 0x00ab_cdef,
            };
            assert_eq!(decode(encode(source, id)), Some((source, id)));
        }
        assert_eq!(decode(u64::MAX), None);
    }
}
