//! Clients of our server that lie, stop, or die: each is disconnected, and the server serves the next.

use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vfio_remap::emulated::{Edu, Emulated, Server};
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{ErrorKind, Result};

use crate::support::{edu, shared, watch};

const TIME: Duration = Duration::from_millis(200);

/// A client that sends what it is told to.
struct Client(UnixStream);

impl Client {
    fn send(&mut self, command: u16, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = [3u16.to_ne_bytes(), command.to_ne_bytes()].concat();
        for field in [16 + body.len() as u32, flags, 0] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(body);
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let (socket, parts) = (self.0.as_raw_fd(), [IoSlice::new(&bytes)]);
        sendmsg::<()>(socket, &parts, control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }

    /// The reply's body, or its errno.
    fn receive(&mut self) -> std::result::Result<Vec<u8>, i32> {
        let mut header = [0; 16];
        self.0.read_exact(&mut header).unwrap();
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(header[..2], 3u16.to_ne_bytes());
        let mut body = vec![0; field(4) as usize - 16];
        self.0.read_exact(&mut body).unwrap();
        if field(8) & 0x20 != 0 { Err(field(12) as i32) } else { Ok(body) }
    }

    fn ask(&mut self, command: u16, body: &[u8]) -> std::result::Result<Vec<u8>, i32> {
        self.ask_with(command, body, &[])
    }

    fn ask_with(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<Vec<u8>, i32> {
        self.send(command, 0, body, fds);
        self.receive()
    }

    fn greet(&mut self) {
        self.ask(1, &[0, 0, 1, 0]).unwrap();
    }
}

/// Serves a client, and sees that an honest one is served afterwards.
fn served(client: impl FnOnce(&mut Client)) -> Result<()> {
    let device = Emulated::new(Edu::new()).unwrap();
    let connect = |time: Duration, f: &mut dyn FnMut(UnixStream)| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| Server::serve_stream(&device, theirs, time));
            f(ours);
            served.join().unwrap()
        })
    };
    let mut client = Some(client);
    let result = connect(TIME, &mut |stream| client.take().unwrap()(&mut Client(stream)));
    connect(Duration::from_secs(5), &mut |stream| {
        let honest = VfioUser::from_stream(stream, Duration::from_secs(5)).unwrap();
        edu::does_all_that_is_documented(&honest);
    })
    .unwrap();
    result
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn access(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_ne_bytes()[..], &bytes(&[region, count]), data].concat()
}

fn map(offset: u64, address: u64, size: u64) -> Vec<u8> {
    let words = [offset, address, size].into_iter().flat_map(|word| word.to_ne_bytes());
    bytes(&[32, 3]).into_iter().chain(words).collect()
}

