//! The network's name server: answers for its own names, and forwards the rest to the host's.
//!
//! A question that comes by UDP is forwarded by UDP, one by TCP by TCP. What is answered is pinned
//! for the rules about names.

mod message;

use std::net::IpAddr;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::AddressFamily;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::SocketFlags;
use rustix::net::SocketType;

use message::Code;

use crate::events::Source;
use crate::slab::Id;
use crate::slab::Slab;
use crate::world::World;

/// For one server's answer.
const TRY: Duration = Duration::from_millis(2500);
const MAX_TRIES: u32 = 4;
const MAX_QUERIES: usize = 1024;
const MAX_STREAMS: usize = 256;
/// Questions of one TCP client that wait for answers.
const MAX_ASKED: usize = 32;
const MAX_MESSAGE: usize = 65_535;
/// An answer by UDP that is longer is asked for again by TCP.
const UDP_HEADERS: usize = 48;

/// Who asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Client {
    Udp {
        port: Id,
        guest: SocketAddr,
        local: SocketAddr,
    },
    Stream(Id),
}

/// The way to a server of the host.
#[derive(Debug)]
struct Upstream {
    socket: OwnedFd,
    by_tcp: bool,
    out: Vec<u8>,
    came: Vec<u8>,
}

#[derive(Debug)]
struct Query {
    client: Client,
    /// As the client sent it.
    message: Vec<u8>,
    name: String,
    kind: u16,
    /// Our number for it.
    id: u16,
    upstream: Option<Upstream>,
    tries: u32,
    deadline: Instant,
}

/// Our end of a guest's TCP connection.
#[derive(Debug)]
struct Stream {
    port: Id,
    socket: OwnedFd,
    came: Vec<u8>,
    out: Vec<u8>,
    asked: usize,
    eof: bool,
}

/// The name server.
#[derive(Debug, Default)]
pub(crate) struct Dns {
    queries: Slab<Query>,
    streams: Slab<Stream>,
}

fn random() -> u16 {
    let mut bytes = [0; 2];
    // Always there once the system is up.
    let _ = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty());
    u16::from_ne_bytes(bytes)
}

fn connect(server: IpAddr, by_tcp: bool) -> Result<OwnedFd, Errno> {
    let to = SocketAddr::new(server, 53);
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let kind = if by_tcp {
        SocketType::STREAM
    } else {
        SocketType::DGRAM
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, kind, flags, None)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&len.to_be_bytes()[..], message].concat()
}

/// Takes one message off the front of a stream.
fn unframed(came: &mut Vec<u8>) -> Option<Vec<u8>> {
    let &[high, low, ref rest @ ..] = &came[..] else {
        return None;
    };
    let len = usize::from(u16::from_be_bytes([high, low]));
    let message = rest.get(..len)?.to_vec();
    came.drain(..2 + len);
    Some(message)
}

