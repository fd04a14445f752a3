//! What client and server agree on: the version, a twin socket, descriptors.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Error, ErrorKind};

use crate::support::peer::{DMA_READ, Device as Served, Peer, VERSION, version};
use crate::support::{peer, shared};

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

fn memory(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("vfio-remap-test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file.into()
}

fn access(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat()
}

/// A `VERSION` with a twin socket at an index of the descriptors that come along.
fn with_twin(supported: &str, index: &str) -> Vec<u8> {
    let twin = format!(r#"{{"supported":{supported},"fd_index":{index}}}"#);
    version(0, 1, &format!(r#"{{"capabilities":{{"max_msg_fds":8,"twin_socket":{twin}}}}}"#))
}

#[test]
fn a_server_with_a_twin_socket_is_answered_there() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let served = Served { version: with_twin("true", "1"), ..Served::default() };
    let (peer, stream) = Peer::start(served, move |_, asked, answer| {
        if asked.command == VERSION {
            let proposal = String::from_utf8_lossy(&asked.body[4..]).into_owned();
            assert!(proposal.contains(r#""twin_socket":{"supported":true}"#), "{proposal}");
            answer.fds = vec![memory(0), theirs.try_clone().unwrap()];
        }
    });
    let client = VfioUser::from_stream(stream, AMPLE).unwrap();
    let memory = shared::memory(0x1000, false);
    shared::put(&memory, 0, b"twin");
    client.dma_map(0, &memory, Access::ReadWrite).unwrap();
    for id in 0..3 {
        let command = peer::message(id, DMA_READ, 0, 0, &access(0, 4, &[]));
        (&ours).write_all(&command).unwrap();
        let (header, body, _) = peer::receive(&ours).unwrap();
        assert_eq!((header[0], header[8], &body[16..]), (id as u8, 1, &b"twin"[..]));
        client.read_at(0, 0, &mut [0; 4]).unwrap();
    }
    drop(client);
    assert!(peer::receive(&ours).is_none(), "it is closed with the other");
    drop(peer);
}

fn refused(version: Vec<u8>, fds: Vec<OwnedFd>) -> Error {
    let (_peer, stream) = Peer::start(Served { version, ..Served::default() }, {
        move |_, asked, answer| {
            if asked.command == VERSION {
                answer.fds = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
            }
        }
    });
    VfioUser::from_stream(stream, AMPLE).unwrap_err()
}

#[test]
fn a_version_that_breaks_the_protocol_is_refused() {
    let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
    let datagrams = || OwnedFd::from(std::os::unix::net::UnixDatagram::pair().unwrap().0);
    let mut without_nul = version(0, 1, "{}");
    without_nul.pop();
    let cases: [(Vec<u8>, Vec<OwnedFd>, &str); 9] = [
        (without_nul, vec![], "do not end with a NUL"),
        (version(0, 1, "[]"), vec![], "is not an object"),
        (version(0, 1, r#"{"capabilities":"all"}"#), vec![], "is not an object"),
        (version(0, 2, "{}"), vec![], "version 0.2, and 0.1 was proposed"),
        (with_twin("true", "0"), vec![], "has not sent it"),
        (with_twin("true", "1"), vec![socket()], "has not sent it"),
        (with_twin("true", "null"), vec![socket()], "has not sent it"),
        (with_twin("true", "0"), vec![memory(0)], "no stream socket"),
        (with_twin("true", "0"), vec![datagrams()], "no stream socket"),
    ];
    for (version, fds, says) in cases {
        let error = refused(version, fds);
        assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    }
    // A socket that is not used.
    let version = with_twin("false", "0");
    let (_peer, stream) = Peer::start(Served { version, ..Served::default() }, |_, _, _| {});
    VfioUser::from_stream(stream, AMPLE).unwrap();
}

#[test]
fn memory_goes_without_a_descriptor_to_a_server_that_takes_none() {
    let version = version(0, 1, r#"{"capabilities":{"max_msg_fds":0}}"#);
    let (peer, stream) = Peer::start(Served { version, ..Served::default() }, |_, _, _| {});
    let client = VfioUser::from_stream(stream, AMPLE).unwrap();
    assert!(!client.dma_limits().unwrap().by_file);
    client.dma_map(0, &shared::memory(0x1000, true), Access::ReadWrite).unwrap();
    assert!(peer.asked().iter().all(|asked| asked.fds == 0));
}
