//! Model-specific registers.

use ringfence_x86::cpuid::CpuidResult;
use ringfence_x86::msr as number;
use ringfence_x86::paging::CR4_OSXSAVE;
use ringfence_x86::paging::EFER_LMA;
use ringfence_x86::paging::EFER_LME;
use ringfence_x86::paging::EFER_NXE;
use ringfence_x86::paging::EFER_SCE;
use ringfence_x86::state::FS;
use ringfence_x86::state::GS;

use crate::clock::tsc;
use crate::core::Core;
use crate::core::is_canonical;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::features::ARCH_CAPABILITIES;

/// EFER.FFXSR and EFER.AIBRSE exist so that they may be set; nothing depends on them.
const EFER_FFXSR: u64 = 1 << 14;
const EFER_AIBRSE: u64 = 1 << 21;
const EFER_VALID: u64 = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR | EFER_AIBRSE;
/// Write-back by default, as firmware leaves it, MTRRs enabled.
const MTRR_DEF_TYPE_RESET: u64 = 0x806;
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings.
const MISC_ENABLE: u64 = 1;
/// AMD's hardware configuration: the time-stamp counter counts at one rate (PPR, Core::X86::Msr::HWCR).
/// Kernels call anything else a fault of the firmware.
const AMD_HWCR: u32 = 0xc001_0015;
const TSC_FREQ_SEL: u64 = 1 << 24;
/// Reads as zero, ignores writes: what kernels touch without asking CPUID first.
const IGNORED: [u32; 19] = [
    // Microcode revision, machine-check, platform and debug controls.
    0x17,
    0x8b,
    0x179,
    0x17a,
    0x17b,
    0x1d9,
    0x1fc,
    0x606,
    0x611,
    0x619,
    0x639,
    0x641,
    // AMD: NB_CFG, DE_CFG, LS_CFG, BU_CFG2, IBS, patch level, SYSCFG.
    0xc001_001f,
    0xc001_1029,
    0xc001_1020,
    0xc001_102a,
    0xc001_103a,
    0xc001_0140,
    0xc001_0010,
];

/// Registers that only the monitor knows.
#[derive(Clone, Debug)]
pub(crate) struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub tsc_offset: u64,
    pub tsc_adjust: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub mtrr_def_type: u64,
    pub misc_enable: u64,
    pub wall_clock: u64,
    pub system_time: u64,
    pub poll_control: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: PAT_RESET,
            mtrr_def_type: MTRR_DEF_TYPE_RESET,
            misc_enable: MISC_ENABLE,
            wall_clock: 0,
            system_time: 0,
            poll_control: 1,
        }
    }
}

/// Registers that a saved state lists, in the order to load them.
pub(crate) const SAVED: [u32; 15] = [
    number::STAR,
    number::LSTAR,
    number::CSTAR,
    number::SFMASK,
    number::KERNEL_GS_BASE,
    number::TSC_AUX,
    number::IA32_SYSENTER_CS,
    number::IA32_SYSENTER_ESP,
    number::IA32_SYSENTER_EIP,
    number::IA32_PAT,
    number::IA32_MTRR_DEF_TYPE,
    number::IA32_MISC_ENABLE,
    number::KVM_WALL_CLOCK_NEW,
    number::KVM_SYSTEM_TIME_NEW,
    number::KVM_POLL_CONTROL,
];

impl Core {
    /// The TSC as the guest reads it.
    pub(crate) fn guest_tsc(&self) -> u64 {
        tsc().wrapping_add(self.msrs.tsc_offset)
    }

    fn is_apic_msr(msr: u32) -> bool {
        matches!(
            msr,
            number::IA32_APIC_BASE | number::IA32_TSC_DEADLINE | number::IA32_X2APIC_FIRST
                ..=number::IA32_X2APIC_LAST
        )
    }

