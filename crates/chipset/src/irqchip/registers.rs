//! The local APIC's registers, by their offsets in the xAPIC page and by x2APIC's MSR numbers.
//!
//! Spec: SDM 3A table 11-1 (page), table 11-6 (MSRs), §11.12 (x2APIC).

use std::sync::atomic::Ordering;

use ringfence_engine::ApicFault;
use ringfence_x86::msr;

use super::Irqchip;
use super::apic::Apic;
use super::apic::BASE_BSP;
use super::apic::BASE_ENABLE;
use super::apic::BASE_X2APIC;
use super::apic::ESR_ILLEGAL_REGISTER;
use super::apic::LVT_ENTRIES;
use super::apic::LVT_MASKED;
use super::apic::Lvt;

/// Version 0x14 (integrated), highest LVT entry 5, no suppression of EOI broadcasts.
const VERSION_VALUE: u32 = 5 << 16 | 0x14;

pub(super) const ID: u16 = 0x20;
pub(super) const VERSION: u16 = 0x30;
pub(super) const TPR: u16 = 0x80;
const APR: u16 = 0x90;
pub(super) const PPR: u16 = 0xa0;
const EOI: u16 = 0xb0;
const RRD: u16 = 0xc0;
pub(super) const LDR: u16 = 0xd0;
pub(super) const DFR: u16 = 0xe0;
pub(super) const SVR: u16 = 0xf0;
pub(super) const ISR: u16 = 0x100;
pub(super) const TMR: u16 = 0x180;
pub(super) const IRR: u16 = 0x200;
pub(super) const ESR: u16 = 0x280;
pub(super) const ICR_LOW: u16 = 0x300;
pub(super) const ICR_HIGH: u16 = 0x310;
pub(super) const LVT_FIRST: u16 = 0x320;
const LVT_LAST: u16 = 0x370;
pub(super) const INITIAL_COUNT: u16 = 0x380;
pub(super) const CURRENT_COUNT: u16 = 0x390;
pub(super) const DIVIDE: u16 = 0x3e0;
const SELF_IPI: u16 = 0x3f0;

const PAGE_REGISTERS: u64 = 0x400;

/// Bits that exist in each LVT entry: vector, delivery mode, polarity, trigger, mask, timer mode.
/// Delivery status and remote IRR are read-only and always clear here.
const LVT_WRITABLE: [u32; LVT_ENTRIES] = [
    0x7_00ff, // timer: modes 0 to 2
    0x1_07ff, 0x1_07ff, // thermal, performance
    0x1_a7ff, 0x1_a7ff, // LINT0, LINT1
    0x1_00ff, // error
];
/// Delivery status and remote IRR.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;
const LVT_TIMER_MODE_RESERVED: u32 = 3 << 17;
/// Vector, software enable, focus checking.
const SVR_WRITABLE: u32 = 0x3ff;
/// ICR bits that exist: delivery status (12) is always clear.
const ICR_LOW_WRITABLE: u32 = 0x000c_cfff;
/// IA32_APIC_BASE bits that may be set: 8, 10, 11 and the address.
const BASE_KNOWN: u64 = 0x000f_ffff_ffff_fd00;

fn lvt_of(offset: u16) -> Option<usize> {
    let index = usize::from(offset.checked_sub(LVT_FIRST)? >> 4);
    (index < LVT_ENTRIES && offset & 0xf == 0).then_some(index)
}

/// Which of the eight 32-bit words of a vector set lies at `offset`.
fn word_of(first: u16, offset: u16) -> usize {
    usize::from((offset - first) >> 4)
}

