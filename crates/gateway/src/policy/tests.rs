//! Rules, asked.

use std::net::IpAddr;
use std::time::Duration;
use std::time::Instant;

use serde_json::json;

use super::*;

fn policy(value: serde_json::Value) -> Policy {
    let config: PolicyConfig = serde_json::from_value(value).expect("a policy");
    Policy::new(&config).expect("good rules")
}

fn check(policy: &Policy, to: &str, port: u16) -> Verdict {
    check_pinned(policy, to, port, &Pins::default())
}

fn check_pinned(policy: &Policy, to: &str, port: u16, pins: &Pins) -> Verdict {
    let to: IpAddr = to.parse().expect("an address");
    policy.check(Transport::Tcp, (to, port), pins, Instant::now())
}

#[test]
fn closed_addresses_stay_closed_however_they_are_written() {
    let wide = policy(json!({"default": "allow", "rules": [
        {"action": "allow", "cidr": "0.0.0.0/0"}, {"action": "allow", "cidr": "::/0"},
        {"action": "allow", "cidr": "169.0.0.0/8"},
    ]}));
    for to in [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "255.255.255.255",
        "100.100.100.200",
        "168.63.129.16",
        "::1",
        "::",
        "fe80::1",
        "ff02::1",
        "fd00:ec2::254",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "::169.254.169.254",
    ] {
        assert!(
            matches!(check(&wide, to, 80), Verdict::Refuse(Reason::Closed(_))),
            "{to}"
        );
    }
    for to in [
        "10.0.0.1",
        "169.253.0.1",
        "fd00::1",
        "2001:db8::1",
        "100.100.100.201",
    ] {
        assert_eq!(check(&wide, to, 80), Verdict::Allow, "{to}");
    }
}

#[test]
fn a_rule_within_what_is_closed_opens_it() {
    let rules = policy(json!({"default": "deny", "rules": [
        {"action": "allow", "cidr": "169.254.169.254"},
        {"action": "allow", "cidr": "127.0.0.1/32", "ports": [[5432, 5433]]},
        {"action": "allow", "cidr": "::1", "ports": [[80, 80]]},
    ]}));
    assert_eq!(check(&rules, "169.254.169.254", 80), Verdict::Allow);
    assert_eq!(check(&rules, "127.0.0.1", 5433), Verdict::Allow);
    assert_eq!(check(&rules, "::1", 80), Verdict::Allow);
    for (to, port) in [
        ("127.0.0.1", 5434),
        ("127.0.0.2", 5432),
        ("169.254.169.253", 80),
    ] {
        assert!(
            matches!(check(&rules, to, port), Verdict::Refuse(_)),
            "{to}"
        );
    }
}

#[test]
fn deny_wins_and_the_default_decides_the_rest() {
    let rules = policy(json!({"default": "deny", "rules": [
        {"action": "allow", "cidr": "10.0.0.0/8", "ports": [[80, 80], [443, 443]]},
        {"action": "deny", "cidr": "10.1.0.0/16"},
        {"action": "allow", "cidr": "192.0.2.1", "transport": "udp"},
    ]}));
    assert_eq!(check(&rules, "10.2.0.1", 443), Verdict::Allow);
    assert_eq!(
        check(&rules, "10.2.0.1", 22),
        Verdict::Refuse(Reason::NotAllowed)
    );
    let denied = Verdict::Refuse(Reason::Denied("10.1.0.0/16".to_owned()));
    assert_eq!(check(&rules, "10.1.0.1", 80), denied);
    assert_eq!(
        check(&rules, "192.0.2.1", 80),
        Verdict::Refuse(Reason::NotAllowed)
    );
}

#[test]
fn names_hold_for_what_was_answered() {
    let rules = policy(json!({"default": "deny", "rules": [
        {"action": "allow", "domain": "example.com"},
        {"action": "allow", "domain": "*.pypi.org", "ports": [[443, 443]]},
    ]}));
    let now = Instant::now();
    let mut pins = Pins::default();
    let pin = |pins: &mut Pins, to: &str, name: &str| {
        pins.add(to.parse().expect("an address"), name, Duration::ZERO, now);
    };
    pin(&mut pins, "192.0.2.1", "example.com");
    pin(&mut pins, "192.0.2.2", "files.pypi.org");
    pin(&mut pins, "192.0.2.3", "notpypi.org");
    pin(&mut pins, "127.0.0.1", "example.com");
    let by_name = Verdict::AllowIf(Inspect::MustBeAllowed);
    assert_eq!(check_pinned(&rules, "192.0.2.1", 22, &pins), by_name);
    assert_eq!(check_pinned(&rules, "192.0.2.2", 443, &pins), by_name);
    for (to, port) in [
        ("192.0.2.2", 80),
        ("192.0.2.3", 443),
        ("192.0.2.4", 443),
        ("127.0.0.1", 80),
    ] {
        assert!(
            matches!(check_pinned(&rules, to, port, &pins), Verdict::Refuse(_)),
            "{to}"
        );
    }
    let quic = rules.check(
        Transport::Udp,
        ("192.0.2.1".parse().expect("one"), 443),
        &pins,
        now,
    );
    assert_eq!(quic, Verdict::Refuse(Reason::NoName));
    assert_eq!(
        rules.check_name(Inspect::MustBeAllowed, "example.com", 443),
        Ok(())
    );
    let other = rules.check_name(Inspect::MustBeAllowed, "evil.example", 443);
    assert_eq!(other, Err(Reason::Name("evil.example".to_owned())));
    assert_eq!(rules.check_resolve("a.b.pypi.org"), Ok(()));
    for name in ["pypi.org", "xpypi.org", "example.com.evil.example"] {
        assert_eq!(rules.check_resolve(name), Err(Reason::NotAllowed), "{name}");
    }
}

#[test]
fn denied_names_are_looked_for_in_first_bytes() {
    let rules = policy(json!({"default": "allow", "rules": [
        {"action": "deny", "domain": "*.evil.example"},
    ]}));
    let verdict = check(&rules, "192.0.2.1", 443);
    assert_eq!(verdict, Verdict::AllowIf(Inspect::MustNotBeDenied));
    assert!(
        rules
            .check_name(Inspect::MustNotBeDenied, "a.evil.example", 443)
            .is_err()
    );
    let fine = rules.check_name(Inspect::MustNotBeDenied, "fine.example", 443);
    assert_eq!(fine, Ok(()));
    assert!(rules.check_resolve("a.evil.example").is_err());
}

#[test]
fn rules_that_cannot_be_are_refused_by_number() {
    for rule in [
        json!({"action": "allow"}),
        json!({"action": "allow", "cidr": "1.2.3.4", "domain": "a.b"}),
        json!({"action": "allow", "cidr": "1.2.3.4/33"}),
        json!({"action": "allow", "cidr": "1.2.3"}),
        json!({"action": "allow", "domain": "a..b"}),
        json!({"action": "allow", "domain": "*"}),
        json!({"action": "allow", "cidr": "1.2.3.4", "ports": [[2, 1]]}),
    ] {
        let good = json!({"action": "deny", "domain": "a.b"});
        let all = json!({"default": "deny", "rules": [good, rule]});
        let config: PolicyConfig = serde_json::from_value(all).expect("a policy");
        let error = Policy::new(&config).expect_err("bad").to_string();
        assert!(error.contains("rule 1"), "{error}");
    }
}
