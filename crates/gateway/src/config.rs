//! The document that a gateway starts from, and the parts of it that can change later.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use serde::Deserialize;
use serde::Deserializer;
use serde::de::Error;

pub use crate::policy::PolicyConfig;
use crate::wire::Mac;

/// The largest document.
pub(crate) const MAX_DOCUMENT_BYTES: usize = 1 << 20;

/// A descriptor: a number that was inherited, or which of those that came with a message.
pub type Fd = i32;

/// An address and its network's prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet<A> {
    /// The gateway's own address.
    pub address: A,
    /// Bits of the prefix.
    pub bits: u8,
}

impl Subnet<Ipv4Addr> {
    /// The mask.
    pub(crate) fn mask(self) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(self.bits))
            .unwrap_or_default()
    }

    pub(crate) fn has(self, other: Ipv4Addr) -> bool {
        (u32::from(self.address) ^ u32::from(other)) & self.mask() == 0
    }
}

impl Subnet<Ipv6Addr> {
    pub(crate) fn has(self, other: Ipv6Addr) -> bool {
        let mask = u128::MAX.checked_shl(128 - u32::from(self.bits));
        (u128::from(self.address) ^ u128::from(other)) & mask.unwrap_or_default() == 0
    }
}

impl<'de, A: std::str::FromStr> Deserialize<'de> for Subnet<A>
where
    A: Into<IpAddr> + Copy,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.split_once('/').and_then(|(address, bits)| {
            let address: A = address.parse().ok()?;
            let most = if address.into().is_ipv4() { 30 } else { 126 };
            let bits: u8 = bits.parse().ok()?;
            (1..=most).contains(&bits).then_some(Self { address, bits })
        });
        parsed.ok_or_else(|| D::Error::custom(format!("{text:?} is not an address with a prefix")))
    }
}

/// What a link's descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// A TAP device.
    Tap,
    /// A socket whose messages are frames.
    Socket,
}

/// Bounds on a link, from the machine's point of view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateConfig {
    /// Bytes a second that it sends.
    pub send_bytes_per_s: Option<u64>,
    /// Bytes a second that it receives.
    pub receive_bytes_per_s: Option<u64>,
    /// Bytes at once after a pause.
    pub burst_bytes: Option<u64>,
}

/// A machine's link.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortConfig {
    /// Its name in this network.
    pub name: String,
    /// Its descriptor.
    pub fd: Fd,
    /// What that is.
    pub link: LinkKind,
    /// The machine's Ethernet address.
    #[serde(deserialize_with = "mac")]
    pub mac: Mac,
    /// The machine's addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Told by DHCP.
    #[serde(default)]
    pub hostname: String,
    /// Bounds.
    #[serde(default)]
    pub rate: RateConfig,
    /// The machine's own egress rules, besides the network's.
    #[serde(default)]
    pub policy: Option<PolicyConfig>,
}

/// What a listening socket of the host is for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublishConfig {
    /// The socket: TCP and listening, or UDP and bound.
    pub fd: Fd,
    /// The link's name.
    pub port: String,
    /// Where to on the machine.
    pub to: u16,
}

