//! The memory that a vCPU shares with the kernel: why KVM_RUN returned, and the data of the
//! access it returned for (§5).

// UNSAFETY: reads and writes a mapping that the kernel also writes (while this thread is in
// KVM_RUN), and reads fields of a C union by the exit reason that says which is valid.
#![expect(
    unsafe_code,
    reason = "kvm_run is a C structure shared with the kernel"
)]

use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::AtomicU8;

use kvm_bindings::KVM_EXIT_IO_OUT;
use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use ringfence_engine::EngineError;
use ringfence_engine::IoSpace;

/// One exit's access: `count` elements of `size` bytes, moved in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) space: IoSpace,
    pub(crate) address: u64,
    pub(crate) size: usize,
    pub(crate) count: usize,
    pub(crate) write: bool,
    data_offset: usize,
}

/// The mapping of one vCPU's `kvm_run`, owned by its [`VcpuFd`], which lives as long.
#[derive(Debug)]
pub(crate) struct RunPage {
    run: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the page is used by the thread that holds the vCPU alone, but for `immediate_exit`,
// which is accessed as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: shared references only read fields that change while KVM_RUN runs, and running needs a
// unique reference to the vCPU.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The page of `fd`, `size` bytes long (KVM_GET_VCPU_MMAP_SIZE). It must not outlive `fd`.
    pub(crate) fn new(fd: &mut VcpuFd, size: usize) -> Self {
        Self {
            run: NonNull::from(fd.get_kvm_run()),
            size,
        }
    }

    fn get(&self) -> &kvm_run {
        // SAFETY: the mapping lives as long as the `VcpuFd` beside this value, and the kernel
        // writes it only inside KVM_RUN, where no reference from here exists.
        unsafe { self.run.as_ref() }
    }

    /// The byte that makes KVM_RUN return at once.
    pub(crate) fn immediate_exit(&self) -> NonNull<AtomicU8> {
        // SAFETY: the field lies in the mapping; only its address is taken.
        let byte = unsafe { &raw mut (*self.run.as_ptr()).immediate_exit };
        // SAFETY: a field of a mapped structure is not null; u8 and AtomicU8 have one layout.
        unsafe { NonNull::new_unchecked(byte.cast()) }
    }

    pub(crate) fn exit_reason(&self) -> u32 {
        self.get().exit_reason
    }

    /// CR8 as KVM takes it at the next entry of a vCPU without a local APIC.
    pub(crate) fn set_cr8(&mut self, value: u64) {
        // SAFETY: the field lies in the mapping and this thread is not in KVM_RUN.
        unsafe { (&raw mut (*self.run.as_ptr()).cr8).write(value) };
    }

    /// The port access of a KVM_EXIT_IO.
    pub(crate) fn pio(&self) -> Result<Access, EngineError> {
        // SAFETY: the exit reason says that `io` is the valid field; any bits are valid in it.
        let io = unsafe { self.get().__bindgen_anon_1.io };
        self.checked(Access {
            space: IoSpace::Pio,
            address: u64::from(io.port),
            size: usize::from(io.size),
            count: usize::try_from(io.count).unwrap_or(usize::MAX),
            write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            data_offset: usize::try_from(io.data_offset).unwrap_or(usize::MAX),
        })
    }

    /// The memory access of a KVM_EXIT_MMIO.
    pub(crate) fn mmio(&self) -> Result<Access, EngineError> {
        // SAFETY: the exit reason says that `mmio` is the valid field; any bits are valid in it.
        let mmio = unsafe { self.get().__bindgen_anon_1.mmio };
        let data = std::mem::offset_of!(kvm_run, __bindgen_anon_1.mmio.data);
        self.checked(Access {
            space: IoSpace::Mmio,
            address: mmio.phys_addr,
            size: usize::try_from(mmio.len).unwrap_or(usize::MAX),
            count: 1,
            write: mmio.is_write != 0,
            data_offset: data,
        })
    }

    /// Refuses an access whose data would lie outside the mapping.
    fn checked(&self, access: Access) -> Result<Access, EngineError> {
        let end = access
            .size
            .checked_mul(access.count)
            .and_then(|len| len.checked_add(access.data_offset));
        if access.size == 0 || end.is_none_or(|end| end > self.size) {
            return Err(EngineError::Internal(format!(
                "KVM reports an access outside its page: {access:x?}"
            )));
        }
        Ok(access)
    }

    /// The bytes of element `index` of `access`, which this page reported last.
    pub(crate) fn element(&mut self, access: &Access, index: usize) -> &mut [u8] {
        assert!(index < access.count, "element {index} of {access:?}");
        let offset = access.data_offset + index * access.size;
        // SAFETY: `checked` held the whole access inside the mapping; the kernel doesn't touch
        // it outside KVM_RUN, and `&mut self` keeps the slice unique.
        unsafe {
            let start = self.run.as_ptr().cast::<u8>().add(offset);
            slice::from_raw_parts_mut(start, access.size)
        }
    }

    /// The linear address of the next instruction at a KVM_EXIT_DEBUG.
    pub(crate) fn debug_pc(&self) -> u64 {
        // SAFETY: the exit reason says that `debug` is the valid field; any bits are valid in it.
        unsafe { self.get().__bindgen_anon_1.debug.arch.pc }
    }

    /// The sub-error of a KVM_EXIT_INTERNAL_ERROR.
    pub(crate) fn internal_error(&self) -> u32 {
        // SAFETY: the exit reason says that `internal` is the valid field; any bits are valid.
        unsafe { self.get().__bindgen_anon_1.internal.suberror }
    }

    /// The hardware's reason in a KVM_EXIT_FAIL_ENTRY.
    pub(crate) fn fail_entry(&self) -> u64 {
        // SAFETY: the exit reason says that `fail_entry` is the valid field; any bits are valid.
        unsafe {
            self.get()
                .__bindgen_anon_1
                .fail_entry
                .hardware_entry_failure_reason
        }
    }
}
