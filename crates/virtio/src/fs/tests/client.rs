//! A small FUSE client over the test driver.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::io::Errno;
use tempfile::TempDir;
use zerocopy::FromBytes;
use zerocopy::FromZeros;
use zerocopy::Immutable;
use zerocopy::IntoBytes;

use crate::fs::Cache;
use crate::fs::FileSystem;
use crate::fs::Fs;
use crate::fs::Ids;
use crate::fs::Layout;
use crate::fs::Limits;
use crate::fs::Share;
use crate::fs::Xattrs;
use crate::fs::abi;
use crate::fs::abi::OUT_HEADER_BYTES;
use crate::fs::abi::OutHeader;
use crate::fs::abi::opcode;
use crate::testing::TestDriver;

pub(super) const ROOT: u64 = 1;
const QUEUE: u16 = 1;

pub(super) fn share(path: &Path) -> Share {
    Share {
        file: std::fs::File::open(path).expect("the shared directory"),
        read_only: false,
        ids: Ids::Host,
        cache: Cache::Auto,
        hide: Vec::new(),
    }
}

pub(super) fn read_only(path: &Path) -> Share {
    Share {
        read_only: true,
        ..share(path)
    }
}

pub(super) fn device(layout: Layout) -> Box<Fs> {
    device_with(layout, Xattrs::Off, Limits::default())
}

pub(super) fn device_with(layout: Layout, xattrs: Xattrs, limits: Limits) -> Box<Fs> {
    let system = FileSystem::new(layout, xattrs, limits).expect("a usable layout");
    Box::new(Fs::new("root", system).expect("a usable tag"))
}

/// A guest with a file system mounted.
pub(super) struct Client {
    pub(super) driver: TestDriver,
    /// The shared directory.
    pub(super) dir: TempDir,
    pub(super) flags: u32,
    unique: u64,
}

impl Client {
    pub(super) fn mount(dir: TempDir, device: Box<Fs>) -> Self {
        let mut new = Self {
            driver: TestDriver::start(device),
            dir,
            flags: 0,
            unique: 0,
        };
        new.init();
        new
    }

