//! Descriptors that a peer has sent, and that nobody uses: left in the socket when the connection ends, or of a message
//! that is not taken. Closing one would wait.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_remap::ErrorKind;
use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::transport::{Transport, VfioUser};

use crate::support::hostile_server::{READ, REGION, Reply, VERSION, serve};
use crate::support::lingering::lingering;
use crate::support::scripted_client::{AMPLE, Client, DMA_MAP};
use crate::support::watch;

/// A message that no peer takes, and another one behind it that brings the descriptor.
fn send(stream: UnixStream, fd: OwnedFd) -> Client {
    let mut client = Client::new(stream);
    client.stream.write_all(&[0; 16]).unwrap();
    client.send(DMA_MAP, &[0; 32], &[fd.as_fd()]);
    client
}

#[test]
fn a_server_does_not_wait_for_their_end() {
    watch::in_time(|| {
        let (fd, _peer) = lingering();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _client = send(ours, fd);
        let device = Emulated::new(Edu::new()).unwrap();
        let error = Server::serve_stream(&device, theirs, AMPLE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    });
}

#[test]
fn a_client_does_not_wait_for_their_end() {
    watch::in_time(|| {
        let (fd, _peer) = lingering();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _server = send(ours, fd);
        let error = VfioUser::from_stream(theirs, AMPLE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    });
}

/// A client that is refused because another one is served, and one that was never accepted.
#[test]
fn nor_for_those_of_clients_that_are_not_served() {
    watch::in_time(|| {
        let path = std::env::temp_dir().join(format!("vfio-remap-unread-{}", std::process::id()));
        let (first, _peer) = lingering();
        let (second, _other_peer) = lingering();
        let server = Server::bind(&path, Emulated::new(Edu::new()).unwrap()).unwrap();
        std::thread::scope(|scope| {
            // Both have sent all before the server takes any of it.
            let mut served = Client::connect(&path);
            let mut refused = send(UnixStream::connect(&path).unwrap(), first);
            let serving = scope.spawn(|| server.serve().unwrap());
            served.greet("{}");
            assert!(refused.is_closed());
            drop(served);
            serving.join().unwrap();
        });
        let _waiting = send(UnixStream::connect(&path).unwrap(), second);
        drop(server);
    });
}

/// Replies that are not taken.
#[test]
fn nor_for_those_of_replies_that_are_malformed_or_errors() {
    let spoils: [fn(&mut Reply); 4] = [
        |reply| reply.set_u16(0, 999),
        |reply| reply.set_u32(8, 0x21),
        |reply| reply.set_body(&[0; 3]),
        |reply| reply.bytes.truncate(17),
    ];
    watch::in_time(move || {
        let peers = Arc::new(Mutex::new(Vec::new()));
        for command in [VERSION, REGION, READ] {
            for spoil in spoils {
                let (ours, theirs) = UnixStream::pair().unwrap();
                let peers = peers.clone();
                // It ends when the peers do: it may be the one that closes a descriptor last.
                std::thread::spawn(move || {
                    serve(theirs, command, move |reply| {
                        let (fd, peer) = lingering();
                        peers.lock().unwrap().push(peer);
                        reply.fds = vec![fd];
                        spoil(reply);
                    })
                });
                let client = VfioUser::from_stream(ours, Duration::from_millis(500));
                let read = client.and_then(|client| client.read_at(0, 8, &mut [0; 4]));
                read.unwrap_err();
            }
        }
        peers.lock().unwrap().clear();
    });
}
