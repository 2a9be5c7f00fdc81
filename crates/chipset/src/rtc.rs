//! The MC146818 real-time clock and its battery-backed memory.
//!
//! Spec: Motorola MC146818A data sheet; the century byte as ACPI's FADT names it. Interrupts
//! (alarm, periodic, update-ended) are not wired: their registers can be written, and nothing
//! happens. Guests that have a driver for it use it to read the date, and to set it.

mod calendar;

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use ringfence_bus::PioDevice;
use ringfence_clock::wall_clock;
use ringfence_device::Persist;
use ringfence_device::RestoreError;
use serde::Deserialize;
use serde::Serialize;

use calendar::DateTime;

/// First port: index, then data.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports.
pub const RTC_PORTS: u64 = 2;
/// The register that holds the century.
pub const RTC_CENTURY: u8 = 0x32;

const BYTES: usize = 128;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// A: an update is near; 32,768 Hz time base, 1,024 Hz rate.
const A_UPDATING: u8 = 1 << 7;
const A_RESET: u8 = 0x26;
/// B: don't update; binary instead of BCD; 24 hours.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// D: the battery is good.
const D_VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// Updates are announced this long before (data sheet, figure 15).
const ANNOUNCED_NS: u32 = 244_000;
const NS_PER_S: u32 = 1_000_000_000;

/// Version of [`RtcState`].
const STATE_VERSION: u32 = 1;

/// The saved state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    version: u32,
    index: u8,
    bytes: Vec<u8>,
    offset_s: i64,
}

#[derive(Debug)]
struct Registers {
    index: u8,
    bytes: [u8; BYTES],
    /// Guest time minus host time.
    offset_s: i64,
}

/// The clock. It tells the host's time until the guest sets it.
#[derive(Debug)]
pub struct Rtc(Mutex<Registers>);

impl Default for Rtc {
    fn default() -> Self {
        let mut bytes = [0; BYTES];
        bytes[usize::from(REGISTER_A)] = A_RESET;
        bytes[usize::from(REGISTER_B)] = B_24_HOURS;
        Self(Mutex::new(Registers {
            index: 0,
            bytes,
            offset_s: 0,
        }))
    }
}

