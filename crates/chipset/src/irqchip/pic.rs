//! The pair of 8259A interrupt controllers of a PC: the slave's output is input 2 of the master.
//!
//! Spec: Intel 8259A datasheet (231468-003); edge/level control registers as in the 82371SB.
//! Models fully nested, rotating, special mask and poll modes and automatic end of interrupt.
//! Doesn't model the 8080 call sequence, buffered mode and special fully nested mode, which no
//! PC system software uses.

use serde::Deserialize;
use serde::Serialize;

/// Inputs of the pair.
pub(super) const PIC_INPUTS: u32 = 16;
/// The master's input that the slave drives.
const CASCADE: u8 = 2;
/// Taken when the request is gone by the time it is acknowledged.
const SPURIOUS: u8 = 7;

/// First ports of the master, the slave, and the edge/level control registers.
pub const PIC_MASTER_PORT: u16 = 0x20;
/// The slave's.
pub const PIC_SLAVE_PORT: u16 = 0xa0;
/// Edge/level control, one register a chip.
pub const PIC_ELCR_PORT: u16 = 0x4d0;

/// Inputs that may be level-triggered: not the timer, keyboard and cascade; not the clock and
/// the coprocessor.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];

/// ICW1 bits.
const ICW1_INIT: u8 = 0x10;
const ICW1_NEEDS_ICW4: u8 = 0x01;
const ICW1_SINGLE: u8 = 0x02;
/// ICW4 bit: automatic end of interrupt.
const ICW4_AUTO_EOI: u8 = 0x02;
/// OCW3 bits.
const OCW3: u8 = 0x08;
const OCW3_POLL: u8 = 0x04;
const OCW3_READ: u8 = 0x02;
const OCW3_READ_ISR: u8 = 0x01;
const OCW3_MASK_SELECT: u8 = 0x40;
const OCW3_SPECIAL_MASK: u8 = 0x20;

/// Which initialisation word port 1 takes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Expects {
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    irr: u8,
    imr: u8,
    isr: u8,
    /// Levels of the inputs.
    lines: u8,
    elcr: u8,
    vector_base: u8,
    /// The input of lowest priority.
    lowest: u8,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    read_isr: bool,
    poll: bool,
    expects: Expects,
    needs_icw4: bool,
    single: bool,
}

impl Chip {
    /// As firmware leaves it: everything masked.
    fn new() -> Self {
        Self {
            imr: 0xff,
            lowest: 7,
            ..Self::default()
        }
    }

    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        let rises = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if self.elcr & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rises {
            // A real 8259A forgets an edge whose input falls before it is acknowledged. Here it is
            // kept, so that a device may pulse its wire.
            self.irr |= bit;
        }
    }

    /// Position in the rotating order: 0 is the highest priority.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.lowest).wrapping_sub(1) & 7
    }

    fn highest(&self, set: u8) -> Option<u8> {
        (0..8)
            .filter(|input| set >> input & 1 != 0)
            .min_by_key(|&input| self.rank(input))
    }

    /// The input that interrupts now.
    fn request(&self) -> Option<u8> {
        let input = self.highest(self.irr & !self.imr)?;
        let served = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        match self.highest(served) {
            Some(active) if self.rank(active) <= self.rank(input) => None,
            _ => Some(input),
        }
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.lowest = input;
            }
        } else {
            self.isr |= bit;
        }
    }

    fn end_of_interrupt(&mut self, specific: Option<u8>, rotate: bool) {
        let served = if self.special_mask {
            self.isr & !self.imr
        } else {
            self.isr
        };
        let Some(input) = specific.or_else(|| self.highest(served)) else {
            return;
        };
        self.isr &= !(1 << input);
        if rotate {
            self.lowest = input;
        }
    }

    fn initialize(&mut self, icw1: u8) {
        *self = Self {
            lines: self.lines,
            elcr: self.elcr,
            irr: self.lines & self.elcr,
            imr: 0,
            needs_icw4: icw1 & ICW1_NEEDS_ICW4 != 0,
            single: icw1 & ICW1_SINGLE != 0,
            expects: Expects::Icw2,
            ..Self::new()
        };
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1_INIT != 0 {
            return self.initialize(value);
        }
        if value & OCW3 != 0 {
            if value & OCW3_POLL != 0 {
                self.poll = true;
            }
            if value & OCW3_READ != 0 {
                self.read_isr = value & OCW3_READ_ISR != 0;
            }
            if value & OCW3_MASK_SELECT != 0 {
                self.special_mask = value & OCW3_SPECIAL_MASK != 0;
            }
            return;
        }
        // OCW2: bits 7 to 5 are rotate, specific, end of interrupt.
        let input = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => self.end_of_interrupt(None, false),
            0b101 => self.end_of_interrupt(None, true),
            0b011 => self.end_of_interrupt(Some(input), false),
            0b111 => self.end_of_interrupt(Some(input), true),
            0b110 => self.lowest = input,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expects = match self.expects {
            Expects::Mask => {
                self.imr = value;
                Expects::Mask
            }
            Expects::Icw2 => {
                self.vector_base = value & 0xf8;
                match (self.single, self.needs_icw4) {
                    (false, _) => Expects::Icw3,
                    (true, true) => Expects::Icw4,
                    (true, false) => Expects::Mask,
                }
            }
            // The wiring is what it is.
            Expects::Icw3 if self.needs_icw4 => Expects::Icw4,
            Expects::Icw3 => Expects::Mask,
            Expects::Icw4 => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                Expects::Mask
            }
        };
    }
}

