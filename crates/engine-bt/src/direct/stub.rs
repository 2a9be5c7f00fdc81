//! The code that runs inside a space process beside the guest's own, and where it lies.
//!
//! It is position-dependent and keeps nothing in memory that decides anything: the guest can read
//! and write all of the frame below, and jump wherever it likes. What holds it are the filters (see
//! [`super::filter`]), which the kernel enforces by the address of the calling instruction.
//!
//! ```text
//!     BASE      code       readable and executable
//!               commands   readable: written by the monitor, executed by the mapper
//!               head       readable and writable: two registers, set-up data
//!     END       frame      readable and writable: the signal stack, with the guest's registers
//! ```

// UNSAFETY: assembly, and its bytes.
#![expect(unsafe_code, reason = "code for another process")]
#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of system calls and places in the stub are small"
)]

use std::arch::global_asm;

/// Where the stub lies in every space: far from where programs are put. A guest that maps something
/// there itself is not run directly.
pub(crate) const BASE: u64 = 0x2fe3_1a20_0000;
const PAGE: u64 = 4096;
/// Offsets of the parts, in the space and in their file.
pub(crate) const COMMANDS: u64 = PAGE;
pub(crate) const COMMAND_BYTES: u64 = 4 * PAGE;
pub(crate) const HEAD: u64 = COMMANDS + COMMAND_BYTES;
pub(crate) const FRAME: u64 = HEAD + PAGE;
/// Room for a signal frame with every state component that a processor has.
pub(crate) const FRAME_BYTES: u64 = 12 * PAGE;
/// Bytes of all parts.
pub(crate) const BYTES: u64 = FRAME + FRAME_BYTES;
/// First address behind the stub.
pub(crate) const END: u64 = BASE + BYTES;
/// First address that no user program has.
pub(crate) const TASK_END: u64 = 0x7fff_ffff_f000;

/// Offsets within the head.
pub(crate) const FS_BASE: u64 = 0;
pub(crate) const GS_BASE: u64 = 8;
/// The filters' descriptors, once they are in place.
pub(crate) const GUEST_LISTENER: u64 = 16;
pub(crate) const MAPPER_LISTENER: u64 = 20;
/// Descriptor of the guest's process.
pub(crate) const GUEST_PROCESS: u64 = 24;
/// `stack_t` of the guest's signals.
pub(crate) const SIGNAL_STACK: u64 = 32;
/// Time-stamp counter when the guest's code was entered and left.
pub(crate) const ENTERED: u64 = 96;
pub(crate) const LEFT: u64 = 104;
/// Flags that returning from a signal leaves as they are: [`KEPT_FLAGS`], and what must be set.
pub(crate) const FLAGS: u64 = 112;
/// NT and ID.
pub(crate) const KEPT_FLAGS: u64 = 1 << 14 | 1 << 21;
/// Selectors of DS, ES, FS and GS, 16 bits each, as the guest's code left them.
pub(crate) const SELECTORS: u64 = 120;
pub(crate) const GUEST_PROGRAM: u64 = 64;
pub(crate) const MAPPER_PROGRAM: u64 = 80;
pub(crate) const GUEST_FILTER: u64 = 128;
pub(crate) const MAPPER_FILTER: u64 = 512;

/// The call that the filters turn into a word to the monitor. It is never executed.
pub(crate) const NOTIFY: u32 = libc::SYS_getppid as u32;

/// A command of the mapper: a system call's number and arguments.
pub(crate) const COMMAND_WORDS: usize = 7;
/// Most commands in a batch: the count takes a word.
pub(crate) const MOST_COMMANDS: usize = (COMMAND_BYTES as usize - 8) / (8 * COMMAND_WORDS);