    /// RDMSR.
    pub(crate) fn read_msr(&mut self, msr: u32) -> Result<u64, Stop> {
        if Self::is_apic_msr(msr) {
            return match &self.apic {
                Some(apic) => apic.read_msr(msr).map_err(|_| Fault::general(0).into()),
                None if msr == number::IA32_APIC_BASE => Ok(self.sys.apic_base),
                None => Err(Fault::general(0).into()),
            };
        }
        let value = match msr {
            number::IA32_TSC => self.guest_tsc(),
            number::IA32_TSC_ADJUST => self.msrs.tsc_adjust,
            number::EFER => self.sys.efer,
            number::STAR => self.msrs.star,
            number::LSTAR => self.msrs.lstar,
            number::CSTAR => self.msrs.cstar,
            number::SFMASK => self.msrs.sfmask,
            number::FS_BASE => self.segment_base(FS),
            number::GS_BASE => self.segment_base(GS),
            number::KERNEL_GS_BASE => self.hot().kernel_gs_base,
            number::TSC_AUX => self.hot().tsc_aux,
            number::IA32_SYSENTER_CS => self.msrs.sysenter_cs,
            number::IA32_SYSENTER_ESP => self.msrs.sysenter_esp,
            number::IA32_SYSENTER_EIP => self.msrs.sysenter_eip,
            number::IA32_PAT => self.msrs.pat,
            number::IA32_MTRRCAP => 0,
            number::IA32_MTRR_DEF_TYPE => self.msrs.mtrr_def_type,
            number::IA32_MISC_ENABLE => self.msrs.misc_enable,
            number::IA32_FEATURE_CONTROL => 1,
            number::IA32_ARCH_CAPABILITIES if !self.shared.host.amd => ARCH_CAPABILITIES,
            number::KVM_WALL_CLOCK_NEW => self.msrs.wall_clock,
            number::KVM_SYSTEM_TIME_NEW => self.msrs.system_time,
            number::KVM_POLL_CONTROL => self.msrs.poll_control,
            AMD_HWCR => TSC_FREQ_SEL,
            _ if IGNORED.contains(&msr) => 0,
            _ => return Err(Fault::general(0).into()),
        };
        Ok(value)
    }

