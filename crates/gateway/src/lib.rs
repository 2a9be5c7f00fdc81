//! The user-space network: a switch between machines' links and a way outside, without root.
//!
//! A guest's TCP connections end here and go on as the host's own sockets, its datagrams likewise,
//! so a machine reaches what the gateway's user reaches and [`PolicyConfig`] lets it. Links are
//! sockets of VM processes or TAP devices in containers' namespaces; either way a frame comes
//! behind a virtio header, and segments of 64 KiB pass unsplit.
//!
//! ```text
//!  link ──▶ switch ──▶ another machine's link
//!              ├────▶ ARP, neighbour discovery, DHCP, ICMP echo
//!              ├────▶ name server ──▶ the host's name servers
//!              └────▶ TCP, UDP, echo ──▶ policy ──▶ the host's sockets
//! ```
//! What it doesn't do: IP fragments, multicast routing, protocols other than TCP, UDP and echo.
//! Frames' checksums aren't verified: a link is memory, not a wire.
//!
//! Standards: RFC 9293 (TCP), RFC 768, RFC 791, RFC 8200, RFC 826, RFC 4861, RFC 2131, RFC 1035.

mod capture;
pub mod config;
mod control;
mod dhcp;
mod dns;
mod events;
mod fds;
mod gateway;
mod jail;
mod log;
mod neighbours;
mod ping;
mod policy;
mod port;
mod relay;
mod segment;
mod shares;
mod slab;
mod stream;
mod switch;
mod tcp;
#[cfg(feature = "test-utils")]
mod testing;
mod udp;
mod wire;
mod world;

use std::error::Error;
use std::io::Read;
use std::io::Write;
use std::process::ExitCode;

pub use gateway::Gateway;
pub use policy::{Action, PolicyConfig, PortRange, RuleConfig, RuleError, Transport};

type AnyError = Box<dyn Error + Send + Sync>;

const USAGE: &str = "usage: ringfence-gateway --config-fd N";

fn read_config(fd: config::Fd) -> Result<config::Config, AnyError> {
    let mut text = Vec::new();
    let file = std::fs::File::from(fds::inherit(fd)?);
    file.take(config::MAX_DOCUMENT_BYTES as u64 + 1)
        .read_to_end(&mut text)?;
    Ok(config::parse(&text)?)
}

/// Takes as many descriptors as the host lets it, and keeps what guests can open within them: one
/// too many would leave a waiting connection that can't be accepted, and a loop that turns for it.
fn fit_descriptors(limits: &mut config::Limits) {
    use rustix::process::Resource;
    let known = rustix::process::getrlimit(Resource::Nofile);
    let wanted = rustix::process::Rlimit {
        current: known.maximum,
        maximum: known.maximum,
    };
    let raised = rustix::process::setrlimit(Resource::Nofile, wanted).is_ok();
    let there = if raised { known.maximum } else { known.current };
    let there = there.map_or(usize::MAX, |count| {
        usize::try_from(count).unwrap_or(usize::MAX)
    });
    // Links, published ports, the control socket, questions to name servers.
    let rest = there.saturating_sub(there / 8).saturating_sub(64);
    limits.connections = limits.connections.min(rest / 3 * 2);
    limits.flows = limits.flows.min(rest / 3);
}

fn run() -> Result<(), AnyError> {
    let mut arguments = std::env::args().skip(1);
    let fd = match (
        arguments.next().as_deref(),
        arguments.next(),
        arguments.next(),
    ) {
        (Some("--config-fd"), Some(fd), None) => fd.parse().map_err(|_| USAGE)?,
        _ => return Err(USAGE.into()),
    };
    let mut config = read_config(fd)?;
    fit_descriptors(&mut config.limits);
    let mut fds = fds::Fds::claim(&config)?;
    let mut gateway = Gateway::new(&config, &mut fds)?;
    jail::enter()?;
    gateway.run()?;
    Ok(())
}

/// The program: reads its document, jails itself, serves.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(inner) = source {
                text.push_str(&format!(": {inner}"));
                source = inner.source();
            }
            // Nobody may be listening.
            let _ = writeln!(std::io::stderr(), "ringfence-gateway: {text}");
            ExitCode::FAILURE
        }
    }
}