#[test]
fn commands_before_the_version_or_after_another_one_end_it() {
    for (command, body) in [(13, vec![]), (9, access(0, 0, 4, &[])), (1, vec![1, 0, 0, 0])] {
        let error = served(|client| {
            assert_eq!(client.ask(command, &body), Err(libc::EINVAL));
            assert_eq!(client.0.read(&mut [0; 1]).unwrap(), 0, "the connection is closed");
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Malformed);
    }
}

#[test]
fn nonsense_is_refused_and_the_client_served_on() {
    served(|client| {
        client.greet();
        let invalid: &[(u16, Vec<u8>)] = &[
            (1, vec![0, 0, 1, 0]),
            (2, vec![0; 31]),
            (2, map(0, 0, 0)),
            (2, map(0, u64::MAX, 2)),
            (3, vec![0; 23]),
            (3, bytes(&[24, 1, 0, 0, 0, 0])),
            (4, vec![0; 15]),
            (5, vec![0; 32]),
            (5, bytes(&[32, 0, 9, 0, 0, 0, 0, 0])),
            (7, bytes(&[16, 0, 5, 0])),
            (8, bytes(&[20, 0x21, 1, 0])),
            (8, bytes(&[20, 0x21, 1, 1, 1])),
            (8, bytes(&[20, 0x21, 1, u32::MAX, 1])),
            (8, bytes(&[20, 0x22, 1, 0, 1])),
            (8, bytes(&[20, 0x01, 1, 0, 1])),
            (9, vec![0; 15]),
            (9, access(1 << 20, 0, 1, &[])),
            (9, access(u64::MAX, 0, 4, &[])),
            (9, access(0, u32::MAX, 4, &[])),
            (10, access(0, 0, 4, &[0; 3])),
            (10, access(0, 0, 4, &[0; 5])),
        ];
        for (command, body) in invalid {
            assert_eq!(client.ask(*command, body), Err(libc::EINVAL), "{command} {body:?}");
        }
        assert_eq!(client.ask(9, &access(0, 0, u32::MAX, &[])), Err(libc::E2BIG));
        assert_eq!(client.ask(8, &bytes(&[20, 0x0c, 1, 0, 1])), Err(libc::EOPNOTSUPP));
        for command in [0, 6, 11, 12, 14, 16, u16::MAX] {
            assert_eq!(client.ask(command, &[]), Err(libc::EOPNOTSUPP));
        }
        assert_eq!(client.ask(3, &map(0, 0, 0)[..24]), Err(libc::EINVAL));
        let read = client.ask(9, &access(0, 0, 4, &[])).unwrap();
        assert_eq!(read[16..], 0x0100_00edu32.to_ne_bytes());
    })
    .unwrap();
}

#[test]
fn commands_that_want_no_reply_get_none() {
    served(|client| {
        client.greet();
        client.send(10, 0x10, &access(4, 0, 4, &7u32.to_ne_bytes()), &[]);
        client.send(10, 0x10, &access(4, 77, 4, &7u32.to_ne_bytes()), &[]);
        let read = client.ask(9, &access(4, 0, 4, &[])).unwrap();
        assert_eq!(read[16..], (!7u32).to_ne_bytes());
    })
    .unwrap();
}

#[test]
fn files_are_checked_and_closed() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    served(|client| {
        client.greet();
        let memory = shared::memory(0x1000, true);
        let (memory, _) = memory.file().unwrap();
        assert_eq!(client.ask_with(2, &map(0, 0, 1), &[memory; 2]), Err(libc::EINVAL));
        assert_eq!(client.ask_with(2, &map(u64::MAX, 0, 2), &[memory]), Err(libc::EINVAL));
        client.ask_with(2, &map(0, 0, 0x1000), &[memory]).unwrap();
        assert_eq!(client.ask_with(2, &map(0, 0xfff, 1), &[memory]), Err(libc::EEXIST));
        let pipe = writer.as_fd();
        let eventfds = bytes(&[20, 0x24, 1, 0, 1]);
        assert_eq!(client.ask_with(8, &eventfds, &[pipe]), Err(libc::EINVAL));
        assert_eq!(client.ask_with(8, &eventfds, &[pipe; 2]), Err(libc::EINVAL));
        // What is not memory is neither asked for by messages nor kept.
        let refused = client.ask_with(2, &map(0, 0x2000, 0x1000), &[pipe]);
        assert_eq!(refused, Err(libc::EOPNOTSUPP));
        client.ask_with(13, &[], &[pipe; 8]).unwrap();
    })
    .unwrap();
    drop(writer);
    reader.read_to_end(&mut Vec::new()).unwrap();
    let error = served(|client| {
        client.greet();
        let null = std::fs::File::open("/dev/null").unwrap();
        client.send(13, 0, &[], &[null.as_fd(); 65]);
        assert!(matches!(client.0.read(&mut [0; 1]), Ok(0) | Err(_)));
    });
    assert!(error.unwrap_err().to_string().contains("65 file descriptors"));
}

