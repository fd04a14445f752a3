//! What a hostile server answers to our client: `cargo +nightly fuzz run vfio_user_client`.
//!
//! The input is a list of replies: a command, flags, a length, a body. Ids follow one another, as the
//! client's do, unless a flag says otherwise. All of them wait in the socket before the client asks.

#![no_main]

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, Placement};
use vfio_remap_fuzz::{memory, send};

const TIME: Duration = Duration::from_millis(20);

const WRONG_ID: u8 = 1;
const WRONG_SIZE: u8 = 2;
const ERROR: u8 = 4;
const COMMAND: u8 = 8;
const WITH_FILE: u8 = 16;
const WITH_SHORT_FILE: u8 = 32;

fn replies(mut input: &[u8], stream: &UnixStream) {
    let mut id = 0u16;
    while let [command, flags, len, rest @ ..] = input {
        let has = |flag| flags & flag != 0;
        let body;
        (body, input) = rest.split_at((*len as usize).min(rest.len()));
        let wrong = u16::from(has(WRONG_ID));
        let size = if has(WRONG_SIZE) { u32::from(*len) << 16 } else { 16 + body.len() as u32 };
        let kind = u32::from(!has(COMMAND)) | u32::from(has(ERROR)) << 5;
        let mut bytes = id.wrapping_add(wrong).to_ne_bytes().to_vec();
        bytes.extend(u16::from(*command).to_ne_bytes());
        for field in [size, kind, u32::from(has(ERROR)) * 22] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(body);
        let mut fds = Vec::new();
        if has(WITH_FILE) {
            fds.push(memory(1 << 20));
        }
        if has(WITH_SHORT_FILE) {
            fds.push(memory(0x1800));
        }
        send(stream, &bytes, &fds);
        id = id.wrapping_add(u16::from(!has(COMMAND)));
    }
}

fuzz_target!(|input: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    replies(input, &theirs);
    theirs.shutdown(Shutdown::Write).expect("a shutdown");
    let Ok(client) = VfioUser::from_stream(ours, TIME) else { return };
    let client = Arc::new(client);
    let _ = client.read_at(0, 0, &mut [0; 4]);
    let _ = client.write_at(0, 0, &[0; 4]);
    let _ = client.irq(0);
    let event = memory(8);
    let _ = client.set_irqs(0, 0, &[Some(event.as_fd()), None]);
    let _ = client.dma_limits();
    let _ = client.dma_unmap(0, 0x1000);
    let _ = client.reset();
    let device = Device::new(client);
    for bar in device.bars().take(8) {
        // The file is as long as was said, and stays so: every word can be loaded.
        if let Some(part) = bar.layout().mappable().next()
            && let Ok(window) = bar.map(part, Placement::Anywhere)
            && let Some(last) = window.size().checked_sub(1)
            && let Ok(register) = window.read_only_register::<u8>(last)
        {
            register.read();
        }
    }
});
