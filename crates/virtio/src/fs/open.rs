//! Opening, reading and writing files.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use ringfence_memory::vectored;
use ringfence_memory::vectored::Wait;
use rustix::fs::FallocateFlags;
use rustix::fs::FileType;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use rustix::fs::copy_file_range;
use rustix::fs::fallocate;
use rustix::fs::fdatasync;
use rustix::fs::fsync;
use rustix::fs::seek;
use rustix::io::Errno;

use super::Cache;
use super::FileSystem;
use super::abi::CopyFileRangeIn;
use super::abi::FSYNC_DATA;
use super::abi::FallocateIn;
use super::abi::FsyncIn;
use super::abi::LseekIn;
use super::abi::OPEN_KEEP_CACHE;
use super::abi::OpenOut;
use super::abi::ReadIn;
use super::abi::WriteIn;
use super::nodes::NodeId;
use super::nodes::Place;
use super::resolve::open_entry;
use super::resolve::stale_if_gone;
use super::resolve::stat_fd;
use crate::ChainReader;
use crate::ChainWriter;

/// Most bytes that one COPY_FILE_RANGE moves, so that it doesn't hold the worker for long.
const MAX_COPY: usize = 16 << 20;
/// Most bytes that one READ or WRITE moves: several times what was negotiated. The rest is a short
/// transfer.
const MAX_TRANSFER: usize = 4 << 20;
/// Open flags that a guest may choose; the rest of its bits mean nothing to the host.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME);

pub(super) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

