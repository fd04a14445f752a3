//! Nothing is left behind by devices, clients and servers: descriptors of any sort, mappings, threads.
//! It is alone, since it looks at the whole process.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Transport};

use crate::common::leftovers;
use crate::support::alone::alone;
use crate::support::{edu, server, watch};

fn drive(transport: Arc<dyn Transport>) {
    edu::does_all_that_is_documented(&*transport);
    let device = Device::new(transport);
    edu::is_reached_through_windows(&device);
    device.close().unwrap();
}

/// A driver whose server dies lets go of its memory all the same.
fn outlive_the_server() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let edu = Emulated::new(Edu::new()).unwrap();
        Server::serve_stream(&edu, theirs, Duration::MAX)
    });
    let line = ours.try_clone().unwrap();
    let device = Device::new(Arc::new(VfioUser::from_stream(ours, Duration::MAX).unwrap()));
    let buffer = device.dma().unwrap().buffer(1 << 16).unwrap();
    line.shutdown(Shutdown::Both).unwrap();
    drop(buffer);
    device.close().unwrap();
    // It saw the end of the connection, or was cut off.
    let _ = server.join().unwrap();
}

fn counts() -> [usize; 2] {
    ["/proc/self/fd", "/proc/self/task"].map(|path| std::fs::read_dir(path).unwrap().count())
}

#[test]
fn nothing_is_left_behind() {
    alone(|| {
        let round = || {
            drive(Arc::new(Emulated::new(Edu::new()).unwrap()));
            server::with_edu(|client| drive(Arc::new(client)));
            outlive_the_server();
        };
        // The first makes what is made once in a process.
        round();
        let before = counts();
        leftovers::none_of(round);
        // Threads that were joined may be listed for an instant.
        watch::until("descriptors or threads are left behind", || counts() == before);
    });
}
