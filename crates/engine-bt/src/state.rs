//! Saving and loading a vCPU's state.

use ringfence_engine::EngineError;
use ringfence_x86::msr as number;
use ringfence_x86::paging::CR0_ET;
use ringfence_x86::paging::CR0_PE;
use ringfence_x86::paging::CR0_PG;
use ringfence_x86::paging::CR4_PAE;
use ringfence_x86::paging::EFER_LMA;
use ringfence_x86::paging::EFER_LME;
use ringfence_x86::state::Activity;
use ringfence_x86::state::CS;
use ringfence_x86::state::PendingEvents;
use ringfence_x86::state::Registers;
use ringfence_x86::state::SS;
use ringfence_x86::state::Segment;
use ringfence_x86::state::SystemRegisters;
use ringfence_x86::state::VcpuState;

use crate::core::Core;
use crate::core::Injected;
use crate::fault::Fault;
use crate::fault::Stop;

/// Access rights of real-mode segments: present, writable data or readable code.
const REAL_DATA: u32 = 0x93;
const REAL_CODE: u32 = 0x9b;

impl Core {
    /// The whole state.
    pub(crate) fn save(&mut self) -> VcpuState {
        let mut sregs = self.sys;
        sregs.cr2 = self.hot().cr2;
        for index in 0..6 {
            sregs.segments[index].base = self.segment_base(index);
        }
        if let Some(apic) = &self.apic {
            sregs.cr8 = u64::from(apic.task_priority());
            sregs.apic_base = apic
                .read_msr(number::IA32_APIC_BASE)
                .unwrap_or(sregs.apic_base);
        }
        let (exception, interrupt) = match self.injected {
            Some(Injected::Exception(fault)) => (Some((fault.vector, fault.error)), None),
            Some(Injected::Interrupt(vector)) => (None, Some(vector)),
            None => (None, None),
        };
        let mut msrs = Vec::new();
        for msr in crate::msr::SAVED {
            if let Ok(value) = self.read_msr(msr) {
                msrs.push((msr, value));
            }
        }
        VcpuState {
            regs: Registers {
                gpr: self.hot().gpr,
                rip: self.rip,
                rflags: self.rflags(),
            },
            sregs,
            xsave: self.xsave.bytes(self.shared.host.xsave_len),
            msrs,
            events: PendingEvents {
                exception,
                interrupt,
                shadow: self.shadow,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_masked,
            },
            activity: if self.activity == Activity::Halted && self.remote.is_unhalted() {
                Activity::Running
            } else {
                self.activity
            },
            lapic: self.apic.as_ref().map_or_else(Vec::new, |apic| apic.save()),
        }
    }

    /// Replaces the state.
    pub(crate) fn load(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        let refused = |what: &str| EngineError::Config(format!("the vCPU state has {what}"));
        if let Some(what) = contradiction(&state.sregs) {
            return Err(refused(what));
        }
        if !state.xsave.is_empty() && !self.xsave.load(&state.xsave, self.shared.host.guest_xcr0) {
            return Err(refused("an XSAVE area that this vCPU can't load"));
        }
        if state.sregs.xcr0 & !self.shared.host.guest_xcr0 != 0 {
            return Err(refused(
                "an XCR0 with components that this vCPU doesn't have",
            ));
        }
        self.sys = state.sregs;
        self.sys.cr0 |= CR0_ET;
        self.hot_mut().cr2 = state.sregs.cr2;
        for (index, segment) in state.sregs.segments.iter().enumerate() {
            self.hot_mut().seg_base[index] = segment.base;
        }
        self.cpl = if state.sregs.cr0 & 1 == 0 {
            0
        } else {
            (state.sregs.segments[SS].access >> 5 & 3) as u8
        };
        self.hot_mut().gpr = state.regs.gpr;
        self.rip = state.regs.rip;
        self.windows.flush_everything();
        self.windows.select(self.current_tag());
        self.windows.flush_current();
        self.window_changed();
        self.set_rflags(state.regs.rflags);
        for &(msr, value) in &state.msrs {
            self.load_msr(msr, value)
                .map_err(|_| refused(&format!("MSR {msr:#x} = {value:#x}, which is invalid")))?;
        }
        self.load_apic(state).map_err(refused)?;
        self.load_events(&state.events);
        self.activity = state.activity;
        self.unhalted = false;
        self.replay = crate::core::Replay::default();
        self.exits.clear();
        self.resumed_at = None;
        self.maybe_interrupt = true;
        self.mode_changed();
        Ok(())
    }

