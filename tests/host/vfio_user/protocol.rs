//! The protocol to the letter, as a client of our server can tell.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vfio_remap::ErrorKind;

use crate::support::scripted_client::{
    AMPLE, Client, DMA_MAP, DMA_READ, DMA_UNMAP, GET_INFO, GET_IRQ_INFO, GET_REGION_INFO, Message,
    REGION_WRITE, REGION_WRITE_MULTI, SET_IRQS, VERSION, access, map, served, version, with_edu,
    words,
};

const ID: u32 = 0x0100_00ed;

fn region_info(client: &mut Client, argsz: u32) -> Message {
    client.ask(GET_REGION_INFO, &words(&[argsz, 0, 0, 0, 0, 0, 0, 0]), &[]).unwrap()
}

#[test]
fn a_reply_without_room_for_capabilities_has_none() {
    with_edu(|client| {
        client.greet("{}");
        let needed = region_info(client, 32).u32(0);
        for argsz in [32, 33, needed - 1] {
            let short = region_info(client, argsz);
            assert_eq!((short.u32(0), short.u32(12)), (needed, 0), "argsz and cap_offset");
            assert_eq!((short.body.len(), short.fds.len()), (32, 0), "{argsz}");
            assert_eq!(short.u32(4), 3, "neither capabilities nor a file");
        }
        for argsz in [needed, u32::MAX] {
            let whole = region_info(client, argsz);
            assert_eq!((whole.u32(0), whole.u32(12)), (needed, 32), "argsz and cap_offset");
            assert_eq!((whole.body.len(), whole.fds.len()), (needed as usize, 1));
            assert_eq!(whole.u32(4), 0xf, "reading, writing, mapping, capabilities");
        }
    });
}

#[test]
fn an_argsz_below_the_fixed_fields_is_refused() {
    with_edu(|client| {
        client.greet("{}");
        client.ask(DMA_MAP, &map(0, 0, 0x1000), &[]).unwrap();
        let unmap = || words(&[24, 0, 0, 0, 0x1000, 0]);
        let commands = [
            (GET_INFO, words(&[16, 0, 0, 0])),
            (GET_REGION_INFO, words(&[32, 0, 0, 0, 0, 0, 0, 0])),
            (GET_IRQ_INFO, words(&[16, 0, 1, 0])),
            (SET_IRQS, words(&[20, 0x21, 1, 0, 0])),
            (DMA_MAP, map(0, 0x1000, 0x1000)),
            (DMA_UNMAP, unmap()),
        ];
        for (command, body) in &commands {
            let fixed = u32::from_ne_bytes(body[..4].try_into().unwrap());
            for argsz in [0, fixed - 1] {
                let body = [&argsz.to_ne_bytes(), &body[4..]].concat();
                assert_eq!(client.ask(*command, &body, &[]).err(), Some(libc::EINVAL), "{command}");
            }
        }
        for (command, body) in &commands {
            client.ask(*command, body, &[]).unwrap();
        }
    });
}

#[test]
fn set_irqs_takes_only_what_its_flags_name() {
    const NONE: u32 = 0x21;
    const BOOL: u32 = 0x22;
    const EVENTFD: u32 = 0x24;
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let event = event.as_fd();
    let set = |flags, start, count, data: &[u8]| {
        let argsz = 20 + data.len() as u32;
        [&words(&[argsz, flags, 1, start, count])[..], data].concat()
    };
    with_edu(|client| {
        client.greet("{}");
        client.ask(SET_IRQS, &set(EVENTFD, 0, 1, &[]), &[event]).unwrap();
        let none = &[][..];
        for (what, body, fds) in [
            ("a descriptor with NONE", set(NONE, 0, 1, &[]), &[event][..]),
            ("a descriptor with BOOL", set(BOOL, 0, 1, &[1]), &[event]),
            ("a descriptor to disconnect", set(NONE, 0, 0, &[]), &[event]),
            ("no vectors with BOOL", set(BOOL, 0, 0, &[]), none),
            ("no vectors with EVENTFD", set(EVENTFD, 0, 0, &[]), none),
            ("too many booleans", set(BOOL, 0, 1, &[1, 1]), none),
            ("too few booleans", set(BOOL, 0, 1, &[]), none),
            ("data with NONE", set(NONE, 0, 1, &[1]), none),
            ("data with EVENTFD", set(EVENTFD, 0, 1, &[0; 4]), none),
            ("more in argsz than there is", words(&[21, NONE, 1, 0, 1]), none),
        ] {
            assert_eq!(client.ask(SET_IRQS, &body, fds).err(), Some(libc::EINVAL), "{what}");
        }
        // Nothing has changed.
        client.ask(SET_IRQS, &set(NONE, 0, 1, &[]), &[]).unwrap();
        client.ask(SET_IRQS, &set(BOOL, 0, 1, &[1]), &[]).unwrap();
        let mut fired = [0; 8];
        nix::unistd::read(event, &mut fired).unwrap();
        assert_eq!(u64::from_ne_bytes(fired), 2);
        client.ask(SET_IRQS, &set(NONE, 0, 0, &[]), &[]).unwrap();
    });
}

