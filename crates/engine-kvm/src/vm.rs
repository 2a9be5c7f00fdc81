//! One machine: its memory slots, chips, clock and vCPUs.

// UNSAFETY: hands host mappings to the kernel as guest memory.
#![expect(
    unsafe_code,
    reason = "KVM_SET_USER_MEMORY_REGION gives the guest access to host memory"
)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_bindings::kvm_clock_data;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use kvm_ioctls::VmFd;
use ringfence_bus::InterruptController;
use ringfence_bus::MmioBus;
use ringfence_bus::MsiMessage;
use ringfence_bus::PioBus;
use ringfence_engine::Doorbell;
use ringfence_engine::EngineError;
use ringfence_engine::Interrupts;
use ringfence_engine::Unclaimed;
use ringfence_engine::Vcpu;
use ringfence_engine::Vm;
use ringfence_engine::VmSetup;
use ringfence_memory::GuestMemoryBackend;
use ringfence_memory::GuestRam;
use ringfence_x86::cpuid::CpuidTable;
use vmm_sys_util::eventfd::EventFd;

use crate::chips::KvmChips;
use crate::dirty::DirtyLog;
use crate::doorbell;
use crate::engine::Host;
use crate::vcpu::KvmVcpu;

/// Where Intel processors without unrestricted guests keep what they need for real mode: four
/// pages just below the firmware's place, never RAM (§4.28, §4.32).
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// Live counters.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) pio: AtomicU64,
    pub(crate) mmio: AtomicU64,
    pub(crate) halts: AtomicU64,
    pub(crate) kicks: AtomicU64,
    pub(crate) stops: AtomicU64,
    pub(crate) lines: AtomicU64,
    pub(crate) messages: AtomicU64,
}

/// What a machine and its vCPUs share.
pub(crate) struct Shared {
    /// Keeps the memory that the slots name.
    pub(crate) ram: GuestRam,
    pub(crate) pio: Arc<PioBus>,
    pub(crate) mmio: Arc<MmioBus>,
    pub(crate) unclaimed: Unclaimed,
    pub(crate) counts: Arc<Counts>,
    /// Whether the machine has interrupt chips.
    pub(crate) has_chips: bool,
    pub(crate) host: Arc<Host>,
}

/// One machine of the `kvm` engine.
pub(crate) struct KvmVm {
    // Dropped before `shared`: the guest loses its memory before the host does.
    vm: Arc<VmFd>,
    chips: Option<Arc<KvmChips>>,
    shared: Arc<Shared>,
    vcpus: u32,
    made: Mutex<BTreeSet<u32>>,
    dirty: Mutex<Option<DirtyLog>>,
}

impl KvmVm {
    pub(crate) fn new(host: &Arc<Host>, setup: VmSetup) -> Result<Self, EngineError> {
        let max_vcpus = host.caps.max_vcpus;
        if setup.vcpus == 0 || setup.vcpus > max_vcpus {
            return Err(EngineError::Config(format!(
                "a machine of the kvm engine has 1 to {max_vcpus} vCPUs here, not {}",
                setup.vcpus
            )));
        }
        let has_chips = match setup.interrupts {
            Interrupts::None => false,
            Interrupts::Engine => true,
            Interrupts::Board(_) => {
                return Err(EngineError::unsupported(
                    "the board's interrupt chips (it brings the kernel's)",
                ));
            }
        };
        let vm = Arc::new(create(&host.kvm)?);
        vm.set_identity_map_address(IDENTITY_MAP)
            .and_then(|()| vm.set_tss_address(TSS))
            .map_err(|errno| EngineError::host("reserve KVM's own guest pages")(errno.into()))?;
        let counts = Arc::new(Counts::default());
        let chips = if has_chips {
            let chips = KvmChips::new(Arc::clone(&vm), Arc::clone(&counts))?;
            Some(Arc::new(chips))
        } else {
            None
        };
        let machine = Self {
            vm,
            chips,
            shared: Arc::new(Shared {
                ram: setup.ram,
                pio: setup.pio,
                mmio: setup.mmio,
                unclaimed: setup.unclaimed,
                counts,
                has_chips,
                host: Arc::clone(host),
            }),
            vcpus: setup.vcpus,
            made: Mutex::default(),
            dirty: Mutex::default(),
        };
        machine.set_slots(0)?;
        Ok(machine)
    }

