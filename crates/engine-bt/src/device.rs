//! Accesses that leave RAM: ports, device memory, the local APIC's page.

use ringfence_engine::IoAccess;
use ringfence_engine::IoDirection;
use ringfence_engine::IoSpace;
use ringfence_engine::Unclaimed;
use ringfence_engine::VcpuExit;

use crate::core::Core;
use crate::fault::Stop;

const APIC_ENABLED: u64 = 1 << 11;
const X2APIC_ENABLED: u64 = 1 << 10;
const APIC_PAGE_BYTES: u64 = 4096;

impl Core {
    /// Offset in the local APIC's page, when that is where `gpa` leads.
    fn apic_offset(&self, gpa: u64) -> Option<u64> {
        let base = self.sys.apic_base;
        self.apic.as_ref()?;
        if base & APIC_ENABLED == 0 || base & X2APIC_ENABLED != 0 {
            return None;
        }
        let offset = gpa.checked_sub(base & !(APIC_PAGE_BYTES - 1))?;
        (offset < APIC_PAGE_BYTES).then_some(offset)
    }

    /// Reads device memory.
    pub(crate) fn read_device(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.remote.counters.mmio.bump();
        if let Some(offset) = self.apic_offset(gpa)
            && let Some(apic) = &self.apic
        {
            apic.read_page(offset, data);
            return Ok(());
        }
        if self.exits_unclaimed() && self.shared.mmio.find(gpa, data.len()).is_none() {
            return self.ask(IoSpace::Mmio, gpa, data);
        }
        self.shared.mmio.read(gpa, data);
        Ok(())
    }

    /// Writes device memory.
    pub(crate) fn write_device(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        self.remote.counters.mmio.bump();
        if let Some(offset) = self.apic_offset(gpa)
            && let Some(apic) = &self.apic
        {
            apic.write_page(offset, data);
            self.maybe_interrupt = true;
            self.apic_touched = true;
            return Ok(());
        }
        if self.exits_unclaimed() && self.shared.mmio.find(gpa, data.len()).is_none() {
            self.tell(IoSpace::Mmio, gpa, data);
            return Ok(());
        }
        self.shared.mmio.write(gpa, data);
        Ok(())
    }

    /// IN.
    pub(crate) fn read_port(&mut self, port: u16, data: &mut [u8]) -> Result<(), Stop> {
        self.remote.counters.pio.bump();
        if self.exits_unclaimed() && self.shared.pio.find(u64::from(port), data.len()).is_none() {
            return self.ask(IoSpace::Pio, u64::from(port), data);
        }
        self.shared.pio.read(port, data);
        Ok(())
    }

    /// OUT.
    pub(crate) fn write_port(&mut self, port: u16, data: &[u8]) -> Result<(), Stop> {
        self.remote.counters.pio.bump();
        if self.exits_unclaimed() && self.shared.pio.find(u64::from(port), data.len()).is_none() {
            self.tell(IoSpace::Pio, u64::from(port), data);
            return Ok(());
        }
        self.shared.pio.write(port, data);
        Ok(())
    }

    fn exits_unclaimed(&self) -> bool {
        self.shared.unclaimed == Unclaimed::Exit
    }

    /// Returns to the monitor for a read that nobody claims; when the instruction starts over, the
    /// answer is there.
    fn ask(&mut self, space: IoSpace, address: u64, data: &mut [u8]) -> Result<(), Stop> {
        if let Some(answer) = self.replay.answers.get(self.replay.next) {
            self.replay.next += 1;
            let len = data.len().min(answer.len());
            data[..len].copy_from_slice(&answer[..len]);
            return Ok(());
        }
        self.replay.waiting = Some(data.len());
        Err(Stop::Exit(VcpuExit::Io(IoAccess {
            space,
            address,
            direction: IoDirection::Read(data.len()),
        })))
    }

    /// Has a write that nobody claims told to the monitor once the instruction is complete.
    fn tell(&mut self, space: IoSpace, address: u64, data: &[u8]) {
        self.exits.push_back(VcpuExit::Io(IoAccess {
            space,
            address,
            direction: IoDirection::Write(data.to_vec()),
        }));
    }

    /// An instruction completed: its answers are used up.
    pub(crate) fn end_replay(&mut self) {
        self.replay.answers.clear();
        self.replay.next = 0;
    }
}
