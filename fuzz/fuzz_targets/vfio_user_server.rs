//! What a hostile client sends to our server: `cargo +nightly fuzz run vfio_user_server`.
//!
//! The input is a list of commands: a command, flags, a length, a body. All of them wait in the socket
//! before the server reads.

#![no_main]

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vfio_remap::transport::{Edu, Emulated, Namespace, Nvme, Server, Transport};
use vfio_remap_fuzz::{eventfd, memory, send};

const TIME: Duration = Duration::from_millis(1);

const REPLY: u8 = 1;
const WRONG_SIZE: u8 = 2;
const NO_REPLY: u8 = 4;
const WITH_FILE: u8 = 8;
const WITH_EVENTFD: u8 = 16;
const NO_GREETING: u8 = 32;
/// In the first command: it is nvme that is served, not edu.
const TO_NVME: u8 = 64;

static EDU: LazyLock<Emulated> = LazyLock::new(|| Emulated::new(Edu::new()).expect("a device"));

static NVME: LazyLock<Emulated> = LazyLock::new(|| {
    let namespace = Namespace::memory(1 << 20, 512).expect("a namespace");
    Emulated::new(Nvme::new(vec![namespace])).expect("a device")
});

fn commands(mut input: &[u8], stream: &UnixStream) {
    if input.get(1).is_none_or(|flags| flags & NO_GREETING == 0) {
        let greeting = [0, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        send(stream, &greeting, &[]);
    }
    while let [command, flags, len, rest @ ..] = input {
        let has = |flag| flags & flag != 0;
        let body;
        (body, input) = rest.split_at((*len as usize).min(rest.len()));
        let size = if has(WRONG_SIZE) { u32::from(*len) << 16 } else { 16 + body.len() as u32 };
        let kind = u32::from(has(REPLY)) | u32::from(has(NO_REPLY)) << 4;
        let mut bytes = 0u16.to_ne_bytes().to_vec();
        bytes.extend(u16::from(*command).to_ne_bytes());
        for field in [size, kind, 0] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(body);
        let mut fds = Vec::new();
        if has(WITH_FILE) {
            fds.push(memory(0x1000));
        }
        if has(WITH_EVENTFD) {
            fds.push(eventfd());
        }
        send(stream, &bytes, &fds);
    }
}

fuzz_target!(|input: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    commands(input, &ours);
    ours.shutdown(Shutdown::Write).expect("a shutdown");
    let nvme = input.get(1).is_some_and(|flags| flags & TO_NVME != 0);
    let device = if nvme { &*NVME } else { &*EDU };
    let _ = Server::serve_stream(device, theirs, TIME);
    assert_eq!(device.dma_limits().expect("limits").mappings, Some(65535), "mappings are left");
    device.reset().expect("a reset");
});