/// Writes what it can; `Err` when the other end is gone.
fn write_out(socket: &OwnedFd, out: &mut Vec<u8>) -> Result<(), Errno> {
    while !out.is_empty() {
        match rustix::net::send(socket, out, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(len) => drop(out.drain(..len)),
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads what is there, up to a message; `Ok(false)` at the end.
fn read_in(socket: &OwnedFd, came: &mut Vec<u8>) -> Result<bool, Errno> {
    let mut buffer = [0; 4096];
    while came.len() < MAX_MESSAGE + 2 {
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Ok(false),
            Ok((_, len)) => came.extend_from_slice(&buffer[..len.min(4096)]),
            Err(Errno::AGAIN) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

impl Dns {
    /// A question of a guest.
    pub(crate) fn ask(&mut self, world: &mut World, client: Client, query: &[u8]) {
        if !message::is_query(query) {
            return;
        }
        world.counters.dns_queries += 1;
        let Some(question) = message::question(query) else {
            self.fail(world, client, query, Code::FormatError);
            return;
        };
        if let Some(addresses) = world.addresses_of(&question.name) {
            let answer = message::own(query, &question, addresses);
            self.reply(world, client, query, &answer);
            return;
        }
        let port = match client {
            Client::Udp { port, .. } => port,
            Client::Stream(id) => self
                .streams
                .get(id)
                .map_or_else(Id::default, |one| one.port),
        };
        if let Err(reason) = world.check_resolve(port, &question.name) {
            world.refuse_name(port, &question.name, &reason);
            self.fail(world, client, query, Code::Refused);
            return;
        }
        let full = self.queries.len() >= MAX_QUERIES;
        if full || !world.net.uplink || world.nameservers.is_empty() {
            world.counters.dns_failed += 1;
            self.fail(world, client, query, Code::ServerFailure);
            return;
        }
        let id = self.queries.insert(Query {
            client,
            message: query.to_vec(),
            name: question.name,
            kind: question.kind,
            id: 0,
            upstream: None,
            tries: 0,
            deadline: world.now,
        });
        if let Client::Stream(stream) = client
            && let Some(stream) = self.streams.get_mut(stream)
        {
            stream.asked += 1;
        }
        self.forward(world, id);
    }

    /// Asks the next server.
    fn forward(&mut self, world: &mut World, id: Id) {
        while let Some(query) = self.queries.get_mut(id) {
            query.upstream = None;
            if query.tries >= MAX_TRIES {
                self.give_up(world, id);
                return;
            }
            let index = query.tries as usize % world.nameservers.len().max(1);
            query.tries += 1;
            query.deadline = world.now + TRY;
            query.id = random();
            let Some(&server) = world.nameservers.get(index) else {
                continue;
            };
            let by_tcp = matches!(query.client, Client::Stream(_));
            let Ok(socket) = connect(server, by_tcp) else {
                continue;
            };
            let mut asked = query.message.clone();
            asked[..2].copy_from_slice(&query.id.to_be_bytes());
            let mut out = Vec::new();
            if by_tcp {
                out = framed(&asked);
            } else if rustix::net::send(&socket, &asked, SendFlags::DONTWAIT).is_err() {
                continue;
            }
            if world
                .events
                .watch_edges(&socket, Source::Resolver, id)
                .is_err()
            {
                continue;
            }
            query.upstream = Some(Upstream {
                socket,
                by_tcp,
                out,
                came: Vec::new(),
            });
            return;
        }
    }

    fn give_up(&mut self, world: &mut World, id: Id) {
        if let Some(query) = self.take(id) {
            world.counters.dns_failed += 1;
            self.fail(world, query.client, &query.message, Code::ServerFailure);
        }
    }

    fn take(&mut self, id: Id) -> Option<Query> {
        let query = self.queries.remove(id)?;
        if let Client::Stream(stream) = query.client
            && let Some(stream) = self.streams.get_mut(stream)
        {
            stream.asked -= 1;
        }
        Some(query)
    }

    /// A server's socket has something.
    pub(crate) fn upstream_event(&mut self, world: &mut World, id: Id) {
        let Some(query) = self.queries.get_mut(id) else {
            return;
        };
        let Some(upstream) = &mut query.upstream else {
            return;
        };
        let mut answers = Vec::new();
        let mut broken = false;
        if upstream.by_tcp {
            let wrote = write_out(&upstream.socket, &mut upstream.out);
            let read = read_in(&upstream.socket, &mut upstream.came);
            // Not connected yet isn't broken.
            broken = !matches!((wrote, read), (Ok(()), Ok(true)));
            answers.extend(unframed(&mut upstream.came));
        } else {
            let mut buffer = vec![0; MAX_MESSAGE];
            loop {
                match rustix::net::recv(&upstream.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                    Ok((_, len)) => answers.push(buffer[..len.min(MAX_MESSAGE)].to_vec()),
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(_) => {
                        broken = true;
                        break;
                    }
                }
            }
        }
        let good = answers.into_iter().find(|answer| {
            message::is_answer(answer)
                && message::id(answer) == query.id
                && message::question(answer)
                    .is_some_and(|asked| asked.name == query.name && asked.kind == query.kind)
        });
        match good {
            Some(answer) => self.answered(world, id, answer),
            None if broken => self.forward(world, id),
            None => {}
        }
    }

    fn answered(&mut self, world: &mut World, id: Id, mut answer: Vec<u8>) {
        let Some(query) = self.take(id) else { return };
        for (address, ttl) in message::addresses(&answer) {
            let address = crate::policy::unwrapped(address);
            world.pins.add(address, &query.name, ttl, world.now);
        }
        answer[..2].copy_from_slice(&message::id(&query.message).to_be_bytes());
        self.reply(world, query.client, &query.message, &answer);
    }

    fn fail(&mut self, world: &mut World, client: Client, query: &[u8], code: Code) {
        if let Some(answer) = message::failure(query, code) {
            self.reply(world, client, query, &answer);
        }
    }

    fn reply(&mut self, world: &mut World, client: Client, query: &[u8], answer: &[u8]) {
        match client {
            Client::Udp { port, guest, local } => {
                if answer.len() + UDP_HEADERS <= usize::from(world.net.mtu) {
                    world.send_udp(port, local, guest, answer);
                } else if let Some(short) = message::truncated(query) {
                    world.send_udp(port, local, guest, &short);
                }
            }
            Client::Stream(id) => {
                if let Some(stream) = self.streams.get_mut(id) {
                    stream.out.extend(framed(answer));
                    // A client that is gone shows at the next event.
                    let _ = write_out(&stream.socket, &mut stream.out);
                }
            }
        }
    }

    /// Takes a TCP connection of a link's guest.
    pub(crate) fn serve(&mut self, world: &mut World, port: Id, socket: OwnedFd) {
        if self.streams.len() >= MAX_STREAMS {
            world.counters.limit_reached += 1;
            return;
        }
        let id = self.streams.insert(Stream {
            port,
            socket,
            came: Vec::new(),
            out: Vec::new(),
            asked: 0,
            eof: false,
        });
        let watched = self.streams.get(id).map(|stream| {
            world
                .events
                .watch_edges(&stream.socket, Source::NameStream, id)
        });
        if watched.is_none_or(|result| result.is_err()) {
            self.streams.remove(id);
        }
    }

    /// A guest's TCP connection has something.
    pub(crate) fn stream_event(&mut self, world: &mut World, id: Id) {
        let Some(stream) = self.streams.get_mut(id) else {
            return;
        };
        let wrote = write_out(&stream.socket, &mut stream.out);
        match read_in(&stream.socket, &mut stream.came) {
            Ok(true) => {}
            Ok(false) => stream.eof = true,
            Err(_) => {
                self.streams.remove(id);
                return;
            }
        }
        while let Some(stream) = self.streams.get_mut(id) {
            if stream.asked >= MAX_ASKED || stream.out.len() > MAX_MESSAGE {
                break;
            }
            let Some(query) = unframed(&mut stream.came) else {
                break;
            };
            self.ask(world, Client::Stream(id), &query);
        }
        let over = self
            .streams
            .get(id)
            .is_some_and(|one| wrote.is_err() || (one.eof && one.asked == 0 && one.out.is_empty()));
        if over {
            self.streams.remove(id);
        }
    }

    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.queries.iter().map(|(_, query)| query.deadline).min()
    }

    /// Asks again where no answer came.
    pub(crate) fn run_timers(&mut self, world: &mut World) {
        for id in self.queries.ids() {
            if self
                .queries
                .get(id)
                .is_some_and(|query| query.deadline <= world.now)
            {
                self.forward(world, id);
            }
        }
        // Streams whose last answer just went out.
        for id in self.streams.ids() {
            let over = |one: &Stream| one.eof && one.asked == 0 && one.out.is_empty();
            if self.streams.get(id).is_some_and(over) {
                self.streams.remove(id);
            }
        }
    }
}
