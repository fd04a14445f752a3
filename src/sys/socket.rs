//! Bytes and file descriptors over a Unix stream socket.

#![expect(unsafe_code, reason = "the kernel's contracts are unsafe")]

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::SockType;
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, getsockname, getsockopt, sendmsg};

/// The most descriptors that one `sendmsg(2)` can carry (`SCM_MAX_FD`).
pub(crate) const MAX_FDS: usize = 253;

/// The result of one `recvmsg(2)`.
#[derive(Debug)]
pub(crate) struct Received {
    /// How many bytes were received; 0 if the peer has closed its side.
    pub(crate) bytes: usize,
    /// The descriptors that came with them, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether the kernel dropped descriptors, because this process may not open as many.
    pub(crate) truncated: bool,
}

/// Up to this many bytes, one `send(2)` of a copy is cheaper than a `sendmsg(2)` of the parts.
const SHORT: usize = 128;

/// `sendmsg(socket, parts, SCM_RIGHTS fds, MSG_NOSIGNAL | MSG_DONTWAIT)`: returns how many bytes were sent;
/// EAGAIN if the socket's buffer is full. Short messages without descriptors go by `send(2)`.
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

/// Whether it is a stream socket of this machine (`getsockopt(SO_TYPE)`, `getsockname`). Of another file the
/// kernel says so without asking its file system.
pub(crate) fn is_stream(fd: impl AsFd) -> bool {
    let fd = fd.as_fd();
    getsockopt(&fd, SockType) == Ok(nix::sys::socket::SockType::Stream)
        && getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok()
}

/// `recvmsg(socket, buffer, MSG_CMSG_CLOEXEC | flags)`. EAGAIN after the socket's receive timeout, or at
/// once with `MSG_DONTWAIT`.
///
/// Uses `libc`, because nix loses the descriptors of a truncated control message: they stay open.
pub(crate) fn receive(
    socket: impl AsFd,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    // SAFETY: CMSG_SPACE only computes a size.
    const ROOM: usize = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
    // An array of words has the alignment of `cmsghdr`.
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
        // SAFETY: FIRSTHDR and NXTHDR return null or a header within the buffer. The header is copied: a
        // pointer derived from a reference to it could not reach the data behind it.
        let message = unsafe { next.read() };
        if (message.cmsg_level, message.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN only computes a size.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // `cmsg_len` has 32 bits in musl and 64 in glibc.
            #[allow(clippy::unnecessary_cast)]
            let len = message.cmsg_len as usize;
            let count = (len - empty) / size_of::<RawFd>();
            // SAFETY: the message lies in the buffer, and `next` may reach all of the buffer.
            let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            fds.extend((0..count).map(|index| {
                // SAFETY: the message's data holds `count` descriptors, perhaps unaligned. Each is new, and
                // ours alone.
                unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) }
            }));
        }
        // SAFETY: as for CMSG_FIRSTHDR.
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
    fn stream_sockets_of_this_machine_are_told_from_other_files() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(is_stream(&ours));
        assert!(!is_stream(std::os::unix::net::UnixDatagram::unbound().unwrap()));
        assert!(!is_stream(std::net::TcpListener::bind("127.0.0.1:0").unwrap()));
        assert!(!is_stream(std::fs::File::open("/dev/null").unwrap()));
    }

    #[test]
    fn as_many_descriptors_as_fit_arrive_in_order() {
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
