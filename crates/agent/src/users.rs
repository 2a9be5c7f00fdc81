//! Who a command runs as, by the guest's own files: passwd(5) and group(5).

use crate::error::AgentError;
use std::fs;

/// A user as a process has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    /// Its name; the number when it has none.
    pub(crate) name: String,
    /// Its number.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// Further groups.
    pub(crate) groups: Vec<u32>,
    /// Its home directory.
    pub(crate) home: String,
}

/// Finds `NAME|UID[:GROUP|GID]`; nothing is root.
///
/// # Errors
///
/// The guest knows no such user or group.
pub(crate) fn find(text: &str) -> Result<User, AgentError> {
    let read = |path| {
        fs::read(path).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    };
    find_in(&read("/etc/passwd"), &read("/etc/group"), text)
}

/// Whether a user and its group have numbers in this user namespace.
pub(crate) fn is_mapped(user: &User) -> bool {
    let maps = [
        ("/proc/self/uid_map", user.uid),
        ("/proc/self/gid_map", user.gid),
    ];
    maps.into_iter().all(|(path, number)| {
        // What can't be read says nothing against it.
        fs::read_to_string(path).map_or(true, |map| is_in(&map, number))
    })
}

/// Source: `user_namespaces(7)`: first inside, first outside, how many.
fn is_in(map: &str, number: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(str::parse::<u32>);
        let (Some(Ok(first)), _, Some(Ok(count))) = (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        number >= first && number - first < count
    })
}

fn find_in(passwd: &str, group: &str, text: &str) -> Result<User, AgentError> {
    let (name, wanted_group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let line = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name) || fields.get(2) == Some(&name));
    let number = |fields: &[&str], at: usize| fields.get(at).and_then(|text| text.parse().ok());
    let mut user = match (&line, name.parse::<u32>()) {
        (Some(fields), _) => User {
            name: fields.first().copied().unwrap_or_default().to_owned(),
            uid: number(fields, 2).unwrap_or(u32::MAX),
            gid: number(fields, 3).unwrap_or(u32::MAX),
            groups: Vec::new(),
            home: fields.get(5).copied().unwrap_or("/").to_owned(),
        },
        // A number needs no name: images' users often have none.
        (None, Ok(uid)) => User {
            name: if uid == 0 { "root".into() } else { name.into() },
            uid,
            gid: 0,
            groups: Vec::new(),
            home: if uid == 0 { "/root".into() } else { "/".into() },
        },
        (None, Err(_)) => {
            let message = format!("the guest has no user {name}");
            return Err(AgentError::config(message));
        }
    };
    if user.home.is_empty() {
        user.home.push('/');
    }
    match wanted_group {
        Some(wanted) => user.gid = group_id(group, wanted)?,
        None => user.groups = member_of(group, &user.name),
    }
    if user.uid == u32::MAX || user.gid == u32::MAX {
        let message = format!("the guest's entry of user {name} is broken");
        return Err(AgentError::guest(message));
    }
    Ok(user)
}

fn group_id(group: &str, wanted: &str) -> Result<u32, AgentError> {
    let named = group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&wanted))
        .and_then(|fields| fields.get(2).and_then(|text| text.parse().ok()));
    named
        .or_else(|| wanted.parse().ok())
        .ok_or_else(|| AgentError::config(format!("the guest has no group {wanted}")))
}

fn member_of(group: &str, name: &str) -> Vec<u32> {
    let members = group.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let among = fields.get(3)?.split(',').any(|member| member == name);
        among.then(|| fields.get(2)?.parse().ok()).flatten()
    });
    members.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001:Ann:/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\naudio:x:29:bob,ann\nsudo:x:27:ann\n";

    fn found(text: &str) -> (String, u32, u32, Vec<u32>, String) {
        let user = find_in(PASSWD, GROUP, text).expect("a user");
        (user.name, user.uid, user.gid, user.groups, user.home)
    }

    #[test]
    fn numbers_are_looked_for_in_every_line_of_a_map() {
        let map = "         0      54321          1\n         1     100000      65536\n";

        assert!(is_in(map, 0) && is_in(map, 33) && is_in(map, 65536));
        assert!(!is_in(map, 65537));
        assert!(!is_in("0 54321 1\n", 33));
        assert!(is_in("0 0 4294967295\n", 65534));
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let ann = ("ann".into(), 1000, 1001, vec![29, 27], "/home/ann".into());
        assert_eq!(found("ann"), ann);
        assert_eq!(found("1000"), ann);
        assert_eq!(found(""), ("root".into(), 0, 0, vec![], "/root".into()));
    }

    #[test]
    fn a_group_may_be_said() {
        let ann = ("ann".into(), 1000, 29, vec![], "/home/ann".into());
        assert_eq!(found("ann:audio"), ann);
        assert_eq!(found("ann:29"), ann);
    }

    #[test]
    fn a_number_needs_no_entry() {
        let user = ("4242".into(), 4242, 77, vec![], "/".into());
        assert_eq!(found("4242:77"), user);
    }

    #[test]
    fn unknown_names_are_refused() {
        find_in(PASSWD, GROUP, "eve").expect_err("nobody");
        find_in(PASSWD, GROUP, "ann:eve").expect_err("nobody");
    }
}
