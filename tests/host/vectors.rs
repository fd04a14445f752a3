//! Vectors with numbers and eventfds that the caller chooses.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_remap::device::{Growth, Interrupt};
use vfio_remap::transport::irq_index::MSIX;
use vfio_remap::{Device, ErrorKind};

use crate::support::alone::alone;
use crate::support::interrupts::Interrupts;

/// As vmm-sys-util's eventfd: it has a number, and no other way to its descriptor.
struct Numbered(EventFd);

impl Numbered {
    fn new() -> Self {
        Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap())
    }

    /// How often it was signalled.
    fn count(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }
}

impl AsRawFd for Numbered {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[test]
fn chosen_vectors_are_set_up_and_the_others_are_holes() {
    let interrupts = Arc::new(Interrupts::default());
    let device = Device::new(interrupts.clone());
    let mut vectors = device.vectors_at(Interrupt::MsiX, &[5, 2]).unwrap();
    assert_eq!(vectors.count(), 6);
    assert_eq!(interrupts.connected(MSIX), [2, 5]);
    interrupts.fire(MSIX, 5);
    assert_eq!(vectors.wait(5, Duration::from_secs(30)).unwrap(), 1);
    assert_eq!(vectors.take(4).unwrap_err().kind(), ErrorKind::OutOfRange);
    vectors.set_enabled(4, true).unwrap();
    assert_eq!(interrupts.connected(MSIX), [2, 4, 5]);
    drop(vectors);
    for numbers in [&[][..], &[8], &[0, usize::MAX]] {
        let error = device.vectors_at(Interrupt::MsiX, numbers).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{numbers:?}: {error}");
    }
    assert!(interrupts.connected(MSIX).is_empty());
}

#[test]
fn a_vector_signals_an_eventfd_of_the_caller() {
    for (noresize, growth) in [(false, Growth::InPlace), (true, Growth::Reenabled)] {
        let interrupts = Arc::new(Interrupts::default().with_noresize(noresize));
        let device = Device::new(interrupts.clone());
        let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        let (first, last) = (Numbered::new(), Numbered::new());
        assert_eq!(vectors.set_eventfd(0, &first).unwrap(), Growth::InPlace);
        assert_eq!(vectors.set_eventfd(3, &last).unwrap(), growth);
        assert_eq!((vectors.count(), interrupts.connected(MSIX)), (4, vec![0, 3]));
        // What was lost while all vectors were set up again is signalled.
        let again = u64::from(noresize);
        assert_eq!((first.count(), last.count()), (again, again));
        interrupts.fire(MSIX, 0);
        interrupts.fire(MSIX, 3);
        assert_eq!((first.count(), last.count()), (1, 1));
        assert_eq!(vectors.set_eventfd(8, &last).unwrap_err().kind(), ErrorKind::OutOfRange);
        // The vectors have descriptors of their own.
        drop(last);
        interrupts.fire(MSIX, 3);
        assert_eq!(vectors.take(3).unwrap(), Some(1));
    }
}

#[test]
fn an_interrupt_that_nobody_took_moves_to_the_new_eventfd() {
    let interrupts = Arc::new(Interrupts::default());
    let device = Device::new(interrupts.clone());
    let mut vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
    let old = vectors.vector(1).unwrap();
    interrupts.fire(MSIX, 1);
    let mine = [Numbered::new(), Numbered::new()];
    vectors.set_eventfd(0, &mine[0]).unwrap();
    vectors.set_eventfd(1, &mine[1]).unwrap();
    assert_eq!([mine[0].count(), mine[1].count()], [0, 1]);
    interrupts.fire(MSIX, 1);
    assert_eq!((old.take().unwrap(), vectors.take(1).unwrap()), (None, Some(1)));
}

#[test]
fn what_is_no_eventfd_is_refused_and_changes_nothing() {
    let interrupts = Arc::new(Interrupts::default());
    let device = Device::new(interrupts.clone());
    let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
    let file: OwnedFd = File::open("/dev/null").unwrap().into();
    for vector in [0, 1, usize::MAX] {
        let error = vectors.set_eventfd(vector, &file).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains("is not an eventfd"), "{error}");
    }
    assert_eq!(vectors.set_resample_eventfd(&file).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(
        vectors.set_eventfd(usize::MAX, &Numbered::new()).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    assert_eq!((vectors.count(), interrupts.connected(MSIX)), (1, vec![0]));
    interrupts.fire(MSIX, 0);
    assert_eq!(vectors.take(0).unwrap(), Some(1));
}

#[test]
fn a_hole_takes_no_descriptor_until_it_is_used() {
    alone(|| {
        let device = Device::new(Arc::new(Interrupts::default().with_count(2048)));
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        let mut vectors = device.vectors_at(Interrupt::MsiX, &[2047]).unwrap();
        // The model has a copy of each.
        assert_eq!(open() - before, 2);
        let hole = vectors.vector(5).unwrap();
        assert_eq!((vectors.fd(5).is_none(), open() - before), (true, 3));
        vectors.set_enabled(5, true).unwrap();
        assert_eq!(open() - before, 4);
        assert_eq!(hole.as_raw_fd(), vectors.fd(5).unwrap().as_raw_fd());
        vectors.set_enabled(5, false).unwrap();
        assert_eq!(vectors.take(5).unwrap_err().kind(), ErrorKind::OutOfRange);
        drop(vectors);

        let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        vectors.set_eventfd(2047, &Numbered::new()).unwrap();
        // That of the hole is still there.
        assert_eq!((vectors.count(), open() - before), (2048, 5));
    });
}

#[test]
fn the_eventfd_that_unmasks_can_be_replaced() {
    let interrupts = Arc::new(Interrupts::default().watching());
    let device = Device::new(interrupts.clone());
    let mut vectors = device.vectors(Interrupt::Intx, 1).unwrap();
    let signal = |eventfd: &Numbered| eventfd.0.write(1).unwrap();
    let [one, other, third] = [(); 3].map(|()| Numbered::new());
    vectors.set_resample_eventfd(&one).unwrap();
    vectors.set_resample_eventfd(&other).unwrap();
    signal(&one);
    assert_eq!(interrupts.unmasked(), Some(0));
    signal(&other);
    assert_eq!(interrupts.unmasked(), Some(1));

    // One that is refused leaves that before it.
    interrupts.refuse_once();
    assert_eq!(vectors.set_resample_eventfd(&third).unwrap_err().errno(), Some(libc::ENOMEM));
    signal(&other);
    assert_eq!(interrupts.unmasked(), Some(1));
    assert!(vectors.resample_fd().is_some());
}
