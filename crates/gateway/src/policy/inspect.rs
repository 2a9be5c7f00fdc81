//! The name in a connection's first bytes: TLS server name (RFC 6066 §3) or HTTP host
//! (RFC 9112 §3.2).

use crate::wire::be16;

/// What the first bytes say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FirstName {
    /// More bytes are needed.
    Incomplete,
    /// Another protocol: no name to be seen.
    Other,
    /// TLS or HTTP, and no name in it.
    Missing,
    /// The name, in lower case.
    Name(String),
}

/// The first bytes that are looked at; a name later than that is as good as none.
pub(crate) const MAX_FIRST_BYTES: usize = 16 * 1024;

/// The longest method, of any standard.
const MAX_METHOD_BYTES: usize = 24;

/// The name in `data`, what came first on a connection.
pub(crate) fn first_name(data: &[u8]) -> FirstName {
    let found = match data {
        [] => FirstName::Incomplete,
        [0x16, ..] => tls(data),
        _ => http(data),
    };
    match found {
        FirstName::Incomplete if data.len() >= MAX_FIRST_BYTES => FirstName::Missing,
        other => other,
    }
}

/// Takes `count` bytes off the front.
fn take<'a>(data: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (front, rest) = data.split_at_checked(count)?;
    *data = rest;
    Some(front)
}

/// Takes a part that is led by its length in `width` bytes.
fn take_part<'a>(data: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let len = take(data, width)?;
    let len = len
        .iter()
        .fold(0, |len: usize, &byte| len << 8 | usize::from(byte));
    take(data, len)
}

/// The handshake bytes in the records at the front (RFC 8446 §5.1), and whether another record
/// comes after them.
fn handshake(mut data: &[u8]) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    while let [kind, major, _, high, low, rest @ ..] = data {
        if *kind != 0x16 || *major != 3 {
            return (bytes, true);
        }
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        let part = &rest[..rest.len().min(len)];
        bytes.extend_from_slice(part);
        data = &rest[part.len()..];
        if part.len() < len {
            break;
        }
    }
    // One whose length isn't there yet is known by its first bytes.
    let is_other = |at: usize, byte: u8| data.get(at).is_some_and(|&found| found != byte);
    (bytes, is_other(0, 0x16) || is_other(1, 3))
}

fn tls(data: &[u8]) -> FirstName {
    match data {
        [_] => return FirstName::Incomplete,
        [_, 3, ..] => {}
        _ => return FirstName::Other,
    }
    let (bytes, ends) = handshake(data);
    if bytes.first().is_some_and(|&kind| kind != 1) {
        return FirstName::Missing;
    }
    let mut rest = bytes.get(1..).unwrap_or_default();
    let Some(hello) = take_part(&mut rest, 3) else {
        // Some servers take records in between, others don't.
        return if ends {
            FirstName::Missing
        } else {
            FirstName::Incomplete
        };
    };
    match server_name(hello) {
        Some(name) => FirstName::Name(name),
        None => FirstName::Missing,
    }
}

/// The server name of a whole ClientHello (RFC 8446 §4.1.2).
fn server_name(mut hello: &[u8]) -> Option<String> {
    take(&mut hello, 2 + 32)?;
    take_part(&mut hello, 1)?;
    take_part(&mut hello, 2)?;
    take_part(&mut hello, 1)?;
    let mut extensions = take_part(&mut hello, 2)?;
    while !extensions.is_empty() {
        let kind = be16(take(&mut extensions, 2)?, 0);
        let mut body = take_part(&mut extensions, 2)?;
        if kind != 0 {
            continue;
        }
        let mut list = take_part(&mut body, 2)?;
        while !list.is_empty() {
            let kind = take(&mut list, 1)?;
            let name = take_part(&mut list, 2)?;
            if kind == [0] {
                return clean(name);
            }
        }
    }
    None
}

