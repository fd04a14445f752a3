//! MSI where the machine has fewer vectors to give than the device has.

use std::sync::Arc;

use vfio_remap::device::Interrupt;
use vfio_remap::transport::Vfio;
use vfio_remap::{Device, ErrorKind};

use crate::{close, lab, leftovers};

/// VFIO_DEVICE_SET_IRQS answers how many there are, by a positive count, and has connected none.
#[test]
fn fewer_vectors_are_an_error_that_counts_them_without_intremap() {
    const ALLOWED: &str = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    let _allowed = lab::Setting::set(ALLOWED, 1);
    leftovers::none_of(|| {
        let device =
            Device::new(Arc::new(Vfio::options().by_group().open(lab::address("xhci")).unwrap()));
        assert_eq!(device.interrupt(Interrupt::MsiX).unwrap().count, 0);
        let offered = device.interrupt(Interrupt::Msi).unwrap().count as usize;
        assert!(offered >= 4, "{offered}");
        for count in [offered, 2] {
            let error = device.vectors(Interrupt::Msi, count).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
            let words = format!("the machine has only 1 of these {count} vectors available");
            assert!(error.to_string().contains(&words), "{error}");
            assert!(error.advice().starts_with("ask for 1"), "{error}");
        }
        let mut vectors = device.vectors(Interrupt::Msi, 1).unwrap();
        let fires = |vectors: &vfio_remap::device::Vectors| {
            vectors.trigger(0).unwrap();
            assert_eq!(vectors.take(0).unwrap(), Some(1));
        };
        fires(&vectors);
        let error = vectors.grow(4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        assert!(error.to_string().contains("has only 1 of these 4 vectors available"), "{error}");
        assert_eq!(vectors.count(), 1);
        // It was signalled, since what came meanwhile is lost; from then on it fires as before.
        assert_eq!(vectors.take(0).unwrap(), Some(1));
        fires(&vectors);
        drop(vectors);
        close(device);
    });
}
