//! Servers that take their time to answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::device::{DmaSpace, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::{TimeLimits, Transport, VfioUser};
use vfio_remap::{Device, ErrorKind};

use crate::support::peer::{DMA_MAP, DMA_READ, DMA_UNMAP, Device as Served, Peer, RESET};
use crate::support::{peer, shared, watch};

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

/// How long one is waited for that does not answer.
const TIME: Duration = Duration::from_millis(200);

fn access(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat()
}

/// It takes longer to reset than it may take for any other answer.
#[test]
fn a_reset_has_a_time_limit_of_its_own() {
    const ANSWER: Duration = Duration::from_secs(3);
    let (_peer, stream) = Peer::start(Served::default(), |_, asked, _| {
        if asked.command == RESET {
            std::thread::sleep(ANSWER + TIME);
        }
    });
    let mut limits = TimeLimits::from(ANSWER);
    limits.reset = AMPLE;
    VfioUser::from_stream(stream, limits).unwrap().reset().unwrap();
}

/// A server that answers `command` when the test lets it, once.
fn late(command: u16) -> (Peer, VfioUser) {
    let once = AtomicBool::new(false);
    let (peer, stream) = Peer::start(Served::default(), move |_, asked, answer| {
        answer.late = asked.command == command && !once.swap(true, Ordering::Relaxed);
    });
    let mut limits = TimeLimits::from(AMPLE);
    match command {
        DMA_MAP => limits.map = TIME,
        DMA_UNMAP => limits.unmap = TIME,
        _ => limits.reset = TIME,
    }
    (peer, VfioUser::from_stream(stream, limits).unwrap())
}

#[track_caller]
fn timed_out<T: std::fmt::Debug>(result: vfio_remap::Result<T>, says: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains(says), "{error}");
    assert!(error.advice().contains("TimeLimits"), "{error}");
}

fn works(client: &VfioUser) -> bool {
    client.read_at(0, 0, &mut [0; 4]).is_ok()
}

#[test]
fn a_late_answer_does_not_end_the_connection() {
    watch::in_time(|| {
        let (peer, client) = late(RESET);
        timed_out(client.reset(), "did not answer within 200ms");
        // Until it has come, nothing is sent and nothing is waited for.
        peer.asked();
        let start = Instant::now();
        for _ in 0..10 {
            timed_out(client.read_at(0, 0, &mut [0; 4]), "has not answered DEVICE_RESET yet");
        }
        assert!(start.elapsed() < AMPLE / 2 && peer.asked().is_empty());
        peer.let_go();
        watch::until("it works again", || works(&client));
    });
}

#[test]
fn a_mapping_that_was_made_too_late_is_undone() {
    watch::in_time(|| {
        let (peer, client) = late(DMA_MAP);
        let memory = shared::memory(0x1000, true);
        timed_out(client.dma_map(0x1000, &memory, Access::ReadWrite), "did not answer within");
        peer.let_go();
        watch::until("it works again", || works(&client));
        let unmapped: Vec<_> =
            peer.asked().into_iter().filter(|asked| asked.command == DMA_UNMAP).collect();
        assert_eq!(unmapped.len(), 1);
        assert_eq!((unmapped[0].word(8), unmapped[0].word(16)), (0x1000, 0x1000));
        assert_eq!(peer.command(DMA_READ, &access(0x1000, 4, &[])), Err(libc::EFAULT));
    });
}

/// What the server may still reach, it is answered for; what it has unmapped in the end, it is not.
#[test]
fn a_mapping_that_was_unmapped_late_is_out_of_reach() {
    watch::in_time(|| {
        let (peer, client) = late(DMA_UNMAP);
        let memory = shared::memory(0x1000, true);
        client.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
        timed_out(client.dma_unmap(0x1000, 0x1000), "did not answer within");
        peer.command(DMA_READ, &access(0x1000, 4, &[])).unwrap();
        peer.let_go();
        watch::until("it works again", || works(&client));
        assert_eq!(peer.command(DMA_READ, &access(0x1000, 4, &[])), Err(libc::EFAULT));
        client.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
    });
}

/// A client and its space, with a buffer of which a second mapping is late. The server refuses that in the end.
fn mapped_twice() -> (Peer, Arc<VfioUser>, DmaSpace) {
    let maps = AtomicU32::new(0);
    let (peer, stream) = Peer::start(Served::default(), move |_, asked, answer| {
        if asked.command == DMA_MAP && maps.fetch_add(1, Ordering::Relaxed) == 1 {
            (answer.late, answer.error) = (true, Some(libc::EIO));
        }
    });
    let mut limits = TimeLimits::from(AMPLE);
    limits.map = Duration::from_secs(3);
    let client = Arc::new(VfioUser::from_stream(stream, limits).unwrap());
    let space = Device::new(client.clone()).dma().unwrap();
    let buffer = space.buffer(0x1000).unwrap();
    let again = space.map(buffer.memory(), IovaPlacement::default(), Access::ReadWrite);
    timed_out(again, "did not answer within");
    (peer, client, space)
}

/// The memory is a buffer's that was dropped meanwhile: with it the buffer's own mapping ends, on the same connection.
#[test]
fn a_late_refusal_may_end_another_mapping() {
    watch::in_time(|| {
        let (peer, client, space) = mapped_twice();
        assert_eq!(space.mapping_count(), 1, "the server may still make the second one");
        peer.let_go();
        watch::until("it works again", || works(&client));
        watch::until("both are gone", || space.mapping_count() == 0);
    });
}

/// Nothing else holds the client any more: it ends in its own thread.
#[test]
fn a_late_refusal_may_end_the_connection() {
    watch::in_time(|| {
        let (peer, client, space) = mapped_twice();
        drop((client, space));
        peer.let_go();
        peer.ended();
    });
}

#[test]
fn memory_of_a_late_mapping_is_freed_when_the_server_goes() {
    watch::in_time(|| {
        let (peer, client, space) = mapped_twice();
        let left = Arc::downgrade(&client);
        drop((client, space));
        drop(peer);
        watch::until("the client is gone", || left.strong_count() == 0);
    });
}

/// An answer that is late for another command than the one that is waited for.
#[test]
fn an_answer_to_something_else_ends_the_connection() {
    let (peer, client) = late(RESET);
    timed_out(client.reset(), "did not answer within");
    // As the peer's commands are: of an id that the client has not used.
    let reply = peer::message(999, RESET, 1, 0, &[]);
    peer.send(&reply);
    watch::until("the end", || {
        let error = client.read_at(0, 0, &mut [0; 4]).unwrap_err();
        assert!(!matches!(error.kind(), ErrorKind::Os), "{error}");
        error.kind() == ErrorKind::Gone
    });
}
