//! Cases run by the host's processor, in a child process.
//!
//! Each case ends in a signal: its `int3`, or whatever exception came before. The handler notes the
//! interrupted state and replaces it by the next case's first one, so that returning from the
//! handler starts that case. Between batches the handler waits on a pipe.

// UNSAFETY: a child process that runs random code, signal frames.
#![expect(unsafe_code, reason = "runs random code natively")]

use std::arch::naked_asm;
use std::io;
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use crate::layout::ARENA_BYTES;
use crate::layout::Access;
use crate::layout::PAGE_BYTES;
use crate::layout::pages;
use crate::state::MAX_CASES;
use crate::state::State;
use crate::state::XSAVE_BYTES;
use crate::state::XSTATE_BV;

const STACK_BYTES: usize = 64 << 10;
/// Reported as the exception when a case doesn't end.
pub const TIMEOUT: u64 = 1000;
/// Reported as the exception when a case, by chance, makes a system call.
pub const SYSTEM_CALL: u64 = 1001;

/// What parent and child share.
#[repr(C)]
struct Shared {
    count: usize,
    inputs: [State; MAX_CASES],
    outputs: [State; MAX_CASES],
}

/// The child's own data, reached from its signal handler.
static SHARED: AtomicU64 = AtomicU64::new(0);
static NEXT: AtomicUsize = AtomicUsize::new(usize::MAX);
static COMMANDS: AtomicI32 = AtomicI32::new(-1);
static ANSWERS: AtomicI32 = AtomicI32::new(-1);
static HOST_FS: AtomicU64 = AtomicU64::new(0);
static FS_BASE: AtomicU64 = AtomicU64::new(0);
static GS_BASE: AtomicU64 = AtomicU64::new(0);

/// The child.
pub struct Native {
    child: libc::pid_t,
    shared: *mut Shared,
    arena: *mut u8,
    commands: libc::c_int,
    answers: libc::c_int,
}

// SAFETY: the pointers lead to shared mappings that this value alone uses.
unsafe impl Send for Native {}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Shared memory that a child inherits.
fn shared_memory(bytes: usize, fd: libc::c_int) -> io::Result<*mut u8> {
    let flags = if fd < 0 {
        libc::MAP_SHARED | libc::MAP_ANONYMOUS
    } else {
        libc::MAP_SHARED
    };
    // SAFETY: a new mapping where the kernel likes.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(start.cast())
}

fn pipe() -> io::Result<[libc::c_int; 2]> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok(ends)
}

impl Native {
    /// Starts the child.
    ///
    /// # Errors
    /// When the host refuses memory, a pipe or a process.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a name without zero bytes.
        let file = check(unsafe { libc::memfd_create(c"arena".as_ptr(), libc::MFD_CLOEXEC) })?;
        // SAFETY: our own descriptor.
        check(unsafe { libc::ftruncate(file, i64::try_from(ARENA_BYTES).unwrap_or(0)) })?;
        let arena = shared_memory(ARENA_BYTES, file)?;
        let shared = shared_memory(size_of::<Shared>(), -1)?.cast::<Shared>();
        let stack = shared_memory(STACK_BYTES, -1)?;
        let (commands, answers) = (pipe()?, pipe()?);
        // SAFETY: the child calls only what is safe after a fork, and never returns.
        let child = check(unsafe { libc::fork() })?;
        if child == 0 {
            // SAFETY: in the child.
            unsafe {
                SHARED.store(shared as u64, Ordering::Relaxed);
                COMMANDS.store(commands[0], Ordering::Relaxed);
                ANSWERS.store(answers[1], Ordering::Relaxed);
                live(file, stack);
                libc::_exit(1);
            }
        }
        // SAFETY: the child's ends.
        unsafe {
            libc::close(commands[0]);
            libc::close(answers[1]);
            libc::close(file);
        }
        Ok(Self {
            child,
            shared,
            arena,
            commands: commands[1],
            answers: answers[0],
        })
    }

    /// The cases' memory.
    pub fn arena(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as this lives; the child runs only inside of [`Self::run`].
        unsafe { std::slice::from_raw_parts_mut(self.arena, ARENA_BYTES) }
    }

    /// Runs a batch.
    ///
    /// # Errors
    /// When the child died.
    ///
    /// # Panics
    /// With more than [`MAX_CASES`] cases.
    pub fn run(&mut self, inputs: &[State]) -> io::Result<Vec<State>> {
        assert!(inputs.len() <= MAX_CASES);
        // SAFETY: the child waits for the command that follows.
        let shared = unsafe { &mut *self.shared };
        shared.count = inputs.len();
        shared.inputs[..inputs.len()].copy_from_slice(inputs);
        let mut byte = [0_u8];
        // SAFETY: one byte each way.
        let (wrote, got) = unsafe {
            (
                libc::write(self.commands, byte.as_ptr().cast(), 1),
                libc::read(self.answers, byte.as_mut_ptr().cast(), 1),
            )
        };
        if wrote != 1 || got != 1 {
            return Err(io::Error::other(
                "the process that runs cases natively died",
            ));
        }
        Ok(shared.outputs[..inputs.len()].to_vec())
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: our own child, descriptors and mappings.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, ptr::null_mut(), 0);
            libc::close(self.commands);
            libc::close(self.answers);
            libc::munmap(self.arena.cast(), ARENA_BYTES);
            libc::munmap(self.shared.cast(), size_of::<Shared>());
        }
    }
}

