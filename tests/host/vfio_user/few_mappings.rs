//! Servers that accept few mappings for DMA, and do not say how many: libvfio-user answers the next by EINVAL.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};
use vfio_remap::{Device, ErrorKind};

use crate::support::hostile_server::{EVERY, Reply, VERSION, serve};
use crate::support::shared;

const AMPLE: Duration = Duration::from_secs(60);
const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;

/// Runs `f` with a client of a server that accepts `most` mappings, and states `stated`, if that is something.
/// The most mappings that there ever were.
fn with_most(most: usize, stated: Option<u32>, f: impl FnOnce(VfioUser)) -> usize {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let (mapped, peak) = (AtomicUsize::new(0), AtomicUsize::new(0));
        serve(theirs, EVERY, |reply: &mut Reply| {
            let command = u16::from_ne_bytes([reply.bytes[2], reply.bytes[3]]);
            match (command, stated) {
                (VERSION, Some(stated)) => {
                    let json = format!(
                        "{{\"capabilities\":{{\"max_msg_fds\":8,\"max_dma_maps\":{stated}}}}}\0"
                    );
                    reply.set_body(&[&[0, 0, 1, 0], json.as_bytes()].concat());
                }
                (DMA_MAP, _) if mapped.load(Ordering::Relaxed) == most => {
                    reply.set_u32(8, 0x21);
                    reply.set_u32(12, libc::EINVAL as u32);
                }
                (DMA_MAP, _) => {
                    let now = mapped.fetch_add(1, Ordering::Relaxed) + 1;
                    peak.fetch_max(now, Ordering::Relaxed);
                }
                (DMA_UNMAP, _) => _ = mapped.fetch_sub(1, Ordering::Relaxed),
                _ => {}
            }
        });
        assert_eq!(mapped.load(Ordering::Relaxed), 0, "left behind");
        peak.load(Ordering::Relaxed)
    });
    f(VfioUser::from_stream(ours, AMPLE).unwrap());
    server.join().unwrap()
}

#[test]
fn a_limit_that_a_server_does_not_state_is_named() {
    let memory = shared::memory(4096, true);
    for (most, stated, kind) in [
        (16, None, ErrorKind::TooManyMappings),
        (64, None, ErrorKind::TooManyMappings),
        // Such a server has another reason.
        (16, Some(64), ErrorKind::Os),
        (15, None, ErrorKind::Os),
    ] {
        with_most(most, stated, |client| {
            let map = |page: u64| client.dma_map(page << 12, &memory, Access::ReadWrite);
            (0..most as u64).for_each(|page| map(page).unwrap());
            let error = map(most as u64).unwrap_err();
            assert_eq!((error.kind(), error.errno()), (kind, Some(libc::EINVAL)), "{error}");
            if kind == ErrorKind::TooManyMappings {
                assert!(error.to_string().contains(&format!("has {most} mappings")), "{error}");
                assert!(error.advice().contains("DmaSpace::buffer"), "{error}");
            }
            // One that was refused is not there.
            client.dma_unmap(0, 4096).unwrap();
            map(most as u64).unwrap();
            (1..=most as u64).for_each(|page| client.dma_unmap(page << 12, 4096).unwrap());
        });
    }
}

#[test]
fn a_server_of_16_mappings_is_given_a_thousand_buffers() {
    let peak = with_most(16, None, |client| {
        let space = Device::new(Arc::new(client)).dma().unwrap();
        let sizes = [1, 4096, 20_000, 64 << 10];
        let buffers: Vec<_> =
            (0..1000).map(|number| space.buffer(sizes[number % 4]).unwrap()).collect();
        assert!(space.mapping_count() <= 16);
        drop(buffers);
    });
    assert!((2..=16).contains(&peak), "{peak}");
}