impl Apic {
    /// Reads a register; `None` where there is none. Offsets are multiples of 16.
    pub(super) fn read(&self, offset: u16) -> Option<u32> {
        let relaxed = Ordering::Relaxed;
        let [icr_low, icr_high] = halves(self.icr.load(relaxed));
        Some(match offset {
            ID if self.is_x2apic() => self.id,
            ID => self.id << 24,
            VERSION => VERSION_VALUE,
            TPR => self.tpr.load(relaxed),
            APR | RRD | EOI => 0,
            PPR => self.ppr(),
            LDR => self.logical_id().ldr,
            DFR => self.dfr.load(relaxed),
            SVR => self.svr.load(relaxed),
            ISR..TMR => self.isr.word(word_of(ISR, offset)),
            TMR..IRR => self.tmr.word(word_of(TMR, offset)),
            IRR..ESR => self.irr.word(word_of(IRR, offset)),
            ESR => self.esr.load(relaxed),
            ICR_LOW => icr_low,
            ICR_HIGH => icr_high,
            LVT_FIRST..=LVT_LAST => self.lvt[lvt_of(offset)?].load(relaxed),
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => self.timer.current_count(),
            DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    pub(super) fn set_tpr(&self, value: u32) {
        self.tpr.store(value & 0xff, Ordering::Relaxed);
        self.update_priority();
    }

    fn set_svr(&self, value: u32) {
        self.svr.store(value & SVR_WRITABLE, Ordering::Relaxed);
        if !self.is_software_enabled() {
            // "The mask bits for all the LVT entries are set" (§11.4.7.2).
            for entry in &self.lvt {
                entry.fetch_or(LVT_MASKED, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn set_lvt(&self, index: usize, value: u32) {
        let mut value = value & LVT_WRITABLE[index];
        if !self.is_software_enabled() {
            value |= LVT_MASKED;
        }
        if index == Lvt::Timer as usize {
            if value & LVT_TIMER_MODE_RESERVED == LVT_TIMER_MODE_RESERVED {
                value &= !LVT_TIMER_MODE_RESERVED;
            }
            self.timer.set_mode(value);
        }
        self.lvt[index].store(value, Ordering::Relaxed);
    }
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

fn low_half(value: u64) -> u32 {
    halves(value)[0]
}

impl Irqchip {
    /// Writes a register. `Err` where there is none to write.
    fn write_register(&self, apic: &Apic, offset: u16, value: u32) -> Result<(), ApicFault> {
        let relaxed = Ordering::Relaxed;
        match offset {
            TPR => apic.set_tpr(value),
            EOI => self.end_of_interrupt(apic),
            LDR if !apic.is_x2apic() => apic.ldr.store(value & 0xff00_0000, relaxed),
            DFR if !apic.is_x2apic() => apic.dfr.store(value | 0x0fff_ffff, relaxed),
            SVR => apic.set_svr(value),
            ESR => apic.latch_errors(),
            ICR_LOW if !apic.is_x2apic() => {
                let [_, high] = halves(apic.icr.load(relaxed));
                let icr = u64::from(high) << 32 | u64::from(value & ICR_LOW_WRITABLE);
                self.send_icr(apic, icr);
            }
            ICR_HIGH if !apic.is_x2apic() => {
                let [low, _] = halves(apic.icr.load(relaxed));
                let icr = u64::from(value & 0xff00_0000) << 32 | u64::from(low);
                apic.icr.store(icr, relaxed);
            }
            LVT_FIRST..=LVT_LAST => apic.set_lvt(lvt_of(offset).ok_or(ApicFault)?, value),
            INITIAL_COUNT => apic.timer.set_initial_count(value),
            DIVIDE => apic.timer.set_divide(value),
            SELF_IPI if apic.is_x2apic() => self.send_self(apic, value.to_le_bytes()[0]),
            _ => return Err(ApicFault),
        }
        Ok(())
    }

    /// A read in the xAPIC page. "All accesses must be 128-bit aligned 32-bit loads and stores"
    /// (§11.4.1); narrower ones inside a register read their part, others read as zeros.
    pub(super) fn read_page(&self, apic: &Apic, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let start = usize::try_from(offset & 0xf).unwrap_or(usize::MAX);
        let register = u16::try_from(offset & !0xf).unwrap_or(u16::MAX);
        if apic.is_x2apic() || start + data.len() > 4 {
            return;
        }
        let known = offset < PAGE_REGISTERS;
        match apic.read(register).filter(|_| known) {
            Some(value) => {
                let bytes = value.to_le_bytes();
                data.copy_from_slice(&bytes[start..start + data.len()]);
            }
            None => drop(apic.error(ESR_ILLEGAL_REGISTER)),
        }
    }

    /// A write in the xAPIC page.
    pub(super) fn write_page(&self, apic: &Apic, offset: u64, data: &[u8]) {
        let (Ok(register), &[a, b, c, d]) = (u16::try_from(offset), data) else {
            return;
        };
        if apic.is_x2apic() || register & 0xf != 0 {
            return;
        }
        let value = u32::from_le_bytes([a, b, c, d]);
        if self.write_register(apic, register, value).is_err() && !is_read_only(register) {
            apic.error(ESR_ILLEGAL_REGISTER);
        }
    }

    /// RDMSR (§11.12.1.3: reserved registers and xAPIC mode fault).
    pub(super) fn read_msr(&self, apic: &Apic, number: u32) -> Result<u64, ApicFault> {
        match number {
            msr::IA32_APIC_BASE => return Ok(apic.base.load(Ordering::Relaxed)),
            msr::IA32_TSC_DEADLINE => return Ok(apic.timer.deadline_tsc()),
            _ => {}
        }
        let offset = x2apic_offset(apic, number)?;
        match offset {
            ICR_LOW => Ok(apic.icr.load(Ordering::Relaxed)),
            ICR_HIGH | DFR | APR | RRD | EOI => Err(ApicFault),
            _ => apic.read(offset).map(u64::from).ok_or(ApicFault),
        }
    }

    /// WRMSR (§11.12.1.3: reserved bits fault).
    pub(super) fn write_msr(&self, apic: &Apic, number: u32, value: u64) -> Result<(), ApicFault> {
        match number {
            msr::IA32_APIC_BASE => return self.set_base(apic, value),
            msr::IA32_TSC_DEADLINE => {
                if apic.timer.set_deadline_tsc(value) {
                    apic.fire(Lvt::Timer, false);
                }
                return Ok(());
            }
            _ => {}
        }
        let offset = x2apic_offset(apic, number)?;
        if offset == ICR_LOW {
            let reserved = u64::from(!ICR_LOW_WRITABLE);
            if value & reserved != 0 {
                return Err(ApicFault);
            }
            self.send_icr(apic, value);
            return Ok(());
        }
        if value & !u64::from(x2apic_writable(offset)) != 0 {
            return Err(ApicFault);
        }
        self.write_register(apic, offset, low_half(value))
    }

    /// IA32_APIC_BASE. The page itself stays at its default address: an engine decodes only that.
    fn set_base(&self, apic: &Apic, value: u64) -> Result<(), ApicFault> {
        let before = apic.base.load(Ordering::Relaxed);
        let mode = |base: u64| (base & BASE_ENABLE != 0, base & BASE_X2APIC != 0);
        // Figure 11-27: off → xAPIC → x2APIC → off, and xAPIC → off.
        let forbidden = matches!(
            (mode(before), mode(value)),
            (_, (false, true)) | ((false, _), (true, true)) | ((true, true), (true, false))
        );
        if forbidden || value & !BASE_KNOWN != 0 {
            return Err(ApicFault);
        }
        let bsp = before & BASE_BSP;
        apic.base.store(value & !BASE_BSP | bsp, Ordering::Relaxed);
        if mode(before) == (true, false) && mode(value) == (true, true) {
            // §11.12.10.1: the ICR is cleared when x2APIC mode is entered.
            apic.icr.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Registers whose writes are ignored without an error.
fn is_read_only(offset: u16) -> bool {
    matches!(
        offset,
        ID | VERSION | APR | PPR | RRD | ISR..=0x270 | CURRENT_COUNT
    )
}

fn x2apic_offset(apic: &Apic, number: u32) -> Result<u16, ApicFault> {
    let index = number
        .checked_sub(msr::IA32_X2APIC_FIRST)
        .filter(|&index| index < 0x40 && apic.is_x2apic())
        .ok_or(ApicFault)?;
    u16::try_from(index << 4).map_err(|_| ApicFault)
}

/// Bits that WRMSR may set without a fault.
fn x2apic_writable(offset: u16) -> u32 {
    match offset {
        TPR | SELF_IPI => 0xff,
        SVR => SVR_WRITABLE,
        LVT_FIRST..=LVT_LAST => lvt_of(offset).map_or(0, |index| {
            // Read-only isn't reserved: Linux writes back what it read on other machines.
            LVT_WRITABLE[index] | LVT_READ_ONLY
        }),
        INITIAL_COUNT => u32::MAX,
        DIVIDE => 0b1011,
        // EOI and ESR take zero only.
        _ => 0,
    }
}
