//! Doorbells: guest writes that signal an event inside the kernel (§4.59, KVM_IOEVENTFD).

// UNSAFETY: kvm-ioctls ties the width to the matched value's type, so a width without a value,
// which the interface has, needs the call itself.
#![expect(unsafe_code, reason = "calls KVM_IOEVENTFD directly")]

use std::os::fd::AsRawFd;

use kvm_bindings::KVMIO;
use kvm_bindings::kvm_ioeventfd;
use kvm_ioctls::VmFd;
use ringfence_engine::Doorbell;
use ringfence_engine::EngineError;
use ringfence_engine::IoSpace;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

const DATAMATCH: u32 = 1 << 0;
const PIO: u32 = 1 << 1;
const DEASSIGN: u32 = 1 << 2;

/// Adds (`on`) or removes a doorbell.
pub(crate) fn set(
    vm: &VmFd,
    doorbell: Doorbell,
    event: &EventFd,
    on: bool,
) -> Result<(), EngineError> {
    if !matches!(doorbell.width, 0 | 1 | 2 | 4 | 8) {
        return Err(EngineError::Config(format!(
            "a doorbell is 1, 2, 4 or 8 bytes wide, or 0 for any width, not {}",
            doorbell.width
        )));
    }
    if doorbell.width == 0 && doorbell.value.is_some() {
        return Err(EngineError::Config(
            "a doorbell that compares a value needs a width".into(),
        ));
    }
    let mut flags = 0;
    if doorbell.value.is_some() {
        flags |= DATAMATCH;
    }
    if doorbell.space == IoSpace::Pio {
        flags |= PIO;
    }
    if !on {
        flags |= DEASSIGN;
    }
    let request = kvm_ioeventfd {
        datamatch: doorbell.value.unwrap_or(0),
        addr: doorbell.address,
        len: u32::from(doorbell.width),
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    };
    // SAFETY: the kernel reads the structure, which lives through the call, and takes its own
    // reference to the event.
    if unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) } != 0 {
        let action = if on {
            "add a doorbell"
        } else {
            "remove a doorbell"
        };
        return Err(EngineError::host(action)(errno::Error::last().into()));
    }
    Ok(())
}
