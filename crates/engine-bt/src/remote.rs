//! The part of a vCPU that other threads may touch: its doorbell.

// UNSAFETY: writes the poll word through a mapping of the vCPU's shared state.
#![expect(
    unsafe_code,
    reason = "the poll pointer lies in memory shared with generated code"
)]

use std::io;
use std::os::fd::RawFd;
use std::sync::Condvar;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ringfence_engine::VcpuWaker;

use crate::counters::Counters;
use crate::hot::Hot;
use crate::mapping::Reservation;
use crate::window::Windows;

/// What a vCPU is asked to look at.
pub(crate) mod request {
    /// Return from `run`.
    pub(crate) const KICK: u32 = 1;
    /// An interrupt or APIC event waits.
    pub(crate) const EVENT: u32 = 2;
    /// Write entries are to be dropped: see [`super::Remote::revoke`].
    pub(crate) const REVOKE: u32 = 4;
    /// All translated code is about to go.
    pub(crate) const FLUSH_CODE: u32 = 8;
    /// All write entries are to be dropped: the dirty log starts a new round.
    pub(crate) const FLUSH_WRITES: u32 = 16;
    /// Leave HLT without an interrupt.
    pub(crate) const UNHALT: u32 = 32;
}

/// Requests that the poster may have to wait for.
const AWAITED: u32 = request::REVOKE | request::FLUSH_CODE | request::FLUSH_WRITES;

/// A vCPU's doorbell.
pub(crate) struct Remote {
    /// Own mapping of the vCPU's [`Hot`], so that ringing is safe at any time.
    hot: Reservation,
    /// An address that faults: what the poll pointer shows when the monitor wants in.
    closed: Reservation,
    requests: AtomicU32,
    /// Host addresses of pages whose write entries must go.
    revoked: Mutex<Vec<u64>>,
    posted: AtomicU64,
    served: AtomicU64,
    /// The vCPU may use its tables now.
    inside: AtomicBool,
    halted: AtomicBool,
    /// Where the vCPU's code runs directly right now: a descriptor of the process, or -1.
    process: AtomicI32,
    bell: Mutex<()>,
    rung: Condvar,
    /// The vCPU's counts; it alone adds to them.
    pub counters: Counters,
}

impl Remote {
    pub(crate) fn new(windows: &Windows) -> io::Result<Self> {
        let hot = Reservation::new(size_of::<Hot>() as u64)?;
        windows.map_hot(&hot)?;
        Ok(Self {
            hot,
            closed: Reservation::new(4096)?,
            requests: AtomicU32::new(0),
            revoked: Mutex::new(Vec::new()),
            posted: AtomicU64::new(0),
            served: AtomicU64::new(0),
            inside: AtomicBool::new(false),
            halted: AtomicBool::new(false),
            process: AtomicI32::new(-1),
            bell: Mutex::new(()),
            rung: Condvar::new(),
            counters: Counters::default(),
        })
    }

    fn poll(&self) -> &AtomicU64 {
        let address = self.hot.start() + std::mem::offset_of!(Hot, poll) as u64;
        // SAFETY: inside this value's own mapping, aligned, and only accessed atomically.
        unsafe { AtomicU64::from_ptr(address as *mut u64) }
    }

    /// Whether a faulting address is the closed poll.
    pub(crate) fn is_closed_poll(&self, address: u64) -> bool {
        address == self.closed.start()
    }

    /// The word for [`Hot::if_poll`], open or closed.
    pub(crate) fn if_poll(&self, closed: bool) -> u64 {
        if closed {
            self.closed.start()
        } else {
            self.hot.start() + std::mem::offset_of!(Hot, poll_word) as u64
        }
    }

    /// Lets polls pass again.
    pub(crate) fn arm(&self) {
        let word = self.hot.start() + std::mem::offset_of!(Hot, poll_word) as u64;
        self.poll().store(word, Ordering::SeqCst);
    }

