//! A terminal of the container's own file system.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::net::SendAncillaryBuffer;
use rustix::net::SendAncillaryMessage;
use rustix::net::SendFlags;
use rustix::termios::OptionalActions;
use rustix::termios::OutputModes;
use rustix::termios::Winsize;

use crate::error::InitError;
use crate::error::Step;
use crate::mounts;
use crate::paths::Kind;
use crate::paths::Tree;
use crate::plan::Console;
use crate::sys;

/// Makes a terminal, sends its other end to the runtime's caller, returns the program's end.
///
/// For exec the tree is the container's root as it is.
pub(crate) fn open(tree: &Tree, console: &Console) -> Result<OwnedFd, InitError> {
    let what = || "make a terminal".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let multiplexer = tree
        .resolve(Path::new("/dev/pts/ptmx"), flags)
        .or_else(|_| tree.resolve(Path::new("/dev/ptmx"), flags))
        .step(what)?;
    let terminal = sys::terminal_peer(multiplexer.as_fd()).step(what)?;
    if console.rows > 0 && console.columns > 0 {
        let size = Winsize {
            ws_row: console.rows,
            ws_col: console.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&multiplexer, size).step(what)?;
    }
    if console.copied {
        let mut modes = rustix::termios::tcgetattr(&terminal).step(what)?;
        modes.output_modes -= OutputModes::ONLCR;
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &modes).step(what)?;
    }
    let number = sys::terminal_number(multiplexer.as_fd()).step(what)?;
    if console.mount {
        let source = tree
            .handle(Path::new(&format!("/dev/pts/{number}")))
            .step(what)?;
        let copy = mounts::copy_of(source.as_fd(), false).step(what)?;
        let target = tree.make("/dev/console", Kind::File)?;
        mounts::attach(&copy, target.as_fd()).step(|| "bind /dev/console".to_owned())?;
    }
    send(console, &multiplexer, &format!("/dev/pts/{number}"))?;
    Ok(terminal)
}

fn send(console: &Console, multiplexer: &OwnedFd, name: &str) -> Result<(), InitError> {
    let what = || "send the terminal to its user".to_owned();
    let socket = sys::inherited(console.socket).step(what)?;
    let descriptors = [multiplexer.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    message.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(name.as_bytes())],
        &mut message,
        SendFlags::NOSIGNAL,
    )
    .step(what)?;
    Ok(())
}

/// Makes the terminal the session's, and the three standard streams.
pub(crate) fn take(terminal: &OwnedFd, uid: u32) -> Result<(), InitError> {
    let what = || "take the terminal".to_owned();
    sys::take_terminal(terminal.as_fd()).step(what)?;
    // A terminal of another user's can't be opened again by name; a file system that can't
    // say so (a mapped one) is left as it is.
    let _owner = rustix::fs::fchown(terminal, Some(rustix::fs::Uid::from_raw(uid)), None);
    rustix::stdio::dup2_stdin(terminal).step(what)?;
    rustix::stdio::dup2_stdout(terminal).step(what)?;
    rustix::stdio::dup2_stderr(terminal).step(what)
}
