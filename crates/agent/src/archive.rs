//! Directories in and out of the guest as tar streams, in GNU form with sparse files.

use crate::error::AgentError;
use crate::error::ServeError;
use crate::error::Tried;
use crate::files::absolute;
use crate::frame::Kind;
use crate::link::CHUNK_BYTES;
use crate::link::Link;
use crate::link::LinkError;
use serde_json::json;
use std::io;
use std::io::Read;
use std::io::Write;
use std::path::Path;

/// Streams a file or directory; names in the archive begin with its own.
///
/// # Errors
///
/// It can't be read, or the host is gone.
pub(crate) fn tar_out(link: &Link, path: &str) -> Result<(), ServeError> {
    let place = absolute(path)?;
    let what = || format!("cannot archive {path}");
    let status = std::fs::symlink_metadata(place).tried(what)?;
    link.send_json(Kind::Answer, &json!({}))?;
    let sender = Sender {
        link,
        buffer: Vec::with_capacity(CHUNK_BYTES),
        broken: None,
    };
    let name = Path::new(place.file_name().unwrap_or_else(|| ".".as_ref()));
    let mut builder = tar::Builder::new(sender);
    builder.follow_symlinks(false);
    builder.sparse(true);
    let packed = if status.is_dir() {
        builder.append_dir_all(name, place)
    } else {
        builder.append_path_with_name(place, name)
    };
    let packed = packed.and_then(|()| builder.finish());
    let sender = builder.get_mut();
    let packed = packed.and_then(|()| sender.flush());
    if let Some(error) = sender.broken.take() {
        return Err(error.into());
    }
    packed.tried(what)?;
    Ok(link.send(Kind::Data, b"")?)
}

/// Unpacks the host's stream into a directory, which is made when it is missing.
///
/// # Errors
///
/// The stream is no archive, a member can't be made, or the host is gone.
pub(crate) fn tar_in(link: &mut Link, path: &str, owner: bool) -> Result<(), ServeError> {
    let place = absolute(path)?;
    std::fs::create_dir_all(place).tried(|| format!("cannot make the directory {path}"))?;
    link.send_json(Kind::Answer, &json!({}))?;
    let mut receiver = Receiver {
        link,
        piece: Vec::new(),
        start: 0,
        ended: false,
        broken: None,
    };
    let mut archive = tar::Archive::new(&mut receiver);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(owner);
    archive.set_overwrite(true);
    let unpacked = archive.unpack(place);
    if receiver.broken.is_none() {
        // Padding behind the archive's end, or all the rest after a failure.
        let _in_step = io::copy(&mut receiver, &mut io::sink());
    }
    if let Some(error) = receiver.broken.take() {
        return Err(error.into());
    }
    match unpacked {
        Ok(()) => Ok(link.send_json(Kind::Answer, &json!({}))?),
        Err(error) => {
            let reason = std::error::Error::source(&error).map(ToString::to_string);
            let message = format!(
                "cannot unpack into {path}: {error}{}",
                reason.map(|text| format!(": {text}")).unwrap_or_default()
            );
            Err(AgentError::guest(message).into())
        }
    }
}

struct Sender<'a> {
    link: &'a Link,
    buffer: Vec<u8>,
    broken: Option<LinkError>,
}

impl Write for Sender<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.buffer.len();
        let taken = bytes.get(..room.min(bytes.len())).unwrap_or_default();
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let sent = self.link.send(Kind::Data, &self.buffer);
        self.buffer.clear();
        sent.map_err(|error| {
            self.broken = Some(error);
            io::Error::from(io::ErrorKind::BrokenPipe)
        })
    }
}

struct Receiver<'a> {
    link: &'a mut Link,
    piece: Vec<u8>,
    start: usize,
    ended: bool,
    broken: Option<LinkError>,
}

impl Read for Receiver<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        if self.start == self.piece.len() && !self.ended {
            match self.link.receive_data() {
                Ok(piece) => {
                    self.ended = piece.is_none();
                    self.piece = piece.unwrap_or_default();
                    self.start = 0;
                }
                Err(error) => {
                    self.broken = Some(error);
                    self.ended = true;
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
        let mut rest = self.piece.get(self.start..).unwrap_or_default();
        let count = rest.read(room)?;
        self.start += count;
        Ok(count)
    }
}