global_asm!(
    ".pushsection .text.ringfence_direct,\"ax\",@progbits",
    ".balign 16",
    ".globl ringfence_direct_start",
    ".hidden ringfence_direct_start",
    ".globl ringfence_direct_begin",
    ".hidden ringfence_direct_begin",
    ".globl ringfence_direct_signal",
    ".hidden ringfence_direct_signal",
    ".globl ringfence_direct_notified",
    ".hidden ringfence_direct_notified",
    ".globl ringfence_direct_returned",
    ".hidden ringfence_direct_returned",
    ".globl ringfence_direct_end",
    ".hidden ringfence_direct_end",
    "ringfence_direct_start:",
    // A copy of the spawner begins. It starts a process that shares its memory, since such a one
    // is free of what the C library registered with the kernel for threads (rseq), and goes.
    "ringfence_direct_begin:",
    "mov eax, {clone}",
    "mov edi, {guest_flags}",
    "xor esi, esi",
    "movabs rdx, {guest_process}",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test eax, eax",
    "jz 5f",
    "xor edi, edi",
    "mov eax, {exit}",
    "syscall",
    // The guest's process: starts the mapper, filters itself, and raises its first signal.
    "5:",
    "mov eax, {prctl}",
    "mov edi, 1",
    "mov esi, 9",
    "syscall",
    "mov eax, {sigaltstack}",
    "movabs rdi, {stack}",
    "xor esi, esi",
    "syscall",
    "mov eax, {clone}",
    "mov edi, {mapper_flags}",
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test eax, eax",
    "jz 6f",
    "mov eax, {seccomp}",
    "mov edi, 1",
    "mov esi, 8",
    "movabs rdx, {guest_program}",
    "syscall",
    "movabs rbx, {head}",
    "mov [rbx + {guest_listener}], eax",
    "ud2",
    // A signal: RDX is the context. Tells the monitor and waits for its answer.
    "ringfence_direct_signal:",
    "movabs rbx, {head}",
    "mov r12, rdx",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rbx + {left}], rax",
    "mov rdx, r12",
    "rdfsbase rax",
    "mov [rbx + {fs_base}], rax",
    "rdgsbase rax",
    "mov [rbx + {gs_base}], rax",
    "mov word ptr [rbx + {selectors}], ds",
    "mov word ptr [rbx + {selectors} + 2], es",
    "mov word ptr [rbx + {selectors} + 4], fs",
    "mov word ptr [rbx + {selectors} + 6], gs",
    "mov eax, {notify}",
    "syscall",
    "ringfence_direct_notified:",
    // Null selectors for whoever comes next; the bases follow.
    "xor eax, eax",
    "cmp [rbx + {selectors}], rax",
    "je 7f",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "7:",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {gs_base}]",
    "wrgsbase rax",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov [rbx + {entered}], rax",
    "push qword ptr [rbx + {flags}]",
    "popfq",
    "mov rsp, r12",
    "mov eax, {sigreturn}",
    "syscall",
    "ringfence_direct_returned:",
    "ud2",
    // The mapper: a process that shares the space, with a filter of its own. It uses registers
    // alone, and reads what the guest can't write.
    "6:",
    "mov eax, {prctl}",
    "mov edi, 1",
    "mov esi, 9",
    "syscall",
    "mov eax, {seccomp}",
    "mov edi, 1",
    "mov esi, 8",
    "movabs rdx, {mapper_program}",
    "syscall",
    "movabs rbx, {head}",
    "mov [rbx + {mapper_listener}], eax",
    "xor r13d, r13d",
    "2:",
    "mov rdi, r13",
    "mov eax, {notify}",
    "syscall",
    "xor r13d, r13d",
    "movabs rbx, {commands}",
    "mov r12, [rbx]",
    "add rbx, 8",
    "3:",
    "test r12, r12",
    "jz 2b",
    "mov rax, [rbx]",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "syscall",
    "cmp rax, -4096",
    "jbe 4f",
    "inc r13",
    "4:",
    "add rbx, 56",
    "dec r12",
    "jmp 3b",
    "ringfence_direct_end:",
    ".popsection",
    seccomp = const libc::SYS_seccomp,
    sigreturn = const libc::SYS_rt_sigreturn,
    prctl = const libc::SYS_prctl,
    clone = const libc::SYS_clone,
    exit = const libc::SYS_exit,
    sigaltstack = const libc::SYS_sigaltstack,
    guest_flags = const libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_PARENT | libc::CLONE_PIDFD,
    mapper_flags = const libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD,
    stack = const BASE + HEAD + SIGNAL_STACK,
    guest_process = const BASE + HEAD + GUEST_PROCESS,
    notify = const NOTIFY,
    head = const BASE + HEAD,
    commands = const BASE + COMMANDS,
    guest_program = const BASE + HEAD + GUEST_PROGRAM,
    mapper_program = const BASE + HEAD + MAPPER_PROGRAM,
    fs_base = const FS_BASE,
    selectors = const SELECTORS,
    gs_base = const GS_BASE,
    entered = const ENTERED,
    left = const LEFT,
    flags = const FLAGS,
    guest_listener = const GUEST_LISTENER,
    mapper_listener = const MAPPER_LISTENER,
);

unsafe extern "C" {
    static ringfence_direct_start: u8;
    static ringfence_direct_begin: u8;
    static ringfence_direct_signal: u8;
    static ringfence_direct_notified: u8;
    static ringfence_direct_returned: u8;
    static ringfence_direct_end: u8;
}

/// Addresses inside the space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entries {
    pub begin: u64,
    pub signal: u64,
    /// Behind the instruction that tells the monitor.
    pub notified: u64,
    /// Behind the instruction that returns from a signal.
    pub returned: u64,
}

/// Where the stub's parts are once it is mapped.
pub(crate) fn entries() -> Entries {
    let start = &raw const ringfence_direct_start as u64;
    let at = |symbol: *const u8| BASE + (symbol as u64 - start);
    Entries {
        begin: at(&raw const ringfence_direct_begin),
        signal: at(&raw const ringfence_direct_signal),
        notified: at(&raw const ringfence_direct_notified),
        returned: at(&raw const ringfence_direct_returned),
    }
}

/// The stub's code.
pub(crate) fn code() -> &'static [u8] {
    let start = &raw const ringfence_direct_start;
    let end = &raw const ringfence_direct_end;
    // SAFETY: both symbols bound the code above, which is readable and never changes.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}
