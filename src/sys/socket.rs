//! Bytes and file descriptors over a Unix stream socket.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// The most descriptors that one `sendmsg(2)` can carry (`SCM_MAX_FD`).
pub(crate) const MAX_FDS: usize = 253;

/// What one `recvmsg(2)` has brought.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes; 0 where the peer has closed its side.
    pub(crate) bytes: usize,
    /// The descriptors that came with them, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether the kernel dropped descriptors: this process may not have as many.
    pub(crate) truncated: bool,
}

/// Up to this many bytes it is cheaper to bring the parts together here than to have the kernel do it.
const SHORT: usize = 128;

/// `sendmsg(socket, parts, SCM_RIGHTS fds, MSG_NOSIGNAL | MSG_DONTWAIT)`: how many bytes were taken; EAGAIN
/// where there is no room. By `send(2)` where that says the same.
pub(crate) fn send(
    socket: impl AsFd,
    parts: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let socket = socket.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let len = parts.iter().map(|part| part.len()).sum();
    if fds.is_empty() && len <= SHORT {
        let mut bytes = [0; SHORT];
        let all = parts.iter().flat_map(|part| part.iter());
        bytes.iter_mut().zip(all).for_each(|(byte, value)| *byte = *value);
        return nix::sys::socket::send(socket, &bytes[..len], flags);
    }
    if fds.is_empty() {
        return sendmsg::<()>(socket, parts, &[], flags, None);
    }
    let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    sendmsg::<()>(socket, parts, &[ControlMessage::ScmRights(&fds)], flags, None)
}

/// `recvmsg(socket, buffer, MSG_CMSG_CLOEXEC | flags)`. EAGAIN after the socket's receive timeout, or at once
/// with `MSG_DONTWAIT`.
///
/// By `libc`, because nix loses the descriptors of a truncated control message: they stay open.
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    // SAFETY: CMSG_SPACE computes.
    const ROOM: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
    // Words give the alignment of `cmsghdr`.
    let mut control = [MaybeUninit::<usize>::uninit(); ROOM.div_ceil(size_of::<usize>())];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all zero is a msghdr without buffers.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = &mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = ROOM as _;
    let flags = flags.bits() | libc::MSG_CMSG_CLOEXEC;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the header names one buffer of bytes and one for control messages, both ours and alive.
    let done = unsafe { libc::recvmsg(socket, &mut header, flags) };
    let bytes = Errno::result(done)? as usize;
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control buffer as the header now says.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&header) };
    while !next.is_null() {
        // SAFETY: FIRSTHDR and NXTHDR answer null, or a header within the buffer. It is copied out, since
        // what is reached from a reference to it ends with the header, and the data follow that.
        let message = unsafe { next.read() };
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN computes.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // It has 32 bits in musl's headers, and a word in glibc's.
            #[allow(clippy::unnecessary_cast)]
            let len = message.cmsg_len as usize;
            let count = (len - empty) / size_of::<RawFd>();
            // SAFETY: the message is one of the buffer, and `next` reaches all of that.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            fds.extend((0..count).map(|index| {
                // SAFETY: `count` descriptors lie in the message's data, perhaps unaligned; each is new
                // and ours.
                unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) }
            }));
        }
        // SAFETY: as above.
        next = unsafe { libc::CMSG_NXTHDR(&header, next) };
    }
    Ok(Received { bytes, fds, truncated: header.msg_flags & libc::MSG_CTRUNC != 0 })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::sys::stat::fstat;

    use super::*;

    #[test]
    fn as_many_descriptors_as_fit_arrive_each_where_it_was() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..MAX_FDS)
            .map(|index| crate::sys::file::memory_file("vfio-remap-test", index as u64).unwrap())
            .collect();
        for count in [1, 2, 3, MAX_FDS] {
            let fds: Vec<_> = files[..count].iter().map(AsFd::as_fd).collect();
            assert_eq!(send(&ours, &[IoSlice::new(b"fds")], &fds), Ok(3));
            let mut bytes = [0; 8];
            let received = receive(&theirs, &mut bytes, MsgFlags::empty()).unwrap();
            assert_eq!((received.bytes, &bytes[..3], received.truncated), (3, &b"fds"[..], false));
            let sizes = received.fds.iter().map(|fd| fstat(fd).unwrap().st_size as usize);
            assert!(sizes.eq(0..count));
        }
    }
}
