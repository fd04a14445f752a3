//! A child of fork(2) leaves alone what its parent made. Each test is alone: what other threads have
//! locked stays locked in a child.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use vfio_remap::Device;
use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};

use crate::support::alone::alone;
use crate::support::{edu, server, shared};

/// Drops something in a child, which must come to an end by itself and without a panic.
#[track_caller]
fn drop_in_child<T>(value: T) -> T {
    // SAFETY: the child drops the value, which takes no lock that another thread may hold, and ends.
    let child = match unsafe { libc::fork() } {
        0 => {
            let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(value)));
            // SAFETY: it ends without running anything of its parent's.
            unsafe { libc::_exit(i32::from(dropped.is_err())) }
        }
        child => Pid::from_raw(child),
    };
    let start = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive if start.elapsed() < Duration::from_secs(60) => {
                thread::sleep(Duration::from_millis(1));
            }
            WaitStatus::Exited(_, 0) => return value,
            other => {
                // SAFETY: it is our own child, which has not been waited for.
                unsafe { libc::kill(child.as_raw(), libc::SIGKILL) };
                panic!("the child: {other:?}");
            }
        }
    }
}

#[test]
fn a_child_leaves_the_connection_to_a_server() {
    alone(|| {
        server::with_edu(|client| {
            // With a thread that listens.
            client.dma_map(0, &shared::memory(0x1000, false), Access::ReadWrite).unwrap();
            let client: VfioUser = drop_in_child(client);
            edu::does_all_that_is_documented(&client);
        });
    });
}

#[test]
fn a_child_leaves_an_emulated_device() {
    alone(|| {
        let device = drop_in_child(Emulated::new(Edu::new()).unwrap());
        edu::does_all_that_is_documented(&device);
    });
}

#[test]
fn a_child_leaves_the_socket_of_a_server() {
    alone(|| {
        let path = server::path();
        let server = Server::bind(&path, Emulated::new(Edu::new()).unwrap()).unwrap();
        let server = drop_in_child(server);
        assert!(path.exists());
        let server = thread::spawn(move || server.serve());
        edu::does_all_that_is_documented(&VfioUser::connect(&path).unwrap());
        server.join().unwrap().unwrap();
    });
}

#[test]
fn a_child_leaves_vectors_buffers_and_windows() {
    alone(|| {
        let transport = Arc::new(Emulated::new(Edu::new()).unwrap());
        let device = Device::new(transport);
        let vectors = device.vectors(vfio_remap::device::Interrupt::Msi, 1).unwrap();
        let buffer = device.dma().unwrap().buffer(4096).unwrap();
        let window =
            device.bar(0).unwrap().map(0x4_0000..0x4_1000, vfio_remap::Placement::Anywhere);
        let (vectors, buffer, window) = drop_in_child((vectors, buffer, window.unwrap()));
        vectors.trigger(0).unwrap();
        assert_eq!(vectors.wait(0, Duration::from_secs(60)).unwrap(), 1);
        window.register::<u32>(0).unwrap().write(7);
        assert_eq!(window.register::<u32>(0).unwrap().read(), 7);
        drop((vectors, buffer, window));
        device.close().unwrap();
    });
}
