//! A machine's link to the network: its frames, and who it may claim to be.

use std::fs::File;
use std::io;
use std::io::IoSlice;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use ringfence_netstack::LinkNotice;
use ringfence_netstack::NetBackend;
use ringfence_netstack::Offloads;
use ringfence_netstack::Tap;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendFlags;

use crate::config::LinkKind;
use crate::config::RateConfig;
use crate::config::Subnet;
use crate::policy::Policy;
use crate::slab::Id;
use crate::wire::Mac;

/// IPv6 addresses that a machine may give itself in a shared network.
const MAX_CLAIMS: usize = 16;

/// All that crosses unsplit.
const ALL: Offloads = Offloads {
    checksum: true,
    tso4: true,
    tso6: true,
    ecn: true,
    ufo: false,
};

#[derive(Debug)]
enum Link {
    Tap(Tap),
    Socket(OwnedFd),
}

/// Traffic of one link, from the machine's point of view.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub(crate) struct PortCounters {
    pub(crate) sent_frames: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) received_frames: u64,
    pub(crate) received_bytes: u64,
    /// Frames to it for which its link had no room.
    pub(crate) dropped_frames: u64,
    /// Frames of it that name others' addresses.
    pub(crate) spoofed_frames: u64,
    /// Frames of it that are no good.
    pub(crate) malformed_frames: u64,
}

/// A bound on bytes a second.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_second: f64,
    burst: f64,
    tokens: f64,
    last: Instant,
}

impl Bucket {
    fn new(per_second: u64, burst: Option<u64>, now: Instant) -> Self {
        let number = |value: u64| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
        // At least a whole segment, or the largest never passes.
        let burst = number(burst.unwrap_or(per_second)).max(131_072.0);
        Self {
            per_second: number(per_second).max(1.0),
            burst,
            tokens: burst,
            last: now,
        }
    }

    /// How long until something may pass; zero when it may now.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.last).as_secs_f64();
        self.last = now;
        self.tokens = (self.tokens + passed * self.per_second).min(self.burst);
        if self.tokens > 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(-self.tokens / self.per_second) + Duration::from_millis(1)
    }

    fn spend(&mut self, bytes: usize) {
        self.tokens -= f64::from(u32::try_from(bytes).unwrap_or(u32::MAX));
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Done,
    /// No room now; the port tells when there is.
    Full,
    /// The link doesn't take it.
    Lost,
}

/// One link.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) name: String,
    link: Link,
    pub(crate) mac: Mac,
    /// What the network gave it.
    pub(crate) addresses: Vec<IpAddr>,
    /// What it gave itself.
    claims: Vec<Ipv6Addr>,
    pub(crate) hostname: String,
    /// Its machine's own rules.
    pub(crate) policy: Option<Policy>,
    pub(crate) offloads: Offloads,
    /// Frames may wait.
    pub(crate) readable: bool,
    pub(crate) full: bool,
    /// Connections that wait for room.
    pub(crate) waiting: Vec<Id>,
    pub(crate) counters: PortCounters,
    pub(crate) send_bucket: Option<Bucket>,
    receive_bucket: Option<Bucket>,
    /// Full by its bound, until then.
    pub(crate) throttled: Option<Instant>,
    pub(crate) gone: bool,
}

fn socket_is_packets(fd: &OwnedFd) -> io::Result<bool> {
    use rustix::net::SocketType;
    let kind = rustix::net::sockopt::socket_type(fd)?;
    Ok(kind == SocketType::SEQPACKET || kind == SocketType::DGRAM)
}

/// Asked of the host for a link's buffer.
const LINK_BUFFER: usize = 4 << 20;

impl Port {
    pub(crate) fn new(
        name: String,
        mac: Mac,
        kind: LinkKind,
        fd: OwnedFd,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let (link, offloads) = match kind {
            LinkKind::Tap => {
                let mut tap = Tap::new(vec![File::from(fd)])?;
                tap.set_guest_offloads(ALL)?;
                (Link::Tap(tap), ALL)
            }
            LinkKind::Socket => {
                if !socket_is_packets(&fd)? {
                    return Err("a link is a SOCK_SEQPACKET or SOCK_DGRAM socket".into());
                }
                rustix::io::ioctl_fionbio(&fd, true)?;
                // As much as the host allows is enough.
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(&fd, LINK_BUFFER);
                // Until the other end says what it takes.
                (Link::Socket(fd), Offloads::default())
            }
        };
        Ok(Self {
            name,
            link,
            mac,
            addresses: Vec::new(),
            claims: Vec::new(),
            hostname: String::new(),
            policy: None,
            offloads,
            readable: true,
            full: false,
            waiting: Vec::new(),
            counters: PortCounters::default(),
            send_bucket: None,
            receive_bucket: None,
            throttled: None,
            gone: false,
        })
    }

