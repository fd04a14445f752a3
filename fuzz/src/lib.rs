//! What the targets share.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Shared memory.
pub fn memory(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("its size");
    file.into()
}

/// An eventfd.
pub fn eventfd() -> OwnedFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd").into()
}

/// Sends what the socket has room for.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
}
