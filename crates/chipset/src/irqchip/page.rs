//! A local APIC's registers as one page, for snapshots (the form of KVM_GET_LAPIC).

use std::sync::atomic::Ordering;

use ringfence_engine::ApicFault;

use super::apic::Apic;
use super::apic::LVT_ENTRIES;
use super::registers;

/// Bytes of the page that hold registers.
const PAGE_BYTES: usize = 1024;
/// 32-bit words in a vector set.
const WORDS: u16 = 8;

struct Page(Vec<u8>);

impl Page {
    fn put(&mut self, offset: u16, value: u32) {
        let at = usize::from(offset);
        self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn get(&self, offset: u16) -> u32 {
        let at = usize::from(offset);
        self.0[at..at + 4]
            .first_chunk()
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

impl Apic {
    pub(super) fn save_page(&self) -> Vec<u8> {
        let mut page = Page(vec![0; PAGE_BYTES]);
        for offset in (0..PAGE_BYTES).step_by(16) {
            let offset = u16::try_from(offset).unwrap_or(0);
            if let Some(value) = self.read(offset) {
                page.put(offset, value);
            }
        }
        page.0
    }

    /// Loads a page. The APIC base and the TSC deadline are MSRs and loaded as such, the base first.
    pub(super) fn restore_page(&self, page: &[u8]) -> Result<(), ApicFault> {
        if page.len() != PAGE_BYTES {
            return Err(ApicFault);
        }
        let page = Page(page.to_vec());
        let relaxed = Ordering::Relaxed;
        self.svr.store(page.get(registers::SVR) & 0x3ff, relaxed);
        self.ldr
            .store(page.get(registers::LDR) & 0xff00_0000, relaxed);
        self.dfr
            .store(page.get(registers::DFR) | 0x0fff_ffff, relaxed);
        self.esr.store(page.get(registers::ESR), relaxed);
        let icr_high = u64::from(page.get(registers::ICR_HIGH));
        let icr = icr_high << 32 | u64::from(page.get(registers::ICR_LOW));
        self.icr.store(icr, relaxed);
        for index in 0..LVT_ENTRIES {
            let offset = registers::LVT_FIRST + 16 * u16::try_from(index).unwrap_or(0);
            self.set_lvt(index, page.get(offset));
        }
        self.timer.restore_counts(
            page.get(registers::INITIAL_COUNT),
            page.get(registers::CURRENT_COUNT),
            page.get(registers::DIVIDE),
        );
        for (first, set) in [
            (registers::ISR, &self.isr),
            (registers::TMR, &self.tmr),
            (registers::IRR, &self.irr),
        ] {
            for word in 0..WORDS {
                set.set_word(usize::from(word), page.get(first + 16 * word));
            }
        }
        self.set_tpr(page.get(registers::TPR));
        Ok(())
    }
}
