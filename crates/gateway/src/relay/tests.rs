//! Connections passed on between real sockets.

use std::io::Read;
use std::io::Write;
use std::net::TcpListener;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;

use crate::Gateway;
use crate::config;
use crate::fds::Fds;
use crate::policy::client_hello;

/// A gateway whose network has `policy`, and a guest at 127.0.0.1.
fn relay(policy: &serde_json::Value) -> Gateway {
    let document = json!({
        "version": 1, "name": "n", "mac": "02:00:00:00:00:01", "policy": policy,
    });
    let config = config::parse(document.to_string().as_bytes()).expect("a document");
    let mut gateway = Gateway::new(&config, &mut Fds::default()).expect("a gateway");
    let machine = json!([{"name": "box", "addresses": ["127.0.0.1"]}]);
    let machines: Vec<_> = serde_json::from_value(machine).expect("machines");
    set_machines(&mut gateway, &machines);
    gateway
}

fn set_machines(gateway: &mut Gateway, machines: &[super::MachineConfig]) {
    let world = &mut gateway.world;
    gateway
        .relay
        .set_machines(world, machines)
        .expect("good rules");
}

/// A server, and a guest's connection that is passed on to it as if to `to`.
fn joined(gateway: &mut Gateway) -> (TcpStream, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").expect("a server");
    let door = TcpListener::bind("127.0.0.1:0").expect("a door");
    let guest = TcpStream::connect(door.local_addr().expect("bound")).expect("connected");
    let (near, _) = door.accept().expect("a connection");
    near.set_nonblocking(true).expect("not blocking");
    let to = server.local_addr().expect("bound");
    gateway
        .relay
        .join(&mut gateway.world, near.into(), "box".to_owned(), to);
    let (far, _) = server.accept().expect("passed on");
    for stream in [&guest, &far] {
        let limit = Some(Duration::from_millis(200));
        stream.set_read_timeout(limit).expect("a limit");
    }
    turn(gateway);
    (guest, far)
}

/// Overrides what a pair must show: the loopback, where tests are, is never looked at.
fn must_show(gateway: &mut Gateway, inspect: Option<super::Inspect>) {
    for id in gateway.relay.pairs.ids() {
        let pair = gateway.relay.pairs.get_mut(id).expect("a pair");
        pair.inspect = inspect;
        pair.to.set_ip("192.0.2.1".parse().expect("an address"));
    }
}

fn turn(gateway: &mut Gateway) {
    for _ in 0..20 {
        gateway
            .turn(Some(Duration::from_millis(5)))
            .expect("a turn");
    }
}

fn good_example() -> Gateway {
    relay(&json!({"default": "deny", "rules": [{"action": "allow", "domain": "good.example"}]}))
}

#[test]
fn what_comes_first_is_held_until_it_shows_a_name_that_may_be_reached() {
    let mut gateway = good_example();
    let (mut guest, mut far) = joined(&mut gateway);
    must_show(&mut gateway, Some(super::Inspect::MustBeAllowed));
    let hello = client_hello(Some("good.example"));
    let mut heard = vec![0; hello.len()];
    guest.write_all(&hello[..50]).expect("written");
    turn(&mut gateway);
    assert!(far.read(&mut heard).is_err(), "nothing has passed");
    // Who is asked may speak first.
    far.write_all(b"220").expect("written");
    turn(&mut gateway);
    guest.read_exact(&mut [0; 3]).expect("heard");
    guest.write_all(&hello[50..]).expect("written");
    turn(&mut gateway);
    far.read_exact(&mut heard).expect("passed on");
    assert_eq!(heard, hello);
}

#[test]
fn another_name_and_no_name_are_refused() {
    for hello in [client_hello(Some("evil.example")), client_hello(None)] {
        let mut gateway = good_example();
        let (mut guest, mut far) = joined(&mut gateway);
        must_show(&mut gateway, Some(super::Inspect::MustBeAllowed));
        guest.write_all(&hello).expect("written");
        turn(&mut gateway);
        assert!(guest.read(&mut [0; 1]).is_err(), "reset");
        assert!(
            far.read(&mut [0; 1]).is_err(),
            "reset, and nothing has passed"
        );
        assert_eq!(gateway.relay.len(), 0);
        let recent = &gateway.world.refusals.recent;
        assert_eq!((recent.len(), recent[0].port.as_str()), (1, "box"));
    }
}

