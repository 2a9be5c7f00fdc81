//! TAP devices (Linux `Documentation/networking/tuntap.rst`).
//!
//! Made and attached by whoever starts the machine; here they arrive as descriptors, one a queue,
//! with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` (and `IFF_MULTI_QUEUE` for several).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use ringfence_memory::GuestMemory;
use ringfence_memory::vectored;
use ringfence_memory::vectored::GuestSlice;

use crate::FrameMover;
use crate::HEADER_BYTES;
use crate::LentRing;
use crate::NetBackend;
use crate::Offloads;
use crate::vhost::Vhost;

/// ioctl requests (`linux/if_tun.h`).
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;

/// TUNSETOFFLOAD bits.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;
const TUN_F_UFO: libc::c_uint = 0x10;

/// Why a TAP descriptor can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No descriptors.
    #[error("a network card needs at least one TAP descriptor")]
    None,
    /// Not a TAP device.
    #[error("descriptor {index} of the network card is not an attached TAP device")]
    NotTap {
        /// Which one.
        index: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// It was attached with other flags.
    #[error(
        "TAP device {name:?} must be attached with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR (and \
         IFF_MULTI_QUEUE for several queues)"
    )]
    Flags {
        /// Its name.
        name: String,
    },
    /// An ioctl failed.
    #[error("cannot {action} of TAP device {name:?}")]
    Setup {
        /// What was attempted.
        action: &'static str,
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A TAP device.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<File>,
    active: u16,
    has_ufo: bool,
    name: String,
    /// The kernel's own movers of frames, one a queue, or none.
    vhost: Vec<Option<Vhost>>,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid one: it holds numbers only.
    unsafe { std::mem::zeroed() }
}

fn set_offload(file: &File, bits: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

fn set_header_size(file: &File) -> io::Result<()> {
    let size = libc::c_int::try_from(HEADER_BYTES).unwrap_or(12);
    // SAFETY: TUNSETVNETHDRSZ reads one int, which lives during the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
}

/// The device's name and flags.
fn interface(file: &File) -> io::Result<(String, libc::c_int)> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF fills one ifreq, which lives during the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|&byte| byte.to_ne_bytes()[0])
        .take_while(|&byte| byte != 0)
        .collect();
    // SAFETY: TUNGETIFF fills the union's flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let flags = libc::c_int::from(u16::from_ne_bytes(flags.to_ne_bytes()));
    Ok((String::from_utf8_lossy(&name).into_owned(), flags))
}

