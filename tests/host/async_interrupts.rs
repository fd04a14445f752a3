//! Vectors and events as tokio's `AsyncFd` takes them.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use vfio_remap::device::{Event, Growth, Interrupt, Vector};
use vfio_remap::transport::irq_index;
use vfio_remap::{Device, ErrorKind};

use crate::support::interrupts::Interrupts;

/// Far more than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

/// What tokio wants to be promised since 1.54: that the descriptor stays open, and the same. It does, as
/// long as its owner lives.
fn watched<T: AsRawFd>(inner: T) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: the tests pass owners of descriptors, which tokio owns from here on.
    unsafe { AsyncFd::register(inner) }.map_err(std::io::Error::from)
}

async fn fired(vector: &AsyncFd<Vector>) -> u64 {
    loop {
        let mut guard = timeout(LIMIT, vector.readable()).await.expect("it fires").unwrap();
        match guard.get_inner().take().unwrap() {
            None => guard.clear_ready(),
            Some(count) => return count,
        }
    }
}

/// While a task waits for one vector, others are added.
#[tokio::test]
async fn a_vector_in_use_lets_others_be_added() {
    for noresize in [false, true] {
        let interrupts = Arc::new(Interrupts::default().with_noresize(noresize));
        let device = Device::new(interrupts.clone());
        let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        let first = watched(vectors.vector(0).unwrap()).unwrap();
        let task = tokio::spawn(async move {
            let count = fired(&first).await;
            (first, count)
        });
        let growth = vectors.grow(3).unwrap();
        assert_eq!(growth, if noresize { Growth::Reenabled } else { Growth::InPlace });
        interrupts.fire(irq_index::MSIX, 0);
        let (first, count) = task.await.unwrap();
        assert!(count >= 1);
        let last = watched(vectors.vector(2).unwrap()).unwrap();
        last.get_ref().take().unwrap();
        interrupts.fire(irq_index::MSIX, 2);
        assert_eq!(fired(&last).await, 1);
        // A vector that outlives its device is silent, and does no harm.
        drop((vectors, interrupts));
        device.close().unwrap();
        first.get_ref().take().unwrap();
        let error = first.get_ref().wait(Duration::ZERO).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    }
}

#[tokio::test]
async fn a_vector_is_the_same_after_it_was_a_hole() {
    let interrupts = Arc::new(Interrupts::default());
    let device = Device::new(interrupts.clone());
    let mut vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
    let vector = watched(vectors.vector(1).unwrap()).unwrap();
    interrupts.fire(irq_index::MSIX, 1);
    vectors.set_enabled(1, false).unwrap();
    assert!(vectors.fd(1).is_none());
    vectors.set_enabled(1, true).unwrap();
    assert_eq!(vector.get_ref().take().unwrap(), None, "what was before is forgotten");
    interrupts.fire(irq_index::MSIX, 1);
    assert_eq!(fired(&vector).await, 1);
    assert_eq!(vectors.vector(2).unwrap_err().kind(), ErrorKind::OutOfRange);
}

#[tokio::test]
async fn events_are_waited_for_together() {
    let interrupts = Arc::new(Interrupts::default());
    let device = Device::new(interrupts.clone());
    let events = watched(device.events().unwrap()).unwrap();
    for (index, event) in [(irq_index::REQ, Event::Release), (irq_index::ERR, Event::Error)] {
        interrupts.fire(index, 0);
        let mut guard = timeout(LIMIT, events.readable()).await.expect("it comes").unwrap();
        assert_eq!(guard.get_inner().take().unwrap(), Some(event));
        assert_eq!(guard.get_inner().take().unwrap(), None);
        guard.clear_ready();
    }
    let error = events.get_ref().wait(Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}
