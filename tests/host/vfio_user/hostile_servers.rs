//! Servers that lie, stop, or die: each an error in time, and nothing is left open.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, Error, ErrorKind, Result};

use crate::support::hostile_server::{
    INFO, IRQ, READ, REGION, Reply, VERSION, WRITE, memory, serve, words,
};
use crate::support::peer::{Device as Served, Peer};
use crate::support::{edu, shared, watch};

/// How long a server is waited for that is silent.
const TIME: Duration = Duration::from_millis(200);
/// How long one may take that answers, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

/// All that a client may want of a server, which may take this time, until something fails.
fn use_all(stream: UnixStream, time: Duration) -> Result<()> {
    let client = Arc::new(VfioUser::from_stream(stream, time)?);
    let used: Result<()> = (|| {
        client.read_at(0, 8, &mut [0; 4])?;
        client.write_at(0, 8, &[0; 4])?;
        let event = edu::event();
        client.set_irqs(0, 0, &[Some(event.as_fd())])?;
        client.dma_map(0, &shared::memory(0x1000, true), Access::ReadWrite)?;
        client.dma_map(0x1000, &shared::memory(0x1000, false), Access::ReadWrite)?;
        client.dma_unmap(0, 0x1000)?;
        client.reset()?;
        let device = Device::new(client.clone());
        let bar = device.bar(0)?;
        let part = bar.layout().mappable().next();
        part.map(|part| bar.map(part, vfio_remap::Placement::Anywhere)).transpose()?;
        Ok(())
    })();
    if let Err(error) = &used
        && matches!(error.kind(), ErrorKind::Gone | ErrorKind::TimedOut)
    {
        // From now on nothing works, and nothing waits: until a late answer comes, if it is late.
        let start = Instant::now();
        for _ in 0..10 {
            let next = client.read_at(0, 0, &mut [0; 4]).unwrap_err();
            assert_eq!(next.kind(), error.kind(), "{next}");
        }
        assert!(start.elapsed() < 9 * time);
    }
    used
}

/// The error of a client whose server answers `command` with what `spoil` makes of the honest reply.
#[track_caller]
fn spoiled(command: u16, spoil: impl Fn(&mut Reply) + Send + 'static) -> Error {
    spoiled_within(AMPLE, command, spoil)
}

#[track_caller]
fn spoiled_within(
    time: Duration,
    command: u16,
    spoil: impl Fn(&mut Reply) + Send + 'static,
) -> Error {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve(theirs, command, spoil));
    let error = use_all(ours, time).unwrap_err();
    server.join().unwrap();
    error
}

#[track_caller]
fn malformed(says: &str, command: u16, spoil: impl Fn(&mut Reply) + Send + 'static) {
    let error = spoiled(command, spoil);
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[test]
fn an_honest_server_is_used_without_an_error() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve(theirs, u16::MAX, |_| {}));
    use_all(ours, AMPLE).unwrap();
    server.join().unwrap();
}

#[test]
fn other_versions_and_nonsense_for_capabilities_are_named() {
    malformed("version 1.1", VERSION, |reply| reply.set_u16(16, 1));
    malformed("not JSON", VERSION, |reply| reply.set_body(b"\0\0\0\0{\"capa\0"));
    malformed("max_msg_fds", VERSION, |reply| {
        reply.set_body(b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":{}}}\0");
    });
    malformed("4 were expected", VERSION, |reply| reply.set_body(&[0]));
    let deep = [&[0; 4][..], "[".repeat(100_000).as_bytes(), &[0]].concat();
    malformed("not JSON", VERSION, move |reply| reply.set_body(&deep));
}

#[test]
fn sizes_ids_and_kinds_that_cannot_be_are_named() {
    for command in [VERSION, INFO, REGION, IRQ, READ, WRITE, 8, 2, 3, 13] {
        malformed("4294967295 bytes", command, |reply| reply.set_u32(4, u32::MAX));
        malformed("15 bytes", command, |reply| reply.set_u32(4, 15));
        malformed("id 999", command, |reply| reply.set_u16(0, 999));
        malformed("command 77", command, |reply| reply.set_u16(2, 77));
        malformed("answered", command, |reply| reply.set_u32(8, 2));
    }
    for command in [INFO, REGION, IRQ, READ, WRITE, 3] {
        malformed("expected", command, |reply| reply.set_body(&[0; 3]));
    }
}

