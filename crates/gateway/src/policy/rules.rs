//! Rules as they are written, and as they are asked.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Instant;

use serde::Deserialize;
use serde::Serialize;

use super::Pins;
use super::closed;
use super::unwrapped;

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Admits.
    Allow,
    /// Refuses.
    Deny,
}

/// What a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP connections.
    Tcp,
    /// UDP datagrams.
    Udp,
    /// ICMP echo.
    Icmp,
}

/// First and last port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct PortRange(pub u16, pub u16);

/// One rule: exactly one of `cidr` and `domain`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig {
    /// What it does.
    pub action: Action,
    /// A range of addresses: `10.0.0.0/8`.
    #[serde(default)]
    pub cidr: Option<String>,
    /// A name (`example.com`), or all below one (`*.example.com`).
    #[serde(default)]
    pub domain: Option<String>,
    /// Which ports; all when empty.
    #[serde(default)]
    pub ports: Vec<PortRange>,
    /// Which transport; all when not given.
    #[serde(default)]
    pub transport: Option<Transport>,
}

/// All rules.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyConfig {
    /// What becomes of what no rule is about.
    pub default: Action,
    /// The rules; a deny rule wins over an allow rule, wherever they stand.
    #[serde(default)]
    pub rules: Vec<RuleConfig>,
    /// Names are resolved even if no rule allows them.
    #[serde(default)]
    pub resolve_all: bool,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            default: Action::Allow,
            rules: Vec::new(),
            resolve_all: false,
        }
    }
}

/// Why a rule can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    /// Neither or both of a range and a name.
    #[error("rule {0} needs exactly one of cidr and domain")]
    OneOf(usize),
    /// Not a range of addresses.
    #[error("rule {0}: {1:?} is not an address or a range such as 10.0.0.0/8")]
    Cidr(usize, String),
    /// Not a name.
    #[error("rule {0}: {1:?} is not a domain or *.domain")]
    Domain(usize, String),
    /// The first port is above the last.
    #[error("rule {0}: ports {1} to {2} are no range")]
    Ports(usize, u16, u16),
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cidr {
    base: u128,
    bits: u32,
    is_v4: bool,
}

impl Cidr {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let address = if bits.is_none() {
            unwrapped(address)
        } else {
            address
        };
        let (base, is_v4) = number(address);
        let width = if is_v4 { 32 } else { 128 };
        let bits = bits.unwrap_or(width);
        (bits <= width).then_some(Self {
            base,
            bits: bits + (128 - width),
            is_v4,
        })
    }

    fn has(self, address: IpAddr) -> bool {
        let (number, is_v4) = number(address);
        let mask = u128::MAX.checked_shl(128 - self.bits).unwrap_or(0);
        is_v4 == self.is_v4 && number & mask == self.base & mask
    }

    /// Whether all of it is closed: such a rule opens what it names.
    fn is_within_closed(self) -> bool {
        let mask = u128::MAX.checked_shl(128 - self.bits).unwrap_or(0);
        let (first, last) = (self.base & mask, self.base | !mask);
        // Each closed range is a whole prefix: both ends inside the same one is enough.
        let (first, last) = (address(first, self.is_v4), address(last, self.is_v4));
        closed::why(first).is_some() && closed::why(first) == closed::why(last)
    }
}

fn number(address: IpAddr) -> (u128, bool) {
    match address {
        IpAddr::V4(four) => (u128::from(u32::from(four)), true),
        IpAddr::V6(six) => (u128::from(six), false),
    }
}

fn address(number: u128, is_v4: bool) -> IpAddr {
    if is_v4 {
        let [.., a, b, c, d] = number.to_be_bytes();
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(number.to_be_bytes())
    }
}

/// A name, or all below it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Domain {
    name: String,
    below: bool,
}

impl Domain {
    fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let text = text.strip_suffix('.').unwrap_or(&text);
        let (name, below) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let label = |label: &str| {
            let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(good)
        };
        (name.len() <= 253 && name.split('.').all(label)).then(|| Self {
            name: name.to_owned(),
            below,
        })
    }

    fn has(&self, name: &str) -> bool {
        if !self.below {
            return name == self.name;
        }
        name.strip_suffix(&self.name)
            .is_some_and(|front| front.len() > 1 && front.ends_with('.'))
    }
}

