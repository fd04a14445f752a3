//! A server that is killed, and its device with it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::device::Revoked;
use vfio_remap::space::{FaultGuard, FaultScope};
use vfio_remap::{Device, ErrorKind, Placement, Window};
use vfio_remap_nvme::{Controller, Settings};

use crate::support::alone::alone;
use crate::support::server::Process;

const DEPTH: u64 = 16;
const SETTINGS: Settings = Settings::DEFAULT.with_entries(32);

/// The doorbells: the part of the BAR that this model lets be mapped.
fn windows(device: &Device) -> Vec<Window> {
    let bar = device.bar(0).unwrap();
    let part = bar.layout().mappable().next().unwrap();
    let first = bar.map(part, Placement::Anywhere).unwrap();
    let (second, _) = first.duplicate(Placement::Anywhere).unwrap();
    vec![first, second]
}

#[test]
fn a_killed_server_is_a_device_that_is_gone() {
    alone(|| {
        FaultGuard::install(FaultScope::WindowOnly).unwrap();
        for _ in 0..20 {
            let server = Process::nvme();
            let device = Device::new(Arc::new(server.connect()));
            let windows = windows(&device);
            assert!(!device.gone() && !windows.iter().any(Window::gone));
            drop(server);
            let end = Instant::now() + Duration::from_secs(60);
            while !device.gone() {
                assert!(Instant::now() < end, "its end is not noticed");
                std::thread::yield_now();
            }
            for window in &windows {
                assert_eq!(window.revoked(), Some(Revoked::Gone));
                let doorbell = window.register::<u32>(0).unwrap();
                assert_eq!(doorbell.try_read().unwrap_err().kind(), ErrorKind::Revoked);
            }
            drop(windows);
            device.close().unwrap();
        }
    });
}

#[test]
fn a_controller_that_vanishes_under_load_ends_each_request_once() {
    alone(|| {
        FaultGuard::install(FaultScope::WholeDevice).unwrap();
        for round in 0..20 {
            let server = Process::nvme();
            let device = Device::new(Arc::new(server.connect()));
            let controller = Controller::new(device.clone(), SETTINGS).unwrap();
            let namespace = controller.namespace(1).unwrap();
            let mut queue = controller.queue().unwrap();
            let mut server = Some(server);
            let (mut next, mut outstanding, mut failed) = (0, BTreeSet::new(), 0);
            // Until the first error, each completion is replaced by a new request.
            while failed == 0 || !outstanding.is_empty() {
                while failed == 0 && (outstanding.len() as u64) < DEPTH {
                    let buffer = controller.buffer(4096).unwrap();
                    if queue.read(&namespace, next % 64, buffer, next).is_err() {
                        failed += 1;
                        break;
                    }
                    outstanding.insert(next);
                    next += 1;
                }
                if next >= 50 + round {
                    server = None;
                }
                let Some(done) = queue.wait() else { break };
                assert!(outstanding.remove(&done.tag), "{} has ended twice", done.tag);
                assert!(done.buffer.is_some(), "memory is not returned");
                failed += usize::from(!done.status.is_success());
            }
            assert!(outstanding.is_empty() && queue.wait().is_none(), "{outstanding:?}");
            assert!(server.is_none() && device.gone());
            let buffer = controller.buffer(512).unwrap();
            let error = queue.read(&namespace, 0, buffer, 0).unwrap_err().error;
            assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
            drop(queue);
            drop(controller);
            device.close().unwrap();
        }
    });
}