    /// Gives the guest its RAM, one slot a run; again with other flags to change these.
    fn set_slots(&self, flags: u32) -> Result<(), EngineError> {
        let memory = self.shared.ram.memory();
        for (slot, range) in (0..).zip(self.shared.ram.layout().ranges()) {
            let host = memory.get_host_address(range.start).map_err(|error| {
                EngineError::Internal(format!("RAM without a mapping at {range:?}: {error}"))
            })?;
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start.0,
                memory_size: range.len_bytes,
                userspace_addr: host.expose_provenance() as u64,
            };
            // SAFETY: the run is mapped as a whole (`GuestRam` maps one region a run) for as long
            // as `shared` lives, which the machine and every vCPU hold; Rust code reaches it
            // through volatile accesses alone, so that the guest's writes break no reference.
            unsafe { self.vm.set_user_memory_region(region) }
                .map_err(|errno| EngineError::host("give the guest its memory")(errno.into()))?;
        }
        Ok(())
    }

    /// See [`Vm::create_vcpu`].
    pub(crate) fn make_vcpu(&self, index: u32, cpuid: &CpuidTable) -> Result<KvmVcpu, EngineError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if index >= self.vcpus {
            return Err(EngineError::Config(format!(
                "there is no vCPU {index} in a machine of {}",
                self.vcpus
            )));
        }
        if made.contains(&index) {
            return Err(EngineError::Config(format!(
                "vCPU {index} was made already"
            )));
        }
        let vcpu = KvmVcpu::new(&self.vm, index, cpuid, &self.shared)?;
        made.insert(index);
        Ok(vcpu)
    }

    fn dirty(&self) -> MutexGuard<'_, Option<DirtyLog>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// KVM_CREATE_VM is interrupted by any signal that the process gets, so it is repeated.
fn create(kvm: &Kvm) -> Result<VmFd, EngineError> {
    const TRIES: usize = 100;
    let mut last = None;
    for _ in 0..TRIES {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            Err(errno) => {
                last = Some(errno);
                if errno.errno() != libc::EINTR {
                    break;
                }
            }
        }
    }
    let error = last.map_or_else(std::io::Error::last_os_error, Into::into);
    Err(EngineError::host("create a machine in KVM")(error))
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u32, cpuid: CpuidTable) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.make_vcpu(index, &cpuid)?))
    }

    fn interrupts(&self) -> Option<Arc<dyn InterruptController>> {
        let chips = Arc::clone(self.chips.as_ref()?);
        Some(chips)
    }

    fn add_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<(), EngineError> {
        doorbell::set(&self.vm, doorbell, event, true)
    }

    fn remove_doorbell(&self, doorbell: Doorbell, event: &EventFd) -> Result<(), EngineError> {
        doorbell::set(&self.vm, doorbell, event, false)
    }

    fn set_irq_event(
        &self,
        event: &EventFd,
        message: Option<MsiMessage>,
    ) -> Result<(), EngineError> {
        if !self.shared.host.caps.irq_events {
            return Err(EngineError::unsupported("interrupt events"));
        }
        self.chips
            .as_ref()
            .ok_or(EngineError::State(
                "a machine without interrupts can't deliver events as interrupts",
            ))?
            .set_event(event, message)
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        let mut dirty = self.dirty();
        if on == dirty.is_some() {
            return Ok(());
        }
        self.set_slots(if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        *dirty = on.then(|| DirtyLog::new(self.shared.ram.layout().ranges()));
        Ok(())
    }

    fn take_dirty(&self, start: u64, pages: usize) -> Result<Vec<u64>, EngineError> {
        self.dirty()
            .as_mut()
            .ok_or(EngineError::State("the dirty log is off"))?
            .take(&self.vm, start, pages)
    }

    fn clock_ns(&self) -> Result<u64, EngineError> {
        let clock = self
            .vm
            .get_clock()
            .map_err(|errno| EngineError::host("read KVM's clock")(errno.into()))?;
        Ok(clock.clock)
    }

    fn set_clock_ns(&self, clock_ns: u64) -> Result<(), EngineError> {
        let clock = kvm_clock_data {
            clock: clock_ns,
            ..Default::default()
        };
        self.vm
            .set_clock(&clock)
            .map_err(|errno| EngineError::host("set KVM's clock")(errno.into()))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.shared.counts;
        [
            ("exits.pio", &counts.pio),
            ("exits.mmio", &counts.mmio),
            ("exits.halt", &counts.halts),
            ("exits.kick", &counts.kicks),
            ("exits.debug", &counts.stops),
            ("interrupts.lines", &counts.lines),
            ("interrupts.messages", &counts.messages),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
        .into()
    }
}
