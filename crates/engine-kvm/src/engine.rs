//! `/dev/kvm` itself: what it offers, and the machines made from it.

// UNSAFETY: takes over a descriptor of /dev/kvm.
#![expect(
    unsafe_code,
    reason = "kvm-ioctls takes ownership of a descriptor through FromRawFd"
)]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::fd::IntoRawFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::OnceLock;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Cap;
use kvm_ioctls::Kvm;
use ringfence_engine::Engine;
use ringfence_engine::EngineCaps;
use ringfence_engine::EngineError;
use ringfence_engine::InterruptChips;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_x86::cpuid::CpuidTable;

use crate::cpuid;
use crate::kick;
use crate::scratch;
use crate::vm::KvmVm;
use crate::xsave::XsaveLayout;

/// Where the host's kernel offers KVM.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// The most vCPUs of one machine, whatever the host's limit.
const MAX_VCPUS: usize = 32;

/// What a machine can't do without, and what it is for. All are in Linux 4.12 and later.
const REQUIRED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY on this host"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT on this host"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID on this host"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR on this host"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP on this host"),
    (Cap::Pit2, "KVM_CAP_PIT2 on this host"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI on this host"),
    (Cap::MpState, "KVM_CAP_MP_STATE on this host"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS on this host"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS on this host"),
    (Cap::Xsave, "KVM_CAP_XSAVE on this host"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK on this host"),
];

/// `/dev/kvm`, and what it answered.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    pub(crate) caps: EngineCaps,
    pub(crate) cpuid: CpuidTable,
    pub(crate) xsave: XsaveLayout,
    /// There is an XCR0.
    pub(crate) has_xcrs: bool,
}

/// The `kvm` engine.
#[derive(Debug)]
pub struct KvmEngine {
    host: Arc<Host>,
}

impl KvmEngine {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`EngineError::Host`] when it can't be opened, [`EngineError::Unsupported`] when this
    /// kernel's KVM lacks something that a machine needs. Whether it is fast enough to be of use
    /// is [`crate::probe`]'s question.
    pub fn open() -> Result<Self, EngineError> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(EngineError::host("open /dev/kvm"))?;
        Self::from_fd(file.into())
    }

    /// As [`Self::open`], from a descriptor of `/dev/kvm` that was opened before (a jailed
    /// process can't open paths).
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, EngineError> {
        // SAFETY: the descriptor is owned, and `into_raw_fd` gives that ownership to `Kvm`. A
        // descriptor of something else makes the calls below fail, no more.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(EngineError::Config(format!(
                "the descriptor given as /dev/kvm answers KVM_GET_API_VERSION with {version} in place of {KVM_API_VERSION}: it is not KVM, or a KVM from before Linux 2.6.22"
            )));
        }
        for (cap, name) in REQUIRED {
            if !kvm.check_extension(cap) {
                return Err(EngineError::unsupported(name));
            }
        }
        kick::install_handler()?;
        let raw = cpuid::supported(&kvm)?;
        let caps = EngineCaps {
            max_vcpus: u32::try_from(kvm.get_max_vcpus().min(MAX_VCPUS)).unwrap_or(1),
            interrupt_chips: InterruptChips::Engine,
            doorbells: kvm.check_extension(Cap::Ioeventfd),
            irq_events: kvm.check_extension(Cap::Irqfd) && kvm.check_extension(Cap::IrqRouting),
            dirty_log: true,
            unheard_writers: true,
            debug: kvm.check_extension(Cap::SetGuestDebug),
        };
        let host = Host {
            has_xcrs: kvm.check_extension(Cap::Xcrs),
            kvm,
            caps,
            xsave: XsaveLayout::new(&raw),
            cpuid: cpuid::filter(&raw),
        };
        Ok(Self {
            host: Arc::new(host),
        })
    }
}

impl KvmEngine {
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }
}

impl Host {
    /// Whether the processor raises breakpoints in guests here, tried once a process.
    pub(crate) fn breakpoints_fire(self: &Arc<Self>) -> bool {
        static FIRE: OnceLock<bool> = OnceLock::new();
        // A host where even the trial fails is none to rely on.
        *FIRE.get_or_init(|| scratch::breakpoint_fires(self).unwrap_or(false))
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn caps(&self) -> &EngineCaps {
        &self.host.caps
    }

    fn supported_cpuid(&self) -> Result<CpuidTable, EngineError> {
        Ok(self.host.cpuid.clone())
    }

    fn create_vm(&self, setup: VmSetup) -> Result<Box<dyn Vm>, EngineError> {
        Ok(Box::new(KvmVm::new(&self.host, setup)?))
    }
}
