//! What a hostile server answers to our client.
//!
//! The input is a list of replies. Ids follow one another, as the client's do, unless a flag says
//! otherwise. Where the first is none to `VERSION`, an honest one comes before it.

#![no_main]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use vfio_remap::transport::VfioUser;
use vfio_remap_fuzz::messages::{Message, Said, decode, flag};
use vfio_remap_fuzz::{drive, memory, run, seeds, start};

const TIME: Duration = Duration::from_millis(20);
const VERSION: u8 = 1;

/// One that is long enough for the regions of our models, one that is not, and one of another identity.
static MEMORY: LazyLock<[OwnedFd; 3]> =
    LazyLock::new(|| [memory(1 << 20), memory(0x1800), memory(1 << 20)]);

fn replies(input: &[u8], server: &Said) {
    let honest = Message { command: VERSION, flags: 0, body: &[0, 0, 1, 0] };
    let greeting = input.first().is_some_and(|command| *command != VERSION).then_some(honest);
    let mut id = 0u16;
    for message in greeting.into_iter().chain(decode(input)) {
        let is_reply = !message.has(flag::WRONG_TYPE);
        let failed = u32::from(message.has(flag::SPECIAL));
        let bytes = message.encode(id, u32::from(is_reply) | failed << 5, failed * 22);
        let [long, short, other] = MEMORY.each_ref().map(AsRawFd::as_raw_fd);
        let fds = match (message.has(flag::WITH_MEMORY), message.has(flag::WITH_OTHER)) {
            (false, false) => &[][..],
            (true, false) if message.has(flag::CHOICE) => &[long, other],
            (true, false) => &[long],
            (false, true) => &[short],
            (true, true) => &[long, short],
        };
        server.say_message(message, &bytes, fds);
        id = id.wrapping_add(is_reply.into());
    }
}

fuzz_target!(init: start(seeds::of_client), |input: &[u8]| {
    run(|| {
        let (server, stream) = Said::pair();
        replies(input, &server);
        server.ends();
        if let Ok(client) = VfioUser::from_stream(stream, TIME) {
            let with_memory = decode(input).next().is_some_and(|first| first.has(flag::CHOICE));
            drive(client, with_memory);
        }
    });
});
