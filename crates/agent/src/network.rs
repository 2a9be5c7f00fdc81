//! Network interfaces, by route netlink (rtnetlink(7)).

use crate::error::AgentError;
use crate::error::Tried;
use crate::message::Interface;
use crate::place::DEVICE_STEP;
use crate::place::wait;
use rustix::net::AddressFamily;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
/// NLM_F_REQUEST, NLM_F_ACK.
const ASK: u16 = 0x1 | 0x4;
/// NLM_F_CREATE, NLM_F_REPLACE.
const PUT: u16 = 0x400 | 0x100;
const ERROR: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const IFF_UP: u32 = 1;
/// No wait for others with the same address: the host gives each guest its own.
const IFA_F_NODAD: u8 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// The gateway may be outside of the address's prefix.
const RTNH_F_ONLINK: u32 = 4;

const DEVICE_PATIENCE: Duration = Duration::from_secs(5);

/// A netlink message under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((ASK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        Self(bytes)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(0).to_ne_bytes();
        self.0.splice(..4, length);
        self.0
    }
}

/// A question to the kernel's routing.
struct Route(OwnedFd);

impl Route {
    fn open() -> Result<Self, AgentError> {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)
            .map(Self)
            .tried(|| "cannot speak to the network's kernel side".into())
    }

    fn ask(&self, message: Message, what: impl Fn() -> String) -> Result<(), AgentError> {
        rustix::net::send(&self.0, &message.finish(), SendFlags::empty()).tried(&what)?;
        let mut answer = [0_u8; 4096];
        rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty()).tried(&what)?;
        let [
            _,
            _,
            _,
            _,
            a,
            b,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            c,
            d,
            e,
            f,
            ..,
        ] = answer;
        let code = i32::from_ne_bytes([c, d, e, f]);
        if u16::from_ne_bytes([a, b]) == ERROR && code != 0 {
            let errno = std::io::Error::from_raw_os_error(code.saturating_neg());
            return Err(AgentError::io(what(), &errno));
        }
        Ok(())
    }

    fn link(
        &self,
        index: u32,
        up: bool,
        attributes: impl FnOnce(Message) -> Message,
        what: impl Fn() -> String,
    ) -> Result<(), AgentError> {
        let (flags, change) = if up { (IFF_UP, IFF_UP) } else { (0, 0) };
        let message = Message::new(NEW_LINK, 0)
            .bytes(&[0; 4])
            .bytes(&index.to_ne_bytes())
            .bytes(&flags.to_ne_bytes())
            .bytes(&change.to_ne_bytes());
        self.ask(attributes(message), what)
    }
}

/// Brings the loopback and all interfaces up.
///
/// # Errors
///
/// There is no such device, an address is none, or the kernel refuses.
pub(crate) fn set_up(interfaces: &[Interface]) -> Result<(), AgentError> {
    let route = Route::open()?;
    route.link(1, true, |message| message, || "cannot bring lo up".into())?;
    for interface in interfaces {
        set_up_one(&route, interface)?;
    }
    Ok(())
}

/// Looks for the device that was put in, and brings it up.
///
/// # Errors
///
/// It isn't there, or the kernel refuses.
pub(crate) fn find(interface: &Interface) -> Result<(), AgentError> {
    fs::write("/sys/bus/pci/rescan", "1").tried(|| "cannot look at the bus again".into())?;
    set_up_one(&Route::open()?, interface)
}

/// Takes the device of a MAC address off the bus.
///
/// # Errors
///
/// There is none, or the kernel refuses.
pub(crate) fn let_go(mac: &str) -> Result<(), AgentError> {
    let (name, _) = device(mac)?;
    let what = || format!("cannot let go of {name}");
    // The device below is virtio's; the one below that is on the bus.
    let device = fs::canonicalize(format!("/sys/class/net/{name}/device")).tried(what)?;
    let on_bus = device.parent().unwrap_or(&device);
    fs::write(on_bus.join("remove"), "1").tried(what)
}

