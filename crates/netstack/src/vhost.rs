//! vhost-net: the host's kernel moves frames between a TAP device and a guest's rings
//! (`linux/vhost.h`, `drivers/vhost/net.c`).
//!
//! Opened by whoever starts the machine; here it arrives as a descriptor, one a queue pair.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::RawFd;

use ringfence_memory::GuestAddress;
use ringfence_memory::GuestMemory;
use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::GuestMemoryRegion;
use ringfence_memory::MemoryRegionAddress;
use ringfence_memory::UnheardWriter;

use crate::LentRing;

/// ioctl requests.
const VHOST_GET_FEATURES: libc::Ioctl = 0x8008_af00;
const VHOST_SET_FEATURES: libc::Ioctl = 0x4008_af00;
const VHOST_SET_OWNER: libc::Ioctl = 0xaf01;
const VHOST_SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const VHOST_SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const VHOST_SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const VHOST_SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const VHOST_GET_VRING_BASE: libc::Ioctl = 0xc008_af12;
const VHOST_SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const VHOST_SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const VHOST_SET_VRING_ERR: libc::Ioctl = 0x4008_af22;
const VHOST_NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// Features that the rings and headers of a guest may have (virtio 1.2 §6, §5.1.3): one that
/// vhost-net doesn't know it can't serve.
const FEATURES: u64 = 1 << 15 // VIRTIO_NET_F_MRG_RXBUF
    | 1 << 28 // VIRTIO_F_INDIRECT_DESC
    | 1 << 29 // VIRTIO_F_EVENT_IDX
    | 1 << 32; // VIRTIO_F_VERSION_1

/// In place of a link's descriptor.
const NOBODY: RawFd = -1;

/// Runs of guest memory: below and above the hole of a PC.
const REGIONS: usize = 2;

/// `struct vhost_memory` with its regions.
#[repr(C)]
#[derive(Default)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [Region; REGIONS],
}

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    guest: u64,
    len_bytes: u64,
    user: u64,
    flags: u64,
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct VringAddress {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// What a request reads or writes.
///
/// # Safety
/// The type is the one that `linux/vhost.h` names for the requests, and any bytes are one.
unsafe trait Argument {
    const REQUESTS: &'static [libc::Ioctl];
}

// SAFETY: as `linux/vhost.h` has it, and made of numbers only; the same for those below.
unsafe impl Argument for u64 {
    const REQUESTS: &'static [libc::Ioctl] = &[VHOST_GET_FEATURES, VHOST_SET_FEATURES];
}
// SAFETY: as above; the kernel reads as many regions as it counts, which are there.
unsafe impl Argument for MemoryTable {
    const REQUESTS: &'static [libc::Ioctl] = &[VHOST_SET_MEM_TABLE];
}
// SAFETY: as above.
unsafe impl Argument for VringState {
    const REQUESTS: &'static [libc::Ioctl] = &[
        VHOST_SET_VRING_NUM,
        VHOST_SET_VRING_BASE,
        VHOST_GET_VRING_BASE,
    ];
}
// SAFETY: as above.
unsafe impl Argument for VringAddress {
    const REQUESTS: &'static [libc::Ioctl] = &[VHOST_SET_VRING_ADDR];
}
// SAFETY: as above; the kernel takes its own hold on the descriptor.
unsafe impl Argument for VringFile {
    const REQUESTS: &'static [libc::Ioctl] = &[
        VHOST_SET_VRING_KICK,
        VHOST_SET_VRING_CALL,
        VHOST_SET_VRING_ERR,
        VHOST_NET_SET_BACKEND,
    ];
}

/// One vhost-net instance, for one queue pair.
#[derive(Debug)]
pub(crate) struct Vhost {
    file: File,
    memory: GuestMemory,
    /// While it runs.
    right: Option<UnheardWriter>,
}

