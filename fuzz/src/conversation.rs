//! Conversations of our client with our server, as inputs to start from.

use std::io::{IoSliceMut, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::close;
use vfio_remap::emulated::{Emulated, Server};
use vfio_remap::space::Access;
use vfio_remap::transport::{MemoryDevice, Transport, VfioUser};
use vfio_remap::{Device, Placement, Window};

use crate::messages::{Message, append, flag};

/// Memory of no file.
static MEMORY: LazyLock<Window> = LazyLock::new(|| {
    let device = Device::new(Arc::new(MemoryDevice::new(0x1000).expect("memory")));
    let bar = device.bar(0).expect("its only region");
    bar.map(.., Placement::Anywhere).expect("a window")
});

/// Asks a server for all that a client can ask for; where `with_memory`, has it reach memory by messages,
/// for which the client starts a thread.
pub fn drive(client: VfioUser, with_memory: bool) {
    let client = Arc::new(client);
    let _ = client.read_at(0, 0, &mut [0; 4]);
    let _ = client.write_at(0, 0, &[0; 4]);
    let _ = client.irq(0);
    let event = crate::eventfd();
    let _ = client.set_irqs(0, 0, &[Some(event.as_fd()), None]);
    let _ = client.set_irqs(2, 0, &[]);
    let _ = client.mask_irqs(0, 0..1, true);
    let _ = client.dma_limits();
    if with_memory {
        let _ = client.dma_map(0, &MEMORY.dma_memory(), Access::ReadWrite);
    }
    let _ = client.dma_unmap(0, 0x1000);
    let _ = client.reset();
    let device = Device::new(client);
    for region in device.regions().take(8) {
        // The file is as long as was said, and stays so: every word can be loaded.
        if let Some(part) = region.layout().mappable().next()
            && let Ok(window) = region.map(part, Placement::Anywhere)
            && let Some(last) = window.size().checked_sub(1)
            && let Ok(register) = window.read_only_register::<u8>(last)
        {
            register.read();
        }
    }
}

/// Has a client drive a device over a socket: the inputs of the commands, and of the replies to them.
pub fn record(device: &Emulated, drive: impl FnOnce(VfioUser)) -> [Vec<u8>; 2] {
    const TIME: Duration = Duration::from_secs(5);
    let pair = || UnixStream::pair().expect("a socket pair");
    let ((client, from_client), (to_server, server)) = (pair(), pair());
    thread::scope(|scope| {
        let served = scope.spawn(|| Server::serve_stream(device, server, TIME));
        let commands = scope.spawn(|| relay(&from_client, &to_server));
        let replies = scope.spawn(|| relay(&to_server, &from_client));
        drive(VfioUser::from_stream(client, TIME).expect("our own server"));
        let inputs = [commands, replies].map(|relay| relay.join().expect("a relay"));
        served.join().expect("a server").expect("an honest client");
        inputs
    })
}

/// Hands messages on until there are no more, as an input.
fn relay(mut from: &UnixStream, to: &UnixStream) -> Vec<u8> {
    let mut input = Vec::new();
    let mut bytes = [0; 16];
    loop {
        let fds = match receive(from, &mut bytes[..1]) {
            Some(fds) => fds,
            None => break,
        };
        from.read_exact(&mut bytes[1..]).expect("a header");
        let field = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let mut body = vec![0; field(4) as usize - bytes.len()];
        from.read_exact(&mut body).expect("a body");
        let (command, failed) = (bytes[2], field(8) & 0x20 != 0);
        let with = if command == 8 { flag::WITH_OTHER } else { flag::WITH_MEMORY };
        let flags = u8::from(failed) * flag::SPECIAL | u8::from(!fds.is_empty()) * with;
        append(&mut input, Message { command, flags, body: &body });
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let message = [&bytes[..], &body].concat();
        let parts = [std::io::IoSlice::new(&message)];
        sendmsg::<()>(to.as_raw_fd(), &parts, control, MsgFlags::empty(), None).expect("a send");
        fds.into_iter().for_each(|fd| close(fd).expect("a descriptor of ours"));
    }
    // The peer may have left before.
    let _ = to.shutdown(Shutdown::Write);
    input
}

/// The first byte of a message, and the descriptors that come with it. `None` at the end.
fn receive(from: &UnixStream, byte: &mut [u8]) -> Option<Vec<RawFd>> {
    let mut space = cmsg_space!([RawFd; 64]);
    let mut parts = [IoSliceMut::new(byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags);
    let message = message.expect("a message");
    let fds = message.cmsgs().expect("control messages").flat_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds,
        _ => Vec::new(),
    });
    let fds = fds.collect();
    (message.bytes > 0).then_some(fds)
}