    fn load_msr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        match msr {
            // LMA is the state's own here.
            number::EFER => self.sys.efer = value,
            _ => self.write_msr(msr, value)?,
        }
        Ok(())
    }

    fn load_apic(&mut self, state: &VcpuState) -> Result<(), &'static str> {
        let Some(apic) = &self.apic else {
            return Ok(());
        };
        if !state.lapic.is_empty() {
            apic.restore(&state.lapic)
                .map_err(|_| "a local APIC page that isn't one")?;
        }
        if state.sregs.apic_base != 0 {
            apic.write_msr(number::IA32_APIC_BASE, state.sregs.apic_base)
                .map_err(|_| "an APIC base that isn't one")?;
        }
        let priority = u8::try_from(state.sregs.cr8 & 0xf).unwrap_or(0);
        if state.lapic.is_empty() {
            apic.set_task_priority(priority);
        }
        Ok(())
    }

    fn load_events(&mut self, events: &PendingEvents) {
        self.shadow = events.shadow;
        self.nmi_pending = events.nmi_pending;
        self.nmi_masked = events.nmi_masked;
        self.injected = match (events.exception, events.interrupt) {
            (Some((vector, error)), _) => Some(Injected::Exception(Fault {
                vector,
                error,
                address: self.hot().cr2,
            })),
            (None, Some(vector)) => Some(Injected::Interrupt(vector)),
            (None, None) => None,
        };
    }

    /// INIT: the state after reset but for caches, FPU and most MSRs (SDM 3A table 9-1).
    pub(crate) fn reset_by_init(&mut self) {
        const CPUID_SIGNATURE: u32 = 1;
        let xcr0 = self.sys.xcr0;
        let apic_base = self.sys.apic_base;
        let mut sys = SystemRegisters {
            cr0: CR0_ET | 0x6000_0000,
            xcr0,
            apic_base,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..Default::default()
        };
        for segment in &mut sys.segments {
            *segment = real_segment(0, REAL_DATA);
        }
        sys.segments[CS] = Segment {
            base: 0xffff_0000,
            ..real_segment(0xf000, REAL_CODE)
        };
        sys.gdt.limit = 0xffff;
        sys.idt.limit = 0xffff;
        sys.ldtr = Segment {
            access: 0x82,
            limit: 0xffff,
            ..Segment::default()
        };
        sys.tr = Segment {
            access: 0x8b,
            limit: 0xffff,
            ..Segment::default()
        };
        self.sys = sys;
        self.hot_mut().cr2 = 0;
        self.cpl = 0;
        let signature = self
            .cpuid
            .get(CPUID_SIGNATURE, 0)
            .map_or(0, |leaf| leaf.eax);
        let hot = self.hot_mut();
        hot.gpr = [0; 16];
        hot.gpr[2] = u64::from(signature);
        for index in 0..6 {
            hot.seg_base[index] = sys.segments[index].base;
        }
        self.rip = 0xfff0;
        self.shadow = false;
        self.nmi_masked = false;
        self.nmi_pending = false;
        self.injected = None;
        self.activity = Activity::WaitForSipi;
        self.windows.flush_everything();
        self.windows.select(0);
        self.window_changed();
        self.set_rflags(2);
    }

    /// SIPI: real mode at `page << 12`.
    pub(crate) fn start_at(&mut self, page: u8) {
        self.load_real_segment(CS, u16::from(page) << 8);
        self.rip = 0;
        self.activity = Activity::Running;
        self.mode_changed();
    }
}

/// What no processor can have.
fn contradiction(sregs: &SystemRegisters) -> Option<&'static str> {
    let active = sregs.efer & EFER_LMA != 0;
    let paging = sregs.cr0 & CR0_PG != 0;
    if active && !(paging && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LME != 0) {
        return Some("long mode without paging, PAE or LME");
    }
    if paging && sregs.cr0 & CR0_PE == 0 {
        return Some("paging without protection");
    }
    if paging && sregs.efer & EFER_LME != 0 && !active {
        return Some("paging with LME but without LMA");
    }
    let avx_without_sse = sregs.xcr0 & 0b110 == 0b100;
    if sregs.xcr0 & 1 == 0 || avx_without_sse {
        return Some("an impossible XCR0");
    }
    None
}

fn real_segment(selector: u16, access: u32) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        access,
    }
}