impl FileSystem {
    /// Opens the regular file `id` by its place.
    pub(super) fn open_node(&mut self, id: NodeId, flags: OFlags) -> Result<File, Errno> {
        let node = self.nodes.get(id)?;
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            // Opening these on the host could block or act on a device.
            _ => return Err(Errno::NXIO),
        }
        if let (Place::ShareRoot, Some(share)) = (&node.place, node.share()) {
            return self.open_single_file(share, flags);
        }
        let (directory, name) = self.entry_of(id)?;
        // Should the entry have become a FIFO meanwhile, opening must not wait for its other end.
        let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = open_entry(&directory, &name, flags, Mode::empty()).map_err(stale_if_gone)?;
        self.check_same(self.nodes.get(id)?, &stat_fd(&fd)?)?;
        Ok(File::from(fd))
    }

    /// A share that is one file: it can only be read, by the descriptor that was given.
    fn open_single_file(
        &self,
        share: super::layout::ShareId,
        flags: OFlags,
    ) -> Result<File, Errno> {
        if flags & OFlags::ACCMODE != OFlags::RDONLY {
            return Err(Errno::ACCESS);
        }
        let file = &self.layout.share(share).file;
        file.try_clone().map_err(|error| errno(&error))
    }

    /// The host's flags for what the guest asked.
    pub(super) fn open_flags(&self, id: NodeId, flags: u32) -> Result<OFlags, Errno> {
        let mut flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        let writes = flags & OFlags::ACCMODE != OFlags::RDONLY;
        if writes || flags.contains(OFlags::TRUNC) {
            self.check_writable(id)?;
        }
        if !self.privileged {
            // Only the owner may ask for it, and the guest's owner needn't be this process.
            flags.remove(OFlags::NOATIME);
        }
        if self.writeback {
            // The guest reads around what it writes, and knows where the end is.
            flags.remove(OFlags::APPEND);
            if flags & OFlags::ACCMODE == OFlags::WRONLY {
                flags = flags.difference(OFlags::ACCMODE) | OFlags::RDWR;
            }
        }
        Ok(flags)
    }

    pub(super) fn open(&mut self, id: NodeId, flags: u32) -> Result<OpenOut, Errno> {
        if self.without_open {
            // The guest stops asking: see `file_for_read`.
            return Err(Errno::NOSYS);
        }
        let flags = self.open_flags(id, flags)?;
        let file = self.open_node(id, flags)?;
        self.opened(id, file, flags)
    }

    pub(super) fn opened(
        &mut self,
        id: NodeId,
        file: File,
        flags: OFlags,
    ) -> Result<OpenOut, Errno> {
        let keep = self.share_of(id)?.cache != Cache::Never;
        Ok(OpenOut {
            handle: self.handles.add_file(id, file, flags)?,
            open_flags: if keep { OPEN_KEEP_CACHE } else { 0 },
            padding: 0,
        })
    }

    /// The file that a READ or LSEEK means; without OPEN, one that is kept or opened for it.
    fn file_for_read(&mut self, id: NodeId) -> Result<Arc<File>, Errno> {
        if let Some(file) = self.handles.kept_file(id) {
            return Ok(file);
        }
        let file = Arc::new(self.open_node(id, OFlags::RDONLY)?);
        self.handles.keep_file(id, &file);
        Ok(file)
    }

    pub(super) fn read(
        &mut self,
        id: NodeId,
        request: &ReadIn,
        body: &mut ChainWriter<'_>,
    ) -> Result<(), Errno> {
        body.limit(MAX_TRANSFER.min(request.size as usize));
        let slices = body.slices(body.remaining());
        let read = |file: &File| {
            vectored::read_at(file.as_fd(), &slices, request.offset, Wait::Allowed)
                .map_err(|error| errno(&error))
        };
        let len = if self.without_open {
            read(&*self.file_for_read(id)?)?
        } else {
            read(&self.handles.file_of(request.handle, id)?.file)?
        };
        body.advance(len);
        self.counters.bytes_read.add(len as u64);
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        id: NodeId,
        request: &WriteIn,
        data: &ChainReader<'_>,
    ) -> Result<u32, Errno> {
        // Handles of read-only shares are never open for writing; this is the second lock.
        self.check_writable(id)?;
        let handle = self.handles.file_of(request.handle, id)?;
        let len = data
            .remaining()
            .min(request.size as usize)
            .min(MAX_TRANSFER);
        let slices = data.slices(len);
        let written = vectored::write_at(handle.file.as_fd(), &slices, request.offset)
            .map_err(|error| errno(&error))?;
        self.counters.bytes_written.add(written as u64);
        u32::try_from(written).map_err(|_| Errno::IO)
    }

    pub(super) fn fsync(&self, id: NodeId, request: &FsyncIn) -> Result<(), Errno> {
        let handle = self.handles.file_of(request.handle, id)?;
        if request.flags & FSYNC_DATA != 0 {
            fdatasync(&handle.file)
        } else {
            fsync(&handle.file)
        }
    }

    pub(super) fn fallocate(&self, id: NodeId, request: &FallocateIn) -> Result<(), Errno> {
        self.check_writable(id)?;
        let known =
            FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let flags = FallocateFlags::from_bits_retain(request.mode);
        if !known.contains(flags) {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = self.handles.file_of(request.handle, id)?;
        fallocate(&handle.file, flags, request.offset, request.len)
    }

    pub(super) fn lseek(&mut self, id: NodeId, request: &LseekIn) -> Result<u64, Errno> {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let to = match request.whence {
            SEEK_DATA => SeekFrom::Data(request.offset),
            SEEK_HOLE => SeekFrom::Hole(request.offset),
            // The others are the guest kernel's own arithmetic.
            _ => return Err(Errno::INVAL),
        };
        if self.without_open {
            return seek(&*self.file_for_read(id)?, to);
        }
        seek(&self.handles.file_of(request.handle, id)?.file, to)
    }

    pub(super) fn copy_file_range(
        &self,
        id: NodeId,
        request: &CopyFileRangeIn,
    ) -> Result<u32, Errno> {
        self.check_writable(request.node_out)?;
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let source = self.handles.file_of(request.handle_in, id)?;
        let target = self.handles.file_of(request.handle_out, request.node_out)?;
        let (mut from, mut to) = (request.offset_in, request.offset_out);
        let len = usize::try_from(request.len)
            .unwrap_or(MAX_COPY)
            .min(MAX_COPY);
        let copied = copy_file_range(
            &source.file,
            Some(&mut from),
            &target.file,
            Some(&mut to),
            len,
        )?;
        u32::try_from(copied).map_err(|_| Errno::IO)
    }
}
