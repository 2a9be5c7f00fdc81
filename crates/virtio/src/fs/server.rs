//! FUSE requests: decoding, dispatch, replies.

use std::ffi::OsStr;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;

use rustix::fs::AtFlags;
use rustix::fs::fsync;
use rustix::fs::syncfs;
use rustix::io::Errno;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

use super::Cache;
use super::FileSystem;
use super::Xattrs;
use super::abi;
use super::abi::EntryOut;
use super::abi::InHeader;
use super::abi::OUT_HEADER_BYTES;
use super::abi::OutHeader;
use super::abi::init;
use super::abi::opcode;
use super::change::Maker;
use super::nodes::NodeId;
use super::xattr::MAX_XATTR;
use crate::ChainReader;
use crate::ChainWriter;

/// Pages in a READ or WRITE: 1 MiB, the protocol's most.
const MAX_PAGES: u16 = 256;
const MAX_WRITE: u32 = 256 * 4096;
/// Most bytes of names in a request: two of the longest paths.
const MAX_NAMES: usize = 2 * 4096 + 2;
/// Most entries in a BATCH_FORGET that are looked at.
const MAX_FORGETS: u32 = 65_536;
/// Requests that the guest may have waiting in the background.
const MAX_BACKGROUND: u16 = 64;

fn io_errno(error: &io::Error) -> Errno {
    match error.kind() {
        // A request shorter than it must be, or a reply buffer too small for it.
        io::ErrorKind::UnexpectedEof => Errno::INVAL,
        _ => Errno::IO,
    }
}

/// A request's payload.
struct Request<'a, 'm> {
    node: NodeId,
    maker: Maker,
    data: &'a mut ChainReader<'m>,
}

impl Request<'_, '_> {
    fn take<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        self.data.read_value().map_err(|error| io_errno(&error))
    }

    fn bytes(&mut self, limit: usize) -> Result<Vec<u8>, Errno> {
        if self.data.remaining() > limit {
            return Err(Errno::NAMETOOLONG);
        }
        self.data.read_rest().map_err(|error| io_errno(&error))
    }

    /// One NUL-terminated string.
    fn name(&mut self) -> Result<OsString, Errno> {
        let bytes = self.bytes(MAX_NAMES)?;
        let (name, _) = split_nul(&bytes)?;
        Ok(OsString::from_vec(name.to_vec()))
    }

    fn two_names(&mut self) -> Result<(OsString, OsString), Errno> {
        let bytes = self.bytes(MAX_NAMES)?;
        let (one, rest) = split_nul(&bytes)?;
        let (two, _) = split_nul(rest)?;
        let owned = |name: &[u8]| OsString::from_vec(name.to_vec());
        Ok((owned(one), owned(two)))
    }
}