    /// Posts `requests` and makes the next poll stop.
    pub(crate) fn post(&self, requests: u32) {
        self.requests.fetch_or(requests, Ordering::SeqCst);
        self.poll().store(self.closed.start(), Ordering::SeqCst);
        let process = self.process.load(Ordering::SeqCst);
        if process >= 0 {
            crate::direct::kill(process, crate::direct::KICK);
        }
        if self.halted.load(Ordering::SeqCst) {
            let _guard = self.bell.lock().unwrap_or_else(PoisonError::into_inner);
            self.rung.notify_all();
        }
    }

    /// Asks for a request to be served and returns the ticket to wait for.
    pub(crate) fn post_awaited(&self, requests: u32) -> u64 {
        // Whoever sees the ticket sees the request, too. Somebody may take the request and not yet
        // see the ticket, which would then wait for the next one: so it is posted again.
        self.requests.fetch_or(requests, Ordering::SeqCst);
        let ticket = self.posted.fetch_add(1, Ordering::SeqCst) + 1;
        self.post(requests);
        ticket
    }

    /// Asks the vCPU to drop write entries to the page at host address `host`.
    pub(crate) fn revoke(&self, host: u64) -> u64 {
        self.revoked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(host);
        self.post_awaited(request::REVOKE)
    }

    /// Ends a HLT, now or the next one.
    pub(crate) fn unhalt(&self) {
        self.post(request::UNHALT);
    }

    /// Whether a HLT that lasts is to end without an interrupt.
    pub(crate) fn is_unhalted(&self) -> bool {
        self.requests.load(Ordering::SeqCst) & request::UNHALT != 0
    }

    /// Whether a ticket is served, or needn't be because the vCPU isn't running: it will serve
    /// it before it does.
    pub(crate) fn is_served(&self, ticket: u64) -> bool {
        self.served.load(Ordering::SeqCst) >= ticket || !self.inside.load(Ordering::SeqCst)
    }

    /// Takes the pages to revoke.
    pub(crate) fn take_revoked(&self) -> Vec<u64> {
        std::mem::take(&mut *self.revoked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether something was posted.
    pub(crate) fn has_requests(&self) -> bool {
        self.requests.load(Ordering::SeqCst) != 0
    }

    /// Takes all requests and a receipt for [`Self::serve`]. Polls pass from here on.
    pub(crate) fn take(&self) -> (u32, u64) {
        // Polls first: a request posted after the exchange closes them again.
        self.arm();
        let receipt = self.posted.load(Ordering::SeqCst);
        (self.requests.swap(0, Ordering::SeqCst), receipt)
    }

    /// Takes only requests that somebody may be waiting for.
    pub(crate) fn take_awaited(&self) -> (u32, u64) {
        let receipt = self.posted.load(Ordering::SeqCst);
        let taken = self.requests.fetch_and(!AWAITED, Ordering::SeqCst);
        (taken & AWAITED, receipt)
    }

    /// Says that everything posted up to `receipt` was served.
    pub(crate) fn serve(&self, receipt: u64) {
        self.served.fetch_max(receipt, Ordering::SeqCst);
    }

    /// The vCPU's code runs in a process of its own from here on, or (-1) no longer.
    pub(crate) fn set_process(&self, process: RawFd) {
        self.process.store(process, Ordering::SeqCst);
    }

    /// The vCPU starts or stops using its tables.
    pub(crate) fn set_inside(&self, inside: bool) {
        self.inside.store(inside, Ordering::SeqCst);
    }

    /// Sleeps until something is posted, or for `limit`.
    pub(crate) fn sleep(&self, limit: Option<Duration>) {
        let mut guard = self.bell.lock().unwrap_or_else(PoisonError::into_inner);
        self.halted.store(true, Ordering::SeqCst);
        while !self.has_requests() {
            match limit {
                None => {
                    guard = self
                        .rung
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Some(limit) => {
                    let _ = self
                        .rung
                        .wait_timeout(guard, limit)
                        .unwrap_or_else(PoisonError::into_inner);
                    break;
                }
            }
        }
        self.halted.store(false, Ordering::SeqCst);
    }
}

impl VcpuWaker for Remote {
    fn wake(&self) {
        self.post(request::EVENT);
    }

    fn kick(&self) {
        self.post(request::KICK);
    }
}