/// The saved state of the pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    pub(super) version: u32,
    chips: [Chip; 2],
}

pub(super) const PIC_STATE_VERSION: u32 = 1;

/// The pair. Index 0 is the master.
#[derive(Debug)]
pub(super) struct PicPair {
    chips: [Chip; 2],
}

impl Default for PicPair {
    fn default() -> Self {
        Self {
            chips: [Chip::new(), Chip::new()],
        }
    }
}

impl PicPair {
    /// Drives an input of the pair, 0 to 15.
    pub(super) fn set_line(&mut self, input: u32, high: bool) {
        let Ok(input) = u8::try_from(input) else {
            return;
        };
        match input {
            CASCADE => {}
            0..8 => self.chips[0].set_line(input, high),
            8..16 => {
                self.chips[1].set_line(input - 8, high);
                self.update_cascade();
            }
            _ => {}
        }
    }

    fn update_cascade(&mut self) {
        // The slave's output is a level: it takes its request back when it is masked or served.
        let bit = 1 << CASCADE;
        let [master, slave] = &mut self.chips;
        master.irr &= !bit;
        if slave.request().is_some() {
            master.irr |= bit;
        }
    }

    /// The level of the wire to the processor.
    pub(super) fn output(&self) -> bool {
        self.chips[0].request().is_some()
    }

