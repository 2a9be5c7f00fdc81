//! The filters of the spawner and of a space's two processes, as classic BPF.
//!
//! | process | call | answer |
//! |---|---|---|
//! | guest | `NOTIFY`, from the stub's one place | the monitor is told, the process waits |
//! | guest | `rt_sigreturn`, from the stub's one place | allowed |
//! | guest | all others, in any ABI | a signal: it is the guest's own system call |
//! | mapper | `NOTIFY` | the monitor is told, the process waits |
//! | mapper | `mmap`, `munmap`, `mprotect` | allowed |
//! | mapper | all others | the process ends |
//! | spawner | what it and a space's set-up need, some with certain arguments alone | allowed |
//! | spawner | all others | a signal, which ends it |
//!
//! Spaces inherit the spawner's filter, and the stricter of two answers counts: so its answer to all
//! others is a signal too, which in a space is the guest's.
//!
//! A guest that jumps to the stub's places can tell the monitor something false of its own
//! registers, and set its own registers: it could do that anyhow.

#![expect(
    clippy::cast_possible_truncation,
    reason = "numbers of system calls and places in the stub are small"
)]

use super::stub::Entries;
use super::stub::NOTIFY;

const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_ANY: u16 = 0x45;
const RETURN: u16 = 0x06;
const AT_NUMBER: u32 = 0;
const AT_ARCHITECTURE: u32 = 4;
const AT_POINTER: u32 = 8;
const AT_ARGUMENTS: u32 = 16;
const X86_64: u32 = 0xc000_003e;
const KILL: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const TELL: u32 = 0x7fc0_0000;
const ALLOW: u32 = 0x7fff_0000;

/// One instruction, as `struct sock_filter` has it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    value: u32,
}

fn load(at: u32) -> Instruction {
    Instruction {
        code: LOAD_WORD,
        jump_true: 0,
        jump_false: 0,
        value: at,
    }
}

/// Skips `otherwise` instructions unless the loaded word is `value`.
fn unless(value: u32, otherwise: u8) -> Instruction {
    Instruction {
        code: JUMP_EQUAL,
        jump_true: 0,
        jump_false: otherwise,
        value,
    }
}

fn give(value: u32) -> Instruction {
    Instruction {
        code: RETURN,
        jump_true: 0,
        jump_false: 0,
        value,
    }
}

/// Halves of a 64-bit word, low first.
#[expect(clippy::cast_possible_truncation, reason = "halves")]
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// `value` for calls of `number` whose instruction ends at `place` and whose first arguments are
/// `arguments`; all other calls of that number are trapped. The number is loaded before and, for
/// other calls, afterwards.
fn rule(number: u32, place: u64, arguments: &[u64], value: u32) -> Vec<Instruction> {
    let words = std::iter::once((AT_POINTER, place)).chain(
        (0..)
            .zip(arguments)
            .map(|(index, &argument)| (AT_ARGUMENTS + 8 * index, argument)),
    );
    let mut tests: Vec<(u32, u32)> = words
        .flat_map(|(at, word)| {
            let [low, high] = halves(word);
            [(at, low), (at + 4, high)]
        })
        .collect();
    let mut tail = vec![give(value), give(TRAP)];
    while let Some((at, word)) = tests.pop() {
        let to_trap = u8::try_from(tail.len() - 1).unwrap_or(u8::MAX);
        tail.insert(0, unless(word, to_trap));
        tail.insert(0, load(at));
    }
    let skip = u8::try_from(tail.len()).unwrap_or(u8::MAX);
    tail.insert(0, unless(number, skip));
    tail
}

/// The guest's filter. A call returns to the address behind its instruction.
pub(crate) fn of_guest(entries: &Entries) -> Vec<Instruction> {
    let rules = [
        rule(NOTIFY, entries.notified, &[], TELL),
        rule(libc::SYS_rt_sigreturn as u32, entries.returned, &[], ALLOW),
    ];
    let rules: Vec<_> = rules.into_iter().flatten().collect();
    let to_trap = u8::try_from(rules.len() + 1).unwrap_or(u8::MAX);
    let mut program = vec![
        load(AT_ARCHITECTURE),
        unless(X86_64, to_trap),
        load(AT_NUMBER),
    ];
    program.extend(rules);
    program.push(give(TRAP));
    program
}

/// The mapper's filter.
pub(crate) fn of_mapper() -> Vec<Instruction> {
    vec![
        load(AT_ARCHITECTURE),
        unless(X86_64, 9),
        load(AT_NUMBER),
        unless(NOTIFY, 1),
        give(TELL),
        unless(libc::SYS_mmap as u32, 1),
        give(ALLOW),
        unless(libc::SYS_munmap as u32, 1),
        give(ALLOW),
        unless(libc::SYS_mprotect as u32, 1),
        give(ALLOW),
        give(KILL),
    ]
}

/// Flags of `clone` that make namespaces.
const NEW_NAMESPACES: u32 = 0x7e02_0000;

/// The spawner's filter, which holds for a space's processes before they have their own: whatever
/// code the VM process has them map, they can't do more.
pub(crate) fn of_spawner() -> Vec<Instruction> {
    let free = [
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_close,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_getppid,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ];
    let first_argument = [
        (libc::SYS_prctl, libc::PR_SET_PDEATHSIG.unsigned_abs()),
        (libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER),
    ];
    let is = |call: i64, otherwise| unless(call.unsigned_abs() as u32, otherwise);
    let mut program = vec![load(AT_ARCHITECTURE), unless(X86_64, 0), load(AT_NUMBER)];
    for number in free {
        program.extend([is(number, 1), give(ALLOW)]);
    }
    for (number, value) in first_argument {
        program.extend([
            is(number, 4),
            load(AT_ARGUMENTS),
            unless(value, 1),
            give(ALLOW),
            give(TRAP),
        ]);
    }
    program.extend([
        is(libc::SYS_clone, 4),
        load(AT_ARGUMENTS),
        Instruction {
            code: JUMP_ANY,
            jump_true: 1,
            jump_false: 0,
            value: NEW_NAMESPACES,
        },
        give(ALLOW),
        give(TRAP),
        give(TRAP),
    ]);
    let to_trap = program.len() - 3;
    program[1] = unless(X86_64, u8::try_from(to_trap).unwrap_or(u8::MAX));
    program
}
