//! Host signals that generated code raises.
//!
//! The handler does as little as possible: when the program counter is in some machine's code
//! cache, it notes what happened and has the thread continue in the host-fault gate, with the
//! guest's registers as they were. All else goes to whoever handled the signal before.

// UNSAFETY: signal handlers, signal stacks and the GS base.
#![expect(unsafe_code, reason = "signal handling is a C interface")]

use std::arch::asm;
use std::io;
use std::mem::MaybeUninit;
use std::mem::offset_of;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::crash;
use crate::hot::Gate;
use crate::hot::Hot;

/// Trap number of a page fault.
pub(crate) const PAGE_TRAP: u64 = 14;
/// Stands for SIGBUS, which has no trap number of its own: the host has no page to give.
pub(crate) const BUS_ERROR: u64 = 256;

const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
const MAX_CACHES: usize = 64;
const STACK_BYTES: usize = 64 << 10;

/// Code caches of this process: start and end.
static CACHES: [(AtomicU64, AtomicU64); MAX_CACHES] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; MAX_CACHES];

/// What handled each signal before.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 4] = [const { AtomicPtr::new(ptr::null_mut()) }; 4];

/// Registration of a code cache; the handler knows it as long as this lives.
pub(crate) struct Registration(usize);

impl Registration {
    /// Registers the range and, the first time, the handlers.
    pub(crate) fn new((start, end): (u64, u64)) -> io::Result<Self> {
        install_handlers()?;
        for (slot, (known_start, known_end)) in CACHES.iter().enumerate() {
            let free = known_start.compare_exchange(0, start, Ordering::SeqCst, Ordering::SeqCst);
            if free.is_ok() {
                known_end.store(end, Ordering::SeqCst);
                return Ok(Self(slot));
            }
        }
        Err(io::Error::other("too many machines in one process"))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let (start, end) = &CACHES[self.0];
        end.store(0, Ordering::SeqCst);
        start.store(0, Ordering::SeqCst);
    }
}

fn is_translated(pc: u64) -> bool {
    CACHES
        .iter()
        .any(|(start, end)| pc >= start.load(Ordering::SeqCst) && pc < end.load(Ordering::SeqCst))
}

fn install_handlers() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| {
        for (index, &signal) in SIGNALS.iter().enumerate() {
            if let Err(error) = install_handler(index, signal) {
                result = Err(error);
            }
        }
    });
    result
}

fn install_handler(index: usize, signal: libc::c_int) -> io::Result<()> {
    let previous = Box::leak(Box::new(MaybeUninit::<libc::sigaction>::zeroed()));
    // SAFETY: zeroed `sigaction` is valid, the handler has SA_SIGINFO's signature, and the old
    // action is written to memory that lives for ever.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        if libc::sigaction(signal, &raw const action, previous.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    PREVIOUS[index].store(previous.as_mut_ptr(), Ordering::SeqCst);
    Ok(())
}

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid context to a SA_SIGINFO handler.
    let context_ref = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context_ref.uc_mcontext.gregs;
    let pc = registers[libc::REG_RIP as usize].cast_unsigned();
    if !is_translated(pc) {
        forward(signal, info, context, pc);
        return;
    }
    let number = registers[libc::REG_TRAPNO as usize].cast_unsigned();
    // A non-canonical stack address ends in SIGBUS too, with the number of its own trap.
    let trap = if signal == libc::SIGBUS && number == PAGE_TRAP {
        BUS_ERROR
    } else {
        number
    };
    // SAFETY: `info` is valid; a fault signal has an address (0 when the processor gives none).
    let address = unsafe { (*info).si_addr() } as u64;
    let gate: u64;
    // SAFETY: the program counter is in translated code, so GS leads to the vCPU's shared state.
    unsafe {
        asm!(
            "mov gs:[{pc_at}], {pc}",
            "mov gs:[{signal_at}], {trap}",
            "mov gs:[{address_at}], {address}",
            "mov {gate}, gs:[{gate_at}]",
            pc = in(reg) pc,
            trap = in(reg) trap,
            address = in(reg) address,
            gate = out(reg) gate,
            pc_at = const offset_of!(Hot, fault_pc),
            signal_at = const offset_of!(Hot, fault_signal),
            address_at = const offset_of!(Hot, fault_address),
            gate_at = const offset_of!(Hot, gates) + 8 * Gate::HostFault as usize,
            options(nostack, preserves_flags),
        );
    }
    registers[libc::REG_RIP as usize] = gate.cast_signed();
}

