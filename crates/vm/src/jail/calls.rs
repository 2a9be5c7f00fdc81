//! Which system calls each kind of thread makes.

use std::collections::BTreeMap;

use ringfence_machine::ThreadKind;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompRule;

use crate::config::Config;
use crate::config::DeviceConfig;

/// What the machine's parts need beyond the ordinary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// The engine makes code: executable mappings and signal handlers.
    pub(crate) makes_code: bool,
    /// There are disks.
    pub(crate) disks: bool,
    /// There are shared directories.
    pub(crate) shares: bool,
    /// There are instances of vhost-net.
    pub(crate) vhost: bool,
}

impl Needs {
    pub(crate) fn of(config: &Config) -> Self {
        let has = |wanted: fn(&DeviceConfig) -> bool| config.devices.iter().any(wanted);
        Self {
            makes_code: config.engine == "bt",
            disks: has(|device| matches!(device, DeviceConfig::Block(_))),
            shares: has(|device| matches!(device, DeviceConfig::Fs(_))),
            // Known when the devices are made: the engine may not allow it.
            vhost: false,
        }
    }
}

/// Allowed calls; no rule for a call means any arguments.
#[derive(Debug, Default)]
pub(super) struct Rules(pub(super) BTreeMap<i64, Vec<SeccompRule>>);

impl Rules {
    /// Allows calls with any arguments.
    fn allow(&mut self, calls: &[i64]) -> &mut Self {
        for &call in calls {
            self.0.insert(call, Vec::new());
        }
        self
    }

    /// Allows a call when `argument & mask == value`, or by another such rule.
    fn allow_masked(&mut self, call: i64, argument: u8, mask: u64, value: u64) -> &mut Self {
        let condition = SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(mask),
            value,
        );
        // Fails for an argument past the sixth alone.
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        match self.0.get_mut(&call) {
            // Any arguments are allowed already.
            Some(rules) if rules.is_empty() => {}
            Some(rules) => rules.extend(rule),
            None => drop(rule.map(|rule| self.0.insert(call, vec![rule]))),
        }
        self
    }

    /// Allows ioctls with these requests.
    fn allow_requests(&mut self, requests: &[u64]) -> &mut Self {
        for &request in requests {
            self.allow_masked(libc::SYS_ioctl, 1, WHOLE, request);
        }
        self
    }
}

/// What the language's runtime does in any thread: memory, locks, time, its end.
const RUNTIME: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Events and timers.
const EVENTS: &[i64] = &[
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

/// Bytes in and out of what is open.
const TRANSFER: &[i64] = &[
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_writev,
];

/// Sockets that are there already, and those that come by them.
const SOCKETS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_dup,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
];

/// Disk images.
const DISKS: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_statx,
];

/// Shared directories: each of these takes one name below a directory that is open.
const SHARES: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_linkat,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_renameat2,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// KVM's ioctls all have this type byte.
const IOCTL_TYPE_MASK: u64 = 0xff00;
const IOCTL_KVM: u64 = 0xae00;
/// What a filter's listener is asked; only the listeners of spaces exist.
const IOCTL_SECCOMP: u64 = 0x2100;
/// What a network card's driver switches on its TAP device.
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETQUEUE: u64 = 0x4004_54d9;
/// What it asks and sets when it is made.
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
/// What a guest's start and reset of a network card make of vhost-net's instance: features, each
/// ring's size, place, position and events, and the TAP device.
const VHOST: &[u64] = &[
    0x4008_af00,
    0x4008_af10,
    0x4028_af11,
    0x4008_af12,
    0xc008_af12,
    0x4008_af20,
    0x4008_af21,
    0x4008_af22,
    0x4008_af30,
];
/// What is asked and told of it when the card is made: features, owner, memory.
const VHOST_MAKE: &[u64] = &[0x8008_af00, 0xaf01, 0x4008_af03];
const SO_SNDBUF: u64 = 7;
const WHOLE: u64 = u32::MAX as u64;

const F_GETFD: u64 = 1;

const PROT_WRITE: u64 = 2;
const PROT_EXEC: u64 = 4;
const PROT_ARGUMENT: u8 = 2;