#[test]
fn claims_that_cannot_be_are_named() {
    malformed("regions", INFO, |reply| reply.set_u32(24, u32::MAX));
    malformed("interrupts", INFO, |reply| reply.set_u32(28, 1025));
    malformed("vectors", IRQ, |reply| reply.set_u32(28, u32::MAX));
    malformed("interrupt 1", IRQ, |reply| reply.set_u32(24, 1));
    malformed("region 1", REGION, |reply| reply.set_u32(24, 1));
    malformed("bytes of information", REGION, |reply| reply.set_u32(16, u32::MAX));
    malformed("bytes of information", REGION, |reply| reply.set_u32(16, 257));
    malformed("of data", READ, |reply| reply.bytes[31] ^= 1);
    malformed("for 2 bytes", READ, |reply| reply.set_u32(28, 2));
    malformed("expected", READ, |reply| {
        let short = reply.bytes[16..34].to_vec();
        reply.set_body(&short);
    });
    malformed("of data", READ, |reply| {
        let long = [&reply.bytes[16..], &[0; 100]].concat();
        reply.set_body(&long);
    });
    malformed("of data", WRITE, |reply| reply.bytes[16] ^= 1);
    malformed("unmapped", 3, |reply| reply.bytes[32] ^= 1);
}

/// A region of which `areas` (start, size) can be mapped.
fn with_areas(reply: &mut Reply, areas: &[(u64, u64)]) {
    let size = 48 + 16 * areas.len() as u64;
    let mut body = words(&[size | 15 << 32, 32 << 32, 0x4000, 0, 1 | 1 << 16, areas.len() as u64]);
    body.extend(areas.iter().flat_map(|&(start, size)| words(&[start, size])));
    reply.set_body(&body);
}

#[test]
fn areas_that_overlap_or_leave_the_region_are_named() {
    malformed("overlap", REGION, |reply| with_areas(reply, &[(0, 0x2000), (0x1000, 0x2000)]));
    malformed("0x3000..0x5000", REGION, |reply| with_areas(reply, &[(0x3000, 0x2000)]));
    malformed("wraps", REGION, |reply| with_areas(reply, &[(u64::MAX, 2)]));
    malformed("would fit", REGION, |reply| {
        with_areas(reply, &[]);
        reply.set_u32(56, 9);
    });
}

/// The file is too short, or the region begins in the middle of a page of it, or past its end.
#[test]
fn a_region_that_its_file_does_not_hold_is_reached_by_messages() {
    let spoilers: [fn(&mut Reply); 3] = [
        |reply| reply.fds = vec![memory(0x3fff)],
        |reply| {
            reply.bytes[40] = 1;
            reply.fds = vec![memory(0x8000)];
        },
        |reply| reply.bytes[40..48].fill(0xff),
    ];
    for spoil in spoilers {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || serve(theirs, REGION, spoil));
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        assert!(!client.region(0).unwrap().mappable);
        client.read_at(0, 8, &mut [0; 4]).unwrap();
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_file_for_each_area_is_taken_where_it_is_the_same() {
    let bar = |same: bool| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            serve(theirs, REGION, |reply| {
                with_areas(reply, &[(0, 0x1000), (0x2000, 0x1000)]);
                let again = if same { reply.fds[0].try_clone().unwrap() } else { memory(0x4000) };
                reply.fds.push(again);
            });
        });
        let client = VfioUser::from_stream(ours, AMPLE).unwrap();
        let areas = client.region(0).unwrap().areas.unwrap();
        drop(client);
        server.join().unwrap();
        areas
    };
    assert_eq!(bar(true), [0..0x1000, 0x2000..0x3000]);
    assert_eq!(bar(false), [0..0x1000], "what is another file's stays trapped");
}

#[test]
fn a_region_without_a_file_is_reached_by_messages() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve(theirs, REGION, |reply| reply.fds.clear()));
    use_all(ours, AMPLE).unwrap();
    server.join().unwrap();
}

