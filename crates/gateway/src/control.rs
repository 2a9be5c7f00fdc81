//! The control socket: one JSON message a request, one an answer, descriptors beside it.
//!
//! `docs/reference/gateway.md` describes the methods.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::RecvAncillaryBuffer;
use rustix::net::RecvAncillaryMessage;
use rustix::net::RecvFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use serde::Deserialize;
use serde_json::Value;
use serde_json::json;

use crate::config::PolicyConfig;
use crate::config::PortConfig;
use crate::config::PublishConfig;
use crate::events::Source;
use crate::fds::Fds;
use crate::gateway::Gateway;
use crate::relay::RelayConfig;
use crate::slab::Id;
use crate::slab::Slab;
use crate::world::World;

/// The longest request.
const MAX_REQUEST: usize = 256 << 10;
/// Who may steer at once.
const MAX_CONNECTIONS: usize = 32;

#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    owner: bool,
}

/// Who steers the gateway.
#[derive(Debug, Default)]
pub(crate) struct Control {
    listener: Option<OwnedFd>,
    connections: Slab<Connection>,
    owner_gone: bool,
}

impl Control {
    /// Serves the owner: the gateway ends when this connection does.
    pub(crate) fn add_owner(&mut self, world: &World, socket: OwnedFd) -> io::Result<()> {
        self.add(world, socket, true)
    }

    fn add(&mut self, world: &World, socket: OwnedFd, owner: bool) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let id = self.connections.insert(Connection { socket, owner });
        if let Some(connection) = self.connections.get(id) {
            let events = &world.events;
            events.watch_readable(&connection.socket, Source::Control, id)?;
        }
        Ok(())
    }

    /// Lets others connect.
    pub(crate) fn listen(&mut self, world: &World, socket: OwnedFd) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        world
            .events
            .watch_readable(&socket, Source::ControlListener, Id::default())?;
        self.listener = Some(socket);
        Ok(())
    }

    pub(crate) fn accept(&mut self, world: &World) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let Ok(socket) = rustix::net::accept_with(listener, flags) else {
            return;
        };
        if self.connections.len() < MAX_CONNECTIONS {
            // One that can't be watched is closed, which its other end sees.
            let _ = self.add(world, socket, false);
        }
    }

    pub(crate) fn owner_is_gone(&self) -> bool {
        self.owner_gone
    }

    fn remove(&mut self, id: Id) {
        if let Some(connection) = self.connections.remove(id) {
            self.owner_gone |= connection.owner;
        }
    }

    /// The next request and its descriptors.
    fn receive(&self, id: Id) -> Result<Option<Received>, Errno> {
        let Some(connection) = self.connections.get(id) else {
            return Ok(None);
        };
        let mut request = vec![0; MAX_REQUEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = rustix::net::recvmsg(
            &connection.socket,
            &mut [IoSliceMut::new(&mut request)],
            &mut ancillary,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        );
        let len = match message {
            Ok(message) => message.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error),
        };
        if len == 0 {
            return Err(Errno::CONNRESET);
        }
        request.truncate(len);
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        Ok(Some((request, fds)))
    }

    fn reply(&mut self, id: Id, answer: &Value) {
        let Some(connection) = self.connections.get(id) else {
            return;
        };
        let text = answer.to_string();
        let sent = rustix::net::sendmsg(
            &connection.socket,
            &[IoSlice::new(text.as_bytes())],
            &mut SendAncillaryBuffer::default(),
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        );
        if sent.is_err() {
            // Somebody who doesn't read is no longer served.
            self.remove(id);
        }
    }
}

/// A request's text and its descriptors.
type Received = (Vec<u8>, Vec<OwnedFd>);

/// A request.
#[derive(Debug, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "snake_case")]
enum Request {
    Status,
    Refusals,
    AddPort(PortConfig),
    RemovePort {
        name: String,
    },
    Publish(PublishConfig),
    Unpublish {
        number: u64,
    },
    SetPolicy(PolicyConfig),
    SetPortPolicy {
        name: String,
        policy: Option<PolicyConfig>,
    },
    SetNames(BTreeMap<String, Vec<IpAddr>>),
    SetSharedNames(BTreeMap<String, Vec<IpAddr>>),
    SetNameservers(Vec<IpAddr>),
    CaptureStart {
        fd: i32,
        port: Option<String>,
    },
    CaptureStop,
    SetRelay(RelayConfig),
    Stop,
}