    /// WRMSR.
    pub(crate) fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        if Self::is_apic_msr(msr) {
            return self.write_apic_msr(msr, value);
        }
        let canonical = |value| {
            if is_canonical(value) {
                Ok(value)
            } else {
                Err(Stop::from(Fault::general(0)))
            }
        };
        match msr {
            number::IA32_TSC => self.write_tsc(value)?,
            number::IA32_TSC_ADJUST => {
                let delta = value.wrapping_sub(self.msrs.tsc_adjust);
                self.msrs.tsc_adjust = value;
                self.shift_tsc(delta)?;
            }
            number::EFER => self.write_efer(value)?,
            number::STAR => {
                self.msrs.star = value;
                self.fast_stale = true;
            }
            number::LSTAR => {
                self.msrs.lstar = canonical(value)?;
                self.fast_stale = true;
            }
            number::CSTAR => self.msrs.cstar = canonical(value)?,
            number::SFMASK => {
                self.msrs.sfmask = value & 0xffff_ffff;
                self.fast_stale = true;
            }
            number::FS_BASE => self.hot_mut().seg_base[FS] = canonical(value)?,
            number::GS_BASE => self.hot_mut().seg_base[GS] = canonical(value)?,
            number::KERNEL_GS_BASE => self.hot_mut().kernel_gs_base = canonical(value)?,
            number::TSC_AUX => {
                let aux = u32::try_from(value).map_err(|_| Fault::general(0))?;
                self.hot_mut().tsc_aux = u64::from(aux);
            }
            number::IA32_SYSENTER_CS => self.msrs.sysenter_cs = value,
            number::IA32_SYSENTER_ESP => self.msrs.sysenter_esp = canonical(value)?,
            number::IA32_SYSENTER_EIP => self.msrs.sysenter_eip = canonical(value)?,
            number::IA32_PAT => self.msrs.pat = valid_pat(value)?,
            number::IA32_MTRR_DEF_TYPE => self.msrs.mtrr_def_type = value & 0xcff,
            number::IA32_MISC_ENABLE => self.msrs.misc_enable = value,
            number::KVM_WALL_CLOCK_NEW => self.write_wall_clock(value)?,
            number::KVM_SYSTEM_TIME_NEW => self.write_system_time(value)?,
            number::KVM_POLL_CONTROL => self.msrs.poll_control = value & 1,
            AMD_HWCR => {}
            _ if IGNORED.contains(&msr) => {}
            _ => return Err(Fault::general(0).into()),
        }
        Ok(())
    }

    fn write_apic_msr(&mut self, msr: u32, value: u64) -> Result<(), Stop> {
        self.maybe_interrupt = true;
        let Some(apic) = &self.apic else {
            return Err(Fault::general(0).into());
        };
        apic.write_msr(msr, value).map_err(|_| Fault::general(0))?;
        // The two most frequent writes can only bring an ordinary interrupt.
        const X2APIC_EOI: u32 = 0x80b;
        self.apic_touched = !matches!(msr, X2APIC_EOI | number::IA32_TSC_DEADLINE);
        if msr == number::IA32_APIC_BASE {
            self.sys.apic_base = value;
            // The page may have appeared, moved or gone.
            self.windows.flush_everything();
        }
        Ok(())
    }

    fn write_tsc(&mut self, value: u64) -> Result<(), Stop> {
        let delta = value.wrapping_sub(self.guest_tsc());
        self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
        self.shift_tsc(delta)
    }

    /// Moves the guest's counter. Translated code reads the host's while they agree.
    fn shift_tsc(&mut self, delta: u64) -> Result<(), Stop> {
        let agreed = self.msrs.tsc_offset == 0;
        self.msrs.tsc_offset = self.msrs.tsc_offset.wrapping_add(delta);
        if agreed && delta != 0 {
            self.empty_code_cache()?;
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Stop> {
        let paging = self.sys.cr0 & ringfence_x86::paging::CR0_PG != 0;
        if value & !EFER_VALID != 0 || (paging && (value ^ self.sys.efer) & EFER_LME != 0) {
            return Err(Fault::general(0).into());
        }
        let changed = value ^ self.sys.efer;
        self.fast_stale = true;
        self.sys.efer = value & !EFER_LMA | self.sys.efer & EFER_LMA;
        if changed & EFER_NXE != 0 {
            self.windows.flush_everything();
        }
        Ok(())
    }

    /// CPUID for the current EAX and ECX.
    pub(crate) fn cpuid_result(&self) -> CpuidResult {
        #[expect(clippy::cast_possible_truncation, reason = "EAX and ECX")]
        let (leaf, subleaf) = (self.gpr(0) as u32, self.gpr(1) as u32);
        let mut result = self.lookup_cpuid(leaf, subleaf);
        const OSXSAVE: u32 = 1 << 27;
        const FPU_APIC_ON: u64 = 1 << 11;
        const APIC: u32 = 1 << 9;
        if leaf == 1 {
            if self.sys.cr4 & CR4_OSXSAVE != 0 {
                result.ecx |= OSXSAVE;
            } else {
                result.ecx &= !OSXSAVE;
            }
            if self.sys.apic_base & FPU_APIC_ON == 0 {
                result.edx &= !APIC;
            }
        }
        if leaf == 0xd && subleaf == 0 && self.sys.xcr0 & 0b100 == 0 {
            // EBX is the size for the components that are enabled now.
            result.ebx = 576;
        }
        result
    }

    fn lookup_cpuid(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let exact = self.cpuid.get(leaf, subleaf);
        let found = if exact.is_none() && !self.cpuid.has_subleaves(leaf) {
            self.cpuid.get(leaf, 0)
        } else {
            exact
        };
        found.copied().unwrap_or_default()
    }

    /// Whether the guest was told of XSAVE.
    pub(crate) fn has_xsave(&self) -> bool {
        self.cpuid
            .get(1, 0)
            .is_some_and(|leaf| leaf.ecx & (1 << 26) != 0)
    }
}

fn valid_pat(value: u64) -> Result<u64, Stop> {
    let valid = value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4..=7));
    if valid {
        Ok(value)
    } else {
        Err(Fault::general(0).into())
    }
}