fn attach(file: &File, on: bool) -> io::Result<()> {
    let flag = if on {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    let mut request = empty_request();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or(0);
    // SAFETY: TUNSETQUEUE reads one ifreq, which lives during the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, &raw const request) })
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: fcntl with F_GETFL and F_SETFL takes and returns numbers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    check(flags)?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

impl Tap {
    /// The device whose queues `files` are.
    ///
    /// # Errors
    /// [`TapError`] when they aren't one TAP device's, attached as they must be.
    pub fn new(files: Vec<File>) -> Result<Self, TapError> {
        let mut first: Option<String> = None;
        for (index, file) in files.iter().enumerate() {
            let (name, flags) =
                interface(file).map_err(|source| TapError::NotTap { index, source })?;
            let mut wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            if files.len() > 1 {
                wanted |= libc::IFF_MULTI_QUEUE;
            }
            let same = first.get_or_insert_with(|| name.clone()) == &name;
            if flags & wanted != wanted || !same {
                return Err(TapError::Flags { name });
            }
        }
        let name = first.ok_or(TapError::None)?;
        let mut new = Self {
            active: u16::try_from(files.len()).unwrap_or(u16::MAX),
            queues: files,
            has_ufo: true,
            name,
            vhost: Vec::new(),
        };
        new.set_up()?;
        Ok(new)
    }

    fn set_up(&mut self) -> Result<(), TapError> {
        let failed = |action| {
            let name = self.name.clone();
            move |source| TapError::Setup {
                action,
                name,
                source,
            }
        };
        for file in &self.queues {
            set_header_size(file).map_err(failed("set the header size"))?;
            set_nonblocking(file).map_err(failed("change the mode"))?;
        }
        let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        let Some(file) = self.queues.first() else {
            return Err(TapError::None);
        };
        self.has_ufo = set_offload(file, all | TUN_F_UFO).is_ok();
        // Nothing until the guest agrees.
        set_offload(file, 0).map_err(failed("set the offloads"))
    }

    /// Leaves the moving of frames to vhost-net's instances `files`, one a queue.
    ///
    /// # Errors
    /// When there is another number of them, they are something else, or know less than a guest
    /// may agree on; frames are moved by this process then.
    pub fn set_vhost(&mut self, files: Vec<File>, memory: &GuestMemory) -> io::Result<()> {
        if files.len() != self.queues.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let made = files.into_iter().map(|file| Vhost::new(file, memory));
        self.vhost = made.map(|made| made.map(Some)).collect::<io::Result<_>>()?;
        Ok(())
    }

    fn queue(&self, queue: u16) -> &File {
        // The card asks only for queues that there are; the first stands in for others.
        self.queues
            .get(usize::from(queue))
            .unwrap_or(&self.queues[0])
    }
}

impl NetBackend for Tap {
    fn queues(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: self.has_ufo,
        }
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut bits = 0;
        // The kernel takes segmentation only with checksums.
        if offloads.checksum {
            bits |= TUN_F_CSUM;
            for (on, bit) in [
                (offloads.tso4, TUN_F_TSO4),
                (offloads.tso6, TUN_F_TSO6),
                (
                    offloads.ecn && (offloads.tso4 || offloads.tso6),
                    TUN_F_TSO_ECN,
                ),
                (offloads.ufo, TUN_F_UFO),
            ] {
                bits |= if on { bit } else { 0 };
            }
        }
        // The offloads are the device's, whichever queue names it.
        set_offload(&self.queues[0], bits)
    }

    fn set_active_queues(&mut self, queues: u16) -> io::Result<()> {
        let wanted = queues.clamp(1, self.queues());
        while self.active < wanted {
            attach(self.queue(self.active), true)?;
            self.active += 1;
        }
        while self.active > wanted {
            attach(self.queue(self.active - 1), false)?;
            self.active -= 1;
        }
        Ok(())
    }

    fn descriptor(&self, queue: u16) -> BorrowedFd<'_> {
        self.queue(queue).as_fd()
    }

    fn receive(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<usize> {
        vectored::read(self.descriptor(queue), slices)
    }

    fn send(&mut self, queue: u16, slices: &[GuestSlice<'_>]) -> io::Result<()> {
        vectored::write(self.descriptor(queue), slices).map(drop)
    }

    fn mover(&mut self) -> Option<&mut dyn FrameMover> {
        (!self.vhost.is_empty()).then_some(self)
    }
}

impl FrameMover for Tap {
    fn start(&mut self, pair: u16, features: u64, rings: [LentRing<'_>; 2]) -> io::Result<()> {
        let index = usize::from(pair);
        let (Some(queue), Some(Some(vhost))) = (self.queues.get(index), self.vhost.get_mut(index))
        else {
            return Err(io::ErrorKind::NotFound.into());
        };
        vhost.start(queue.as_fd(), features, rings)
    }

    fn stop(&mut self, pair: u16) -> io::Result<[u16; 2]> {
        let place = self.vhost.get_mut(usize::from(pair));
        let place = place.ok_or(io::ErrorKind::NotFound)?;
        let vhost = place.as_mut().ok_or(io::ErrorKind::NotFound)?;
        vhost.stop().unwrap_or_else(|| {
            // What doesn't let go of the link is closed, which ends it for good.
            *place = None;
            Err(io::ErrorKind::BrokenPipe.into())
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::OpenOptions;
    use std::net::UdpSocket;

    use ringfence_memory::GuestAddress;
    use ringfence_memory::GuestMemoryBackend;
    use ringfence_memory::GuestRam;
    use ringfence_memory::HugePages;
    use rustix::thread::UnshareFlags;

    use super::*;

    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

    pub(crate) fn open_tap(name: &[u8], flags: libc::c_int) -> File {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .expect("/dev/net/tun");
        let mut request = empty_request();
        for (to, &from) in request.ifr_name.iter_mut().zip(name) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("16 bits");
        // SAFETY: TUNSETIFF reads one ifreq, which lives during the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw const request) })
            .expect("an attached device");
        file
    }

    pub(crate) fn set_up(name: &[u8]) {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        let mut request = empty_request();
        for (to, &from) in request.ifr_name.iter_mut().zip(name) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).expect("16 bits");
        let fd = socket.as_raw_fd();
        // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives during the call.
        check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw const request) }).expect("a link");
    }

    /// Runs `body` in a network of its own. Says so and does nothing where that isn't allowed.
    pub(crate) fn in_own_network(body: fn()) {
        let thread = std::thread::spawn(move || {
            #[expect(
                deprecated,
                reason = "only the network namespace of this thread changes"
            )]
            let own = rustix::thread::unshare(UnshareFlags::NEWNET);
            if own.is_err() {
                eprintln!("not run: making a network namespace needs root");
                return;
            }
            body();
        });
        thread.join().expect("the body passes");
    }

    pub(crate) const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

    #[test]
    fn offloads_and_queues_are_switched() {
        in_own_network(|| {
            let multi = FLAGS | libc::IFF_MULTI_QUEUE;
            let files = (0..3).map(|_| open_tap(b"tap0", multi)).collect();
            let mut tap = Tap::new(files).expect("a TAP device");
            assert_eq!(tap.queues(), 3);
            tap.set_guest_offloads(tap.offloads()).expect("all");
            tap.set_guest_offloads(Offloads::default()).expect("none");
            tap.set_active_queues(1).expect("detached");
            tap.set_active_queues(3).expect("attached");
            tap.set_active_queues(99).expect("as many as there are");
            let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
            let slice = ram.memory().get_slice(GuestAddress(0), 100).expect("ram");
            let empty = tap.receive(0, &[slice]).expect_err("nothing came");
            assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        });
    }

    #[test]
    fn descriptors_that_are_not_taps_or_attached_otherwise_are_refused() {
        assert!(matches!(Tap::new(Vec::new()), Err(TapError::None)));
        let null = File::open("/dev/null").expect("/dev/null");
        let refused = Tap::new(vec![null]);
        assert!(matches!(refused, Err(TapError::NotTap { index: 0, .. })));
        in_own_network(|| {
            let plain = open_tap(b"tap1", libc::IFF_TAP | libc::IFF_NO_PI);
            let refused = Tap::new(vec![plain]).expect_err("no header");
            assert!(refused.to_string().contains("\"tap1\""), "{refused}");
            let two = ["tap2", "tap3"].map(|name| open_tap(name.as_bytes(), FLAGS));
            assert!(matches!(Tap::new(two.into()), Err(TapError::Flags { .. })));
        });
    }
}