/// The child's life: maps the areas, installs the handler and enters it.
///
/// # Safety
/// Only in the child.
unsafe fn live(file: libc::c_int, stack: *mut u8) {
    // SAFETY: the areas' addresses are free in a position-independent program; the handler has
    // SA_SIGINFO's signature; the stack is a mapping of its own.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        for (address, place, access) in pages() {
            let protection = match access {
                Access::Absent => continue,
                Access::Read => libc::PROT_READ,
                Access::Write => libc::PROT_READ | libc::PROT_WRITE,
                Access::All => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            };
            let start = libc::mmap(
                address as *mut libc::c_void,
                PAGE_BYTES,
                protection,
                libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE,
                file,
                place.cast_signed(),
            );
            if start as u64 != address {
                return;
            }
        }
        let base: u64;
        std::arch::asm!("rdfsbase {}", out(reg) base);
        HOST_FS.store(base, Ordering::Relaxed);
        let alternate = libc::stack_t {
            ss_sp: stack.cast(),
            ss_flags: 0,
            ss_size: STACK_BYTES,
        };
        libc::sigaltstack(&raw const alternate, ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&raw mut action.sa_mask);
        for signal in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGALRM,
            libc::SIGSYS,
        ] {
            libc::sigaction(signal, &raw const action, ptr::null_mut());
        }
        let mut open: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut open);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const open, ptr::null_mut());
        if forbid_system_calls() {
            std::arch::asm!("int3");
        }
    }
}

/// Turns system calls from the areas, all of which begin below 4 GiB, into signals.
fn forbid_system_calls() -> bool {
    const IP_HIGH: u32 = 12;
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt: 0,
        jf: 0,
        k,
    };
    let mut filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, IP_HIGH),
        libc::sock_filter {
            jt: 0,
            jf: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 1)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: a valid program that the kernel copies.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ) == 0
    }
}

/// Swaps the FS base around [`on_signal`], whose arguments it passes on, and clears the flags that
/// the kernel leaves alone (NT, AC, ID).
#[unsafe(naked)]
unsafe extern "C" fn handler() {
    naked_asm!(
        "pushfq",
        "and dword ptr [rsp], ~0x244000",
        "popfq",
        "rdfsbase rax",
        "mov [rip + {fs}], rax",
        "rdgsbase rax",
        "mov [rip + {gs}], rax",
        "mov rax, [rip + {host}]",
        "wrfsbase rax",
        "sub rsp, 8",
        "call {body}",
        "add rsp, 8",
        "mov rax, [rip + {gs}]",
        "wrgsbase rax",
        "mov rax, [rip + {fs}]",
        "wrfsbase rax",
        "ret",
        fs = sym FS_BASE,
        gs = sym GS_BASE,
        host = sym HOST_FS,
        body = sym on_signal,
    );
}