#[derive(Clone, Debug)]
enum Subject {
    Cidr(Cidr),
    Domain(Domain),
}

#[derive(Clone, Debug)]
struct Rule {
    action: Action,
    subject: Subject,
    ports: Vec<RangeInclusive<u16>>,
    transport: Option<Transport>,
    opens_closed: bool,
    text: String,
}

impl Rule {
    fn new(index: usize, config: &RuleConfig) -> Result<Self, RuleError> {
        let subject = match (&config.cidr, &config.domain) {
            (Some(cidr), None) => Subject::Cidr(
                Cidr::parse(cidr).ok_or_else(|| RuleError::Cidr(index, cidr.clone()))?,
            ),
            (None, Some(domain)) => Subject::Domain(
                Domain::parse(domain).ok_or_else(|| RuleError::Domain(index, domain.clone()))?,
            ),
            _ => return Err(RuleError::OneOf(index)),
        };
        let mut ports = Vec::new();
        for &PortRange(first, last) in &config.ports {
            if first > last {
                return Err(RuleError::Ports(index, first, last));
            }
            ports.push(first..=last);
        }
        let text = config.cidr.clone().or_else(|| config.domain.clone());
        Ok(Self {
            action: config.action,
            opens_closed: matches!(&subject, Subject::Cidr(cidr) if cidr.is_within_closed()),
            subject,
            ports,
            transport: config.transport,
            text: text.unwrap_or_default(),
        })
    }

    fn is_about(&self, transport: Transport, port: u16) -> bool {
        self.transport.is_none_or(|own| own == transport)
            && (self.ports.is_empty() || self.ports.iter().any(|ports| ports.contains(&port)))
    }
}

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    Closed(&'static str),
    Denied(String),
    NotAllowed,
    /// The name in the first bytes isn't one that may be reached.
    Name(String),
    /// A connection to an address that is open by its name alone doesn't show its name.
    NoName,
    NoUplink,
}

impl Reason {
    /// What it is counted under.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Closed(_) => "closed",
            Self::Denied(_) => "denied",
            Self::NotAllowed => "not-allowed",
            Self::Name(_) => "name",
            Self::NoName => "no-name",
            Self::NoUplink => "no-uplink",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(why) => write!(f, "the address is closed ({why})"),
            Self::Denied(rule) => write!(f, "denied by the rule for {rule}"),
            Self::NotAllowed => f.write_str("no rule allows it"),
            Self::Name(name) => write!(f, "the connection asks for {name}"),
            Self::NoName => f.write_str("the connection doesn't show the name it is for"),
            Self::NoUplink => f.write_str("the network has no way outside"),
        }
    }
}

/// What the first bytes of a connection must hold to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inspect {
    /// The address is open by its name alone.
    MustBeAllowed,
    /// Some names are denied.
    MustNotBeDenied,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Allow,
    AllowIf(Inspect),
    Refuse(Reason),
}

/// The rules, ready to be asked.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    default: Action,
    rules: Vec<Rule>,
    resolve_all: bool,
    denies_names: bool,
}

/// QUIC (RFC 9000): its names can't be seen.
const QUIC: u16 = 443;

impl Policy {
    pub(crate) fn new(config: &PolicyConfig) -> Result<Self, RuleError> {
        let rules = config.rules.iter().enumerate();
        let rules: Vec<Rule> = rules
            .map(|(index, rule)| Rule::new(index, rule))
            .collect::<Result<_, _>>()?;
        let denies_names = rules
            .iter()
            .any(|rule| rule.action == Action::Deny && matches!(rule.subject, Subject::Domain(_)));
        Ok(Self {
            default: config.default,
            rules,
            resolve_all: config.resolve_all,
            denies_names,
        })
    }

    fn find(
        &self,
        action: Action,
        (transport, port): (Transport, u16),
        mut is_subject: impl FnMut(&Subject) -> bool,
    ) -> Option<&Rule> {
        self.rules.iter().find(|rule| {
            rule.action == action && rule.is_about(transport, port) && is_subject(&rule.subject)
        })
    }