/// Serves what a connection asks.
pub(crate) fn serve(gateway: &mut Gateway, id: Id) {
    loop {
        let received = gateway.control().receive(id);
        let (request, fds) = match received {
            Ok(Some(received)) => received,
            Ok(None) => return,
            Err(_) => {
                gateway.control().remove(id);
                return;
            }
        };
        let answer = match serde_json::from_slice::<Request>(&request) {
            Ok(request) => perform(gateway, request, Fds::of_message(fds)),
            Err(error) => Err(error.into()),
        };
        let answer = match answer {
            Ok(result) => json!({ "result": result }),
            Err(error) => json!({ "error": error.to_string() }),
        };
        gateway.control().reply(id, &answer);
    }
}

fn perform(
    gateway: &mut Gateway,
    request: Request,
    mut fds: Fds,
) -> Result<Value, Box<dyn Error + Send + Sync>> {
    match request {
        Request::Status => return Ok(status(gateway)),
        Request::Refusals => {
            let refusals = &gateway.world.refusals;
            return Ok(json!({ "counts": refusals.counts, "recent": refusals.recent }));
        }
        Request::AddPort(config) => {
            let fd = fds.take(config.fd)?;
            gateway.add_port(&config, fd)?;
        }
        Request::RemovePort { name } => match gateway.port_named(&name) {
            Some(id) => gateway.remove_port(id),
            None => return Err(format!("there is no link named {name:?}").into()),
        },
        Request::Publish(config) => {
            let fd = fds.take(config.fd)?;
            return Ok(json!(gateway.publish(&config, fd)?));
        }
        Request::Unpublish { number } => {
            if !gateway.unpublish(number) {
                return Err(format!("nothing is published as {number}").into());
            }
        }
        Request::SetPolicy(config) => gateway.world.set_policy(&config)?,
        Request::SetPortPolicy { name, policy } => match gateway.port_named(&name) {
            Some(id) => gateway.world.set_port_policy(id, policy.as_ref())?,
            None => return Err(format!("there is no link named {name:?}").into()),
        },
        Request::SetNames(names) => gateway.world.set_names(&names),
        Request::SetSharedNames(names) => gateway.world.set_shared_names(&names),
        Request::SetNameservers(servers) => gateway.world.nameservers = servers,
        Request::CaptureStart { fd, port } => {
            let fd = fds.take(fd)?;
            gateway.world.capture.start(fd, port)?;
        }
        Request::SetRelay(config) => {
            let (world, relay) = (&mut gateway.world, &mut gateway.relay);
            for &fd in &config.listen {
                relay.listen(world, fds.take(fd)?, None)?;
            }
            for machine in &config.machines {
                for &fd in &machine.listen {
                    relay.listen(world, fds.take(fd)?, Some(&machine.name))?;
                }
            }
            relay.set_machines(world, &config.machines)?;
        }
        Request::CaptureStop => gateway.world.capture.stop(),
        Request::Stop => gateway.stopping = true,
    }
    Ok(Value::Null)
}

fn status(gateway: &Gateway) -> Value {
    let world = &gateway.world;
    let ports: Vec<Value> = world
        .ports
        .iter()
        .map(|(_, port)| {
            let mac = port.mac.map(|byte| format!("{byte:02x}")).join(":");
            json!({
                "name": port.name,
                "mac": mac,
                "addresses": port.addresses,
                "counters": port.counters,
            })
        })
        .collect();
    json!({
        "pid": std::process::id(),
        "ports": ports,
        "tcp_connections": gateway.tcp.len(),
        "udp_flows": gateway.udp.len(),
        "relay": {
            "listening": gateway.relay.listening(),
            "doors": gateway.relay.doors(),
            "connections": gateway.relay.len(),
        },
        "buffer_bytes": world.budget.used,
        "counters": world.counters,
        "refused": world.refusals.counts,
        "policy": world.written_policy,
        "captured_frames": world.capture.frames,
        "capture_dropped": world.capture.dropped,
    })
}