impl Vhost {
    /// Takes the instance into possession, and shows it the machine's memory.
    pub(crate) fn new(file: File, memory: &GuestMemory) -> io::Result<Self> {
        let new = Self {
            file,
            memory: memory.clone(),
            right: None,
        };
        let mut known = 0;
        new.call(VHOST_GET_FEATURES, &mut known)?;
        if known & FEATURES != FEATURES {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // SAFETY: VHOST_SET_OWNER takes no argument. From here on the kernel reaches this
        // process's memory, at the addresses that it's given alone.
        check(unsafe { libc::ioctl(new.file.as_raw_fd(), VHOST_SET_OWNER) })?;
        let mut table = memory_table(memory)?;
        new.call(VHOST_SET_MEM_TABLE, &mut table)?;
        Ok(new)
    }

    /// See [`FrameMover::start`](crate::FrameMover::start).
    pub(crate) fn start(
        &mut self,
        tap: BorrowedFd<'_>,
        features: u64,
        rings: [LentRing<'_>; 2],
    ) -> io::Result<()> {
        self.right = Some(UnheardWriter::admit(&self.memory).map_err(io::Error::other)?);
        let result = self.try_start(tap, features, &rings);
        if result.is_err() {
            self.halt();
        }
        result
    }

    fn try_start(
        &self,
        tap: BorrowedFd<'_>,
        features: u64,
        rings: &[LentRing<'_>; 2],
    ) -> io::Result<()> {
        self.call(VHOST_SET_FEATURES, &mut (features & FEATURES))?;
        for (index, ring) in (0..).zip(rings) {
            self.set_up(index, ring)?;
        }
        for index in [0, 1] {
            self.file_call(VHOST_NET_SET_BACKEND, index, tap.as_raw_fd())?;
        }
        Ok(())
    }

    fn set_up(&self, index: u32, ring: &LentRing<'_>) -> io::Result<()> {
        let state = |value: u16| VringState {
            index,
            value: u32::from(value),
        };
        self.call(VHOST_SET_VRING_NUM, &mut state(ring.size))?;
        self.call(VHOST_SET_VRING_BASE, &mut state(ring.next))?;
        let size = usize::from(ring.size);
        let mut address = VringAddress {
            index,
            flags: 0,
            // The sizes of §2.7, with the event index.
            descriptors: self.user(ring.descriptors, 16 * size)?,
            used: self.user(ring.device, 6 + 8 * size)?,
            available: self.user(ring.driver, 6 + 2 * size)?,
            log: 0,
        };
        self.call(VHOST_SET_VRING_ADDR, &mut address)?;
        for (request, fd) in [
            (VHOST_SET_VRING_ERR, ring.broken),
            (VHOST_SET_VRING_CALL, ring.call),
            (VHOST_SET_VRING_KICK, ring.kick),
        ] {
            self.file_call(request, index, fd.as_raw_fd())?;
        }
        Ok(())
    }

    /// Where guest memory is in this process.
    fn user(&self, start: GuestAddress, len_bytes: usize) -> io::Result<u64> {
        let slice = self.memory.get_slice(start, len_bytes);
        let slice = slice.map_err(io::Error::other)?;
        Ok(slice.ptr_guard_mut().as_ptr().expose_provenance() as u64)
    }

    /// See [`FrameMover::stop`](crate::FrameMover::stop). `None` when only the end of the instance
    /// ends it.
    pub(crate) fn stop(&mut self) -> Option<io::Result<[u16; 2]>> {
        if !self.halt() {
            return None;
        }
        Some(self.positions())
    }

    fn positions(&self) -> io::Result<[u16; 2]> {
        let mut positions = [0; 2];
        for (index, position) in (0..).zip(&mut positions) {
            let mut state = VringState { index, value: 0 };
            self.call(VHOST_GET_VRING_BASE, &mut state)?;
            *position = u16::try_from(state.value & 0xffff).unwrap_or(0);
        }
        Ok(positions)
    }

    /// Takes the link away, which waits for what is on its way: the rings rest. Whether it did.
    fn halt(&mut self) -> bool {
        let both = [0, 1].map(|index| self.file_call(VHOST_NET_SET_BACKEND, index, NOBODY));
        let halted = both.iter().all(Result::is_ok);
        if halted {
            self.right = None;
        }
        halted
    }

    fn file_call(&self, request: libc::Ioctl, index: u32, fd: RawFd) -> io::Result<()> {
        self.call(request, &mut VringFile { index, fd })
    }

    fn call<T: Argument>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        if !T::REQUESTS.contains(&request) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the request reads or writes one `T`, which lives during the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), request, &raw mut *argument) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn memory_table(memory: &GuestMemory) -> io::Result<MemoryTable> {
    let mut table = MemoryTable::default();
    for region in memory.iter() {
        let index = usize::try_from(table.count).unwrap_or(REGIONS);
        let place = table.regions.get_mut(index);
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        let user = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(io::Error::other)?;
        *place = Region {
            guest: region.start_addr().0,
            len_bytes: region.len(),
            user: user.expose_provenance() as u64,
            flags: 0,
        };
        table.count += 1;
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ringfence_memory::Bytes;
    use ringfence_memory::GuestRam;
    use ringfence_memory::HugePages;
    use ringfence_memory::MMIO_HOLE_END;
    use ringfence_memory::MMIO_HOLE_START;
    use rustix::event::PollFd;
    use rustix::event::PollFlags;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::NetBackend;
    use crate::Tap;
    use crate::tap::tests::FLAGS;
    use crate::tap::tests::in_own_network;
    use crate::tap::tests::open_tap;
    use crate::tap::tests::set_up;

    /// Where a test's ring lies.
    const RING: u64 = 0x4000;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const FRAME: u64 = 0x1_0000;
    const FRAME_BYTES: u32 = 12 + 60;

    #[test]
    fn the_kernel_is_shown_all_of_guest_memory_and_nothing_else() {
        let ram = GuestRam::new(MMIO_HOLE_START + 0x5000, HugePages::Off).expect("ram");
        let table = memory_table(ram.memory()).expect("two runs");
        assert_eq!(table.count, 2);
        let runs = table
            .regions
            .map(|region| (region.guest, region.len_bytes, region.flags));
        let expected = [(0, MMIO_HOLE_START, 0), (MMIO_HOLE_END, 0x5000, 0)];
        assert_eq!(runs, expected);
        assert!(table.regions.iter().all(|region| region.user % 4096 == 0));
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let null = File::open("/dev/null").expect("/dev/null");
        let refused = Vhost::new(null, ram.memory()).expect_err("no vhost");
        assert_eq!(refused.raw_os_error(), Some(libc::ENOTTY));
    }

    #[test]
    fn a_request_takes_its_own_argument_alone() {
        let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
        let vhost = Vhost {
            file: File::open("/dev/null").expect("/dev/null"),
            memory: ram.memory().clone(),
            right: None,
        };
        let wrong = vhost.call(VHOST_SET_MEM_TABLE, &mut 0_u64);
        let wrong = wrong.expect_err("another type");
        assert_eq!(wrong.kind(), io::ErrorKind::InvalidInput);
    }

    /// Makes the buffer at `address` available as entry `index` of the ring at `start`.
    fn offer(ram: &GuestRam, start: u64, index: u16, address: u64) {
        let memory = ram.memory();
        let descriptor = start + 16 * u64::from(index);
        let words = [address.to_le_bytes(), u64::from(FRAME_BYTES).to_le_bytes()];
        memory
            .write_slice(&words.concat(), GuestAddress(descriptor))
            .expect("ram");
        let entry = GuestAddress(start + AVAILABLE + 4 + 2 * u64::from(index));
        memory.write_obj(index.to_le(), entry).expect("ram");
        let next = GuestAddress(start + AVAILABLE + 2);
        memory.write_obj((index + 1).to_le(), next).expect("ram");
    }

    fn rings(signal: bool, event: &EventFd) -> bool {
        // SAFETY: the event outlives the call.
        let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let mut polled = [PollFd::new(&event, PollFlags::IN)];
        let patience = if signal { 10_000 } else { 0 };
        let patience = rustix::event::Timespec::try_from(Duration::from_millis(patience));
        rustix::event::poll(&mut polled, patience.ok().as_ref()).expect("a poll") > 0
    }

    #[test]
    fn a_frame_is_sent_by_the_kernel_and_a_broken_ring_is_told() {
        in_own_network(|| {
            let options = File::options().read(true).write(true).clone();
            let Ok(file) = options.open("/dev/vhost-net") else {
                eprintln!("not run: this host has no vhost-net");
                return;
            };
            let ram = GuestRam::new(1 << 20, HugePages::Off).expect("ram");
            let mut tap = Tap::new(vec![open_tap(b"tapv", FLAGS)]).expect("a TAP device");
            set_up(b"tapv");
            tap.set_vhost(vec![file], ram.memory()).expect("vhost-net");
            let event = || EventFd::new(EFD_NONBLOCK).expect("an event");
            let (kick, call, broken) = (event(), event(), event());
            let ring = |start, next| LentRing {
                size: 64,
                descriptors: GuestAddress(start),
                driver: GuestAddress(start + AVAILABLE),
                device: GuestAddress(start + USED),
                next,
                kick: &kick,
                call: &call,
                broken: &broken,
            };
            let mover = tap.mover().expect("a mover");
            let lent = [ring(0, 0), ring(RING, 0)];
            mover.start(0, FEATURES, lent).expect("started");
            ram.set_logging(true).expect_err("nobody hears the kernel");
            offer(&ram, RING, 0, FRAME);
            kick.write(1).expect("a doorbell");
            assert!(rings(true, &call), "the frame is gone");
            assert!(!rings(false, &broken));
            offer(&ram, RING, 1, 1 << 40);
            kick.write(1).expect("a doorbell");
            assert!(rings(true, &broken), "a buffer outside memory");
            assert_eq!(mover.stop(0).expect("positions"), [0, 1]);
            ram.set_logging(true).expect("nobody writes unheard");
            mover.start(0, FEATURES, lent).expect_err("all is logged");
            let devices = std::fs::read_to_string("/proc/thread-self/net/dev").expect("links");
            let line = devices.lines().find(|line| line.contains("tapv"));
            let received = line.and_then(|line| line.split_whitespace().nth(2));
            assert_eq!(received, Some("1"), "{devices}");
        });
    }
}
