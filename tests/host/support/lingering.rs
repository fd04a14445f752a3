//! A descriptor whose end has to be waited for: a TCP socket that has to send what its peer does not take
//! (`SO_LINGER`).

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;

use nix::sys::socket::{setsockopt, sockopt};

/// A descriptor, and the peer: when that is dropped, nobody waits any more.
pub fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = ours.write(&[0; 1 << 16]) {
            break error.kind();
        }
    };
    assert_eq!(full, ErrorKind::WouldBlock);
    ours.set_nonblocking(false).unwrap();
    let linger = libc::linger { l_onoff: 1, l_linger: 3600 };
    setsockopt(&ours, sockopt::Linger, &linger).unwrap();
    (ours.into(), theirs)
}
