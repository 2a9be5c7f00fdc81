//! A vCPU's state between KVM's structures and [`VcpuState`].

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_bindings::KVM_MP_STATE_INIT_RECEIVED;
use kvm_bindings::KVM_MP_STATE_RUNNABLE;
use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
use kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
use kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
use kvm_bindings::KVM_X86_SHADOW_INT_STI;
use kvm_bindings::kvm_debugregs;
use kvm_bindings::kvm_lapic_state;
use kvm_bindings::kvm_mp_state;
use kvm_bindings::kvm_regs;
use kvm_bindings::kvm_sregs;
use kvm_bindings::kvm_vcpu_events;
use kvm_bindings::kvm_xcrs;
use kvm_ioctls::VcpuFd;
use ringfence_engine::EngineError;
use ringfence_x86::state as x86;
use ringfence_x86::state::Activity;
use ringfence_x86::state::PendingEvents;
use ringfence_x86::state::Registers;
use ringfence_x86::state::SystemRegisters;
use ringfence_x86::state::VcpuState;
use vmm_sys_util::errno;

use crate::msrs;
use crate::segments;
use crate::vm::Shared;

/// Bytes of the local APIC's page that KVM exchanges.
const LAPIC_BYTES: usize = 1024;

fn reading(errno: errno::Error) -> EngineError {
    EngineError::host("read a vCPU's state")(errno.into())
}

/// KVM refuses a state that the processor can't have with EINVAL.
fn writing(part: &'static str) -> impl FnOnce(errno::Error) -> EngineError {
    move |errno| {
        if errno.errno() == libc::EINVAL {
            EngineError::Config(format!("a vCPU can't have these {part}"))
        } else {
            EngineError::host("write a vCPU's state")(errno.into())
        }
    }
}

/// Without XSAVE there is no XCR0; it counts as one with x87 alone, its value after reset.
const XCR0_RESET: u64 = 1;

/// Reads everything.
pub(crate) fn save(fd: &VcpuFd, shared: &Shared) -> Result<VcpuState, EngineError> {
    let mut sregs = system_from_kvm(&fd.get_sregs().map_err(reading)?);
    let debug = fd.get_debug_regs().map_err(reading)?;
    sregs.dr = debug.db;
    sregs.dr6 = debug.dr6;
    sregs.dr7 = debug.dr7;
    sregs.xcr0 = if shared.host.has_xcrs {
        fd.get_xcrs().map_err(reading)?.xcrs[0].value
    } else {
        XCR0_RESET
    };
    let mut lapic = Vec::new();
    let mut activity = Activity::Running;
    if shared.has_chips {
        let page = fd.get_lapic().map_err(reading)?;
        lapic = page.regs.iter().map(|byte| byte.to_le_bytes()[0]).collect();
        activity = activity_from_kvm(fd.get_mp_state().map_err(reading)?.mp_state);
    }
    Ok(VcpuState {
        regs: registers_from_kvm(&fd.get_regs().map_err(reading)?),
        sregs,
        xsave: shared.host.xsave.save(fd)?,
        msrs: msrs::save(fd)?,
        events: events_from_kvm(&fd.get_vcpu_events().map_err(reading)?),
        activity,
        lapic,
    })
}

/// Writes everything. Order: the APIC base before the APIC, the APIC before its deadline MSR, and
/// events last, because KVM_SET_REGS drops a pending exception (§4.12).
pub(crate) fn load(fd: &VcpuFd, state: &VcpuState, shared: &Shared) -> Result<(), EngineError> {
    let chips = shared.has_chips;
    if !chips && (state.activity != Activity::Running || !state.lapic.is_empty()) {
        return Err(EngineError::Config(
            "a vCPU of a machine without interrupts can't wait or have a local APIC".into(),
        ));
    }
    fd.set_sregs(&system_to_kvm(&state.sregs))
        .map_err(writing("system registers"))?;
    if shared.host.has_xcrs {
        fd.set_xcrs(&xcrs_to_kvm(state.sregs.xcr0))
            .map_err(writing("extended control registers"))?;
    } else if state.sregs.xcr0 != XCR0_RESET {
        return Err(EngineError::Config(
            "this host's processor has no XSAVE, so XCR0 is 1".into(),
        ));
    }
    if !state.xsave.is_empty() {
        shared.host.xsave.load(fd, &state.xsave)?;
    }
    fd.set_regs(&registers_to_kvm(&state.regs))
        .map_err(writing("registers"))?;
    fd.set_debug_regs(&kvm_debugregs {
        db: state.sregs.dr,
        dr6: state.sregs.dr6,
        dr7: state.sregs.dr7,
        ..Default::default()
    })
    .map_err(writing("debug registers"))?;
    if !state.lapic.is_empty() {
        fd.set_lapic(&lapic_to_kvm(&state.lapic)?)
            .map_err(writing("local APIC registers"))?;
    }
    msrs::load(fd, &state.msrs)?;
    fd.set_vcpu_events(&events_to_kvm(&state.events))
        .map_err(writing("pending events"))?;
    if chips {
        fd.set_mp_state(kvm_mp_state {
            mp_state: activity_to_kvm(state.activity),
        })
        .map_err(writing("activity"))?;
    }
    Ok(())
}

