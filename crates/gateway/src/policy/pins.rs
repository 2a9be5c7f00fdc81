//! Which names our own name server gave for an address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;
use std::time::Instant;

/// Addresses remembered; the ones that end first make room.
const MAX_ADDRESSES: usize = 16_384;
/// Names an address.
const MAX_NAMES: usize = 32;
/// An answer holds at least so long: programs keep addresses longer than they should.
const LEAST: Duration = Duration::from_secs(300);
const MOST: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
struct Pin {
    name: String,
    until: Instant,
}

/// Answers, by address.
#[derive(Debug, Default)]
pub(crate) struct Pins(HashMap<IpAddr, Vec<Pin>>);

impl Pins {
    /// Remembers that `name` was answered with `address`.
    pub(crate) fn add(&mut self, address: IpAddr, name: &str, ttl: Duration, now: Instant) {
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&address) {
            self.make_room(now);
        }
        let until = now + ttl.clamp(LEAST, MOST);
        let pins = self.0.entry(address).or_default();
        if let Some(pin) = pins.iter_mut().find(|pin| pin.name == name) {
            pin.until = pin.until.max(until);
            return;
        }
        if pins.len() >= MAX_NAMES {
            pins.remove(0);
        }
        pins.push(Pin {
            name: name.to_owned(),
            until,
        });
    }

    fn make_room(&mut self, now: Instant) {
        self.0.retain(|_, pins| {
            pins.retain(|pin| pin.until > now);
            !pins.is_empty()
        });
        if self.0.len() < MAX_ADDRESSES {
            return;
        }
        // A part at once, so that a flood of answers costs little each.
        let last = |pins: &[Pin]| pins.iter().map(|pin| pin.until).max();
        let mut ends: Vec<_> = self.0.values().map(|pins| last(pins)).collect();
        let (_, &mut middle, _) = ends.select_nth_unstable(MAX_ADDRESSES / 4);
        let mut room = MAX_ADDRESSES / 4;
        self.0.retain(|_, pins| {
            let goes = room > 0 && last(pins) <= middle;
            room -= usize::from(goes);
            !goes
        });
    }

    /// The names of `address` that still hold.
    pub(crate) fn names(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = &str> {
        let pins = self.0.get(&address).map(Vec::as_slice).unwrap_or_default();
        pins.iter()
            .filter(move |pin| pin.until > now)
            .map(|pin| pin.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_end_and_are_bounded() {
        let mut pins = Pins::default();
        let now = Instant::now();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        pins.add(address(0), "long.example", Duration::from_secs(5000), now);
        for n in 1..40_000 {
            pins.add(address(n), "a.example", Duration::ZERO, now);
        }
        assert!(pins.0.len() <= MAX_ADDRESSES);
        assert_eq!(
            pins.names(address(0), now).collect::<Vec<_>>(),
            ["long.example"]
        );
        assert_eq!(pins.names(address(39_999), now).count(), 1);
        assert_eq!(pins.names(address(39_999), now + LEAST).count(), 0);
        for n in 0..100 {
            pins.add(address(0), &n.to_string(), Duration::ZERO, now);
        }
        assert_eq!(pins.names(address(0), now).count(), MAX_NAMES);
    }
}
