//! The `kvm` engine: vCPUs run by the processor's own virtualization extension, through the host
//! kernel's KVM interface (the kernel's virt/kvm/api document; section numbers refer to it).
//!
//! Interrupt chips are the kernel's: local APICs, IOAPIC, PICs and PIT, wired as on a PC (the
//! PIT's line, KVM's input 0, goes to IOAPIC pin 2, which the MADT must say). A machine made with
//! [`Interrupts::None`](ringfence_engine::Interrupts::None) has no chips at all, so HLT exits.
//!
//! Nothing here takes the host for bare metal: abilities are asked for one by one, and [`probe`]
//! measures whether a `/dev/kvm` that exists runs code at a useful speed.
//!
//! Known limits, all KVM's own: a guest that looks at its trap flag sees the debugger's single
//! step, a step over an instruction that loads the flags (POPF, IRET, SYSRET) may run on, and while
//! the debugger is on, the guest's own debug exceptions reach it and not the guest.

mod chips;
mod cpuid;
mod debug;
mod dirty;
mod doorbell;
mod engine;
mod io;
mod kick;
mod msrs;
mod probe;
mod run_page;
mod scratch;
mod segments;
mod state;
mod vcpu;
mod vm;
mod xsave;

pub use engine::KvmEngine;
pub use probe::{KvmProbe, KvmVerdict, USEFUL_MIPS, probe};
