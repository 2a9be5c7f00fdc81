//! Messages (RFC 1035 §4): what a question asks, what an answer says, and answers of our own.

use std::net::IpAddr;
use std::time::Duration;

use smoltcp::wire::DnsPacket;
use smoltcp::wire::DnsQueryType;
use smoltcp::wire::DnsRecord;
use smoltcp::wire::DnsRecordData;

use crate::wire::be16;

pub(super) const HEADER_BYTES: usize = 12;
pub(super) const TYPE_A: u16 = 1;
pub(super) const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Seconds that an answer of our own holds.
const OWN_TTL_S: u32 = 30;

/// Response codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    Ok = 0,
    FormatError = 1,
    ServerFailure = 2,
    Refused = 5,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) id: u16,
    /// In lower case, without the final dot.
    pub(super) name: String,
    pub(super) kind: u16,
    /// Where the question's section ends.
    pub(super) end: usize,
}

fn name_at(packet: &DnsPacket<&[u8]>, bytes: &[u8]) -> Option<String> {
    let mut name = String::new();
    for label in packet.parse_name(bytes) {
        let label = label.ok()?;
        if !name.is_empty() {
            name.push('.');
        }
        // A dot or a control character within a label would read as another name.
        let good = label
            .iter()
            .all(|byte| byte.is_ascii_graphic() && *byte != b'.');
        good.then_some(())?;
        name.push_str(std::str::from_utf8(label).ok()?);
        (name.len() <= 253).then_some(())?;
    }
    name.make_ascii_lowercase();
    Some(name)
}

fn kind_number(kind: DnsQueryType) -> u16 {
    kind.into()
}

/// The one question of a message, whichever way it goes.
pub(super) fn question(message: &[u8]) -> Option<Question> {
    let packet = DnsPacket::new_checked(message).ok()?;
    if packet.question_count() != 1 {
        return None;
    }
    let (rest, question) = smoltcp::wire::DnsQuestion::parse(packet.payload()).ok()?;
    Some(Question {
        id: packet.transaction_id(),
        name: name_at(&packet, question.name)?,
        kind: kind_number(question.type_),
        end: message.len() - rest.len(),
    })
}

/// Whether a message is an ordinary query.
pub(super) fn is_query(message: &[u8]) -> bool {
    // QR and the operation.
    message.get(2).is_some_and(|flags| flags & 0xf8 == 0)
}

/// Whether a message is an answer.
pub(super) fn is_answer(message: &[u8]) -> bool {
    message.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

/// The addresses that an answer gives, and how long they hold.
pub(super) fn addresses(message: &[u8]) -> Vec<(IpAddr, Duration)> {
    let Ok(packet) = DnsPacket::new_checked(message) else {
        return Vec::new();
    };
    let mut rest = packet.payload();
    for _ in 0..packet.question_count() {
        match smoltcp::wire::DnsQuestion::parse(rest) {
            Ok((after, _)) => rest = after,
            Err(_) => return Vec::new(),
        }
    }
    let mut found = Vec::new();
    for _ in 0..packet.answer_record_count() {
        let Ok((after, record)) = DnsRecord::parse(rest) else {
            break;
        };
        rest = after;
        let ttl = Duration::from_secs(u64::from(record.ttl));
        match record.data {
            DnsRecordData::A(address) => found.push((address.into(), ttl)),
            DnsRecordData::Aaaa(address) => found.push((address.into(), ttl)),
            _ => {}
        }
    }
    found
}

fn begin(query: &[u8], end: usize, code: Code, answers: u16) -> Vec<u8> {
    let mut message = query[..end].to_vec();
    // An answer, the operation and the wish for recursion as asked; recursion is there.
    message[2] = 0x80 | (query[2] & 0x79);
    message[3] = 0x80 | code as u8;
    message[6..8].copy_from_slice(&answers.to_be_bytes());
    message[8..12].fill(0);
    message
}

/// An answer without records.
pub(super) fn failure(query: &[u8], code: Code) -> Option<Vec<u8>> {
    let end = match question(query) {
        Some(question) => question.end,
        None if query.len() >= HEADER_BYTES => {
            let mut message = begin(query, HEADER_BYTES, code, 0);
            message[4..6].fill(0);
            return Some(message);
        }
        None => return None,
    };
    Some(begin(query, end, code, 0))
}

/// An answer that doesn't fit the way it has to go: the client asks again by TCP.
pub(super) fn truncated(query: &[u8]) -> Option<Vec<u8>> {
    let mut message = failure(query, Code::Ok)?;
    message[2] |= 2;
    Some(message)
}

/// An answer from the network's own names.
pub(super) fn own(query: &[u8], question: &Question, addresses: &[IpAddr]) -> Vec<u8> {
    let fitting: Vec<&IpAddr> = addresses
        .iter()
        .filter(|address| {
            let kind = if address.is_ipv4() { TYPE_A } else { TYPE_AAAA };
            kind == question.kind
        })
        .take(32)
        .collect();
    let count = u16::try_from(fitting.len()).unwrap_or(0);
    let mut message = begin(query, question.end, Code::Ok, count);
    for address in fitting {
        message.extend([0xc0, 12]);
        message.extend(question.kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message.extend(OWN_TTL_S.to_be_bytes());
        match address {
            IpAddr::V4(four) => {
                message.extend([0, 4]);
                message.extend(four.octets());
            }
            IpAddr::V6(six) => {
                message.extend([0, 16]);
                message.extend(six.octets());
            }
        }
    }
    message
}

/// The transaction's number.
pub(super) fn id(message: &[u8]) -> u16 {
    be16(message, 0)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        for label in name.split('.') {
            message.push(u8::try_from(label.len()).expect("short"));
            message.extend(label.as_bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    #[test]
    fn own_answers_are_understood_again() {
        let query = query(7, "Box.Example", TYPE_A);
        let question = question(&query).expect("a question");
        assert_eq!((question.id, question.name.as_str()), (7, "box.example"));
        let all: Vec<IpAddr> = ["10.0.2.7", "fd00::7"]
            .map(|a| a.parse().expect("one"))
            .into();
        let answer = own(&query, &question, &all);
        assert!(is_answer(&answer) && !is_query(&answer));
        let found = addresses(&answer);
        assert_eq!(found, [(all[0], Duration::from_secs(30))]);
    }

    #[test]
    fn names_with_hidden_dots_are_no_names() {
        let mut message = query(1, "axb.example", TYPE_A);
        let at = message.iter().position(|&byte| byte == b'x').expect("an x");
        message[at] = b'.';
        assert_eq!(question(&message), None);
    }

    #[test]
    fn damaged_messages_end() {
        let query = query(1, "a.example", TYPE_A);
        let question = question(&query).expect("a question");
        let answer = own(&query, &question, &["10.0.0.1".parse().expect("one")]);
        for at in 0..answer.len() {
            for value in [0, 1, 12, 0x3f, 0xc0, 0xff] {
                let mut damaged = answer.clone();
                damaged[at] = value;
                addresses(&damaged);
                super::question(&damaged);
                failure(&damaged, Code::ServerFailure);
            }
            failure(&answer[..at], Code::FormatError);
        }
    }
}
