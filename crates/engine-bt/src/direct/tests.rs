use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use super::space::Space;
use super::space::register;
use super::spawner::Spawner;
use crate::mapping::Reservation;
use crate::mapping::memory_file;

const CODE: u64 = 0x40_0000;
const RAM_BYTES: u64 = 1 << 20;

fn ram() -> (OwnedFd, Reservation) {
    let file = memory_file(c"test-ram", RAM_BYTES).expect("memfd");
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let view = Reservation::of_file(&file, RAM_BYTES, protection).expect("mapping");
    (file, view)
}

/// A space that shows the second page of RAM at [`CODE`], with `code` in it.
fn space_with(code: &[u8]) -> (Spawner, Space) {
    let (file, view) = ram();
    let patches = super::Patches::new().expect("a file");
    let spawner = Spawner::start(file.as_raw_fd(), patches.file()).expect("a spawner");
    let mut space = Space::new(&spawner).expect("a space");
    // SAFETY: inside the mapping of RAM.
    unsafe { crate::ram::copy_raw(code.as_ptr() as u64, view.start() + 4096, code.len()) };
    let mut maps = super::maps::Maps::default();
    maps.show(
        CODE / 4096,
        view.start() + 4096,
        super::maps::Bytes::Ram(4096),
        super::maps::READ | super::maps::EXECUTE,
        super::maps::Enter::Now,
    );
    space.execute(&maps.take_pending()).expect("mapped");
    (spawner, space)
}

fn go(space: &mut Space) -> (i32, super::space::Registers) {
    let mut registers = space.registers();
    registers[register::RIP] = CODE;
    registers[register::FLAGS] = 0x202;
    registers[register::GENERAL[3]] = 77;
    space.set_registers(&registers);
    let signal = space.run().expect("a signal");
    (i32::try_from(signal).expect("small"), space.registers())
}

#[test]
fn selectors_that_code_loads_are_told_and_gone_next_time() {
    // mov ax, gs; mov ecx, 0x2b; mov gs, ecx; syscall
    let code = [0x8c, 0xe8, 0xb9, 0x2b, 0, 0, 0, 0x8e, 0xe9, 0x0f, 0x05];
    let (_spawner, mut space) = space_with(&code);
    for _ in 0..2 {
        let (signal, registers) = go(&mut space);
        assert_eq!(signal, libc::SIGSYS);
        assert_eq!(registers[register::GENERAL[0]] & 0xffff, 0);
        assert_eq!(space.selectors(), [0, 0, 0, 0x2b]);
    }
}

#[test]
fn code_runs_until_it_makes_a_system_call() {
    // mov eax, 42; syscall
    let (_spawner, mut space) = space_with(&[0xb8, 42, 0, 0, 0, 0x0f, 0x05]);
    for _ in 0..3 {
        let (signal, registers) = go(&mut space);
        assert_eq!(signal, libc::SIGSYS, "{registers:x?}");
        assert_eq!(registers[register::RIP], CODE + 7);
        assert_eq!(registers[register::GENERAL[0]], 42);
        assert_eq!(registers[register::GENERAL[3]], 77);
    }
}

#[test]
fn the_stubs_own_calls_are_trapped_elsewhere() {
    for number in [
        libc::SYS_rt_sigreturn,
        libc::SYS_getppid,
        libc::SYS_exit_group,
    ] {
        let number = u8::try_from(number).expect("small");
        let (_spawner, mut space) = space_with(&[0xb8, number, 0, 0, 0, 0x0f, 0x05]);
        let (signal, registers) = go(&mut space);
        assert_eq!(signal, libc::SIGSYS, "{registers:x?}");
    }
}

/// Runs code in a process that has the spawner's filter alone, as one that the VM process was taken
/// over in could have it run; returns the signal that ended it.
fn ended_under_the_spawners_filter(number: i64, arguments: [u64; 2]) -> Option<i32> {
    let filter = super::filter::of_spawner();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).expect("short"),
        filter: filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the child makes system calls alone and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                &raw const program,
            );
            libc::syscall(number, arguments[0], arguments[1], 0, 0, 0);
            libc::syscall(libc::SYS_exit_group, 0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
    }
}

#[test]
fn a_space_can_do_little_even_before_it_has_its_own_filter() {
    let nothing = u64::MAX;
    for (number, arguments) in [
        (libc::SYS_openat, [nothing, 0]),
        (libc::SYS_socket, [1, 1]),
        (libc::SYS_kill, [0, 0]),
        (libc::SYS_ptrace, [16, 1]),
        (libc::SYS_execve, [0, 0]),
        (libc::SYS_clone3, [0, 0]),
        (libc::SYS_clone, [0x1000_0000 | 17, 0]),
        (libc::SYS_prctl, [4, 1]),
    ] {
        let signal = ended_under_the_spawners_filter(number, arguments);
        assert_eq!(signal, Some(libc::SIGSYS), "{number}");
    }
    let signal = ended_under_the_spawners_filter(libc::SYS_getppid, [0, 0]);
    assert_eq!(signal, None);
}

#[test]
fn nothing_of_the_host_is_in_a_space() {
    // mov rbx, [rbx]: the monitor's own code, the stack, the commands for writing.
    let (_spawner, mut space) = space_with(&[0x48, 0x8b, 0x1b]);
    let own = code_runs_until_it_makes_a_system_call as *const () as u64;
    let mut registers = space.registers();
    for address in [own, &raw const registers as u64, 0, 0x7fff_ffff_e000] {
        registers[register::RIP] = CODE;
        registers[register::FLAGS] = 0x202;
        registers[register::GENERAL[3]] = address;
        space.set_registers(&registers);
        let signal = space.run().expect("a signal");
        assert_eq!(signal, 11);
        assert_eq!(space.registers()[register::FAULT_ADDRESS], address);
    }
}

#[test]
fn code_that_destroys_its_signal_stack_loses_its_space_alone() {
    // mov rsp, stub's frame; push in a loop until the frame is gone; syscall
    let frame = super::stub::BASE + super::stub::FRAME;
    let mut code = vec![0x48, 0xbf];
    code.extend(frame.to_le_bytes());
    // mov ecx, bytes; mov al, 0xff; rep stosb; syscall
    code.push(0xb9);
    code.extend(
        u32::try_from(super::stub::FRAME_BYTES)
            .expect("small")
            .to_le_bytes(),
    );
    code.extend([0xb0, 0xff, 0xf3, 0xaa, 0x0f, 0x05]);
    let (_spawner, mut space) = space_with(&code);
    let (signal, _) = go(&mut space);
    assert_eq!(signal, libc::SIGSYS);
    let (signal, _) = go(&mut space);
    assert_eq!(signal, libc::SIGSYS);
}

#[test]
fn flags_that_a_signals_return_leaves_alone_are_the_codes_own() {
    const NT_AND_ID: u64 = super::stub::KEPT_FLAGS;
    // syscall
    let (_spawner, mut space) = space_with(&[0x0f, 0x05]);
    for wanted in [0, NT_AND_ID, 0] {
        let mut registers = space.registers();
        registers[register::RIP] = CODE;
        registers[register::FLAGS] = 0x202 | wanted;
        space.set_registers(&registers);
        space.run().expect("a signal");
        assert_eq!(space.registers()[register::FLAGS] & NT_AND_ID, wanted);
    }
}