unsafe extern "C" fn on_signal(
    signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    context: *mut libc::ucontext_t,
) {
    // SAFETY: the kernel passes a valid context; the parent waits while this runs.
    unsafe {
        let shared = &mut *(SHARED.load(Ordering::Relaxed) as *mut Shared);
        let context = &mut (*context).uc_mcontext;
        let mut next = NEXT.load(Ordering::Relaxed);
        if next < MAX_CASES {
            capture(signal, context, &mut shared.outputs[next]);
            if signal == libc::SIGALRM {
                alarm(2);
            }
        }
        next = next.wrapping_add(1);
        if next == 0 || next >= shared.count {
            let first = next == 0;
            wait(first);
            next = 0;
        }
        NEXT.store(next, Ordering::Relaxed);
        load(context, &shared.inputs[next % MAX_CASES]);
    }
}

/// Tells the parent that a batch is done and waits for the next one.
unsafe fn wait(first: bool) {
    let mut byte = [0_u8];
    // SAFETY: one byte each way; the parent's death ends the child too.
    unsafe {
        if !first {
            libc::write(ANSWERS.load(Ordering::Relaxed), byte.as_ptr().cast(), 1);
        }
        alarm(0);
        let got = libc::read(
            COMMANDS.load(Ordering::Relaxed),
            byte.as_mut_ptr().cast(),
            1,
        );
        if got != 1 {
            libc::_exit(0);
        }
        // What doesn't end ends then.
        alarm(2);
    }
}

unsafe fn alarm(seconds: u32) {
    // SAFETY: a plain system call.
    unsafe { libc::alarm(seconds) };
}

/// Context registers in encoding order.
const GPR: [usize; 16] = [
    libc::REG_RAX as usize,
    libc::REG_RCX as usize,
    libc::REG_RDX as usize,
    libc::REG_RBX as usize,
    libc::REG_RSP as usize,
    libc::REG_RBP as usize,
    libc::REG_RSI as usize,
    libc::REG_RDI as usize,
    libc::REG_R8 as usize,
    libc::REG_R9 as usize,
    libc::REG_R10 as usize,
    libc::REG_R11 as usize,
    libc::REG_R12 as usize,
    libc::REG_R13 as usize,
    libc::REG_R14 as usize,
    libc::REG_R15 as usize,
];

const RIP: usize = libc::REG_RIP as usize;
const FLAGS: usize = libc::REG_EFL as usize;

unsafe fn capture(signal: libc::c_int, context: &libc::mcontext_t, state: &mut State) {
    let register = |index: usize| context.gregs[index].cast_unsigned();
    for (value, index) in state.gpr.iter_mut().zip(GPR) {
        *value = register(index);
    }
    state.rip = register(RIP);
    state.rflags = register(FLAGS);
    state.fs_base = FS_BASE.load(Ordering::Relaxed);
    state.gs_base = GS_BASE.load(Ordering::Relaxed);
    state.trap = match signal {
        libc::SIGALRM => TIMEOUT,
        libc::SIGSYS => SYSTEM_CALL,
        _ => register(libc::REG_TRAPNO as usize),
    };
    state.error = register(libc::REG_ERR as usize);
    state.cr2 = register(libc::REG_CR2 as usize);
    // SAFETY: the kernel's frame holds at least the legacy area, the header and AVX.
    unsafe {
        ptr::copy_nonoverlapping(
            context.fpregs.cast::<u8>(),
            state.xsave.as_mut_ptr(),
            XSAVE_BYTES,
        );
    }
    state.xsave[XSTATE_BV] &= 7;
}

unsafe fn load(context: &mut libc::mcontext_t, state: &State) {
    for (&value, index) in state.gpr.iter().zip(GPR) {
        context.gregs[index] = value.cast_signed();
    }
    context.gregs[RIP] = state.rip.cast_signed();
    context.gregs[FLAGS] = state.rflags.cast_signed();
    FS_BASE.store(state.fs_base, Ordering::Relaxed);
    GS_BASE.store(state.gs_base, Ordering::Relaxed);
    // SAFETY: as in [`capture`]. Bytes 464 to 511 are the kernel's own; the header's first byte says
    // what is loaded, the rest of the header and further components stay.
    unsafe {
        let frame = context.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(state.xsave.as_ptr(), frame, 416);
        let bits = frame.add(XSTATE_BV);
        *bits = *bits & !7 | state.xsave[XSTATE_BV] & 7;
        ptr::copy_nonoverlapping(
            state.xsave.as_ptr().add(crate::state::UPPER),
            frame.add(crate::state::UPPER),
            XSAVE_BYTES - crate::state::UPPER,
        );
    }
}

const _: () = assert!(offset_of!(State, xsave) == 192);
