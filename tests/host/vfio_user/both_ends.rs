//! Our client and our server, in one process and in two.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, ErrorKind, Placement, Result};

use crate::support::{edu, server, shared};

#[test]
fn edu_over_a_socket_does_all_that_is_documented() {
    server::with_edu(|client| {
        server::same_shape(&client, &Emulated::new(Edu::new()).unwrap());
        edu::does_all_that_is_documented(&client);
        let device = Device::new(Arc::new(client));
        edu::is_reached_through_windows(&device);
        device.close().unwrap();
    });
}

#[test]
fn edu_in_another_process_does_all_that_is_documented() {
    let server = server::Process::start();
    for _ in 0..2 {
        let client = server.connect();
        edu::does_all_that_is_documented(&client);
        let device = Device::new(Arc::new(client));
        edu::is_reached_through_windows(&device);
        device.close().unwrap();
    }
}

#[test]
fn a_server_that_is_killed_is_gone_at_once_and_windows_stay() {
    let mut server = server::Process::start();
    let client = Arc::new(server.connect());
    let device = Device::new(client.clone());
    let window = device.bar(0).unwrap().map(0x4_0000..0x4_1000, Placement::Anywhere).unwrap();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let start = Instant::now();
    for _ in 0..2 {
        let error = client.read_at(0, 0, &mut [0; 4]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    window.register::<u32>(0).unwrap().write(1);
    assert_eq!(window.register::<u32>(0).unwrap().read(), 1, "its memory is ours, too");
}

#[test]
fn large_accesses_are_made_in_parts() {
    server::with_edu(|client| {
        let mut data = vec![0; 0x5_0000];
        client.read_at(0, 0x4_0000, &mut data[..0x1_0000]).unwrap();
        assert!(data[..0x1_0000].iter().all(|&byte| byte == 0));
        // All of the BAR is more than mapped parts, and then the model's: it reads as ones.
        let mut all = vec![0; 1 << 20];
        client.read_at(0, 0, &mut all).unwrap();
        assert!(all.iter().all(|&byte| byte == 0xff));
    });
}

#[test]
fn what_the_server_refuses_is_an_error_and_the_next_call_works() {
    server::with_edu(|client| {
        let kind = |result: Result<()>| result.unwrap_err().kind();
        assert_eq!(kind(client.read_at(1, 0, &mut [0; 4])), ErrorKind::NotFound);
        assert_eq!(kind(client.read_at(0, (1 << 20) - 3, &mut [0; 4])), ErrorKind::OutOfRange);
        assert_eq!(kind(client.irq(5).map(drop)), ErrorKind::NotFound);
        assert_eq!(kind(client.trigger_irqs(1, 0..2)), ErrorKind::OutOfRange);
        let memory = shared::memory(0x1000, true);
        client.dma_map(0, &memory, Access::ReadWrite).unwrap();
        assert_eq!(client.dma_unmap(0, 0x2000).unwrap_err().errno(), Some(libc::ENOENT));
        let (_reader, writer) = std::io::pipe().unwrap();
        let no_eventfd = [Some(writer.as_fd())];
        let error = client.set_irqs(1, 0, &no_eventfd).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EINVAL), "{error}");
        assert_eq!(edu::read(&client, 0), 0x0100_00ed);
    });
}

#[test]
fn many_threads_share_a_client() {
    server::with_edu(|client| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        assert_eq!(edu::read(&client, 0), 0x0100_00ed);
                    }
                });
            }
        });
    });
}

/// The model's own thread asks for memory while the client is idle, in an exchange, or sends ahead.
#[test]
fn unshared_memory_is_reached_whatever_the_client_does() {
    server::with_edu(|client| {
        client.write_at(7, 4, &6u16.to_le_bytes()).unwrap();
        let memory = shared::memory(0x1000, false);
        client.dma_map(0, &memory, Access::ReadWrite).unwrap();
        let event = edu::event();
        client.set_irqs(1, 0, &[Some(event.as_fd())]).unwrap();
        for round in 0..200u32 {
            shared::put(&memory, 0, &round.to_le_bytes());
            for (offset, value) in [(0x80, 0), (0x88, 0x4_0000), (0x90, 4), (0x98, 5u64)] {
                client.write_at(0, offset, &value.to_le_bytes()).unwrap();
            }
            // Idle in every other round; busy in the rest.
            while round % 2 == 0 && edu::read(&client, 0x98) & 1 != 0 {}
            assert_eq!(edu::fired(&event), 1);
            assert_eq!(edu::read(&client, 0x4_0000), round);
            edu::write(&client, 0x64, 0x100);
        }
    });
}

#[test]
fn a_client_that_leaves_takes_its_memory_and_eventfds_along() {
    let device = Emulated::new(Edu::new()).unwrap();
    for _ in 0..3 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let served =
                scope.spawn(|| Server::serve_stream(&device, theirs, Duration::from_secs(5)));
            let client = VfioUser::from_stream(ours, Duration::from_secs(5)).unwrap();
            let memory = shared::memory(0x1000, true);
            client.dma_map(0, &memory, Access::ReadWrite).unwrap();
            let event = edu::event();
            client.set_irqs(0, 0, &[Some(event.as_fd())]).unwrap();
            drop(client);
            served.join().unwrap().unwrap();
        });
        assert_eq!(device.dma_limits().unwrap().available_mappings, Some(65535));
    }
}

#[test]
fn devices_over_one_client_share_its_io_addresses() {
    server::with_edu(|client| {
        let client = Arc::new(client);
        let [one, other] = [(); 2].map(|()| Device::new(client.clone()));
        shared::io_addresses_are_shared(&one, &other);
    });
}

#[test]
fn io_addresses_that_the_server_uses_itself_are_left_alone() {
    let edu = Emulated::new(Edu::new()).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| Server::serve_stream(&edu, theirs, Duration::from_secs(5)).unwrap());
        let client = VfioUser::from_stream(ours, Duration::from_secs(5)).unwrap();
        let theirs = Device::new(Arc::new(edu.clone()));
        shared::io_addresses_are_shared(&theirs, &Device::new(Arc::new(client)));
    });
}

#[test]
fn paths_that_no_server_listens_at_are_named() {
    let path = server::path();
    let refused = |kind: ErrorKind| {
        let error = VfioUser::connect(&path).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    };
    refused(ErrorKind::NotFound);
    std::fs::write(&path, "").unwrap();
    refused(ErrorKind::Os);
    std::fs::remove_file(&path).unwrap();
    let error = VfioUser::connect("/".repeat(200)).unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENAMETOOLONG), "{error}");
    let (taken, _server) = server::edu();
    let error = Server::bind(&taken, Emulated::new(Edu::new()).unwrap()).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EADDRINUSE), "{error}");
    drop(VfioUser::connect(taken).unwrap());
}
