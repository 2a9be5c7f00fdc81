//! KVM's paravirtual interfaces (Documentation/virt/kvm/x86/msr and hypercalls): stock kernels
//! already use them.

use std::sync::Arc;

use crate::clock::tsc_khz;
use crate::core::Core;
use crate::fault::Fault;
use crate::fault::Stop;
use crate::ram::write_raw;

/// The host's TSC is the same on all vCPUs.
const FLAG_TSC_STABLE: u8 = 1;
const ENABLE: u64 = 1;

const HC_KICK_CPU: u64 = 5;
const HC_SEND_IPI: u64 = 10;
const ERROR_NO_SYSTEM: i64 = -1000;
const ERROR_PERMISSION: i64 = -1;

impl Core {
    /// Publishes the time of day at which the machine clock was zero.
    pub(crate) fn write_wall_clock(&mut self, value: u64) -> Result<(), Stop> {
        let wall = self.shared.clock.wall_at_zero();
        let seconds = u32::try_from(wall.as_secs()).unwrap_or(u32::MAX);
        let mut image = [0; 12];
        image[0..4].copy_from_slice(&2_u32.to_le_bytes());
        image[4..8].copy_from_slice(&seconds.to_le_bytes());
        image[8..12].copy_from_slice(&wall.subsec_nanos().to_le_bytes());
        self.write_physical(value, &image)?;
        self.msrs.wall_clock = value;
        Ok(())
    }

    /// Publishes how to turn TSC ticks into nanoseconds.
    pub(crate) fn write_system_time(&mut self, value: u64) -> Result<(), Stop> {
        if value & ENABLE == 0 {
            self.msrs.system_time = value;
            return Ok(());
        }
        let (multiplier, shift) = tsc_scale(tsc_khz());
        let now_ns = self.shared.clock.now_ns();
        let now_tsc = self.guest_tsc();
        let mut image = [0; 32];
        image[0..4].copy_from_slice(&2_u32.to_le_bytes());
        image[8..16].copy_from_slice(&now_tsc.to_le_bytes());
        image[16..24].copy_from_slice(&now_ns.to_le_bytes());
        image[24..28].copy_from_slice(&multiplier.to_le_bytes());
        image[28] = shift.cast_unsigned();
        image[29] = FLAG_TSC_STABLE;
        self.write_physical(value & !ENABLE, &image)?;
        self.msrs.system_time = value;
        Ok(())
    }

    fn write_physical(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        let host = self
            .shared
            .ram
            .host(gpa, data.len() as u64)
            .ok_or_else(|| Fault::general(0))?;
        // SAFETY: `host` leads to that many bytes of RAM.
        #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
        unsafe {
            write_raw(host, data);
        };
        self.wrote_ram(gpa, data.len());
        Ok(())
    }

    /// VMCALL and VMMCALL.
    pub(crate) fn hypercall(&mut self) -> Result<(), Stop> {
        let mask = if self.is_64bit() {
            u64::MAX
        } else {
            0xffff_ffff
        };
        let [number, a0, a1, a2, a3] = [0, 3, 1, 2, 6].map(|index| self.gpr(index) & mask);
        let result = if self.cpl != 0 {
            ERROR_PERMISSION
        } else {
            match number {
                HC_KICK_CPU => self.kick_cpu(a1),
                HC_SEND_IPI => self.send_ipis(a0, a1, a2, a3),
                _ => ERROR_NO_SYSTEM,
            }
        };
        self.set_gpr(0, result.cast_unsigned() & mask);
        Ok(())
    }

    /// Wakes the vCPU with an APIC id from HLT.
    fn kick_cpu(&self, apic_id: u64) -> i64 {
        let target = usize::try_from(apic_id)
            .ok()
            .and_then(|index| self.shared.remotes.get(index))
            .and_then(std::sync::OnceLock::get)
            .map(Arc::clone);
        if let Some(remote) = target {
            remote.unhalt();
        }
        0
    }

    /// Sends an interrupt to every APIC id `first + n` whose bit n is set in the 128-bit map.
    fn send_ipis(&mut self, low: u64, high: u64, first: u64, icr: u64) -> i64 {
        let Some(apic) = self.apic.clone() else {
            return ERROR_NO_SYSTEM;
        };
        const X2APIC_ICR: u32 = 0x830;
        let mut sent = 0;
        for bit in 0..128_u64 {
            let word = if bit < 64 { low } else { high };
            if word >> (bit % 64) & 1 == 0 {
                continue;
            }
            let destination = first.wrapping_add(bit) & 0xffff_ffff;
            let command = destination << 32 | icr & 0xffff_ffff;
            if apic.write_msr(X2APIC_ICR, command).is_ok() {
                sent += 1;
            }
        }
        self.maybe_interrupt = true;
        self.apic_touched = true;
        sent
    }
}

/// Multiplier and shift with `ns = (ticks << shift) * multiplier >> 32`.
fn tsc_scale(khz: u64) -> (u32, i8) {
    let mut shift = 0_i8;
    let mut hz = khz * 1000;
    let wanted = 1_000_000_000_u64;
    while hz > 2 * wanted {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= wanted {
        hz <<= 1;
        shift += 1;
    }
    let multiplier = (u128::from(wanted) << 32) / u128::from(hz);
    (u32::try_from(multiplier).unwrap_or(u32::MAX), shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_turns_a_second_of_ticks_into_a_second() {
        for khz in [100_000, 999_999, 1_000_000, 2_596_148, 5_000_000] {
            let (multiplier, shift) = tsc_scale(khz);
            let ticks = khz * 1000;
            let scaled = if shift >= 0 {
                ticks << shift
            } else {
                ticks >> -shift
            };
            let ns = (u128::from(scaled) * u128::from(multiplier)) >> 32;
            assert!(ns.abs_diff(1_000_000_000) < 1000, "{khz}: {ns}");
        }
    }
}