/// Hands a signal that isn't ours to its previous handler.
fn forward(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, pc: u64) {
    // SAFETY: `info` is valid; a fault signal has an address.
    crash::report(signal, pc, unsafe { (*info).si_addr() } as u64);
    let index = SIGNALS.iter().position(|&known| known == signal);
    let previous = index.map_or(ptr::null_mut(), |index| {
        PREVIOUS[index].load(Ordering::SeqCst)
    });
    // SAFETY: stored pointers lead to leaked `sigaction`s that the kernel filled; a handler is
    // called with the signature that its flags name. The default action is taken by restoring it
    // and letting the instruction fault again.
    unsafe {
        let handler = if previous.is_null() {
            libc::SIG_DFL
        } else {
            (*previous).sa_sigaction
        };
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &raw const default, ptr::null_mut());
            return;
        }
        if (*previous).sa_flags & libc::SA_SIGINFO != 0 {
            type Action = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            std::mem::transmute::<usize, Action>(handler)(signal, info, context);
        } else {
            type Plain = extern "C" fn(libc::c_int);
            std::mem::transmute::<usize, Plain>(handler)(signal);
        }
    }
}

/// The calling thread's readiness to run guest code: a signal stack, and asynchronous signals held
/// off, since a handler without SA_ONSTACK would write to the guest's stack address.
pub(crate) struct ThreadGuard {
    old_mask: libc::sigset_t,
    old_stack: Option<libc::stack_t>,
    _stack: Option<Box<[u8]>>,
}

impl ThreadGuard {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: plain data that the calls below fill.
        let (mut mask, mut old_mask): (libc::sigset_t, libc::sigset_t) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: valid pointers to live sets; the synchronous signals stay deliverable.
        unsafe {
            libc::sigfillset(&raw mut mask);
            for signal in SIGNALS {
                libc::sigdelset(&raw mut mask, signal);
            }
            for signal in [libc::SIGTRAP, libc::SIGSYS, libc::SIGABRT] {
                libc::sigdelset(&raw mut mask, signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, &raw mut old_mask);
        }
        let (stack, old_stack) = signal_stack()?;
        Ok(Self {
            old_mask,
            old_stack,
            _stack: stack,
        })
    }
}

/// A signal stack of our own and the one before; nothing when that is large enough.
type SignalStack = (Option<Box<[u8]>>, Option<libc::stack_t>);

/// Gives the thread a signal stack unless it has a large one already.
fn signal_stack() -> io::Result<SignalStack> {
    // SAFETY: plain data that the call fills.
    let mut old: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: a query.
    unsafe { libc::sigaltstack(ptr::null(), &raw mut old) };
    if old.ss_flags & libc::SS_DISABLE == 0 && old.ss_size >= STACK_BYTES {
        return Ok((None, None));
    }
    let mut memory = vec![0_u8; STACK_BYTES].into_boxed_slice();
    let new = libc::stack_t {
        ss_sp: memory.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: STACK_BYTES,
    };
    // SAFETY: the memory lives in the guard, which puts the old stack back before it goes.
    if unsafe { libc::sigaltstack(&raw const new, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((Some(memory), Some(old)))
}

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        // SAFETY: puts back what was there.
        unsafe {
            if let Some(old) = &self.old_stack {
                libc::sigaltstack(ptr::from_ref(old), ptr::null_mut());
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.old_mask, ptr::null_mut());
        }
    }
}

/// Sets the calling thread's GS base.
pub(crate) fn set_gs_base(base: u64, fsgsbase: bool) {
    // SAFETY: GS is unused by Rust and libc on x86-64 Linux; the kernel allows the instruction
    // where `fsgsbase` says so.
    unsafe {
        if fsgsbase {
            asm!("wrgsbase {}", in(reg) base, options(nostack, preserves_flags));
        } else {
            const ARCH_SET_GS: libc::c_int = 0x1001;
            libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base);
        }
    }
}