/// Bounds on what a network's machines can make the gateway keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// TCP connections.
    pub connections: usize,
    /// UDP and ICMP flows.
    pub flows: usize,
    /// Bytes on their way, of all connections.
    pub buffer_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            flows: 8192,
            buffer_bytes: 256 << 20,
        }
    }
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Of this document: 1.
    pub version: u32,
    /// For log lines.
    pub name: String,
    /// The gateway's Ethernet address.
    #[serde(deserialize_with = "mac")]
    pub mac: Mac,
    /// The gateway's IPv4 address and the network's prefix.
    #[serde(default)]
    pub ipv4: Option<Subnet<Ipv4Addr>>,
    /// Likewise for IPv6.
    #[serde(default)]
    pub ipv6: Option<Subnet<Ipv6Addr>>,
    /// The largest packet.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Whether there is a way outside.
    #[serde(default = "yes")]
    pub uplink: bool,
    /// The host's name servers.
    #[serde(default)]
    pub nameservers: Vec<IpAddr>,
    /// Names without a dot are looked for in these domains, told by DHCP.
    #[serde(default)]
    pub search: Vec<String>,
    /// Names that are answered here.
    #[serde(default)]
    pub names: BTreeMap<String, Vec<IpAddr>>,
    /// Who may be reached.
    #[serde(default)]
    pub policy: PolicyConfig,
    /// Links that are there from the start.
    #[serde(default)]
    pub ports: Vec<PortConfig>,
    /// Published ports that are there from the start.
    #[serde(default)]
    pub publish: Vec<PublishConfig>,
    /// A connection to the owner: the gateway ends with it.
    #[serde(default)]
    pub control_fd: Option<Fd>,
    /// Where others may connect and steer.
    #[serde(default)]
    pub listen_fd: Option<Fd>,
    /// End when the last link is gone.
    #[serde(default)]
    pub exit_when_empty: bool,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
}

fn yes() -> bool {
    true
}

fn default_mtu() -> u16 {
    1500
}

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not the document that this program understands.
    #[error("{path}: {message}")]
    Field {
        /// The field.
        path: String,
        /// What's wrong with it.
        message: String,
    },
    /// Too long.
    #[error("the document is longer than {MAX_DOCUMENT_BYTES} bytes")]
    TooLong,
}

impl ConfigError {
    fn field(path: &str, message: impl Into<String>) -> Self {
        Self::Field {
            path: path.to_owned(),
            message: message.into(),
        }
    }
}

/// Reads a document.
///
/// # Errors
/// [`ConfigError`] names the field.
pub fn parse(text: &[u8]) -> Result<Config, ConfigError> {
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(ConfigError::TooLong);
    }
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let config: Config = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        ConfigError::field(&path, error.into_inner().to_string())
    })?;
    if config.version != 1 {
        return Err(ConfigError::field(
            "version",
            "this program knows version 1",
        ));
    }
    if config.mtu < 1280 || config.mtu > 65_520 {
        return Err(ConfigError::field("mtu", "is not 1280 to 65520"));
    }
    Ok(config)
}

/// Six hexadecimal bytes with colons; a station's own address, not a group's.
fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
    let text = String::deserialize(deserializer)?;
    let byte = |part: &str| {
        let digits = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes
        .and_then(|bytes| Mac::try_from(bytes).ok())
        .filter(|mac| mac[0] & 1 == 0 && mac != &[0; 6])
        .ok_or_else(|| D::Error::custom(format!("{text:?} is not a unicast MAC address")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(field: &str, value: serde_json::Value) -> String {
        let mut document = json!({"version": 1, "name": "n", "mac": "02:00:00:00:00:01"});
        document[field] = value;
        let error = parse(document.to_string().as_bytes()).expect_err(field);
        error.to_string()
    }

    #[test]
    fn wrong_fields_are_named() {
        for (field, value) in [
            ("version", json!(2)),
            ("mac", json!("03:00:00:00:00:01")),
            ("ipv4", json!("10.0.0.1")),
            ("ipv4", json!("10.0.0.1/31")),
            ("ipv6", json!("fd00::1/0")),
            ("mtu", json!(1000)),
        ] {
            let message = refused(field, value);
            assert!(message.starts_with(field), "{message}");
        }
        assert!(refused("colour", json!(1)).contains("colour"));
    }

    #[test]
    fn subnets_know_their_own() {
        let subnet: Subnet<Ipv4Addr> = serde_json::from_value(json!("10.0.2.2/24")).expect("one");
        assert!(subnet.has(Ipv4Addr::new(10, 0, 2, 200)));
        assert!(!subnet.has(Ipv4Addr::new(10, 0, 3, 1)));
    }
}
