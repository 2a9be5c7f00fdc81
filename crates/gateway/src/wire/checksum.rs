//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A sum under way. Parts may have any length; only the last one may be odd, or [`Self::add`]
/// keeps count.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    total: u64,
    odd: bool,
}

impl Sum {
    /// Adds bytes that follow those before.
    pub(crate) fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let [first, rest @ ..] = bytes
        {
            self.total += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            let word: [u8; 4] = word.try_into().unwrap_or_default();
            self.total += u64::from(u32::from_be_bytes(word));
        }
        let mut rest = words.remainder();
        if let [high, low, more @ ..] = rest {
            self.total += u64::from(u16::from_be_bytes([*high, *low]));
            rest = more;
        }
        if let [last] = rest {
            self.total += u64::from(*last) << 8;
            self.odd = true;
        }
        self.total = (self.total & 0xffff_ffff) + (self.total >> 32);
    }

    /// Folded to 16 bits, not inverted: what a header holds that others are to complete.
    pub(crate) fn folded(self) -> u16 {
        let mut total = self.total;
        while total >> 16 != 0 {
            total = (total & 0xffff) + (total >> 16);
        }
        let [.., high, low] = total.to_be_bytes();
        u16::from_be_bytes([high, low])
    }

    /// The checksum.
    pub(crate) fn finish(self) -> u16 {
        !self.folded()
    }
}

/// The sum of the pseudo header (RFC 793 §3.1, RFC 8200 §8.1).
pub(crate) fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Sum {
    let mut sum = Sum::default();
    for address in [src, dst] {
        match address {
            IpAddr::V4(address) => sum.add(&address.octets()),
            IpAddr::V6(address) => sum.add(&address.octets()),
        }
    }
    sum.add(&[0, protocol]);
    let len = u32::try_from(len).unwrap_or(0);
    sum.add(&len.to_be_bytes());
    sum
}