    /// The processor's acknowledge cycle: the vector.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let input = self.chips[0].request();
        if let Some(input) = input {
            self.chips[0].acknowledge(input);
        }
        if input != Some(CASCADE) {
            return self.chips[0].vector_base | input.unwrap_or(SPURIOUS);
        }
        let slave_input = self.chips[1].request();
        if let Some(input) = slave_input {
            self.chips[1].acknowledge(input);
        }
        self.update_cascade();
        self.chips[1].vector_base | slave_input.unwrap_or(SPURIOUS)
    }

    /// Reads port `port` (0 command, 1 data) of a chip.
    pub(super) fn read(&mut self, chip: usize, port: u16) -> u8 {
        let Some(this) = self.chips.get_mut(chip) else {
            return 0xff;
        };
        if this.poll {
            this.poll = false;
            let input = this.request();
            if let Some(input) = input {
                this.acknowledge(input);
                self.update_cascade();
            }
            return input.map_or(0, |input| 0x80 | input);
        }
        match (port, this.read_isr) {
            (0, true) => this.isr,
            (0, false) => this.irr,
            _ => this.imr,
        }
    }

    /// Writes a port of a chip.
    pub(super) fn write(&mut self, chip: usize, port: u16, value: u8) {
        if let Some(this) = self.chips.get_mut(chip) {
            match port {
                0 => this.write_command(value),
                _ => this.write_data(value),
            }
            self.update_cascade();
        }
    }

    pub(super) fn elcr(&self, chip: usize) -> u8 {
        self.chips.get(chip).map_or(0xff, |chip| chip.elcr)
    }

    pub(super) fn set_elcr(&mut self, chip: usize, value: u8) {
        if let Some((chip, mask)) = self.chips.get_mut(chip).zip(ELCR_MASKS.get(chip)) {
            chip.elcr = value & mask;
        }
    }

    pub(super) fn save(&self) -> PicState {
        PicState {
            version: PIC_STATE_VERSION,
            chips: self.chips.clone(),
        }
    }

    pub(super) fn from_state(state: PicState) -> Self {
        let mut chips = state.chips;
        for (chip, mask) in chips.iter_mut().zip(ELCR_MASKS) {
            chip.lowest &= 7;
            chip.vector_base &= 0xf8;
            chip.elcr &= mask;
        }
        Self { chips }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux and every BIOS do it: vectors 0x30 and 0x38, nothing masked.
    fn initialized() -> PicPair {
        let mut pair = PicPair::default();
        for (chip, base, wiring) in [(0, 0x30, 4), (1, 0x38, 2)] {
            pair.write(chip, 0, 0x11);
            for word in [base, wiring, 1, 0] {
                pair.write(chip, 1, word);
            }
        }
        pair
    }

    #[test]
    fn an_edge_is_acknowledged_with_its_vector() {
        let mut pair = initialized();
        pair.set_line(4, true);
        assert!(pair.output());
        assert_eq!(pair.acknowledge(), 0x34);
        assert!(!pair.output());
        pair.write(0, 0, 0x20);
        assert!(!pair.output());
    }

    #[test]
    fn the_slaves_inputs_come_through_the_cascade() {
        let mut pair = initialized();
        pair.set_line(8, true);
        pair.set_line(4, true);
        assert_eq!(pair.acknowledge(), 0x38);
        assert!(
            !pair.output(),
            "4 has lower priority than the cascade in service"
        );
        pair.write(1, 0, 0x20);
        pair.write(0, 0, 0x20);
        assert_eq!(pair.acknowledge(), 0x34);
    }

    #[test]
    fn a_request_that_goes_away_is_spurious() {
        let mut pair = initialized();
        pair.set_elcr(0, 0x20);
        pair.set_line(5, true);
        pair.set_line(5, false);
        assert!(!pair.output());
        assert_eq!(pair.acknowledge(), 0x37);
        pair.write(0, 0, 0x0b);
        assert_eq!(pair.read(0, 0), 0, "nothing is in service");
    }

    #[test]
    fn a_pulse_is_an_edge() {
        let mut pair = initialized();
        pair.set_line(4, true);
        pair.set_line(4, false);
        assert_eq!(pair.acknowledge(), 0x34);
        assert!(!pair.output());
    }

    #[test]
    fn masked_inputs_wait() {
        let mut pair = initialized();
        pair.write(0, 1, 0xff);
        pair.set_line(1, true);
        assert!(!pair.output());
        assert_eq!(pair.read(0, 1), 0xff);
        pair.write(0, 1, 0xfd);
        assert_eq!(pair.acknowledge(), 0x31);
    }

    #[test]
    fn a_level_input_requests_again_until_it_is_low() {
        let mut pair = initialized();
        pair.set_elcr(1, 0xff);
        assert_eq!(pair.elcr(1), 0xde);
        pair.set_line(10, true);
        for _ in 0..2 {
            assert_eq!(pair.acknowledge(), 0x3a);
            pair.write(1, 0, 0x20);
            pair.write(0, 0, 0x20);
        }
        pair.set_line(10, false);
        assert!(!pair.output());
    }

    #[test]
    fn rotation_gives_the_served_input_the_lowest_priority() {
        let mut pair = initialized();
        pair.set_line(0, true);
        pair.set_line(1, true);
        assert_eq!(pair.acknowledge(), 0x30);
        pair.write(0, 0, 0xa0);
        pair.set_line(0, false);
        pair.set_line(0, true);
        assert_eq!(pair.acknowledge(), 0x31);
    }

    #[test]
    fn polling_acknowledges_without_the_processor() {
        let mut pair = initialized();
        pair.set_line(3, true);
        pair.write(0, 0, 0x0c);
        assert_eq!(pair.read(0, 0), 0x83);
        assert!(!pair.output());
    }

    #[test]
    fn automatic_end_of_interrupt_leaves_nothing_in_service() {
        let mut pair = PicPair::default();
        pair.write(0, 0, 0x13);
        for word in [0x40, 0x03, 0] {
            pair.write(0, 1, word);
        }
        pair.set_line(5, true);
        assert_eq!(pair.acknowledge(), 0x45);
        pair.write(0, 0, 0x0b);
        assert_eq!(pair.read(0, 0), 0);
    }

    #[test]
    fn a_restored_pair_continues() {
        let mut pair = initialized();
        pair.set_line(4, true);
        let mut restored = PicPair::from_state(pair.save());
        assert_eq!(restored.acknowledge(), 0x34);
    }
}
