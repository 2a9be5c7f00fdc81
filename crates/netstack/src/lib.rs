//! The other end of a guest's network card.
//!
//! [`NetBackend`] is what virtio-net needs of it: frames in and out of guest memory, each behind a
//! virtio header, and offloads that can be switched. [`Tap`] is the host kernel's; [`Link`] is a
//! socket to another program. [`FrameMover`] moves frames without this process: vhost-net.

// UNSAFETY: TAP devices are set up by ioctl, and sockets by options, without safe wrappers.
#![expect(
    unsafe_code,
    reason = "TAP devices and sockets are set up by system calls"
)]

mod backend;
mod link;
mod tap;
mod vhost;

pub use backend::{FrameMover, HEADER_BYTES, LentRing, NetBackend, Offloads};
pub use link::{Link, LinkError, LinkNotice, NOTICE_BYTES};
pub use tap::{Tap, TapError};
