//! Addresses that stay closed unless a rule names them.

use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

/// The IPv4 address inside an IPv6 one that stands for it (RFC 4291 §2.5.5.2, RFC 6052 §2.1,
/// RFC 3056), so that no second way of writing an address escapes a rule.
pub(crate) fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(six) = address else {
        return address;
    };
    if let Some(four) = six.to_ipv4_mapped() {
        return four.into();
    }
    let [a, b, c, d, e, f, g, h] = six.segments();
    let of = |high: u16, low: u16| {
        let [one, two] = high.to_be_bytes();
        let [three, four] = low.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(one, two, three, four))
    };
    match (a, b, c, d, e, f) {
        (0x64, 0xff9b, 0, 0, 0, 0) => of(g, h),
        (0x2002, high, low, ..) => of(high, low),
        (0, 0, 0, 0, 0, 0) if (g, h) != (0, 0) && (g, h) != (0, 1) => of(g, h),
        _ => address,
    }
}

/// Providers' metadata and agent addresses outside the link-local range.
const METADATA: [Ipv4Addr; 3] = [
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(168, 63, 129, 16),
    Ipv4Addr::new(192, 0, 0, 192),
];
const METADATA_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
];

/// Why `address`, already [`unwrapped`], is closed, if it is.
pub(super) fn why(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(four) => {
            let first = four.octets()[0];
            if first == 127 || first == 0 {
                Some("the host's loopback")
            } else if four.octets()[..2] == [169, 254] || METADATA.contains(&four) {
                Some("link-local or metadata")
            } else if first >= 224 {
                Some("a group or reserved")
            } else {
                None
            }
        }
        IpAddr::V6(six) => {
            if six.is_loopback() || six.is_unspecified() {
                Some("the host's loopback")
            } else if six.segments()[0] & 0xffc0 == 0xfe80 || METADATA_V6.contains(&six) {
                Some("link-local or metadata")
            } else if six.is_multicast() {
                Some("a group or reserved")
            } else {
                None
            }
        }
    }
}
