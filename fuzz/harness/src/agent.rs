//! The agent's protocol, as a host that was taken over could speak it.

use ringfence_agent::frame::Decoder;
use ringfence_agent::frame::Frame;
use ringfence_agent::frame::FrameError;
use ringfence_agent::frame::encode;
use ringfence_agent::understands;

use crate::script::Input;

/// What a host says in earnest, to be changed a little.
const WORDS: [&[u8]; 6] = [
    br#"{"op":"exec","argv":["sh"],"env":{"A":"b"},"terminal":{"columns":80,"rows":24},"timeout_ms":1}"#,
    br#"{"op":"write","path":"/x","mode":420,"append":false,"user":"0:0"}"#,
    br#"{"op":"list","path":"/","skip":0}"#,
    br#"{"op":"power_off","reboot":false,"grace_ms":0}"#,
    br#"{"hostname":"h","root":{"layers":[{"kind":"block","source":"/dev/vda"}],"writable":"no"}}"#,
    b"",
];

/// A stream of frames in pieces of any size, and what they say.
///
/// The first byte says how the stream is cut; the others are read as frames with words of a host that
/// are a little changed, between bytes as they are. Oracles: the cut changes nothing, frames are what
/// was sent, and no payload does more than not being understood.
///
/// # Panics
/// When an oracle fails.
pub fn protocol(data: &[u8]) {
    let mut input = Input::new(data);
    let cut = usize::from(input.u8()) + 1;
    let stream = speak(&mut input);
    let (frames, ending) = decode(&stream, stream.len().max(1));
    let (again, same_ending) = decode(&stream, cut);
    assert_eq!(frames, again, "the cut changed the frames");
    assert_eq!(ending, same_ending, "the cut changed the ending");
    let mut encoded = Vec::new();
    for frame in &frames {
        understands(frame.kind, &frame.payload);
        encode(frame.kind, &frame.payload, &mut encoded);
    }
    let start = stream.get(..encoded.len());
    assert_eq!(
        start,
        Some(encoded.as_slice()),
        "a frame isn't what was sent"
    );
}

fn speak(input: &mut Input<'_>) -> Vec<u8> {
    let mut stream = Vec::new();
    while !input.is_empty() {
        let kind = input.u8();
        let mut payload = WORDS[usize::from(input.u8()) % WORDS.len()].to_vec();
        if let (at, Some(last)) = (usize::from(input.u8()), payload.len().checked_sub(1)) {
            payload[at.min(last)] ^= input.u8() & 0x7f;
        }
        let length = u32::try_from(payload.len()).expect("small");
        if kind % 16 != 15 {
            stream.extend_from_slice(&length.to_le_bytes());
            stream.push(kind % 24);
        }
        stream.extend_from_slice(&payload);
    }
    stream
}

fn decode(stream: &[u8], piece: usize) -> (Vec<Frame>, Option<FrameError>) {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    for piece in stream.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringfence_agent::frame::Kind;

    #[test]
    fn the_words_are_understood_unless_they_are_changed() {
        for words in WORDS.iter().filter(|words| !words.is_empty()) {
            assert!(understands(Kind::Request, words) || understands(Kind::Setup, words));
        }
        assert!(!understands(Kind::Request, b"{}"));
    }
}