fn any_thread(needs: Needs) -> Rules {
    let mut rules = Rules::default();
    rules.allow(RUNTIME);
    // A thread may signal threads of its own process: that is how vCPUs are woken and how the
    // runtime aborts.
    let own = u64::try_from(rustix::process::getpid().as_raw_nonzero().get()).unwrap_or(0);
    rules.allow_masked(libc::SYS_tgkill, 0, WHOLE, own);
    // The language's checked builds look at a descriptor before they close it.
    rules.allow_masked(libc::SYS_fcntl, 1, WHOLE, F_GETFD);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.allow_masked(call, PROT_ARGUMENT, PROT_EXEC, 0);
        if needs.makes_code {
            // Never writable and executable at once.
            let both = PROT_WRITE | PROT_EXEC;
            rules.allow_masked(call, PROT_ARGUMENT, both, PROT_EXEC);
        }
    }
    if needs.makes_code {
        rules.allow(&[
            libc::SYS_memfd_create,
            libc::SYS_ftruncate,
            libc::SYS_fallocate,
            libc::SYS_membarrier,
            // Takes a vCPU out of direct execution: reaches the processes that it has descriptors of.
            libc::SYS_pidfd_send_signal,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_timer_create,
            libc::SYS_timer_delete,
            libc::SYS_timer_settime,
        ]);
    } else {
        rules.allow_masked(libc::SYS_ioctl, 1, IOCTL_TYPE_MASK, IOCTL_KVM);
    }
    rules
}

/// The calls of a machine's thread.
pub(super) fn of_thread(kind: ThreadKind, needs: Needs) -> Rules {
    let mut rules = any_thread(needs);
    rules.allow(EVENTS);
    match kind {
        ThreadKind::Timers => {}
        // A device is started and reset by the vCPU that asks for it.
        ThreadKind::Vcpu(_) | ThreadKind::Devices => {
            rules.allow(TRANSFER).allow(SOCKETS);
            if needs.makes_code {
                rules.allow_masked(libc::SYS_ioctl, 1, IOCTL_TYPE_MASK, IOCTL_SECCOMP);
            }
            // The balloon punches holes into guest memory.
            rules.allow(&[libc::SYS_fcntl, libc::SYS_fallocate]);
            if needs.disks {
                // Writes are answered at once, and an image grows by them.
                rules.allow(DISKS);
            }
            if needs.shares {
                rules.allow(SHARES);
            }
            // A network card may be put in later.
            rules.allow_requests(&[TUNSETOFFLOAD, TUNSETQUEUE]);
            if needs.vhost {
                rules.allow_requests(VHOST);
            }
        }
    }
    rules
}

/// The calls of the threads that wait for disks.
pub(super) fn of_disk(needs: Needs) -> Rules {
    let mut rules = any_thread(needs);
    rules.allow(TRANSFER).allow(DISKS);
    rules
}

/// The calls of the thread that serves the control socket.
pub(super) fn of_control(needs: Needs) -> Rules {
    let mut rules = any_thread(needs);
    rules.allow(EVENTS).allow(TRANSFER);
    rules.allow(&[
        libc::SYS_fcntl,
        libc::SYS_getrusage,
        libc::SYS_getsockopt,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_shutdown,
    ]);
    // The other end of a network card that is put in is a TAP device or a socket.
    rules.allow_requests(&[TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETQUEUE]);
    if needs.vhost {
        // One that is taken out is reset.
        rules.allow_requests(VHOST_MAKE).allow_requests(VHOST);
    }
    rules.allow_masked(libc::SYS_setsockopt, 2, WHOLE, SO_SNDBUF);
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    /// VHOST_SET_LOG_BASE, which has the kernel write at an address.
    const UNWANTED: u64 = 0x4008_af04;

    fn allows(rules: &Rules, request: u64) -> bool {
        let by_value = format!("{:?}", rules.0.get(&libc::SYS_ioctl));
        by_value.contains(&format!("value: {request} "))
    }

    fn all(vhost: bool) -> [Rules; 3] {
        let needs = Needs {
            vhost,
            ..Needs::default()
        };
        [
            of_thread(ThreadKind::Vcpu(0), needs),
            of_thread(ThreadKind::Devices, needs),
            of_control(needs),
        ]
    }

    #[test]
    fn vhost_net_is_asked_where_there_is_an_instance_alone() {
        for rules in all(true) {
            assert!(VHOST.iter().all(|&request| allows(&rules, request)));
            assert!(!allows(&rules, UNWANTED));
        }
        let known = VHOST.iter().chain(VHOST_MAKE);
        for rules in all(false) {
            assert!(allows(&rules, TUNSETOFFLOAD));
            assert!(!known.clone().any(|&request| allows(&rules, request)));
        }
        let [vcpu, devices, control] = all(true);
        for &request in VHOST_MAKE {
            let found = [&vcpu, &devices, &control].map(|rules| allows(rules, request));
            assert_eq!(found, [false, false, true]);
        }
    }
}