impl Registers {
    fn byte(&self, index: u8) -> u8 {
        self.bytes.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn b(&self) -> u8 {
        self.byte(REGISTER_B)
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 {
            value
        } else {
            ((value / 10 % 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.b() & B_BINARY != 0 {
            value
        } else {
            (value >> 4).saturating_mul(10).saturating_add(value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let pm = if value & PM != 0 { 12 } else { 0 };
        self.decode(value & !PM) % 12 + pm
    }

    /// Time registers as the clock would show them now.
    fn put_time(&mut self, time: DateTime) {
        let century = u8::try_from(time.year / 100).unwrap_or(0);
        let year = u8::try_from(time.year % 100).unwrap_or(0);
        for (index, value) in [
            (0x00, self.encode(time.second)),
            (0x02, self.encode(time.minute)),
            (0x04, self.encode_hour(time.hour)),
            (0x06, self.encode(time.weekday)),
            (0x07, self.encode(time.day)),
            (0x08, self.encode(time.month)),
            (0x09, self.encode(year)),
            (RTC_CENTURY, self.encode(century)),
        ] {
            self.bytes[usize::from(index)] = value;
        }
    }

    fn time(&self) -> DateTime {
        let part = |index| self.decode(self.byte(index));
        DateTime {
            second: part(0x00),
            minute: part(0x02),
            hour: self.decode_hour(self.byte(0x04)),
            weekday: part(0x06),
            day: part(0x07),
            month: part(0x08),
            year: u16::from(part(RTC_CENTURY)) * 100 + u16::from(part(0x09)),
        }
    }

    fn host_s() -> i64 {
        i64::try_from(wall_clock().0).unwrap_or(i64::MAX)
    }

    /// Brings the time registers up to date, unless the guest holds them.
    fn update(&mut self) {
        if self.b() & B_SET == 0 {
            let now = Self::host_s().saturating_add(self.offset_s);
            self.put_time(DateTime::from_unix(now));
        }
    }

    /// The clock goes on from what the time registers say; a date that isn't one is ignored.
    fn adopt(&mut self) {
        if let Some(seconds) = self.time().to_unix() {
            self.offset_s = seconds.saturating_sub(Self::host_s());
        }
    }

    fn read(&mut self) -> u8 {
        match self.index {
            REGISTER_A => {
                let near = wall_clock().1 >= NS_PER_S - ANNOUNCED_NS;
                let held = self.b() & B_SET != 0;
                let updating = if near && !held { A_UPDATING } else { 0 };
                self.byte(REGISTER_A) | updating
            }
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            index => {
                self.update();
                self.byte(index)
            }
        }
    }

    fn write(&mut self, value: u8) {
        let index = usize::from(self.index);
        match self.index {
            REGISTER_A => self.bytes[index] = value & !A_UPDATING,
            REGISTER_B => {
                self.update();
                let was_held = self.b() & B_SET != 0;
                let time = self.time();
                self.bytes[index] = value;
                if !was_held {
                    // In the new format, if that changed.
                    self.put_time(time);
                } else if value & B_SET == 0 {
                    self.adopt();
                }
            }
            REGISTER_C | REGISTER_D => {}
            0x00 | 0x02 | 0x04 | 0x06..=0x09 | RTC_CENTURY => {
                self.update();
                self.bytes[index] = value;
                if self.b() & B_SET == 0 {
                    self.adopt();
                }
            }
            _ => self.bytes[index] = value,
        }
    }
}

impl Rtc {
    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PioDevice for Rtc {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], 1) = (data, offset) {
            *byte = self.registers().read();
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let &[byte] = data else { return };
        let mut registers = self.registers();
        match offset {
            // The top bit masks NMIs on a PC, which this machine has none of.
            0 => registers.index = byte & 0x7f,
            _ => registers.write(byte),
        }
    }
}

impl Persist for Rtc {
    type State = RtcState;

    const NAME: &'static str = "real-time clock";

    fn save(&self) -> RtcState {
        let registers = self.registers();
        RtcState {
            version: STATE_VERSION,
            index: registers.index,
            bytes: registers.bytes.to_vec(),
            offset_s: registers.offset_s,
        }
    }

    fn restore(&self, state: RtcState) -> Result<(), RestoreError> {
        if state.version != STATE_VERSION {
            return Err(RestoreError::Version {
                what: Self::NAME,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let bytes = state.bytes.try_into().map_err(|_| RestoreError::Mismatch {
            what: Self::NAME,
            why: format!("its memory doesn't have {BYTES} bytes"),
        })?;
        *self.registers() = Registers {
            index: state.index & 0x7f,
            bytes,
            offset_s: state.offset_s,
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &Rtc, index: u8) -> u8 {
        let mut byte = [0];
        rtc.write(0, &[index]);
        rtc.read(1, &mut byte);
        byte[0]
    }

    fn write(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    /// Sets 2031-12-31 23:59:58, as a driver does.
    fn set(rtc: &Rtc) {
        write(rtc, REGISTER_B, B_24_HOURS | B_SET);
        for (index, value) in [
            (0x00, 0x58),
            (0x02, 0x59),
            (0x04, 0x23),
            (0x06, 0x04),
            (0x07, 0x31),
            (0x08, 0x12),
            (0x09, 0x31),
            (RTC_CENTURY, 0x20),
        ] {
            write(rtc, index, value);
        }
    }

    fn unix(rtc: &Rtc) -> i64 {
        let mut registers = rtc.registers();
        registers.update();
        registers.time().to_unix().expect("a date")
    }

    #[test]
    fn it_tells_the_hosts_time_in_bcd() {
        let rtc = Rtc::default();
        let before = Registers::host_s();
        let told = unix(&rtc);
        assert!((before..=before + 2).contains(&told), "{told}");
        assert_eq!(read(&rtc, RTC_CENTURY), 0x20);
        assert_eq!(read(&rtc, REGISTER_D), D_VALID);
        assert_eq!(read(&rtc, REGISTER_C), 0);
    }

    #[test]
    fn a_clock_that_was_set_goes_on_from_there() {
        let rtc = Rtc::default();
        set(&rtc);
        assert_eq!(read(&rtc, 0x00), 0x58, "held while SET is on");
        write(&rtc, REGISTER_B, B_24_HOURS);
        let told = unix(&rtc);
        assert!((1_956_527_998..1_956_528_100).contains(&told), "{told}");
    }

    #[test]
    fn formats_follow_register_b() {
        let rtc = Rtc::default();
        set(&rtc);
        assert_eq!(read(&rtc, 0x04), 0x23);
        let mut registers = rtc.registers();
        registers.bytes[usize::from(REGISTER_B)] = B_SET | B_BINARY;
        assert_eq!(registers.encode_hour(23), 11 | PM);
        assert_eq!(registers.encode_hour(0), 12);
        assert_eq!(registers.encode_hour(12), 12 | PM);
        for hour in 0..24 {
            assert_eq!(registers.decode_hour(registers.encode_hour(hour)), hour);
        }
    }

    #[test]
    fn nonsense_dates_are_ignored() {
        let rtc = Rtc::default();
        for index in 0..=0x7f {
            write(&rtc, index, 0xff);
        }
        for index in 0..=0x7f {
            write(&rtc, index, 0);
            read(&rtc, index);
        }
        assert!(unix(&rtc) > 0);
    }

    #[test]
    fn memory_and_offset_survive_a_snapshot() {
        let one = Rtc::default();
        set(&one);
        write(&one, REGISTER_B, B_24_HOURS);
        write(&one, 0x40, 0xa5);
        let two = Rtc::default();
        two.restore(one.save()).expect("fits");
        assert_eq!(read(&two, 0x40), 0xa5);
        assert!(unix(&two) >= 1_956_527_998);
    }
}
