//! What the gateway gives up once everything is open: files, privileges, system calls.
//!
//! It keeps the host's network: that is what it is for. A guest that took it over could open
//! sockets as its user could, and nothing else.

use std::collections::BTreeMap;
use std::error::Error;

use landlock::ABI;
use landlock::Access as _;
use landlock::AccessFs;
use landlock::CompatLevel;
use landlock::Compatible;
use landlock::Ruleset;
use landlock::RulesetAttr;
use rustix::thread::CapabilitySet;
use rustix::thread::CapabilitySets;
use seccompiler::BpfProgram;
use seccompiler::SeccompAction;
use seccompiler::SeccompCmpArgLen;
use seccompiler::SeccompCmpOp;
use seccompiler::SeccompCondition;
use seccompiler::SeccompFilter;
use seccompiler::SeccompRule;
use seccompiler::TargetArch;

type AnyError = Box<dyn Error + Send + Sync>;

/// Calls with any arguments.
const CALLS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socketpair,
    libc::SYS_write,
    libc::SYS_writev,
];

const FIONBIO: u64 = 0x5421;
/// Links that come later: `TUNGETIFF`, `TUNSETOFFLOAD`, `TUNSETVNETHDRSZ`, `TUNSETQUEUE`.
const IOCTLS: [u64; 5] = [FIONBIO, 0x8004_54d2, 0x4004_54d0, 0x4004_54d8, 0x4004_54d9];
const PROT_EXEC: u64 = 4;

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = SeccompCondition::new(
        argument,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(mask),
        value,
    )?;
    SeccompRule::new(vec![condition])
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let whole = u64::from(u32::MAX);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|&call| (call, Vec::new())).collect();
    // Internet sockets alone: no netlink, no packets, no other families' kernel code.
    let families = [libc::AF_INET, libc::AF_INET6];
    let families: Result<Vec<_>, _> = families
        .into_iter()
        .map(|family| masked(0, whole, u64::try_from(family).unwrap_or(0)))
        .collect();
    rules.insert(libc::SYS_socket, families?);
    let ioctls: Result<Vec<_>, _> = IOCTLS.iter().map(|&call| masked(1, whole, call)).collect();
    rules.insert(libc::SYS_ioctl, ioctls?);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![masked(2, PROT_EXEC, 0)?]);
    }
    // The runtime aborts so.
    let own = u64::try_from(rustix::process::getpid().as_raw_nonzero().get()).unwrap_or(0);
    rules.insert(libc::SYS_tgkill, vec![masked(0, whole, own)?]);
    Ok(rules)
}

/// No file is ever opened again.
fn restrict_files() -> Result<(), AnyError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn drop_capabilities() -> Result<(), AnyError> {
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none)?;
    Ok(())
}

/// Gives it all up.
///
/// # Errors
/// When the host refuses a layer that it has: a gateway that isn't jailed doesn't start.
pub(crate) fn enter() -> Result<(), AnyError> {
    rustix::thread::set_no_new_privs(true)?;
    drop_capabilities()?;
    restrict_files()?;
    let filter = SeccompFilter::new(
        rules()?,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
