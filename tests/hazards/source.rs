//! Accepted, and yet the source is dead.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use crate::probe;
use crate::raw::{self, MAP_SHARED, MREMAP_DONTUNMAP, MREMAP_MAYMOVE, PAGE};

/// The ring of a packet socket: mapped at once, and never by a fault.
fn packet_ring() -> (OwnedFd, usize) {
    // SAFETY: the file descriptor is checked, and nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let page = PAGE as libc::c_uint;
    let ring = libc::tpacket_req {
        tp_block_size: page,
        tp_block_nr: 1,
        tp_frame_size: page,
        tp_frame_nr: 1,
    };
    // SAFETY: the option's value is as long as is said.
    let set = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        let len = size_of_val(&ring) as libc::socklen_t;
        libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_RX_RING, (&raw const ring).cast(), len)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: no MAP_FIXED.
    let at = unsafe { raw::map_file(0, PAGE, MAP_SHARED, socket.as_fd(), 0) }.unwrap();
    (socket, at)
}

/// From 5.13 on `DONTUNMAP` is accepted for whatever is not `VM_DONTEXPAND` or `VM_PFNMAP`, whether or
/// not anything fills the source again.
#[test]
fn accepted_source_is_dead() {
    let (_socket, old) = packet_ring();
    assert!(probe::load(old).is_some());
    // SAFETY: the mapping is ours.
    let new = unsafe { raw::mremap(old, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0) };
    println!("mremap(MAYMOVE|DONTUNMAP) of a packet ring: {new:x?}");
    let (source, moved) = (probe::load(old), probe::load(new.unwrap()));
    println!("the source answers {source:x?} (None: it faults), the new side {moved:x?}");
    assert!(moved.is_some());
    assert_eq!(source, None, "this kernel fills the source again");
}
