//! What a hostile client sends to our server.
//!
//! The input is a list of commands, and of replies to the server's own. Where the first is not `VERSION`,
//! that comes before it.

#![no_main]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vfio_remap::emulated::nvme::Namespace;
use vfio_remap::emulated::{Edu, Emulated, Nvme, Server};
use vfio_remap::transport::Transport;
use vfio_remap_fuzz::messages::{Message, Said, decode, flag};
use vfio_remap_fuzz::{eventfd, memory, run, seeds, start};

const TIME: Duration = Duration::from_millis(1);
const VERSION: u8 = 1;

static EDU: LazyLock<Emulated> = LazyLock::new(|| Emulated::new(Edu::new()).expect("a device"));

static NVME: LazyLock<Emulated> = LazyLock::new(|| {
    let namespace = Namespace::memory(1 << 20, 512).expect("a namespace");
    Emulated::new(Nvme::new(vec![namespace])).expect("a device")
});

/// Memory, and an eventfd.
static FILES: LazyLock<[OwnedFd; 2]> = LazyLock::new(|| [memory(0x1_0000), eventfd()]);

fn commands(input: &[u8], client: &Said) {
    let honest = Message { command: VERSION, flags: 0, body: &[0, 0, 1, 0] };
    let greeting = input.first().is_some_and(|command| *command != VERSION).then_some(honest);
    let mut replies = 0;
    for message in greeting.into_iter().chain(decode(input)) {
        let is_reply = message.has(flag::WRONG_TYPE);
        let kind = u32::from(is_reply) | u32::from(message.has(flag::SPECIAL)) << 4;
        let bytes = message.encode(if is_reply { replies } else { 0 }, kind, 0);
        let [memory, eventfd] = FILES.each_ref().map(AsRawFd::as_raw_fd);
        let fds = match (message.has(flag::WITH_MEMORY), message.has(flag::WITH_OTHER)) {
            (false, false) => &[][..],
            (true, false) => &[memory],
            (false, true) => &[eventfd],
            (true, true) => &[memory, eventfd],
        };
        client.say_message(message, &bytes, fds);
        replies = replies.wrapping_add(is_reply.into());
    }
}

fuzz_target!(init: start(seeds::of_server), |input: &[u8]| {
    run(|| {
        let (client, stream) = Said::pair();
        commands(input, &client);
        client.ends();
        let nvme = decode(input).next().is_some_and(|first| first.has(flag::CHOICE));
        let device = if nvme { &*NVME } else { &*EDU };
        let _ = Server::serve_stream(device, stream, TIME);
        assert_eq!(device.dma_limits().expect("limits").available_mappings, Some(65535), "mappings are left");
        device.reset().expect("a reset");
    });
});
