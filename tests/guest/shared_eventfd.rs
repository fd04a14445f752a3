//! Eventfds that somebody else has made blocking, and filled: what this kernel does then.

use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::write;
use vfio_remap::device::{Interrupt, Vectors};
use vfio_remap::emulated::{Edu, Emulated};
use vfio_remap::{Device, ErrorKind};

use crate::lab;

/// As whoever has the eventfd, too, may leave it.
fn spoil(vectors: &Vectors, counter: u64) {
    let fd = vectors.fd(0).unwrap().try_clone_to_owned().unwrap();
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    if counter > 0 {
        write(&fd, &counter.to_ne_bytes()).unwrap();
    }
}

#[test]
fn a_blocking_eventfd_is_waited_for_in_time() {
    let device = lab::open("edu");
    let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
    spoil(&vectors, 0);
    assert_eq!(vectors.take(0).unwrap(), None);
    let error = vectors.wait(0, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    vectors.trigger(0).unwrap();
    assert_eq!(vectors.wait(0, Duration::from_secs(60)).unwrap(), 1);
}

/// Whether this kernel signals by AIO or a thread of ours does.
#[test]
fn a_full_eventfd_does_not_hold_up_a_model() {
    const FULL: u64 = u64::MAX - 1;
    let device = Device::new(Arc::new(Emulated::new(Edu::new()).unwrap()));
    let vectors = device.vectors(Interrupt::Msi, 1).unwrap();
    spoil(&vectors, FULL);
    for _ in 0..1000 {
        vectors.trigger(0).unwrap();
    }
    assert!(vectors.take(0).unwrap() >= Some(FULL));
    // What follows may be one that was on its way.
    vectors.trigger(0).unwrap();
    assert!(vectors.wait(0, Duration::from_secs(60)).unwrap() >= 1);
}