    /// A writable share of a new directory.
    pub(super) fn writable() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::single(share(dir.path())).expect("a layout");
        Self::mount(dir, device(layout))
    }

    pub(super) fn init(&mut self) {
        let request = abi::InitIn {
            major: 7,
            minor: 38,
            max_readahead: 1 << 20,
            flags: u32::MAX,
        };
        let reply = self.call(opcode::INIT, 0, request.as_bytes(), 64);
        let out = abi::InitOut::read_from_bytes(&reply.expect("init")).expect("64 bytes");
        assert_eq!(out.major, 7);
        self.flags = out.flags;
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// One request with its raw payload and room for a reply body.
    pub(super) fn call(
        &mut self,
        code: u32,
        node: u64,
        payload: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        self.unique += 1;
        let len = size_of::<abi::InHeader>() + payload.len();
        let header = abi::InHeader {
            len: u32::try_from(len).expect("small"),
            opcode: code,
            unique: self.unique,
            node,
            uid: 0,
            gid: 0,
            pid: 1,
            extensions: 0,
            padding: 0,
        };
        let readable = [header.as_bytes(), payload];
        let reply = self
            .driver
            .request(QUEUE, &readable, &[OUT_HEADER_BYTES, room]);
        let (head, body) = reply.split_at(OUT_HEADER_BYTES);
        let head = OutHeader::read_from_bytes(head).expect("16 bytes");
        assert_eq!(head.unique, self.unique);
        assert_eq!(head.len as usize, reply.len());
        match head.error {
            0 => Ok(body.to_vec()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    pub(super) fn typed<T: FromBytes>(
        &mut self,
        code: u32,
        node: u64,
        payload: &[u8],
    ) -> Result<T, Errno> {
        let body = self.call(code, node, payload, size_of::<T>())?;
        Ok(T::read_from_bytes(&body).expect("the reply's size"))
    }

    pub(super) fn lookup_raw(&mut self, parent: u64, name: &[u8]) -> Result<abi::EntryOut, Errno> {
        let mut payload = name.to_vec();
        payload.push(0);
        self.typed(opcode::LOOKUP, parent, &payload)
    }

    /// The node of `name`; `NOENT` for a negative entry.
    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, Errno> {
        let entry = self.lookup_raw(parent, name.as_bytes())?;
        if entry.node == 0 {
            return Err(Errno::NOENT);
        }
        Ok(entry.node)
    }

    /// Walks a path as the guest's kernel would.
    pub(super) fn walk(&mut self, path: &str) -> Result<u64, Errno> {
        let mut node = ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            node = self.lookup(node, name)?;
        }
        Ok(node)
    }

    pub(super) fn attr(&mut self, node: u64) -> Result<abi::Attr, Errno> {
        self.attr_by(node, None)
    }

    pub(super) fn attr_by(&mut self, node: u64, handle: Option<u64>) -> Result<abi::Attr, Errno> {
        let request = abi::GetattrIn {
            flags: u32::from(handle.is_some()),
            padding: 0,
            handle: handle.unwrap_or(0),
        };
        let out: abi::AttrOut = self.typed(opcode::GETATTR, node, request.as_bytes())?;
        Ok(out.attr)
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, Errno> {
        let request = abi::OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        let out: abi::OpenOut = self.typed(opcode::OPEN, node, request.as_bytes())?;
        Ok(out.handle)
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        name: &str,
        mode: u32,
    ) -> Result<(u64, u64), Errno> {
        let request = abi::CreateIn {
            flags: (libc_flags::RDWR | libc_flags::CREAT).cast_unsigned(),
            mode,
            umask: 0,
            open_flags: 0,
        };
        let payload = with_name(request.as_bytes(), name);
        let body = self.call(opcode::CREATE, parent, &payload, 128 + 16)?;
        let (entry, open) = body.split_at(128);
        let entry = abi::EntryOut::read_from_bytes(entry).expect("128 bytes");
        let open = abi::OpenOut::read_from_bytes(open).expect("16 bytes");
        Ok((entry.node, open.handle))
    }

    pub(super) fn read(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<u8>, Errno> {
        let request = read_in(handle, offset, size);
        self.call(opcode::READ, node, request.as_bytes(), size as usize)
    }

    pub(super) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
    ) -> Result<u32, Errno> {
        let request = abi::WriteIn {
            handle,
            offset,
            size: u32::try_from(data.len()).expect("small"),
            write_flags: 0,
            lock_owner: 0,
            flags: 0,
            padding: 0,
        };
        let mut payload = request.as_bytes().to_vec();
        payload.extend(data);
        let out: abi::WriteOut = self.typed(opcode::WRITE, node, &payload)?;
        Ok(out.size)
    }

    pub(super) fn setattr(
        &mut self,
        node: u64,
        change: impl FnOnce(&mut abi::SetattrIn),
    ) -> Result<abi::Attr, Errno> {
        let mut request = abi::SetattrIn::new_zeroed();
        change(&mut request);
        let out: abi::AttrOut = self.typed(opcode::SETATTR, node, request.as_bytes())?;
        Ok(out.attr)
    }

    /// A whole file.
    pub(super) fn content(&mut self, path: &str) -> Result<Vec<u8>, Errno> {
        let node = self.walk(path)?;
        let handle = match self.open(node, libc_flags::RDONLY) {
            Err(Errno::NOSYS) => 0,
            other => other?,
        };
        self.read(node, handle, 0, 1 << 20)
    }

    /// Names in a directory, without `.` and `..`, and their type bits.
    pub(super) fn list(&mut self, node: u64, plus: bool) -> Result<Vec<(String, u32)>, Errno> {
        let open = self.call(opcode::OPENDIR, node, &[0; 8], 16);
        let handle = match open {
            Err(Errno::NOSYS) => 0,
            other => abi::OpenOut::read_from_bytes(&other?).expect("16").handle,
        };
        let mut names = Vec::new();
        let mut offset = 0;
        let code = if plus {
            opcode::READDIRPLUS
        } else {
            opcode::READDIR
        };
        loop {
            let request = read_in(handle, offset, 4096);
            let body = self.call(code, node, request.as_bytes(), 4096)?;
            if body.is_empty() {
                return Ok(names);
            }
            offset = parse_entries(&body, plus, &mut names);
        }
    }

    pub(super) fn named(
        &mut self,
        code: u32,
        node: u64,
        head: &[u8],
        name: &str,
    ) -> Result<Vec<u8>, Errno> {
        self.call(code, node, &with_name(head, name), 256)
    }

    pub(super) fn make_directory(
        &mut self,
        parent: u64,
        name: &str,
        mode: u32,
    ) -> Result<u64, Errno> {
        let request = abi::MkdirIn { mode, umask: 0 };
        let body = self.named(opcode::MKDIR, parent, request.as_bytes(), name)?;
        Ok(abi::EntryOut::read_from_bytes(&body).expect("128").node)
    }

    pub(super) fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Result<(), Errno> {
        let mut payload = to.0.to_le_bytes().to_vec();
        payload.extend(format!("{}\0{}\0", from.1, to.1).as_bytes());
        self.call(opcode::RENAME, from.0, &payload, 0).map(drop)
    }

    pub(super) fn forget(&mut self, node: u64, count: u64) {
        let header = abi::InHeader {
            len: 48,
            opcode: opcode::FORGET,
            unique: 0,
            node,
            uid: 0,
            gid: 0,
            pid: 0,
            extensions: 0,
            padding: 0,
        };
        let reply = self
            .driver
            .request(0, &[header.as_bytes(), &count.to_le_bytes()], &[]);
        assert!(reply.is_empty());
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        let counters = ringfence_device::Inspect::counters(&*self.driver.pci);
        let found = counters.iter().find(|(known, _)| *known == name);
        found.expect("a counter").1
    }
}

/// Flags as the guest's kernel numbers them.
pub(super) mod libc_flags {
    pub(crate) const RDONLY: i32 = 0;
    pub(crate) const WRONLY: i32 = 1;
    pub(crate) const RDWR: i32 = 2;
    pub(crate) const CREAT: i32 = 0o100;
    pub(crate) const TRUNC: i32 = 0o1000;
}

pub(super) fn with_name(head: &[u8], name: &str) -> Vec<u8> {
    let mut payload = head.to_vec();
    payload.extend(name.as_bytes());
    payload.push(0);
    payload
}

pub(super) fn read_in(handle: u64, offset: u64, size: u32) -> abi::ReadIn {
    abi::ReadIn {
        handle,
        offset,
        size,
        read_flags: 0,
        lock_owner: 0,
        flags: 0,
        padding: 0,
    }
}

fn parse_entries(body: &[u8], plus: bool, names: &mut Vec<(String, u32)>) -> u64 {
    let mut rest = body;
    let mut last = 0;
    while !rest.is_empty() {
        if plus {
            rest = &rest[size_of::<abi::EntryOut>()..];
        }
        let (record, tail) = abi::Dirent::read_from_prefix(rest).expect("a record");
        let name_len = record.name_len as usize;
        let name = std::ffi::OsStr::from_bytes(&tail[..name_len]);
        let name = name.to_str().expect("UTF-8").to_owned();
        if name != "." && name != ".." {
            names.push((name, record.kind));
        }
        last = record.offset;
        let size = (size_of::<abi::Dirent>() + name_len).next_multiple_of(8);
        rest = &rest[size..];
    }
    last
}

/// For asserting on whole replies.
pub(super) fn bytes_of<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}