#[test]
fn a_malformed_version_is_refused_and_ends_the_connection() {
    for data in [
        "{}",
        "{\"capabilities\":{}}",
        "[]\0",
        "null\0",
        "{\"capabilities\":[]}\0",
        "{\"capabilities\":null}\0",
        "{\"capabilities\":{\"write_multiple\":1}}\0",
    ] {
        let error = served(AMPLE, |client| {
            assert_eq!(
                client.ask(VERSION, &version(data), &[]).err(),
                Some(libc::EINVAL),
                "{data}"
            );
            assert!(client.is_closed());
        });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Malformed, "{data}");
    }
    for data in ["", "\0", "{}\0"] {
        with_edu(|client| {
            client.ask(VERSION, &version(data), &[]).unwrap();
        });
    }
}

#[test]
fn a_client_that_takes_no_descriptors_is_sent_none() {
    with_edu(|client| {
        let (server, fds) =
            client.greet("{\"max_msg_fds\":0,\"twin_socket\":{\"supported\":true}}");
        assert!(fds.is_empty() && server["twin_socket"].is_null(), "{server}");
        let info = region_info(client, 1000);
        assert!(info.fds.is_empty());
        assert_eq!((info.u32(0), info.u32(4)), (32, 3), "nothing can be mapped");
        assert_eq!(client.read(0, 0x1_0000, 4), ID.to_ne_bytes());
    });
}

#[test]
fn without_a_word_a_client_takes_one_descriptor() {
    with_edu(|client| {
        client.greet("{}");
        assert_eq!(region_info(client, 1000).fds.len(), 1);
    });
}

#[test]
fn a_file_that_cannot_be_mapped_is_refused() {
    let pipe = std::io::pipe().unwrap().1;
    let socket = UnixStream::pair().unwrap().0;
    let file = |path| std::fs::File::open(path).unwrap();
    let (zero, proc, directory) = (file("/dev/zero"), file("/proc/self/status"), file("/tmp"));
    let all = [pipe.as_fd(), socket.as_fd(), zero.as_fd(), proc.as_fd(), directory.as_fd()];
    with_edu(|client| {
        client.greet("{}");
        for fd in all {
            let refused = client.ask(DMA_MAP, &map(0, 0, 0x1000), &[fd]).err();
            assert_eq!(refused, Some(libc::EOPNOTSUPP));
            client.edu_copies(0, 64, false);
        }
        // Not as memory that it does not share.
        client.ask(DMA_MAP, &map(0, 0, 0x1000), &[]).unwrap();
    });
}

/// Memory that the client has to be asked for: the next command of the server's.
fn asked(client: &mut Client) -> (u16, u16, Vec<u8>) {
    let message = client.receive();
    assert!(!message.is_reply);
    (message.id, message.command, message.body)
}

/// A client of a server that asks by a second socket: it, and that socket.
fn with_twin(script: impl FnOnce(&mut Client, Client)) -> vfio_remap::Result<()> {
    served(AMPLE, |client| {
        let (server, mut fds) = client.greet("{\"twin_socket\":{\"supported\":true}}");
        assert_eq!(server["twin_socket"]["supported"], true, "{server}");
        assert_eq!(server["twin_socket"]["fd_index"], 0, "{server}");
        assert_eq!(fds.len(), 1);
        let twin = Client::new(UnixStream::from(fds.remove(0)));
        script(client, twin);
    })
}

/// Starts a transfer of edu's from the memory at 0; the write is not waited for.
fn start_transfer(client: &mut Client) {
    client.ask(DMA_MAP, &map(0, 0, 0x1000), &[]).unwrap();
    client.write(7, 4, &6u16.to_ne_bytes());
    for (offset, value) in [(0x80, 0u64), (0x88, 0x4_0000), (0x90, 8)] {
        client.write(0, offset, &value.to_ne_bytes());
    }
    client.send(REGION_WRITE, &access(0x98, 0, 8, &1u64.to_ne_bytes()), &[]);
}

#[test]
fn the_servers_commands_go_over_the_second_socket() {
    with_twin(|client, mut twin| {
        start_transfer(client);
        let (id, command, body) = asked(&mut twin);
        assert_eq!(command, DMA_READ);
        // Meanwhile the client's commands are served by the first, and nothing else comes there.
        let written = client.receive();
        assert!(written.is_reply && written.command == REGION_WRITE);
        client.ask(GET_INFO, &words(&[16, 0, 0, 0]), &[]).unwrap();
        let reply = [&body[..], b"from RAM"].concat();
        twin.send_message(id, command, 1, &reply, &[]);
        while client.read(0, 0x98, 4)[0] & 1 != 0 {}
        assert_eq!(client.read(0, 0x4_0000, 8), b"from RAM");
        assert!(!client.has_message());
    })
    .unwrap();
}

