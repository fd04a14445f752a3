//! Nothing is left behind by devices, clients and servers: descriptors of any sort, mappings, threads.
//! One test, since it looks at the whole process.
#![cfg(feature = "emulated")]

#[path = "support/edu.rs"]
mod edu;
#[path = "support/leftovers.rs"]
mod leftovers;
#[path = "support/server.rs"]
mod server;
#[path = "support/shared.rs"]
mod shared;

use std::sync::Arc;

use vfio_remap::transport::{Edu, Emulated};
use vfio_remap::{Device, Transport};

fn drive(transport: Arc<dyn Transport>) {
    edu::does_all_that_is_documented(&*transport);
    let device = Device::new(transport);
    edu::is_reached_through_windows(&device);
    device.close().unwrap();
}

fn counts() -> [usize; 2] {
    ["/proc/self/fd", "/proc/self/task"].map(|path| std::fs::read_dir(path).unwrap().count())
}

#[test]
fn nothing_is_left_behind() {
    let round = || {
        drive(Arc::new(Emulated::new(Edu::new()).unwrap()));
        server::with_edu(|client| drive(Arc::new(client)));
    };
    // The first makes what is made once in a process.
    round();
    let before = counts();
    leftovers::none_of(round);
    // Threads that were joined may be listed for an instant.
    edu::until("descriptors or threads are left behind", || counts() == before);
}