/// Each may have to be waited for by a thread until it is closed: a server must not send more and more of them.
#[test]
fn descriptors_with_replies_that_take_none_are_malformed() {
    for command in [INFO, IRQ, READ, WRITE, 8, 2, 3, 13] {
        malformed("which takes none", command, |reply| reply.fds = vec![memory(0)]);
    }
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    for command in [VERSION, INFO, REGION, IRQ, READ, WRITE, 8, 2, 3, 13] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            serve(theirs, command, |reply| {
                reply.fds = vec![writer.try_clone().unwrap().into()];
            });
        });
        let client = VfioUser::from_stream(ours, AMPLE);
        if let Ok(client) = &client {
            let _ = client.read_at(0, 8, &mut [0; 4]);
            let _ = client.write_at(0, 8, &[0; 4]);
            let _ = client.reset();
        }
        drop(client);
        server.join().unwrap();
        // The server's copies are gone with it: any that is left is the client's.
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
    }
    let error = spoiled(VERSION, |reply| {
        reply.fds = (0..200).map(|_| memory(0)).collect();
    });
    assert!(error.to_string().contains("200 file descriptors"), "{error}");
}

#[test]
fn silence_is_an_error_in_time() {
    watch::in_time(|| {
        for command in [VERSION, INFO, REGION, IRQ, READ, WRITE, 8, 2, 3, 13] {
            for sent in [0, 1, 16, 17] {
                let error = spoiled_within(TIME, command, move |reply| {
                    reply.silent = sent == 0;
                    reply.set_u32(4, 100);
                    reply.bytes.truncate(sent);
                });
                assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
                assert!(error.to_string().contains("did not answer within 200ms"), "{error}");
            }
        }
    });
}

#[test]
fn a_server_that_accepts_no_connection_is_an_error_in_time() {
    watch::in_time(|| {
        let path = std::env::temp_dir().join(format!("vfio-remap-full-{}", std::process::id()));
        let address = UnixAddr::new(&path).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let server = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(server.as_raw_fd(), &address).unwrap();
        listen(&server, Backlog::new(0).unwrap()).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let error = VfioUser::connect_within(&path, TIME).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert!(error.to_string().contains("accepts no connection"), "{error}");
    });
}

#[test]
fn errors_of_the_server_are_errors_with_its_errno() {
    for command in [VERSION, INFO, IRQ, READ, WRITE, 8, 2, 3, 13] {
        let error = spoiled(command, |reply| {
            reply.set_body(&[]);
            reply.set_u32(8, 0x21);
            reply.set_u32(12, libc::EBUSY as u32);
        });
        assert_eq!((error.kind(), error.errno()), (ErrorKind::InUse, Some(libc::EBUSY)), "{error}");
        let error = spoiled(command, |reply| {
            reply.set_u32(8, 0x21);
            reply.set_u32(12, u32::MAX);
        });
        assert!(error.to_string().contains("rejected"), "{error}");
    }
}

/// Of a real server's replies the first bytes only, for each number of bytes.
#[test]
fn a_server_that_dies_anywhere_is_an_error() {
    let device = Emulated::new(Edu::new()).unwrap();
    let mut whole = false;
    for bytes in 0.. {
        let (ours, proxy) = UnixStream::pair().unwrap();
        let (onward, theirs) = UnixStream::pair().unwrap();
        let start = Instant::now();
        let result = std::thread::scope(|scope| {
            scope.spawn(|| Server::serve_stream(&device, theirs, AMPLE));
            scope.spawn(|| {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = (&proxy).read(&mut bytes) {
                    // Descriptors do not come through, so the server must not send a second socket.
                    let name = b"twin_socket";
                    let at = bytes[..len].windows(name.len()).position(|part| part == name);
                    at.into_iter().for_each(|at| bytes[at] = b'-');
                    if (&onward).write_all(&bytes[..len]).is_err() {
                        break;
                    }
                }
                let _ = onward.shutdown(Shutdown::Both);
            });
            scope.spawn(|| {
                let (from, mut to) = (&onward, &proxy);
                let _ = std::io::copy(&mut from.take(bytes), &mut to);
                let _ = proxy.shutdown(Shutdown::Both);
            });
            use_all(ours, AMPLE)
        });
        assert!(start.elapsed() < AMPLE, "after {bytes} bytes");
        match result {
            Ok(()) => {
                whole = true;
                assert!(bytes > 500, "{bytes} bytes");
                break;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::Gone, "{bytes} bytes: {error}"),
        }
    }
    assert!(whole);
}