#[test]
fn without_the_capability_there_is_one_socket() {
    for capabilities in ["{}", "{\"twin_socket\":{}}", "{\"twin_socket\":{\"supported\":false}}"] {
        with_edu(|client| {
            let (server, fds) = client.greet(capabilities);
            assert!(fds.is_empty() && server["twin_socket"].is_null(), "{server}");
            start_transfer(client);
            // The reply to the write, and the question: in any order.
            let messages = [client.receive(), client.receive()];
            let asked = messages.iter().find(|message| !message.is_reply).unwrap();
            assert_eq!(asked.command, DMA_READ);
            client.send_message(asked.id, DMA_READ, 0x21, &[], &[]);
        });
    }
}

#[test]
fn both_sockets_end_with_either() {
    // The second is closed: noticed when the client is asked.
    with_twin(|client, twin| {
        drop(twin);
        start_transfer(client);
        // After the reply to the write, if that was sent before.
        let mut rest = Vec::new();
        client.stream.read_to_end(&mut rest).unwrap();
        assert!([0, 32].contains(&rest.len()), "{rest:?}");
    })
    .unwrap();
    // A command comes by it.
    let error = with_twin(|client, mut twin| {
        start_transfer(client);
        asked(&mut twin);
        twin.send(GET_INFO, &words(&[16, 0, 0, 0]), &[]);
        assert!(twin.is_closed());
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Malformed, "{error}");
    assert!(error.to_string().contains("by the server's socket"), "{error}");
    // The first is closed while the server waits for the second.
    with_twin(|client, mut twin| {
        start_transfer(client);
        asked(&mut twin);
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(twin.is_closed());
    })
    .unwrap();
}

/// A write of `REGION_WRITE_MULTI`.
fn small(offset: u64, region: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    access(offset, region, data.len() as u32, &bytes)
}

fn multi(writes: &[Vec<u8>]) -> Vec<u8> {
    [(writes.len() as u64).to_ne_bytes().to_vec(), writes.concat()].concat()
}

#[test]
fn several_writes_in_one_message_are_done_in_their_order() {
    with_edu(|client| {
        let (server, _) = client.greet("{\"write_multiple\":true}");
        assert_eq!(server["write_multiple"], true, "{server}");
        let done = |reply: Message| {
            assert_eq!(reply.body.len(), 8);
            u64::from(reply.u32(0))
        };
        let writes = [
            small(4, 0, &1u32.to_ne_bytes()),
            small(4, 0, &2u32.to_ne_bytes()),
            small(0x4_0008, 0, b"8 bytes!"),
            small(0x4_0001, 0, b"1"),
        ];
        assert_eq!(done(client.ask(REGION_WRITE_MULTI, &multi(&writes), &[]).unwrap()), 4);
        assert_eq!(client.read(0, 4, 4), (!2u32).to_ne_bytes());
        assert_eq!(client.read(0, 0x4_0000, 16), b"\x001\0\0\0\0\0\08 bytes!");
        assert_eq!(done(client.ask(REGION_WRITE_MULTI, &multi(&[]), &[]).unwrap()), 0);

        // One that is refused is the last.
        let writes = [writes[0].clone(), small(0, 77, b"1"), writes[1].clone()];
        assert_eq!(done(client.ask(REGION_WRITE_MULTI, &multi(&writes), &[]).unwrap()), 1);
        assert_eq!(client.read(0, 4, 4), (!1u32).to_ne_bytes());
        let refused = client.ask(REGION_WRITE_MULTI, &multi(&writes[1..]), &[]).err();
        assert_eq!(refused, Some(libc::EINVAL));

        // What is malformed does nothing.
        let good = multi(&writes[2..]);
        let long = access(4, 0, 9, &[0; 8]);
        let many = [&u64::MAX.to_ne_bytes()[..], &good[8..]].concat();
        for body in [
            &good[..7],
            &good[..31],
            &[&good[..], &[0]].concat(),
            &many,
            &multi(&[writes[2].clone(), long]),
        ] {
            assert_eq!(client.ask(REGION_WRITE_MULTI, body, &[]).err(), Some(libc::EINVAL));
        }
        assert_eq!(client.read(0, 4, 4), (!1u32).to_ne_bytes());
    });
    with_edu(|client| {
        let (server, _) = client.greet("{}");
        assert!(server["write_multiple"].is_null(), "{server}");
    });
}

/// Descriptors belong to no reply of the client's.
#[test]
fn descriptors_with_a_reply_end_the_connection() {
    let error = served(AMPLE, |client| {
        client.greet("{}");
        start_transfer(client);
        let messages = [client.receive(), client.receive()];
        let asked = messages.iter().find(|message| !message.is_reply).unwrap();
        let pipe = std::io::pipe().unwrap().1;
        let reply = [&asked.body[..], &[0; 8]].concat();
        client.send_message(asked.id, DMA_READ, 1, &reply, &[pipe.as_fd()]);
        assert!(client.is_closed());
    });
    assert!(error.unwrap_err().to_string().contains("descriptors with a reply"));
}
