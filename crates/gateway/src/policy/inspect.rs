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

const METHODS: [&[u8]; 9] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
];

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

/// The handshake bytes in the records at the front (RFC 8446 §5.1).
fn handshake(mut data: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    while let [kind, major, _, high, low, rest @ ..] = data {
        if *kind != 0x16 || *major != 3 {
            return None;
        }
        let len = usize::from(u16::from_be_bytes([*high, *low]));
        let part = &rest[..rest.len().min(len)];
        bytes.extend_from_slice(part);
        data = &rest[part.len()..];
        if part.len() < len {
            break;
        }
    }
    Some(bytes)
}

fn tls(data: &[u8]) -> FirstName {
    let Some(bytes) = handshake(data) else {
        return if data.len() < 3 {
            FirstName::Incomplete
        } else {
            FirstName::Other
        };
    };
    if bytes.first().is_some_and(|&kind| kind != 1) {
        return FirstName::Other;
    }
    let mut rest = bytes.get(1..).unwrap_or_default();
    let Some(hello) = take_part(&mut rest, 3) else {
        return FirstName::Incomplete;
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

fn http(data: &[u8]) -> FirstName {
    let could_be = METHODS.iter().any(|method| {
        let len = method.len().min(data.len());
        data[..len] == method[..len]
    });
    if !could_be {
        return FirstName::Other;
    }
    let mut lines = data.split_inclusive(|&byte| byte == b'\n');
    let Some(request) = lines.next().filter(|line| line.ends_with(b"\n")) else {
        return FirstName::Incomplete;
    };
    // The host of an absolute target is what counts for a proxy (RFC 9112 §3.2.2).
    let absolute = absolute_target(request);
    for line in lines {
        if !line.ends_with(b"\n") {
            return FirstName::Incomplete;
        }
        let line = line.trim_ascii();
        if line.is_empty() {
            return FirstName::Missing;
        }
        let Some((name, value)) = line.split_at_checked(5) else {
            continue;
        };
        if name.eq_ignore_ascii_case(b"host:") {
            let host = clean(value);
            return match (host, absolute) {
                (Some(host), Some(target)) if host != target => FirstName::Missing,
                (Some(host), _) => FirstName::Name(host),
                (None, _) => FirstName::Missing,
            };
        }
    }
    FirstName::Incomplete
}

fn absolute_target(request: &[u8]) -> Option<String> {
    let target = request.split(|&byte| byte == b' ').nth(1)?;
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
        assert_eq!(first_name(b"SSH-2.0-x\r\n"), FirstName::Other);
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
                // It ends, whatever it says.
                first_name(&damaged);
            }
        }
    }
}
