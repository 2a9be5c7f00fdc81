//! Where the host is: vsock, or UNIX sockets when the agent runs as an ordinary process under test.
// UNSAFETY: rustix has no vsock address; its trait for further ones hands a raw pointer to the kernel.
#![expect(unsafe_code, reason = "the kernel reads the address by a pointer")]

use rustix::net::AddressFamily;
use rustix::net::SocketAddrUnix;
use rustix::net::SocketFlags;
use rustix::net::SocketType;
use rustix::net::addr::SocketAddrArg;
use rustix::net::addr::SocketAddrLen;
use rustix::net::addr::SocketAddrOpaque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::ptr::from_ref;

/// The host's port, and the agent's.
const PORT: u32 = 1024;
const HOST_CID: u32 = 2;
const ANY_CID: u32 = u32::MAX;
const BACKLOG: i32 = 128;

/// `struct sockaddr_vm` (vsock(7)).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

const VSOCK_ADDRESS_BYTES: SocketAddrLen = 16;
const _: () = assert!(size_of::<VsockAddress>() == 16, "as the kernel has it");

impl VsockAddress {
    fn new(cid: u32) -> Self {
        Self {
            family: AddressFamily::VSOCK.as_raw(),
            reserved: 0,
            port: PORT,
            cid,
            flags: 0,
            zero: [0; 3],
        }
    }
}

// SAFETY: the pointer is that of `self`, readable for its size, which is the size that is passed; the
// layout is the kernel's.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(
            from_ref(self).cast::<SocketAddrOpaque>(),
            VSOCK_ADDRESS_BYTES,
        )
    }
}

/// How the host is reached and where it connects.
#[derive(Debug)]
pub enum Address {
    /// In a guest.
    Vsock,
    /// Under test: where to listen, and where to connect.
    Unix {
        /// The agent's.
        listen: PathBuf,
        /// The host's.
        connect: Option<PathBuf>,
    },
}

impl Address {
    /// A socket where the host connects.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn listen(&self) -> rustix::io::Result<OwnedFd> {
        let fd = match self {
            Self::Vsock => {
                let fd = socket(AddressFamily::VSOCK)?;
                rustix::net::bind(&fd, &VsockAddress::new(ANY_CID))?;
                fd
            }
            Self::Unix { listen, .. } => {
                let fd = socket(AddressFamily::UNIX)?;
                rustix::net::bind(&fd, &SocketAddrUnix::new(listen)?)?;
                fd
            }
        };
        rustix::net::listen(&fd, BACKLOG)?;
        Ok(fd)
    }

    /// A connection to the host; `None` when there is nothing to connect to.
    ///
    /// # Errors
    ///
    /// The host isn't there (yet).
    pub fn connect(&self) -> rustix::io::Result<Option<OwnedFd>> {
        match self {
            Self::Vsock => {
                let fd = socket(AddressFamily::VSOCK)?;
                rustix::net::connect(&fd, &VsockAddress::new(HOST_CID))?;
                Ok(Some(fd))
            }
            Self::Unix { connect: None, .. } => Ok(None),
            Self::Unix {
                connect: Some(path),
                ..
            } => {
                let fd = socket(AddressFamily::UNIX)?;
                rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)?;
                Ok(Some(fd))
            }
        }
    }
}

fn socket(family: AddressFamily) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}