#[test]
fn unmapped_memory_is_not_given_and_the_connection_stays() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let ask = |stream: &mut UnixStream, command: u16, address: u64, count: u64, data: &[u8]| {
        let mut bytes = Vec::new();
        for field in [9, command] {
            bytes.extend(field.to_ne_bytes());
        }
        for field in [32 + data.len() as u32, 0, 0] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(words(&[address, count]));
        bytes.extend(data);
        stream.write_all(&bytes).unwrap();
        let mut header = [0; 16];
        stream.read_exact(&mut header).unwrap();
        assert_eq!(header[..4], bytes[..4], "the reply is to this");
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap()) as usize;
        let mut body = vec![0; size - 16];
        stream.read_exact(&mut body).unwrap();
        let errno = i32::from_ne_bytes(header[12..].try_into().unwrap());
        if header[8] == 0x21 { Err(errno) } else { Ok(body) }
    };
    let mut idle = theirs.try_clone().unwrap();
    let server = std::thread::spawn(move || {
        serve(theirs.try_clone().unwrap(), READ, |reply| {
            // In the middle of an exchange.
            let mut stream = theirs.try_clone().unwrap();
            assert_eq!(ask(&mut stream, 11, 0x5000, 4, &[]), Err(libc::EFAULT));
            assert_eq!(ask(&mut stream, 11, 0xffe, 4, &[]), Err(libc::EFAULT));
            assert_eq!(ask(&mut stream, 11, 0, u64::MAX, &[]), Err(libc::E2BIG));
            assert_eq!(ask(&mut stream, 11, u64::MAX, 4, &[]), Err(libc::EFAULT));
            assert_eq!(ask(&mut stream, 12, 0, 5, b"four"), Err(libc::EINVAL));
            assert_eq!(ask(&mut stream, 12, 0x2000, 4, b"four"), Err(libc::EACCES));
            assert_eq!(ask(&mut stream, 14, 0, 4, &[]), Err(libc::EOPNOTSUPP));
            assert_eq!(ask(&mut stream, 12, 4, 4, b"four"), Ok(words(&[4, 4])));
            let read = ask(&mut stream, 11, 2, 8, &[]).unwrap();
            assert_eq!(read[16..], *b"\0\0four\0\0");
            assert!(!reply.silent);
        });
    });
    let client = VfioUser::from_stream(ours, AMPLE).unwrap();
    let memory = [shared::memory(0x1000, false), shared::memory(0x1000, false)];
    client.dma_map(0, &memory[0], Access::ReadWrite).unwrap();
    client.dma_map(0x2000, &memory[1], Access::ReadOnly).unwrap();
    client.read_at(0, 0, &mut [0; 4]).unwrap();
    assert_eq!(shared::get(&memory[0], 4, 4), b"four");
    // A reply that nobody asked for, while the client is idle.
    let mut reply = vec![0; 16];
    reply[4] = 16;
    reply[8] = 1;
    idle.write_all(&reply).unwrap();
    watch::until("the end", || client.irq(0).is_err());
    drop(client);
    server.join().unwrap();
}

/// It has left the socket with the reply, so that nobody would find it there.
#[test]
fn a_command_that_comes_with_a_reply_is_served_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        serve(theirs, READ, |reply| {
            let mut command = [0; 32];
            (command[2], command[4], command[24]) = (11, 32, 4);
            reply.bytes.extend(command);
        })
    });
    let client = VfioUser::from_stream(ours, AMPLE).unwrap();
    client.read_at(0, 0, &mut [0; 4]).unwrap();
    drop(client);
    assert_eq!(server.join().unwrap(), 1);
}

/// Bytes that no server means: whatever comes of it, it comes in time, and without a panic.
#[test]
fn garbage_is_an_error() {
    let mut state = 1u64;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    for round in 0..2000 {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let garbage: Vec<u8> = (0..round % 300).map(|_| random()).collect();
        theirs.write_all(&garbage).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        VfioUser::from_stream(ours, AMPLE).unwrap_err();
    }
}

/// It makes the socket ready to be read, and there is nothing to read.
#[test]
fn a_byte_out_of_band_ends_the_connection() {
    let (peer, stream) = Peer::start(Served::default(), |_, _, _| {});
    let client = VfioUser::from_stream(stream, AMPLE).unwrap();
    client.dma_map(0x1000, &shared::memory(0x1000, false), Access::ReadWrite).unwrap();
    // A read that is under way goes on behind the byte, and drops it: that of the exchange above may be.
    watch::until("the client ends the connection", || peer.send_out_of_band());
    watch::in_time(|| peer.ended());
    assert_eq!(client.read_at(0, 0, &mut [0; 4]).unwrap_err().kind(), ErrorKind::Gone);
}