fn registers_from_kvm(regs: &kvm_regs) -> Registers {
    Registers {
        gpr: [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

fn registers_to_kvm(regs: &Registers) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = regs.gpr;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

fn system_from_kvm(sregs: &kvm_sregs) -> SystemRegisters {
    let segment = segments::from_kvm;
    SystemRegisters {
        segments: [
            segment(&sregs.es),
            segment(&sregs.cs),
            segment(&sregs.ss),
            segment(&sregs.ds),
            segment(&sregs.fs),
            segment(&sregs.gs),
        ],
        tr: segment(&sregs.tr),
        ldtr: segment(&sregs.ldt),
        gdt: segments::table_from_kvm(&sregs.gdt),
        idt: segments::table_from_kvm(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        ..SystemRegisters::default()
    }
}

fn system_to_kvm(sregs: &SystemRegisters) -> kvm_sregs {
    let segment = |index: usize| segments::to_kvm(&sregs.segments[index]);
    kvm_sregs {
        es: segment(x86::ES),
        cs: segment(x86::CS),
        ss: segment(x86::SS),
        ds: segment(x86::DS),
        fs: segment(x86::FS),
        gs: segment(x86::GS),
        tr: segments::to_kvm(&sregs.tr),
        ldt: segments::to_kvm(&sregs.ldtr),
        gdt: segments::table_to_kvm(&sregs.gdt),
        idt: segments::table_to_kvm(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        // Pending interrupts travel with the events.
        interrupt_bitmap: [0; 4],
    }
}

fn xcrs_to_kvm(xcr0: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = xcr0;
    xcrs
}

fn lapic_to_kvm(page: &[u8]) -> Result<kvm_lapic_state, EngineError> {
    if page.len() != LAPIC_BYTES {
        return Err(EngineError::Config(format!(
            "a local APIC's page has {LAPIC_BYTES} bytes, not {}",
            page.len()
        )));
    }
    let mut lapic = kvm_lapic_state::default();
    for (to, from) in lapic.regs.iter_mut().zip(page) {
        *to = libc::c_char::from_le_bytes([*from]);
    }
    Ok(lapic)
}

fn events_from_kvm(events: &kvm_vcpu_events) -> PendingEvents {
    let exception = events.exception;
    PendingEvents {
        exception: (exception.injected != 0 || exception.pending != 0).then(|| {
            let error = (exception.has_error_code != 0).then_some(exception.error_code);
            (exception.nr, error)
        }),
        interrupt: (events.interrupt.injected != 0).then_some(events.interrupt.nr),
        shadow: events.interrupt.shadow != 0,
        nmi_pending: events.nmi.pending != 0 || events.nmi.injected != 0,
        nmi_masked: events.nmi.masked != 0,
    }
}

fn events_to_kvm(events: &PendingEvents) -> kvm_vcpu_events {
    let mut kvm = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    if let Some((vector, error)) = events.exception {
        kvm.exception.injected = 1;
        kvm.exception.nr = vector;
        kvm.exception.has_error_code = u8::from(error.is_some());
        kvm.exception.error_code = error.unwrap_or(0);
    }
    if let Some(vector) = events.interrupt {
        kvm.interrupt.injected = 1;
        kvm.interrupt.nr = vector;
    }
    if events.shadow {
        kvm.interrupt.shadow = KVM_X86_SHADOW_INT_STI.to_le_bytes()[0];
    }
    kvm.nmi.pending = u8::from(events.nmi_pending);
    kvm.nmi.masked = u8::from(events.nmi_masked);
    kvm
}

fn activity_from_kvm(mp_state: u32) -> Activity {
    match mp_state {
        KVM_MP_STATE_UNINITIALIZED => Activity::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::Running,
    }
}

fn activity_to_kvm(activity: Activity) -> u32 {
    match activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    }
}
