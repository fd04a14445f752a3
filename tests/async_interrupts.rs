//! Vectors and events as tokio's `AsyncFd` takes them.
#![cfg(feature = "emulated")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::unistd::write;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;
use vfio_remap::device::{Event, Growth, Interrupt, Vector};
use vfio_remap::transport::{DeviceInfo, IrqInfo, RegionInfo, Transport, irq_index};
use vfio_remap::{Device, Result};

/// Far more than anything here takes.
const LIMIT: Duration = Duration::from_secs(60);

/// A device of interrupts alone, which the test fires.
#[derive(Debug, Default)]
struct Bell {
    noresize: bool,
    connected: Mutex<Vec<(u32, u32, OwnedFd)>>,
}

impl Bell {
    fn ring(&self, index: u32, vector: u32) {
        let connected = self.connected.lock().unwrap();
        let found = connected.iter().rev().find(|(i, v, _)| (*i, *v) == (index, vector));
        write(&found.expect("it is connected").2, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Transport for Bell {
    fn info(&self) -> DeviceInfo {
        DeviceInfo::new("bell", 0)
    }

    fn region(&self, _: u32) -> Result<RegionInfo> {
        Ok(RegionInfo::trapped(4))
    }

    fn read_at(&self, _: u32, _: u64, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write_at(&self, _: u32, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn irq(&self, _: u32) -> Result<IrqInfo> {
        let mut info = IrqInfo::eventfds(8);
        info.noresize = self.noresize;
        Ok(info)
    }

    fn set_irqs(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        let mut connected = self.connected.lock().unwrap();
        if fds.is_empty() {
            connected.retain(|(old, ..)| *old != index);
        }
        for (vector, fd) in (start..).zip(fds) {
            connected.retain(|(i, v, _)| (*i, *v) != (index, vector));
            if let Some(fd) = fd {
                connected.push((index, vector, fd.try_clone_to_owned().unwrap()));
            }
        }
        Ok(())
    }
}

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
            0 => guard.clear_ready(),
            count => return count,
        }
    }
}

/// While a task waits for one vector, others are added.
#[tokio::test]
async fn a_vector_in_use_lets_others_be_added() {
    for noresize in [false, true] {
        let bell = Arc::new(Bell { noresize, ..Bell::default() });
        let device = Device::new(bell.clone());
        let mut vectors = device.vectors(Interrupt::MsiX, 1).unwrap();
        let first = watched(vectors.vector(0).unwrap()).unwrap();
        let task = tokio::spawn(async move {
            let count = fired(&first).await;
            (first, count)
        });
        let growth = vectors.grow(3).unwrap();
        assert_eq!(growth, if noresize { Growth::Rearmed } else { Growth::InPlace });
        bell.ring(irq_index::MSIX, 0);
        let (first, count) = task.await.unwrap();
        assert!(count >= 1);
        let last = watched(vectors.vector(2).unwrap()).unwrap();
        last.get_ref().take().unwrap();
        bell.ring(irq_index::MSIX, 2);
        assert_eq!(fired(&last).await, 1);
        // A vector that outlives its device is silent, and does no harm.
        drop((vectors, bell));
        device.close().unwrap();
        first.get_ref().take().unwrap();
        assert_eq!(first.get_ref().wait(Duration::ZERO).unwrap(), 0);
    }
}

#[tokio::test]
async fn a_vector_is_the_same_after_it_was_a_hole() {
    let bell = Arc::new(Bell::default());
    let device = Device::new(bell.clone());
    let mut vectors = device.vectors(Interrupt::MsiX, 2).unwrap();
    let vector = watched(vectors.vector(1).unwrap()).unwrap();
    bell.ring(irq_index::MSIX, 1);
    vectors.set_enabled(1, false).unwrap();
    assert!(vectors.fd(1).is_none());
    vectors.set_enabled(1, true).unwrap();
    assert_eq!(vector.get_ref().take().unwrap(), 0, "what was before is forgotten");
    bell.ring(irq_index::MSIX, 1);
    assert_eq!(fired(&vector).await, 1);
    assert_eq!(vectors.vector(2).unwrap_err().kind(), vfio_remap::ErrorKind::OutOfRange);
}

#[tokio::test]
async fn events_are_waited_for_together() {
    let bell = Arc::new(Bell::default());
    let device = Device::new(bell.clone());
    let events = watched(device.events().unwrap()).unwrap();
    for (index, event) in [(irq_index::REQ, Event::Release), (irq_index::ERR, Event::Error)] {
        bell.ring(index, 0);
        let mut guard = timeout(LIMIT, events.readable()).await.expect("it comes").unwrap();
        assert_eq!(guard.get_inner().poll().unwrap(), Some(event));
        assert_eq!(guard.get_inner().poll().unwrap(), None);
        guard.clear_ready();
    }
    assert_eq!(events.get_ref().wait(Duration::from_millis(1)).unwrap(), None);
}
