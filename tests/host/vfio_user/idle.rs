//! Servers that ask for memory at any time.

use std::time::Duration;

use vfio_remap::space::Access;
use vfio_remap::transport::{Transport, VfioUser};

use crate::support::peer::{DMA_MAP, DMA_READ, DMA_WRITE, Device as Served, Peer};
use crate::support::shared;

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

fn access(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&address.to_ne_bytes(), &count.to_ne_bytes(), data].concat()
}

#[test]
fn an_idle_client_answers_for_all_memory_that_it_has_mapped() {
    for with_file in [true, false] {
        let (peer, stream) = Peer::start(Served::default(), |_, _, _| {});
        let client = VfioUser::from_stream(stream, AMPLE).unwrap();
        let memory = shared::memory(0x1000, with_file);
        shared::put(&memory, 0x10, b"read");
        client.dma_map(0x1000, &memory, Access::ReadWrite).unwrap();
        let sent = peer.asked().iter().find(|asked| asked.command == DMA_MAP).unwrap().fds;
        assert_eq!(sent, usize::from(with_file));
        for _ in 0..3 {
            let read = peer.command(DMA_READ, &access(0x1010, 4, &[])).unwrap();
            assert_eq!(read[16..], *b"read");
            peer.command(DMA_WRITE, &access(0x1020, 5, b"write")).unwrap();
            assert_eq!(shared::get(&memory, 0x20, 5), b"write");
            assert_eq!(peer.command(DMA_READ, &access(0x2000, 4, &[])), Err(libc::EFAULT));
            client.read_at(0, 0, &mut [0; 4]).unwrap();
        }
        client.dma_unmap(0x1000, 0x1000).unwrap();
        assert_eq!(peer.command(DMA_READ, &access(0x1010, 4, &[])), Err(libc::EFAULT));
    }
}