fn split_nul(bytes: &[u8]) -> Result<(&[u8], &[u8]), Errno> {
    let end = bytes.iter().position(|&byte| byte == 0);
    let end = end.ok_or(Errno::INVAL)?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

fn put<T: IntoBytes + Immutable>(body: &mut ChainWriter<'_>, value: &T) -> Result<(), Errno> {
    body.write_value(value).map_err(|error| io_errno(&error))
}

fn put_bytes(body: &mut ChainWriter<'_>, bytes: &[u8]) -> Result<(), Errno> {
    body.write_all(bytes).map_err(|error| io_errno(&error))
}

/// GETXATTR and LISTXATTR: the value, or its size when the guest asks with no room.
fn put_sized(body: &mut ChainWriter<'_>, room: u32, value: &[u8]) -> Result<(), Errno> {
    let size = u32::try_from(value.len()).map_err(|_| Errno::IO)?;
    if room == 0 {
        return put(body, &abi::GetxattrOut { size, padding: 0 });
    }
    if size > room {
        return Err(Errno::RANGE);
    }
    put_bytes(body, value)
}

impl FileSystem {
    /// Serves one request; returns the bytes written to `reply`, zero where none is due.
    pub fn serve(&mut self, data: &mut ChainReader<'_>, reply: &ChainWriter<'_>) -> u32 {
        let Ok(header) = data.read_value::<InHeader>() else {
            return 0;
        };
        let payload = (header.len as usize).saturating_sub(size_of::<InHeader>());
        data.limit(payload);
        self.counters.requests.increment();
        let mut request = Request {
            node: header.node,
            maker: Maker {
                uid: header.uid,
                gid: header.gid,
            },
            data,
        };
        let mut body = reply.clone();
        body.advance(OUT_HEADER_BYTES);
        let before = body.written();
        let result = match header.opcode {
            opcode::FORGET => return self.forget_one(&mut request),
            opcode::BATCH_FORGET => return self.forget_batch(&mut request),
            // Requests are served one after another: what is to be interrupted is done.
            opcode::INTERRUPT => return 0,
            code => self.dispatch(code, &mut request, &mut body),
        };
        let (error, len) = match result {
            Ok(()) => (0, body.written() - before),
            Err(error) => {
                self.counters.errors.increment();
                (-error.raw_os_error(), 0)
            }
        };
        write_header(reply, header.unique, error, len)
    }

    fn dispatch(
        &mut self,
        code: u32,
        request: &mut Request<'_, '_>,
        body: &mut ChainWriter<'_>,
    ) -> Result<(), Errno> {
        let node = request.node;
        match code {
            opcode::LOOKUP => self.serve_lookup(request, body),
            opcode::GETATTR => {
                let attributes = self.getattr(node, &request.take()?)?;
                put(body, &attributes)
            }
            opcode::READLINK => put_bytes(body, &self.readlink(node)?),
            opcode::OPEN => {
                let open: abi::OpenIn = request.take()?;
                put(body, &self.open(node, open.flags)?)
            }
            opcode::READ => self.read(node, &request.take()?, body),
            opcode::OPENDIR => put(body, &self.opendir(node)?),
            opcode::READDIR => self.readdir(node, &request.take()?, body, false),
            opcode::READDIRPLUS => self.readdir(node, &request.take()?, body, true),
            opcode::RELEASE => {
                self.handles
                    .close_file(request.take::<abi::ReleaseIn>()?.handle);
                Ok(())
            }
            opcode::RELEASEDIR => {
                self.handles
                    .close_directory(request.take::<abi::ReleaseIn>()?.handle);
                Ok(())
            }
            opcode::STATFS => put(body, &self.statfs(node)?),
            opcode::LSEEK => {
                let offset = self.lseek(node, &request.take()?)?;
                put(body, &abi::LseekOut { offset })
            }
            opcode::GETXATTR => {
                let wanted: abi::GetxattrIn = request.take()?;
                let value = self.getxattr(node, &request.name()?)?;
                put_sized(body, wanted.size, &value)
            }
            opcode::LISTXATTR => {
                let wanted: abi::GetxattrIn = request.take()?;
                put_sized(body, wanted.size, &self.listxattr(node)?)
            }
            opcode::INIT => self.init(&request.take()?, body),
            opcode::DESTROY => {
                self.reset();
                Ok(())
            }
            _ => self.dispatch_change(code, request, body),
        }
    }

    fn dispatch_change(
        &mut self,
        code: u32,
        request: &mut Request<'_, '_>,
        body: &mut ChainWriter<'_>,
    ) -> Result<(), Errno> {
        let (node, maker) = (request.node, request.maker);
        match code {
            opcode::WRITE => {
                let write = request.take()?;
                let size = self.write(node, &write, request.data)?;
                put(body, &abi::WriteOut { size, padding: 0 })
            }
            opcode::SETATTR => {
                let attributes = self.setattr(node, &request.take()?)?;
                put(body, &attributes)
            }
            opcode::CREATE => self.serve_create(request, body),
            opcode::MKDIR => {
                let make: abi::MkdirIn = request.take()?;
                let entry = self.mkdir(node, &request.name()?, make.mode, maker)?;
                put(body, &entry)
            }
            opcode::MKNOD => {
                let make: abi::MknodIn = request.take()?;
                let entry = self.mknod(node, &request.name()?, make.mode, maker)?;
                put(body, &entry)
            }
            opcode::SYMLINK => {
                let (name, target) = request.two_names()?;
                put(body, &self.symlink(node, &name, &target, maker)?)
            }
            opcode::LINK => {
                let source: u64 = request.take()?;
                put(body, &self.link(source, node, &request.name()?)?)
            }
            opcode::UNLINK => self.unlink(node, &request.name()?, AtFlags::empty()),
            opcode::RMDIR => self.unlink(node, &request.name()?, AtFlags::REMOVEDIR),
            opcode::RENAME => {
                let new_dir: u64 = request.take()?;
                self.serve_rename(request, new_dir, 0)
            }
            opcode::RENAME2 => {
                let rename: abi::Rename2In = request.take()?;
                self.serve_rename(request, rename.new_dir, rename.flags)
            }
            opcode::FSYNC => self.fsync(node, &request.take()?),
            opcode::FSYNCDIR => self.sync_directory(node),
            opcode::SYNCFS => self.sync_all(),
            opcode::FALLOCATE => self.fallocate(node, &request.take()?),
            opcode::COPY_FILE_RANGE => {
                let size = self.copy_file_range(node, &request.take()?)?;
                put(body, &abi::WriteOut { size, padding: 0 })
            }
            opcode::SETXATTR => self.serve_setxattr(request),
            opcode::REMOVEXATTR => self.removexattr(node, &request.name()?),
            // FLUSH, ACCESS and locks among them: the guest's kernel does without from then on.
            _ => Err(Errno::NOSYS),
        }
    }

    fn serve_lookup(
        &mut self,
        request: &mut Request<'_, '_>,
        body: &mut ChainWriter<'_>,
    ) -> Result<(), Errno> {
        let name = request.name()?;
        let found = self.lookup(request.node, &name)?;
        let valid = match self.share_of(request.node) {
            Ok(share) => share.cache.seconds(),
            Err(_) => Cache::Always.seconds(),
        };
        match found {
            Some(entry) => put(body, &entry),
            None if valid == 0 => Err(Errno::NOENT),
            // Node zero: the guest may remember that there is nothing.
            None => put(
                body,
                &EntryOut {
                    entry_valid: valid,
                    ..EntryOut::default()
                },
            ),
        }
    }

    fn serve_create(
        &mut self,
        request: &mut Request<'_, '_>,
        body: &mut ChainWriter<'_>,
    ) -> Result<(), Errno> {
        let create = request.take()?;
        let name = request.name()?;
        let (entry, open) = self.create(request.node, &name, &create, request.maker)?;
        put(body, &entry)?;
        put(body, &open)
    }

    fn serve_rename(
        &mut self,
        request: &mut Request<'_, '_>,
        new_dir: NodeId,
        flags: u32,
    ) -> Result<(), Errno> {
        let (old, new) = request.two_names()?;
        self.rename((request.node, &old), (new_dir, &new), flags)
    }

    fn serve_setxattr(&mut self, request: &mut Request<'_, '_>) -> Result<(), Errno> {
        let set: abi::SetxattrIn = request.take()?;
        let bytes = request.bytes(MAX_XATTR + 256)?;
        let (name, rest) = split_nul(&bytes)?;
        let value = rest.get(..set.size as usize).ok_or(Errno::INVAL)?;
        self.setxattr(request.node, OsStr::from_bytes(name), value, set.flags)
    }

    fn forget_one(&mut self, request: &mut Request<'_, '_>) -> u32 {
        if let Ok(count) = request.take::<u64>() {
            self.nodes.forget(request.node, count);
        }
        0
    }

    fn forget_batch(&mut self, request: &mut Request<'_, '_>) -> u32 {
        let Ok(batch) = request.take::<abi::BatchForgetIn>() else {
            return 0;
        };
        for _ in 0..batch.count.min(MAX_FORGETS) {
            let Ok(one) = request.take::<abi::ForgetOne>() else {
                break;
            };
            self.nodes.forget(one.node, one.count);
        }
        0
    }

    fn sync_directory(&mut self, node: NodeId) -> Result<(), Errno> {
        self.check_writable(node)?;
        let directory = self.directory(node)?;
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
        let dot = OsStr::new(".");
        let fd = super::resolve::open_entry(&directory, dot, flags, rustix::fs::Mode::empty())?;
        fsync(fd)
    }

    fn sync_all(&self) -> Result<(), Errno> {
        for share in self.layout.shares.iter().filter(|share| !share.read_only) {
            syncfs(&share.file)?;
        }
        Ok(())
    }

    /// The first request: what both sides can do.
    fn init(&mut self, request: &abi::InitIn, body: &mut ChainWriter<'_>) -> Result<(), Errno> {
        if request.major != abi::MAJOR {
            return Err(Errno::PROTO);
        }
        self.reset();
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS;
        let all_always = self
            .layout
            .shares
            .iter()
            .all(|share| share.cache == Cache::Always);
        if self.layout.is_read_only() {
            wanted |= init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;
        } else if all_always {
            wanted |= init::WRITEBACK_CACHE;
        }
        if self.xattrs == Xattrs::UserAndAcl {
            wanted |= init::POSIX_ACL;
        }
        let flags = wanted & request.flags;
        self.without_open =
            flags & init::NO_OPEN_SUPPORT != 0 && flags & init::NO_OPENDIR_SUPPORT != 0;
        self.writeback = flags & init::WRITEBACK_CACHE != 0;
        put(
            body,
            &abi::InitOut {
                major: abi::MAJOR,
                minor: abi::MINOR,
                max_readahead: request.max_readahead,
                flags: flags & !init::INIT_EXT,
                max_background: MAX_BACKGROUND,
                congestion_threshold: MAX_BACKGROUND / 4 * 3,
                max_write: MAX_WRITE,
                time_gran: 1,
                max_pages: MAX_PAGES,
                ..abi::InitOut::default()
            },
        )
    }
}

fn write_header(reply: &ChainWriter<'_>, unique: u64, error: i32, body_len: u32) -> u32 {
    let len = body_len + u32::try_from(OUT_HEADER_BYTES).unwrap_or(0);
    let mut head = reply.clone();
    match head.write_value(&OutHeader { len, error, unique }) {
        Ok(()) => len,
        // No room for a reply at all: the guest gets none.
        Err(_) => 0,
    }
}