fn set_up_one(route: &Route, interface: &Interface) -> Result<(), AgentError> {
    let (mut name, index) = device(&interface.mac)?;
    if !interface.name.is_empty() && interface.name != name {
        let new = format!("{}\0", interface.name);
        let what = || format!("cannot name {name} {}", interface.name);
        route.link(
            index,
            false,
            |at| at.attribute(IFLA_IFNAME, new.as_bytes()),
            what,
        )?;
        name.clone_from(&interface.name);
    }
    if let Some(mtu) = interface.mtu {
        let what = || format!("cannot give {name} an MTU of {mtu}");
        route.link(
            index,
            false,
            |at| at.attribute(IFLA_MTU, &mtu.to_ne_bytes()),
            what,
        )?;
    }
    route.link(
        index,
        true,
        |message| message,
        || format!("cannot bring {name} up"),
    )?;
    for text in &interface.addresses {
        let (address, prefix) = parse_prefix(text)?;
        let bytes = octets(address);
        let message = Message::new(NEW_ADDRESS, PUT)
            .bytes(&[family(address), prefix, IFA_F_NODAD, 0])
            .bytes(&index.to_ne_bytes())
            .attribute(IFA_LOCAL, &bytes)
            .attribute(IFA_ADDRESS, &bytes);
        route.ask(message, || format!("cannot give {name} the address {text}"))?;
    }
    for text in &interface.gateways {
        let gateway = parse(text)?;
        let message = Message::new(NEW_ROUTE, PUT)
            .bytes(&[family(gateway), 0, 0, 0])
            .bytes(&[RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST])
            .bytes(&RTNH_F_ONLINK.to_ne_bytes())
            .attribute(RTA_OIF, &index.to_ne_bytes())
            .attribute(RTA_GATEWAY, &octets(gateway));
        route.ask(message, || format!("cannot route by {text} on {name}"))?;
    }
    Ok(())
}

/// The device of a MAC address: its name and number.
fn device(mac: &str) -> Result<(String, u32), AgentError> {
    let deadline = Instant::now() + DEVICE_PATIENCE;
    loop {
        for entry in fs::read_dir("/sys/class/net")
            .into_iter()
            .flatten()
            .flatten()
        {
            let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
            if read("address").trim().eq_ignore_ascii_case(mac)
                && let Ok(index) = read("ifindex").trim().parse()
            {
                return Ok((entry.file_name().to_string_lossy().into_owned(), index));
            }
        }
        if Instant::now() > deadline {
            let message = format!("there is no network device with the address {mac}");
            return Err(AgentError::config(message));
        }
        wait(DEVICE_STEP);
    }
}

fn parse(text: &str) -> Result<IpAddr, AgentError> {
    text.parse()
        .map_err(|_| AgentError::config(format!("{text} is no address")))
}

fn parse_prefix(text: &str) -> Result<(IpAddr, u8), AgentError> {
    let wrong = || AgentError::config(format!("{text} is no address with a prefix length"));
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address = parse(address)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.parse().ok().filter(|bits| *bits <= most);
    Ok((address, prefix.ok_or_else(wrong)?))
}

/// AF_INET or AF_INET6.
fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_the_length_is_the_whole() {
        let message = Message::new(NEW_LINK, 0).attribute(IFLA_IFNAME, b"lo\0");
        let bytes = message.finish();
        assert_eq!(bytes.len(), 16 + 8);
        assert_eq!(bytes[..4], 24_u32.to_ne_bytes());
        assert_eq!(bytes[16..24], [7, 0, 3, 0, b'l', b'o', 0, 0]);
    }

    #[test]
    fn prefixes_are_checked() {
        let parsed = parse_prefix("10.0.0.2/24").expect("an address");
        assert_eq!(parsed, ("10.0.0.2".parse().expect("an address"), 24));
        parse_prefix("10.0.0.2/33").expect_err("no address");
        parse_prefix("10.0.0.2").expect_err("no address");
        parse_prefix("fd00::2/64").expect("an address");
        parse_prefix("x/8").expect_err("no address");
    }
}
