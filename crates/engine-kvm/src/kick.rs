//! Taking a vCPU out of the guest from another thread (§5, `immediate_exit`).
//!
//! A signal makes KVM_RUN return, but one that arrives just before the call is lost; the
//! `immediate_exit` byte of the shared page covers that gap. So a kick sets its flag, then the
//! byte, then sends the signal, in that order, and only while a thread is inside [`Kick::enter`].

// UNSAFETY: writes a byte that the kernel reads at any time, and sends a thread-directed signal.
#![expect(
    unsafe_code,
    reason = "the immediate_exit byte is shared with the kernel, and pthread_kill is libc's"
)]

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::Once;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::Ordering;

use ringfence_engine::EngineError;
use ringfence_engine::VcpuWaker;
use vmm_sys_util::signal::SIGRTMIN;
use vmm_sys_util::signal::register_signal_handler;

/// The signal is the first real-time one; nothing else in the process may use it.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Makes the kick's signal interrupt system calls and do nothing else.
pub(crate) fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| {
        result = register_signal_handler(kick_signal(), do_nothing);
    });
    result.map_err(|errno| EngineError::host("install the vCPU signal handler")(errno.into()))
}

/// The thread that is running the vCPU, and the byte that keeps it from entering the guest.
#[derive(Debug)]
struct Target {
    thread: libc::pthread_t,
    immediate_exit: NonNull<AtomicU8>,
}

// SAFETY: the pointer is used only under the mutex that holds the target, and the target is taken
// out of there before the page it points into goes away (see `Kick::enter`).
unsafe impl Send for Target {}

/// One vCPU's kick: shared by the vCPU and its wakers.
#[derive(Debug, Default)]
pub(crate) struct Kick {
    requested: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl Kick {
    fn target(&self) -> MutexGuard<'_, Option<Target>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers the calling thread as the one that runs the vCPU, until the guard is dropped.
    ///
    /// The caller keeps the page of `immediate_exit` mapped for as long as the guard lives.
    pub(crate) fn enter(&self, immediate_exit: NonNull<AtomicU8>) -> Entered<'_> {
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.target() = Some(Target {
            thread,
            immediate_exit,
        });
        let entered = Entered {
            kick: self,
            immediate_exit,
        };
        entered.rearm();
        entered
    }
}

impl VcpuWaker for Kick {
    fn wake(&self) {
        // The kernel's own interrupt chips wake the vCPU; without chips there is nothing to wake.
    }

    fn kick(&self) {
        self.requested.store(true, Ordering::SeqCst);
        if let Some(target) = &*self.target() {
            // SAFETY: a registered target's page is mapped (see `enter`).
            unsafe { target.immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
            // SAFETY: the thread is inside `Vcpu::run`, so it exists; the handler is installed.
            unsafe { libc::pthread_kill(target.thread, kick_signal()) };
        }
    }
}

/// Proof that the calling thread is registered with its [`Kick`].
#[derive(Debug)]
pub(crate) struct Entered<'a> {
    kick: &'a Kick,
    immediate_exit: NonNull<AtomicU8>,
}

impl Entered<'_> {
    fn byte(&self) -> &AtomicU8 {
        // SAFETY: `enter`'s caller keeps the page mapped while the guard lives.
        unsafe { self.immediate_exit.as_ref() }
    }

    /// Lets the guest be entered again, and returns whether a kick was asked for since.
    ///
    /// The byte is cleared before the flag is taken: a kick that comes between the two is
    /// reported now and costs one idle turn later, where the other order would lose it.
    pub(crate) fn take(&self) -> bool {
        self.byte().store(0, Ordering::SeqCst);
        self.kick.requested.swap(false, Ordering::SeqCst)
    }

    /// Makes the next KVM_RUN return before it enters the guest.
    pub(crate) fn hold(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    /// Ends [`Self::hold`], unless a kick waits.
    pub(crate) fn rearm(&self) {
        self.byte().store(0, Ordering::SeqCst);
        if self.kick.requested.load(Ordering::SeqCst) {
            self.hold();
        }
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        *self.kick.target() = None;
    }
}
