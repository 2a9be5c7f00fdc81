//! The I/O APIC: 24 inputs, each with an entry that says what it sends.
//!
//! Spec: Intel 82093AA datasheet (290566-001). Polarity bits are kept and have no effect: device
//! wires here are asserted or not.

use serde::Deserialize;
use serde::Serialize;

use super::delivery::Message;

/// Inputs.
pub const IOAPIC_PINS: u32 = 24;
/// Physical address of its registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Length of its register window.
pub const IOAPIC_LEN: u64 = 0x1000;

const PINS: usize = IOAPIC_PINS as usize;

/// Registers of the window (§3.1).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Indirect registers (§3.2).
const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_ENTRIES: u8 = 0x10;

const VERSION: u32 = 0x11;

/// Redirection entry (§3.2.4).
const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_STATUS: u64 = 1 << 12;
const ENTRY_READ_ONLY: u64 = ENTRY_REMOTE_IRR | ENTRY_STATUS;
const ENTRY_RESERVED: u64 = 0x00ff_ffff_fffe_0000;

/// Version of [`IoApicState`].
const STATE_VERSION: u32 = 1;

/// The I/O APIC's saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    pub(super) version: u32,
    select: u8,
    id: u32,
    entries: Vec<u64>,
    lines: u32,
}

/// The registers and the inputs' levels.
#[derive(Debug)]
pub(super) struct IoApic {
    select: u8,
    id: u32,
    entries: [u64; PINS],
    /// Level of each input, a bit each.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self {
            select: 0,
            id: 0,
            entries: [ENTRY_MASKED; PINS],
            lines: 0,
        }
    }
}

impl IoApic {
    /// Drives an input; what it sends.
    pub(super) fn set_line(&mut self, pin: u32, high: bool) -> Option<Message> {
        let index = usize::try_from(pin).ok().filter(|&pin| pin < PINS)?;
        let bit = 1 << pin;
        let was_high = self.lines & bit != 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if !high || (was_high && self.entries[index] & ENTRY_LEVEL == 0) {
            return None;
        }
        self.service(index)
    }

    /// Sends an entry's message if it may now. A level-triggered one waits for its end of
    /// interrupt before it is sent again (remote IRR). An edge while masked is lost.
    fn service(&mut self, index: usize) -> Option<Message> {
        let entry = &mut self.entries[index];
        if *entry & ENTRY_MASKED != 0 {
            return None;
        }
        let message = Message::from_redirection(*entry)?;
        if *entry & ENTRY_LEVEL != 0 {
            if *entry & ENTRY_REMOTE_IRR != 0 {
                return None;
            }
            *entry |= ENTRY_REMOTE_IRR;
        }
        Some(message)
    }

    /// A local APIC broadcast the end of a level-triggered interrupt: entries with this vector may
    /// be sent again, and are when their input is still high.
    pub(super) fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut again = Vec::new();
        for index in 0..PINS {
            let entry = self.entries[index];
            if entry.to_le_bytes()[0] != vector || entry & ENTRY_LEVEL == 0 {
                continue;
            }
            self.entries[index] &= !ENTRY_REMOTE_IRR;
            if self.lines >> index & 1 != 0 {
                again.extend(self.service(index));
            }
        }
        again
    }

    /// A read of the window. Registers are 32 bits wide; narrower reads get their low part.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => u32::from(self.select),
            WINDOW => self.read_register(),
            _ => 0,
        };
        data.fill(0);
        for (byte, part) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = part;
        }
    }

    /// A write to the window; what is sent by it.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Message> {
        let mut bytes = [0; 4];
        for (byte, part) in bytes.iter_mut().zip(data) {
            *byte = *part;
        }
        match offset {
            SELECT => {
                self.select = bytes[0];
                None
            }
            WINDOW => self.write_register(u32::from_le_bytes(bytes)),
            _ => None,
        }
    }

    fn entry_of(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(REG_ENTRIES)?;
        let entry = usize::from(index >> 1);
        (entry < PINS).then_some((entry, index & 1 != 0))
    }

    fn read_register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => (IOAPIC_PINS - 1) << 16 | VERSION,
            _ => self.entry_of().map_or(0, |(index, high)| {
                let [a, b, c, d, e, f, g, h] = self.entries[index].to_le_bytes();
                u32::from_le_bytes(if high { [e, f, g, h] } else { [a, b, c, d] })
            }),
        }
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        if self.select == REG_ID {
            self.id = value & 0x0f00_0000;
            return None;
        }
        let (index, high) = self.entry_of()?;
        let before = self.entries[index];
        let mut entry = if high {
            before & 0xffff_ffff | u64::from(value) << 32
        } else {
            let kept = before & (0xffff_ffff_0000_0000 | ENTRY_READ_ONLY);
            kept | u64::from(value) & !ENTRY_READ_ONLY
        };
        entry &= !ENTRY_RESERVED;
        if entry & ENTRY_LEVEL == 0 {
            // Remote IRR has no meaning for edges, and a guest clears a stuck one this way.
            entry &= !ENTRY_REMOTE_IRR;
        }
        self.entries[index] = entry;
        let is_high = self.lines >> index & 1 != 0;
        (entry & ENTRY_LEVEL != 0 && is_high)
            .then(|| self.service(index))
            .flatten()
    }

    pub(super) fn save(&self) -> IoApicState {
        IoApicState {
            version: STATE_VERSION,
            select: self.select,
            id: self.id,
            entries: self.entries.to_vec(),
            lines: self.lines,
        }
    }

    /// Becomes what was saved; `None` for a state that isn't one.
    pub(super) fn from_state(state: IoApicState) -> Option<Self> {
        let entries: [u64; PINS] = state.entries.try_into().ok()?;
        Some(Self {
            select: state.select,
            id: state.id & 0x0f00_0000,
            entries: entries.map(|entry| entry & !ENTRY_RESERVED),
            lines: state.lines & ((1 << PINS) - 1),
        })
    }
}