/// A host name without port and final dot, in lower case.
fn clean(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?.trim();
    let name = match name.strip_prefix('[') {
        Some(rest) => rest.split(']').next()?,
        None => name.split(':').next()?,
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let good = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
    good.then(|| name.to_ascii_lowercase())
}

/// Whether a first line, as far as it is there, is one of a request; `None` when that isn't clear.
///
/// Methods are of capital letters: what begins otherwise isn't held back for the rest of its line.
fn is_request(line: &[u8]) -> Option<bool> {
    let is_method = |byte: &u8| byte.is_ascii_uppercase() || b"-_".contains(byte);
    let method = line.iter().take_while(|byte| is_method(byte)).count();
    match line.get(method) {
        _ if method > MAX_METHOD_BYTES => Some(false),
        None => None,
        Some(b' ') if method > 0 => {
            let whole = line.ends_with(b"\n");
            whole.then(|| line.windows(6).any(|part| part == b" HTTP/"))
        }
        Some(_) => Some(false),
    }
}

fn http(data: &[u8]) -> FirstName {
    // Servers skip empty lines before a request (RFC 9112 §2.2).
    let skipped = data
        .iter()
        .take_while(|byte| b"\r\n".contains(byte))
        .count();
    let mut lines = data[skipped..].split_inclusive(|&byte| byte == b'\n');
    let request = lines.next().unwrap_or_default();
    match is_request(request) {
        None => return FirstName::Incomplete,
        Some(false) => return FirstName::Other,
        Some(true) => {}
    }
    // The host of an absolute target is what counts for a proxy (RFC 9112 §3.2.2).
    let target = absolute_target(request);
    let mut hosts: Vec<Option<String>> = Vec::new();
    let mut after_host = false;
    for line in lines {
        if !line.ends_with(b"\n") {
            return FirstName::Incomplete;
        }
        // What goes on in the next line, some servers take for a part of it.
        if after_host && (line.starts_with(b" ") || line.starts_with(b"\t")) {
            hosts.push(None);
        }
        let line = line.trim_ascii();
        if line.is_empty() {
            return the_same(hosts.into_iter().chain(target.map(Some)));
        }
        let (name, value) = line.split_at(line.len().min(5));
        after_host = name.eq_ignore_ascii_case(b"host:");
        if after_host {
            hosts.push(clean(value));
        }
    }
    FirstName::Incomplete
}

/// The name, if there is one and all say the same.
fn the_same(names: impl Iterator<Item = Option<String>>) -> FirstName {
    let mut names: Vec<_> = names.collect();
    names.dedup();
    match <[_; 1]>::try_from(names) {
        Ok([Some(name)]) => FirstName::Name(name),
        _ => FirstName::Missing,
    }
}

fn absolute_target(request: &[u8]) -> Option<String> {
    let mut words = request
        .split(|&byte| byte == b' ')
        .filter(|word| !word.is_empty());
    let target = words.nth(1)?;
    let at = target.windows(3).position(|part| part == b"://")?;
    let authority = target[at + 3..].split(|&byte| byte == b'/').next()?;
    clean(authority)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A ClientHello for `name` as one TLS record.
    pub(crate) fn client_hello(name: Option<&str>) -> Vec<u8> {
        let part = |width: usize, body: &[u8]| {
            let len = u32::try_from(body.len()).expect("small").to_be_bytes();
            [&len[4 - width..], body].concat()
        };
        let mut extensions = [&[0, 0x2b][..], &part(2, &[2, 3, 4])].concat();
        if let Some(name) = name {
            let list = [&[0][..], &part(2, name.as_bytes())].concat();
            extensions.extend([0, 0]);
            extensions.extend(part(2, &part(2, &list)));
        }
        let mut hello = vec![3, 3];
        hello.extend([7; 32]);
        hello.extend(part(1, &[1; 32]));
        hello.extend(part(2, &[0x13, 1]));
        hello.extend(part(1, &[0]));
        hello.extend(part(2, &extensions));
        let message = [&[1][..], &part(3, &hello)].concat();
        [&[0x16, 3, 1][..], &part(2, &message)].concat()
    }

    fn name(text: &str) -> FirstName {
        FirstName::Name(text.to_owned())
    }

    #[test]
    fn a_client_hello_tells_its_name_once_it_is_whole() {
        let hello = client_hello(Some("Example.COM"));
        for len in 0..hello.len() {
            assert_eq!(first_name(&hello[..len]), FirstName::Incomplete, "{len}");
        }
        assert_eq!(first_name(&hello), name("example.com"));
        assert_eq!(first_name(&client_hello(None)), FirstName::Missing);
        // The same handshake in records of 20 bytes.
        let mut pieces = Vec::new();
        for piece in hello[5..].chunks(20) {
            pieces.extend([0x16, 3, 1, 0, u8::try_from(piece.len()).expect("20")]);
            pieces.extend(piece);
        }
        assert_eq!(first_name(&pieces), name("example.com"));
    }

    #[test]
    fn http_tells_its_host() {
        let good = b"GET / HTTP/1.1\r\nA: b\r\nhost: Example.com:80\r\n\r\n";
        assert_eq!(first_name(good), name("example.com"));
        assert_eq!(first_name(&good[..20]), FirstName::Incomplete);
        assert_eq!(first_name(b"GE"), FirstName::Incomplete);
        assert_eq!(first_name(b"GET / HTTP/1.0\r\n\r\n"), FirstName::Missing);
        let two = b"GET http://evil.example/ HTTP/1.1\r\nHost: good.example\r\n\r\n";
        assert_eq!(first_name(two), FirstName::Missing);
        for other in ["SSH-2.0-x\r\n", "hello", "EHLO x\r\n", "PING\r\n", "AMQP\0"] {
            assert_eq!(first_name(other.as_bytes()), FirstName::Other, "{other}");
        }
    }

    #[test]
    fn requests_that_servers_read_in_more_than_one_way_show_no_name() {
        for (text, found) in [
            ("\r\n\r\nGET / HTTP/1.1\r\nHost: evil\r\n\r\n", name("evil")),
            ("PROPFIND / HTTP/1.1\r\nHost: evil\r\n\r\n", name("evil")),
            ("M-SEARCH * HTTP/1.1\nHost: evil\n\n", name("evil")),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: A\r\n\r\n", name("a")),
            ("GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", name("a")),
            (
                "GET / HTTP/1.1\r\nHost: good\r\nHost: evil\r\n\r\n",
                FirstName::Missing,
            ),
            (
                "GET / HTTP/1.1\r\nHost: good\r\n .evil\r\n\r\n",
                FirstName::Missing,
            ),
            ("GET / HTTP/1.1\r\nHost : evil\r\n\r\n", FirstName::Missing),
            (
                "GET  http://evil/ HTTP/1.1\r\nHost: good\r\n\r\n",
                FirstName::Missing,
            ),
            ("GET / HTTP/1.1\r\nHost: good\r\n", FirstName::Incomplete),
            ("REPORT", FirstName::Incomplete),
        ] {
            assert_eq!(first_name(text.as_bytes()), found, "{text:?}");
        }
    }

    #[test]
    fn a_hello_with_other_records_inside_shows_no_name() {
        let hello = client_hello(Some("evil.example"));
        let (front, rest) = hello[5..].split_at(40);
        let record = |kind: u8, body: &[u8]| {
            let len = u16::try_from(body.len()).expect("small").to_be_bytes();
            [&[kind, 3, 1][..], &len, body].concat()
        };
        for between in [record(0x15, &[1, 0]), record(0x14, &[1])] {
            let parts = [record(0x16, front), between, record(0x16, rest)].concat();
            assert_eq!(first_name(&parts), FirstName::Missing);
        }
        // An empty one is none.
        let parts = [record(0x16, &[]), record(0x16, front), record(0x16, rest)].concat();
        assert_eq!(first_name(&parts), name("evil.example"));
    }

    #[test]
    fn what_was_said_of_the_first_bytes_holds_whatever_follows() {
        // Early data comes at once with the hello.
        let early = [
            &client_hello(Some("a.example"))[..],
            &[0x14, 3, 3, 0, 1, 1, 0x17, 3],
        ]
        .concat();
        let texts: [&[u8]; 4] = [
            &early,
            b"\r\nGET http://a/ HTTP/1.1\r\nX: y\r\nHost: a\r\n\r\n",
            b"EHLO a\r\n and more",
            &[0x16, 3, 1, 0, 1, 1, 0x15, 3, 1, 0, 2, 1, 0],
        ];
        for text in texts {
            assert_ne!(hold(text), FirstName::Incomplete, "{text:?}");
        }
    }

    /// What is said of `text`, which must not change once it is said.
    fn hold(text: &[u8]) -> FirstName {
        let mut known = FirstName::Incomplete;
        for len in 0..=text.len() {
            let found = first_name(&text[..len]);
            if known != FirstName::Incomplete {
                assert_eq!(found, known, "{len} bytes of {text:?}");
            }
            known = found;
        }
        known
    }

    #[test]
    fn endless_beginnings_end() {
        let mut endless = b"GET /".to_vec();
        endless.resize(MAX_FIRST_BYTES, b'x');
        assert_eq!(first_name(&endless), FirstName::Missing);
    }

    #[test]
    fn damaged_hellos_are_no_names() {
        let hello = client_hello(Some("example.com"));
        for at in 5..hello.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut damaged = hello.clone();
                damaged[at] = value;
                damaged.extend([0x16, 3, 1, 0, 1, 1, 0x17, 3, 3, 0, 0]);
                hold(&damaged);
            }
        }
    }
}