/// A file that is cut short after it was mapped does not reach the server as a signal.
#[test]
fn memory_that_goes_away_is_a_transfer_that_fails() {
    served(|client| {
        client.greet();
        let memory = shared::memory(0x1000, true);
        let (fd, offset) = memory.file().unwrap();
        client.ask_with(2, &map(offset, 0, 0x1000), &[fd]).unwrap();
        std::fs::File::from(fd.try_clone_to_owned().unwrap()).set_len(0).unwrap();
        client.ask(10, &access(4, 7, 2, &[6, 0])).unwrap();
        for (offset, value) in [(0x80, 0u64), (0x88, 0x4_0000), (0x90, 64), (0x98, 1)] {
            client.ask(10, &access(offset, 0, 8, &value.to_le_bytes())).unwrap();
        }
        watch::until("a transfer", || {
            client.ask(9, &access(0x98, 0, 4, &[])).unwrap()[16] & 1 == 0
        });
    })
    .unwrap();
}

/// A shorter file would be a signal to the model, which has it mapped.
#[test]
fn what_a_model_maps_cannot_be_shrunk() {
    let device = Emulated::new(Edu::new()).unwrap();
    let file = device.backing(0).unwrap().fd().try_clone_to_owned().unwrap();
    let file = std::fs::File::from(file);
    for size in [0, 1 << 21] {
        let error = file.set_len(size).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{size:#x} bytes");
    }
}

/// The commands of the messages in `bytes`.
fn commands(mut bytes: &[u8]) -> Vec<u16> {
    let mut commands = Vec::new();
    while bytes.len() >= 16 {
        commands.push(u16::from_ne_bytes([bytes[2], bytes[3]]));
        let size = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        bytes = bytes.get(size.max(16)..).unwrap_or_default();
    }
    commands
}

/// A model that asks for memory is not held up by a client that does not answer.
#[test]
fn a_client_that_keeps_its_memory_to_itself_is_given_up() {
    let start = Instant::now();
    let error = served(|client| {
        client.greet();
        client.ask(2, &map(0, 0, 0x1000)).unwrap();
        client.ask(10, &access(4, 7, 2, &[6, 0])).unwrap();
        for (offset, value) in [(0x80, 0u64), (0x88, 0x4_0000), (0x90, 64)] {
            client.ask(10, &access(offset, 0, 8, &value.to_le_bytes())).unwrap();
        }
        // The device asks for memory as soon as it is told to go, before or after the reply to that.
        client.send(10, 0, &access(0x98, 0, 8, &1u64.to_le_bytes()), &[]);
        let mut rest = Vec::new();
        client.0.read_to_end(&mut rest).unwrap();
        assert!(commands(&rest).contains(&11), "it was not asked: {rest:?}");
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Gone);
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn clients_that_stop_or_die_anywhere_are_given_up() {
    let message = |client: &mut Client, len: usize, die: bool| {
        client.greet();
        let mut bytes = bytes(&[10 << 16, 36, 0, 0]);
        bytes.extend(access(4, 0, 4, &[0; 4]));
        client.0.write_all(&bytes[..len]).unwrap();
        if die {
            client.0.shutdown(Shutdown::Both).unwrap();
        }
        let _ = client.0.read_to_end(&mut Vec::new());
    };
    for len in 1..36 {
        let error = served(|client| message(client, len, true)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    }
    for len in [1, 15, 16, 35] {
        let error = served(|client| message(client, len, false)).unwrap_err();
        assert!(error.to_string().contains("within 200ms"), "{error}");
    }
    let error = served(|client| drop(client.0.read(&mut [0; 1]))).unwrap_err();
    assert!(error.to_string().contains("within 200ms"), "one that does not greet: {error}");
}

#[test]
fn a_client_that_takes_no_answers_is_given_up() {
    let error = served(|client| {
        client.greet();
        for _ in 0..3 {
            client.send(9, 0, &access(0, 0, 1 << 20, &[]), &[]);
        }
        std::thread::sleep(3 * TIME);
    });
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Gone);
}

#[test]
fn garbage_ends_in_an_error_or_the_clients_end() {
    let device = Emulated::new(Edu::new()).unwrap();
    let mut state = 1u64;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    for round in 0..2000 {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let garbage: Vec<u8> = (0..round % 300).map(|_| random()).collect();
        ours.write_all(&garbage).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let _ = Server::serve_stream(&device, theirs, TIME);
    }
    assert_eq!(device.dma_limits().unwrap().available_mappings, Some(65535));
}
