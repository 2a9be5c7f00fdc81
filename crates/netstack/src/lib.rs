//! The other end of a guest's network card.
//!
//! [`NetBackend`] is what virtio-net needs of it: frames in and out of guest memory, each behind a
//! virtio header, and offloads that can be switched. [`Tap`] is the host kernel's.

// UNSAFETY: TAP devices are set up by ioctl, which has no safe wrapper.
#![expect(unsafe_code, reason = "TAP devices are set up by ioctl")]

mod backend;
mod tap;

pub use backend::{HEADER_BYTES, NetBackend, Offloads};
pub use tap::{Tap, TapError};
