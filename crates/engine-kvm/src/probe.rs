//! Whether `/dev/kvm` is of use, measured: a device file that exists says little. It may be
//! closed to this user, and there are KVM modules for hosts without VT-x or AMD-V that run a
//! kernel's code through an instruction emulator, about a thousand times slower than the
//! processor.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use ringfence_engine::EngineError;
use ringfence_engine::Vcpu;
use ringfence_engine::VcpuExit;
use ringfence_x86::state::RCX;
use ringfence_x86::state::VcpuState;

use crate::KvmEngine;
use crate::engine::DEVICE;
use crate::engine::Host;
use crate::scratch;
use crate::vcpu::KvmVcpu;

/// Below this many million instructions a second a stock kernel takes minutes to boot, and the
/// host doesn't use its processor's virtualization. Emulating modules reach about 2; a guest in
/// an emulated host, the slowest that is still useful, over 100.
pub const USEFUL_MIPS: f64 = 30.0;

/// What the probe found.
#[derive(Debug)]
pub enum KvmVerdict {
    /// There is no `/dev/kvm`.
    Missing,
    /// This user may not open it.
    NotPermitted,
    /// It opens, but no machine runs.
    Broken(EngineError),
    /// It runs code far too slowly: an emulator is behind it.
    Emulating,
    /// It runs code on the processor.
    Usable,
}

/// A verdict and what it stands on.
#[derive(Debug)]
pub struct KvmProbe {
    /// What was found.
    pub verdict: KvmVerdict,
    /// Guest speed in million instructions a second, when a guest ran.
    pub mips: Option<f64>,
    /// How long the probe took.
    pub took: Duration,
}

impl KvmProbe {
    /// One sentence: the state of `/dev/kvm`.
    #[must_use]
    pub fn summary(&self) -> String {
        let mips = self.mips.unwrap_or(0.0);
        match &self.verdict {
            KvmVerdict::Missing => format!("{DEVICE} does not exist"),
            KvmVerdict::NotPermitted => format!("{DEVICE} exists, but this user may not open it"),
            KvmVerdict::Broken(error) => {
                let cause = std::error::Error::source(error)
                    .map_or_else(String::new, |source| format!(": {source}"));
                format!("{DEVICE} opens, but runs no machine: {error}{cause}")
            }
            KvmVerdict::Emulating => format!(
                "{DEVICE} emulates instructions ({mips:.1} million a second); it does not use the processor's virtualization"
            ),
            KvmVerdict::Usable => {
                format!("{DEVICE} runs guests ({mips:.0} million instructions a second)")
            }
        }
    }

    /// What to do about it; empty when it is usable.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match &self.verdict {
            KvmVerdict::Missing => {
                "enable virtualization (VT-x or AMD-V) in the firmware, or nested virtualization for this virtual machine, then load the module: modprobe kvm_intel, or modprobe kvm_amd"
            }
            KvmVerdict::NotPermitted => {
                "join the group that owns the device: sudo usermod -aG kvm \"$USER\", then log in again"
            }
            KvmVerdict::Broken(_) => "see the kernel's log: dmesg | grep -i kvm",
            KvmVerdict::Emulating => {
                "use another engine here, or a host with VT-x or AMD-V (for a virtual machine: nested virtualization)"
            }
            KvmVerdict::Usable => "",
        }
    }
}

/// Opens `/dev/kvm` and times a loop in a throw-away guest, for about 20 milliseconds.
#[must_use]
pub fn probe() -> KvmProbe {
    let start = Instant::now();
    let (verdict, mips) = match File::options().read(true).write(true).open(DEVICE) {
        Ok(device) => measure(device),
        Err(error) => (unopened(error), None),
    };
    KvmProbe {
        verdict,
        mips,
        took: start.elapsed(),
    }
}

fn unopened(error: io::Error) -> KvmVerdict {
    match error.raw_os_error() {
        // ENODEV: the device file is there, the module that it belongs to isn't.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KvmVerdict::Missing,
        Some(libc::EACCES | libc::EPERM) => KvmVerdict::NotPermitted,
        _ => KvmVerdict::Broken(EngineError::host("open /dev/kvm")(error)),
    }
}

fn measure(device: File) -> (KvmVerdict, Option<f64>) {
    let speed = KvmEngine::from_fd(device.into()).and_then(|engine| guest_mips(engine.host()));
    match speed {
        Ok(mips) if mips >= USEFUL_MIPS => (KvmVerdict::Usable, Some(mips)),
        Ok(mips) => (KvmVerdict::Emulating, Some(mips)),
        Err(error) => (KvmVerdict::Broken(error), None),
    }
}

/// Runs longer and longer loops until one takes long enough to be timed.
fn guest_mips(host: &Arc<Host>) -> Result<f64, EngineError> {
    const ENOUGH: Duration = Duration::from_millis(3);
    const FIRST_TURNS: u32 = 1000;
    const MAX_TURNS: u32 = 1 << 26;
    const INSTRUCTIONS_A_TURN: f64 = 2.0;
    const DEC_RCX_JNZ_HLT: [u8; 6] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
    let mut vcpu = scratch::guest(host, &DEC_RCX_JNZ_HLT)?;
    let mut state = scratch::state(&vcpu)?;
    let mut turns = FIRST_TURNS;
    loop {
        state.regs.gpr[RCX] = turns.into();
        let took = fastest(&mut vcpu, &state, ENOUGH)?;
        if took >= ENOUGH || turns >= MAX_TURNS {
            return Ok(f64::from(turns) / 1e6 * INSTRUCTIONS_A_TURN / took.as_secs_f64());
        }
        turns *= 4;
    }
}

/// The shortest time of three runs, or the first under `enough`: a guest's first entry is slow,
/// and on a busy host so is any one.
fn fastest(
    vcpu: &mut KvmVcpu,
    state: &VcpuState,
    enough: Duration,
) -> Result<Duration, EngineError> {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        vcpu.set_state(state)?;
        let start = Instant::now();
        let exit = vcpu.run()?;
        fastest = fastest.min(start.elapsed());
        if exit != VcpuExit::Halt {
            return Err(EngineError::Guest(format!(
                "the test guest stopped with {exit:?} in place of HLT"
            )));
        }
        if fastest < enough {
            break;
        }
    }
    Ok(fastest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_file_without_its_module_counts_as_missing() {
        for errno in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
            let verdict = unopened(io::Error::from_raw_os_error(errno));
            assert!(matches!(verdict, KvmVerdict::Missing), "{errno}");
        }
    }

    #[test]
    fn a_refused_open_names_the_group() {
        let probe = KvmProbe {
            verdict: unopened(io::Error::from_raw_os_error(libc::EACCES)),
            mips: None,
            took: Duration::ZERO,
        };
        assert!(probe.summary().contains("may not open"));
        assert!(probe.remedy().contains("usermod"));
    }

    #[test]
    fn another_file_in_its_place_is_broken_not_usable() {
        let (verdict, mips) = measure(File::open("/dev/null").expect("there always"));
        assert!(matches!(verdict, KvmVerdict::Broken(_)), "{verdict:?}");
        assert_eq!(mips, None);
    }

    #[test]
    fn the_probe_of_this_host_is_quick_and_says_what_it_found() {
        let probe = probe();
        assert!(probe.took < Duration::from_secs(2), "{probe:?}");
        assert!(probe.summary().contains(DEVICE));
        let usable = matches!(probe.verdict, KvmVerdict::Usable);
        assert_eq!(usable, probe.remedy().is_empty(), "{probe:?}");
        assert_eq!(usable, probe.mips.is_some_and(|mips| mips >= USEFUL_MIPS));
    }
}