    /// Whether a rule opens an address that is closed otherwise.
    pub(crate) fn opens(&self, transport: Transport, (to, port): (IpAddr, u16)) -> bool {
        let to = unwrapped(to);
        self.rules.iter().any(|rule| {
            rule.opens_closed
                && rule.action == Action::Allow
                && rule.is_about(transport, port)
                && matches!(&rule.subject, Subject::Cidr(cidr) if cidr.has(to))
        })
    }

    /// Whether `destination` may be reached.
    pub(crate) fn check(
        &self,
        transport: Transport,
        (destination, port): (IpAddr, u16),
        pins: &Pins,
        now: Instant,
    ) -> Verdict {
        let destination = unwrapped(destination);
        let about = (transport, port);
        let by_address =
            |subject: &Subject| matches!(subject, Subject::Cidr(cidr) if cidr.has(destination));
        let by_name = |subject: &Subject| match subject {
            Subject::Domain(domain) => pins.names(destination, now).any(|name| domain.has(name)),
            Subject::Cidr(_) => false,
        };
        let either = |subject: &Subject| by_address(subject) || by_name(subject);
        if let Some(rule) = self.find(Action::Deny, about, either) {
            return Verdict::Refuse(Reason::Denied(rule.text.clone()));
        }
        if let Some(why) = closed::why(destination) {
            return if self.opens(transport, (destination, port)) {
                Verdict::Allow
            } else {
                Verdict::Refuse(Reason::Closed(why))
            };
        }
        let quic = transport == Transport::Udp && port == QUIC;
        if self.admits_address(about, destination) {
            return match (self.denies_names, quic) {
                (false, _) => Verdict::Allow,
                (true, true) => Verdict::Refuse(Reason::NoName),
                (true, false) => Verdict::AllowIf(Inspect::MustNotBeDenied),
            };
        }
        if self.find(Action::Allow, about, by_name).is_some() {
            return if quic {
                Verdict::Refuse(Reason::NoName)
            } else {
                Verdict::AllowIf(Inspect::MustBeAllowed)
            };
        }
        Verdict::Refuse(Reason::NotAllowed)
    }

    /// Whether `destination`, already unwrapped, is open whatever it is called.
    fn admits_address(&self, about: (Transport, u16), destination: IpAddr) -> bool {
        let by_address =
            |subject: &Subject| matches!(subject, Subject::Cidr(cidr) if cidr.has(destination));
        self.default == Action::Allow || self.find(Action::Allow, about, by_address).is_some()
    }

    /// What the first bytes of a connection must hold to that others admitted, who know what was
    /// answered for names.
    pub(crate) fn inspects(&self, (destination, port): (IpAddr, u16)) -> Option<Inspect> {
        let destination = unwrapped(destination);
        // A closed address that was opened shows no names.
        if closed::why(destination).is_some() {
            return None;
        }
        if !self.admits_address((Transport::Tcp, port), destination) {
            return Some(Inspect::MustBeAllowed);
        }
        self.denies_names.then_some(Inspect::MustNotBeDenied)
    }

    /// Whether a connection whose first bytes ask for `name` may go on.
    pub(crate) fn check_name(&self, inspect: Inspect, name: &str, port: u16) -> Result<(), Reason> {
        let about = (Transport::Tcp, port);
        let by_name =
            |subject: &Subject| matches!(subject, Subject::Domain(domain) if domain.has(name));
        let refused = self.find(Action::Deny, about, by_name).is_some()
            || (inspect == Inspect::MustBeAllowed
                && self.find(Action::Allow, about, by_name).is_none());
        if refused {
            return Err(Reason::Name(name.to_owned()));
        }
        Ok(())
    }

    /// Whether `name` may be resolved: what can't be reached needs no address, and a name server
    /// is a way out for data.
    pub(crate) fn check_resolve(&self, name: &str) -> Result<(), Reason> {
        let matching = |action: Action| {
            self.rules.iter().find(|rule| {
                rule.action == action
                    && matches!(&rule.subject, Subject::Domain(domain) if domain.has(name))
            })
        };
        let denied =
            matching(Action::Deny).filter(|rule| rule.ports.is_empty() && rule.transport.is_none());
        if let Some(rule) = denied {
            return Err(Reason::Denied(rule.text.clone()));
        }
        let open =
            self.default == Action::Allow || self.resolve_all || matching(Action::Allow).is_some();
        if open {
            Ok(())
        } else {
            Err(Reason::NotAllowed)
        }
    }
}
