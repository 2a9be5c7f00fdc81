//! The guest's files, for the host: read, written, listed, moved and removed.

use crate::error::AgentError;
use crate::error::ServeError;
use crate::error::Tried;
use crate::frame::Kind;
use crate::link::CHUNK_BYTES;
use crate::link::Link;
use crate::message::FileInfo;
use crate::users;
use serde_json::json;
use std::fs;
use std::fs::File;
use std::fs::Metadata;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Entries of a directory that one answer holds; names have at most 255 bytes, so it fits a frame.
const ENTRIES: usize = 1000;

/// Paths are absolute, since the agent has no directory of its own.
///
/// # Errors
///
/// This one isn't.
pub(crate) fn absolute(path: &str) -> Result<&Path, AgentError> {
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(Path::new(path));
    }
    let message = format!("{path:?} is no absolute path of the guest");
    Err(AgentError::config(message))
}

/// What is at a path.
///
/// # Errors
///
/// Nothing, or it can't be seen.
pub(crate) fn stat(path: &str, follow: bool) -> Result<FileInfo, AgentError> {
    let place = absolute(path)?;
    let status = if follow {
        fs::metadata(place)
    } else {
        fs::symlink_metadata(place)
    };
    let name = place.file_name().unwrap_or(place.as_os_str());
    let status = status.tried(|| format!("cannot look at {path}"))?;
    Ok(info(&name.to_string_lossy(), place, &status))
}

fn info(name: &str, path: &Path, status: &Metadata) -> FileInfo {
    let target = if status.is_symlink() {
        fs::read_link(path).unwrap_or_default()
    } else {
        Path::new("").to_owned()
    };
    FileInfo {
        name: name.to_owned(),
        kind: kind(status),
        size: status.size(),
        mode: status.mode() & 0o7777,
        uid: status.uid(),
        gid: status.gid(),
        mtime_ns: status
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(status.mtime_nsec()),
        target: target.to_string_lossy().into_owned(),
    }
}

fn kind(status: &Metadata) -> &'static str {
    let kind = status.file_type();
    if kind.is_file() {
        "file"
    } else if kind.is_dir() {
        "directory"
    } else if kind.is_symlink() {
        "symlink"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_block_device() {
        "block"
    } else {
        "char"
    }
}

/// Some of a directory's entries: those, how many names were looked at, and whether there are more.
///
/// # Errors
///
/// It is no directory.
pub(crate) fn list(path: &str, skip: usize) -> Result<(Vec<FileInfo>, usize, bool), AgentError> {
    let place = absolute(path)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(place).tried(|| format!("cannot list {path}"))? {
        let entry = entry.tried(|| format!("cannot list {path}"))?;
        names.push(entry.file_name());
    }
    names.sort_unstable();
    let count = names.len().saturating_sub(skip).min(ENTRIES);
    let more = names.len() > skip.saturating_add(count);
    let entries = names.iter().skip(skip).take(ENTRIES).filter_map(|name| {
        let place = place.join(name);
        // It may be gone by now.
        let status = fs::symlink_metadata(&place).ok()?;
        Some(info(&name.to_string_lossy(), &place, &status))
    });
    Ok((entries.collect(), count, more))
}

/// Streams a file's content.
///
/// # Errors
///
/// It can't be read, or the host is gone.
pub(crate) fn read(
    link: &Link,
    path: &str,
    offset: u64,
    length: Option<u64>,
) -> Result<(), ServeError> {
    let what = || format!("cannot read {path}");
    let mut file = File::open(absolute(path)?).tried(what)?;
    let status = file.metadata().tried(what)?;
    if status.is_dir() {
        return Err(AgentError::config(format!("cannot read {path}: it is a directory")).into());
    }
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).tried(what)?;
    }
    link.send_json(Kind::Answer, &json!({ "size": status.size() }))?;
    let mut left = length.unwrap_or(u64::MAX);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
        let room = chunk.get_mut(..most).unwrap_or_default();
        let count = file.read(room).tried(what)?;
        left = left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        link.send(Kind::Data, chunk.get(..count).unwrap_or_default())?;
        if count == 0 {
            return Ok(());
        }
    }
}

/// What a file that is written becomes.
#[derive(Debug)]
pub(crate) struct WriteOptions<'a> {
    /// Permissions of a new file.
    pub(crate) mode: u32,
    /// At its end.
    pub(crate) append: bool,
    /// Owner; empty leaves it.
    pub(crate) user: &'a str,
}

/// Writes a file from the host's stream.
///
/// # Errors
///
/// It can't be written, or the host is gone.
pub(crate) fn write(
    link: &mut Link,
    path: &str,
    options: &WriteOptions<'_>,
) -> Result<(), ServeError> {
    let what = || format!("cannot write {path}");
    let place = absolute(path)?;
    let mut open = File::options();
    open.create(true).mode(options.mode & 0o7777);
    if options.append {
        open.append(true);
    } else {
        open.write(true).truncate(true);
    }
    let mut file = open.open(place).tried(what)?;
    if !options.user.is_empty() {
        let user = users::find(options.user)?;
        std::os::unix::fs::fchown(&file, Some(user.uid), Some(user.gid)).tried(what)?;
    }
    link.send_json(Kind::Answer, &json!({}))?;
    let mut failed = None;
    let mut size = 0_u64;
    while let Some(bytes) = link.receive_data()? {
        // After a failure the rest is taken all the same, so that the connection stays in step.
        if failed.is_none() {
            failed = file.write_all(&bytes).tried(what).err();
            size += u64::try_from(bytes.len()).unwrap_or(0);
        }
    }
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(link.send_json(Kind::Answer, &json!({ "size": size }))?),
    }
}

/// Makes a directory.
///
/// # Errors
///
/// It is there already (but for `parents`) or can't be made.
pub(crate) fn mkdir(path: &str, mode: u32, parents: bool) -> Result<(), AgentError> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(mode & 0o7777).recursive(parents);
    let made = builder.create(absolute(path)?);
    made.tried(|| format!("cannot make the directory {path}"))
}

/// Removes a file or directory.
///
/// # Errors
///
/// It isn't there, or has something in it (but for `recursive`).
pub(crate) fn remove(path: &str, recursive: bool) -> Result<(), AgentError> {
    let place = absolute(path)?;
    let what = || format!("cannot remove {path}");
    let status = fs::symlink_metadata(place).tried(what)?;
    let removed = match (status.is_dir(), recursive) {
        (false, _) => fs::remove_file(place),
        (true, false) => fs::remove_dir(place),
        (true, true) => fs::remove_dir_all(place),
    };
    removed.tried(what)
}

/// Renames.
///
/// # Errors
///
/// The source isn't there, or the target is on another file system.
pub(crate) fn rename(source: &str, target: &str) -> Result<(), AgentError> {
    let renamed = fs::rename(absolute(source)?, absolute(target)?);
    renamed.tried(|| format!("cannot rename {source} to {target}"))
}