pub(super) const IOAPIC_STATE_VERSION: u32 = STATE_VERSION;

#[cfg(test)]
mod tests {
    use super::super::delivery::Delivery;
    use super::super::delivery::Destination;
    use super::*;

    fn program(ioapic: &mut IoApic, pin: u8, entry: u64) -> Option<Message> {
        let bytes = entry.to_le_bytes();
        ioapic.write(SELECT, &[REG_ENTRIES + 2 * pin + 1]);
        ioapic.write(WINDOW, &bytes[4..]);
        ioapic.write(SELECT, &[REG_ENTRIES + 2 * pin]);
        ioapic.write(WINDOW, &bytes[..4])
    }

    fn register(ioapic: &mut IoApic, index: u8) -> u32 {
        ioapic.write(SELECT, &[index]);
        let mut data = [0; 4];
        ioapic.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_says_how_many_inputs_it_has() {
        assert_eq!(register(&mut IoApic::default(), REG_VERSION), 0x0017_0011);
    }

    #[test]
    fn an_edge_is_sent_once() {
        let mut ioapic = IoApic::default();
        program(&mut ioapic, 4, 1 << 56 | 0x31);
        let sent = ioapic.set_line(4, true).expect("sent");
        assert_eq!(sent.destination, Destination::Physical(1));
        assert_eq!((sent.delivery, sent.vector), (Delivery::Fixed, 0x31));
        assert_eq!(ioapic.set_line(4, true), None);
        ioapic.set_line(4, false);
        assert!(ioapic.set_line(4, true).is_some());
    }

    #[test]
    fn a_level_is_sent_again_only_after_its_end_of_interrupt() {
        let mut ioapic = IoApic::default();
        program(&mut ioapic, 16, ENTRY_LEVEL | 0x41);
        assert!(ioapic.set_line(16, true).is_some_and(|sent| sent.level));
        assert_eq!(ioapic.set_line(16, true), None);
        assert_eq!(
            u64::from(register(&mut ioapic, 0x30)) & ENTRY_REMOTE_IRR,
            ENTRY_REMOTE_IRR
        );
        assert_eq!(ioapic.end_of_interrupt(0x41).len(), 1);
        ioapic.set_line(16, false);
        assert!(ioapic.end_of_interrupt(0x41).is_empty());
        assert!(ioapic.set_line(16, true).is_some());
    }

    #[test]
    fn a_masked_level_is_sent_when_unmasked_and_an_edge_is_not() {
        let mut ioapic = IoApic::default();
        ioapic.set_line(16, true);
        ioapic.set_line(4, true);
        assert!(program(&mut ioapic, 16, ENTRY_LEVEL | 0x41).is_some());
        assert!(program(&mut ioapic, 4, 0x42).is_none());
    }

    #[test]
    fn read_only_and_reserved_bits_are_not_written() {
        let mut ioapic = IoApic::default();
        program(&mut ioapic, 0, u64::MAX);
        assert_eq!(register(&mut ioapic, 0x10), 0x0001_afff);
        assert_eq!(register(&mut ioapic, 0x11), 0xff00_0000);
    }

    #[test]
    fn inputs_and_registers_that_do_not_exist_are_ignored() {
        let mut ioapic = IoApic::default();
        assert_eq!(ioapic.set_line(24, true), None);
        assert_eq!(ioapic.set_line(u32::MAX, true), None);
        assert_eq!(register(&mut ioapic, 0x40), 0);
        assert_eq!(register(&mut ioapic, 0xff), 0);
    }
}