    pub(crate) fn limit(&mut self, rate: &RateConfig, now: Instant) {
        let bucket =
            |limit: Option<u64>| limit.map(|bytes| Bucket::new(bytes, rate.burst_bytes, now));
        self.send_bucket = bucket(rate.send_bytes_per_s);
        self.receive_bucket = bucket(rate.receive_bytes_per_s);
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.link {
            Link::Tap(tap) => tap.descriptor(0),
            Link::Socket(fd) => fd.as_fd(),
        }
    }

    /// The first address of a version.
    pub(crate) fn address(&self, v4: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|ip| ip.is_ipv4() == v4)
    }

    /// Whether `address` is its own; in a network of its own, whichever IPv6 address it takes, and
    /// else a few of the network's that it makes for itself (RFC 4862), unless others have them.
    pub(crate) fn may_use(
        &mut self,
        address: IpAddr,
        (alone, net): (bool, Option<Subnet<Ipv6Addr>>),
    ) -> bool {
        if self.addresses.contains(&address) {
            return true;
        }
        let IpAddr::V6(six) = address else {
            return false;
        };
        let link_local = six.segments()[0] & 0xffc0 == 0xfe80;
        if alone || six.is_unspecified() || self.claims.contains(&six) {
            return true;
        }
        let near = link_local || net.is_some_and(|net| net.has(six));
        if near && self.claims.len() < MAX_CLAIMS {
            self.claims.push(six);
            return true;
        }
        false
    }

    /// Takes back a claim that another has made before.
    pub(crate) fn give_up(&mut self, address: IpAddr) {
        self.claims.retain(|claim| IpAddr::V6(*claim) != address);
    }

    pub(crate) fn claims(&self) -> &[Ipv6Addr] {
        &self.claims
    }

    /// The next frame, or how the link is.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = match &self.link {
            Link::Tap(tap) => rustix::io::read(tap.descriptor(0), buffer),
            Link::Socket(fd) => {
                let received = rustix::net::recv(fd, buffer, RecvFlags::DONTWAIT);
                match received.map(|(len, _)| len) {
                    Ok(0) => Err(Errno::CONNRESET),
                    other => other,
                }
            }
        };
        match result {
            Ok(len) => {
                self.counters.sent_frames += 1;
                self.counters.sent_bytes += len as u64;
                if let Some(bucket) = &mut self.send_bucket {
                    bucket.spend(len);
                }
                Ok(len)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Err(Errno::AGAIN.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What its other end said.
    pub(crate) fn notice(&mut self, message: &[u8]) {
        match LinkNotice::decode(message) {
            Some(LinkNotice::GuestOffloads(offloads)) => self.offloads = offloads,
            None => self.counters.malformed_frames += 1,
        }
    }

    /// Is full when its bound says so.
    fn throttle(&mut self) {
        if let Some(bucket) = &mut self.receive_bucket {
            let now = Instant::now();
            let pause = bucket.wait(now);
            if !pause.is_zero() {
                self.full = true;
                self.throttled = Some(now + pause);
            }
        }
    }

    /// Sends a frame, its virtio header first.
    pub(crate) fn send(&mut self, parts: &[IoSlice<'_>]) -> Sent {
        self.throttle();
        if self.full {
            self.counters.dropped_frames += 1;
            return Sent::Full;
        }
        let result = match &self.link {
            Link::Tap(tap) => rustix::io::writev(tap.descriptor(0), parts),
            Link::Socket(fd) => rustix::net::sendmsg(
                fd,
                parts,
                &mut SendAncillaryBuffer::default(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ),
        };
        match result {
            Ok(len) => {
                self.counters.received_frames += 1;
                self.counters.received_bytes += len as u64;
                if let Some(bucket) = &mut self.receive_bucket {
                    bucket.spend(len);
                }
                Sent::Done
            }
            Err(Errno::AGAIN | Errno::NOBUFS) => {
                self.counters.dropped_frames += 1;
                self.full = true;
                Sent::Full
            }
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::BADFD) => {
                self.gone = true;
                Sent::Lost
            }
            Err(_) => {
                self.counters.dropped_frames += 1;
                Sent::Lost
            }
        }
    }
}