#[test]
fn all_bytes_pass_both_ways_and_each_end_alone() {
    let mut gateway = good_example();
    let (guest, far) = joined(&mut gateway);
    let bytes: Vec<u8> = (0..5_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let send = |mut from: TcpStream, bytes: Vec<u8>| {
        std::thread::spawn(move || {
            from.write_all(&bytes).expect("written");
            from.shutdown(std::net::Shutdown::Write).expect("shut");
        })
    };
    let receive = |mut from: TcpStream| {
        std::thread::spawn(move || {
            from.set_read_timeout(None).expect("no limit");
            let mut heard = Vec::new();
            from.read_to_end(&mut heard).expect("heard");
            heard
        })
    };
    let jobs = [
        receive(guest.try_clone().expect("a copy")),
        receive(far.try_clone().expect("a copy")),
    ];
    let sending = [send(guest, bytes.clone()), send(far, bytes.clone())];
    while gateway.relay.len() > 0 {
        turn(&mut gateway);
    }
    assert_eq!(gateway.world.budget.used, 0);
    for job in sending {
        job.join().expect("sent");
    }
    for job in jobs {
        assert!(job.join().expect("received") == bytes);
    }
}

#[test]
fn connections_of_a_machine_that_is_gone_are_reset() {
    let mut gateway = good_example();
    let (mut guest, mut far) = joined(&mut gateway);
    set_machines(&mut gateway, &[]);
    assert_eq!(gateway.relay.len(), 0);
    for end in [&mut guest, &mut far] {
        let error = end.read(&mut [0; 1]).expect_err("reset");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_destination_that_refuses_resets_the_guest() {
    let mut gateway = good_example();
    let free = TcpListener::bind("127.0.0.1:0").expect("a server");
    let to = free.local_addr().expect("bound");
    drop(free);
    let door = TcpListener::bind("127.0.0.1:0").expect("a door");
    let mut guest = TcpStream::connect(door.local_addr().expect("bound")).expect("connected");
    let (near, _) = door.accept().expect("a connection");
    gateway
        .relay
        .join(&mut gateway.world, near.into(), "box".to_owned(), to);
    turn(&mut gateway);
    let error = guest.read(&mut [0; 1]).expect_err("reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_door_is_its_machines_alone_and_goes_with_it() {
    let mut gateway = good_example();
    let door = TcpListener::bind("127.0.0.1:0").expect("a door");
    let at = door.local_addr().expect("bound");
    let listening = gateway
        .relay
        .listen(&gateway.world, door.into(), Some("other"));
    listening.expect("a door");
    let machines = json!([{"name": "box", "addresses": ["127.0.0.1"]}, {"name": "other"}]);
    let machines: Vec<super::MachineConfig> = serde_json::from_value(machines).expect("machines");
    set_machines(&mut gateway, &machines);
    assert_eq!(gateway.relay.doors()["other"], [at.to_string()]);
    assert!(gateway.relay.listening().is_empty());
    // What was meant for the door itself goes nowhere.
    let mut guest = TcpStream::connect(at).expect("connected");
    turn(&mut gateway);
    assert_eq!(guest.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_eq!(gateway.relay.len(), 0);
    set_machines(&mut gateway, &machines[..1]);
    assert!(gateway.relay.doors().is_empty());
    assert!(TcpStream::connect(at).is_err(), "closed");
}

#[test]
fn one_machine_leaves_others_connections() {
    let document = json!({
        "version": 1, "name": "n", "mac": "02:00:00:00:00:01", "limits": {"connections": 8},
    });
    let config = config::parse(document.to_string().as_bytes()).expect("a document");
    let mut gateway = Gateway::new(&config, &mut Fds::default()).expect("a gateway");
    let machines = json!([{"name": "greedy"}, {"name": "other"}]);
    let machines: Vec<_> = serde_json::from_value(machines).expect("machines");
    set_machines(&mut gateway, &machines);
    let server = TcpListener::bind("127.0.0.1:0").expect("a server");
    let to = server.local_addr().expect("bound");
    let door = TcpListener::bind("127.0.0.1:0").expect("a door");
    let mut guests = Vec::new();
    let mut join = |name: &str| {
        guests.push(TcpStream::connect(door.local_addr().expect("bound")).expect("connected"));
        let (near, _) = door.accept().expect("a connection");
        let relay = &mut gateway.relay;
        relay.join(&mut gateway.world, near.into(), name.to_owned(), to);
        relay.len()
    };
    // Each has a socket on either side: four are passed on.
    assert_eq!([join("greedy"), join("greedy"), join("greedy")], [1, 2, 2]);
    assert_eq!([join("other"), join("other"), join("greedy")], [3, 3, 3]);
    set_machines(&mut gateway, &machines[1..]);
    assert_eq!(gateway.relay.len(), 1);
}
