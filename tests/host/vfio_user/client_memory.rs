//! Clients whose memory is of huge pages or a file on a disk, or a file that must not be touched.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::support::alone::alone;
use crate::support::fuse::Fuse;
use crate::support::memory_files::{HUGE, Mapped, of_huge_pages, on_disk};
use crate::support::scripted_client::{
    AMPLE, Client, DMA_MAP, DMA_UNMAP, GET_INFO, SET_IRQS, map, served, with_edu, words,
};
use crate::support::watch;

const PAGE: u64 = 4096;

fn put(file: &File, size: u64, at: u64, data: &[u8]) {
    Mapped::new(file, size).unwrap().put(at, data);
}

/// Edu reads and writes memory at `address`, which lies at `at` of the file.
fn is_reached(client: &mut Client, file: &File, size: u64, address: u64, at: u64) {
    let text = format!("from the file at {at:#x}");
    put(file, size, at, text.as_bytes());
    client.edu_copies(address, text.len() as u64, false);
    assert_eq!(client.read(0, 0x4_0000, text.len() as u32), text.as_bytes());
    client.write(0, 0x4_0000, b"TO");
    client.edu_copies(address, 2, true);
    assert_eq!(Mapped::new(file, size).unwrap().get(at, 2), b"TO");
}

/// The whole of it, and parts that begin and end anywhere.
fn is_mapped(file: &File, size: u64) {
    with_edu(|client| {
        client.greet("{}");
        let parts = [(0, size), (PAGE, PAGE), (size - 3 * PAGE, 3 * PAGE), (8, 100)];
        for (index, (offset, len)) in parts.into_iter().enumerate() {
            let address = (index as u64 + 1) << 24;
            client.ask(DMA_MAP, &map(offset, address, len), &[file.as_fd()]).unwrap();
            is_reached(client, file, size, address, offset);
            is_reached(client, file, size, address + len - 40, offset + len - 40);
        }
        let (offset, len) = parts[1];
        let unmap =
            [&words(&[24, 0])[..], &(2u64 << 24).to_ne_bytes(), &len.to_ne_bytes()].concat();
        client.ask(DMA_UNMAP, &unmap, &[]).unwrap();
        put(file, size, offset, b"once more");
        client.write(0, 0x4_0000, &[0; 9]);
        client.edu_copies(2 << 24, 9, false);
        assert_eq!(client.read(0, 0x4_0000, 9), [0; 9], "it is not reached any more");
        // What is not in the file, and what cannot be.
        for (offset, len) in [(size, 1), (0, size + 1), (u64::MAX, 2), (1 << 63, 1), (0, 0)] {
            let refused = client.ask(DMA_MAP, &map(offset, 1 << 30, len), &[file.as_fd()]).err();
            assert_eq!(refused, Some(libc::EINVAL), "{offset:#x}, {len:#x}");
        }
    });
}

#[test]
fn memory_of_huge_pages_is_reached() {
    if let Some(file) = of_huge_pages(3) {
        is_mapped(&file, 3 * HUGE);
    }
}

#[test]
fn a_file_on_a_disk_is_reached() {
    if let Some(file) = on_disk(16 * PAGE) {
        is_mapped(&file, 16 * PAGE);
    }
}

#[test]
fn a_file_that_is_cut_short_is_a_transfer_that_fails() {
    for (file, size) in [(on_disk(16 * PAGE), 16 * PAGE), (of_huge_pages(1), HUGE)] {
        let Some(file) = file else { continue };
        with_edu(|client| {
            client.greet("{}");
            client.ask(DMA_MAP, &map(0, 0, size), &[file.as_fd()]).unwrap();
            is_reached(client, &file, size, 0, 0);
            file.set_len(0).unwrap();
            client.write(0, 0x4_0000, b"as it was");
            client.edu_copies(0, 9, false);
            assert_eq!(client.read(0, 0x4_0000, 9), b"as it was");
            client.edu_copies(0, 9, true);
            assert_eq!(file.metadata().unwrap().len(), 0);
        });
    }
}

#[test]
fn a_file_that_is_open_for_reading_is_mapped_for_reading() {
    let Some(file) = on_disk(PAGE) else { return };
    file.write_all_at(b"read me", 0).unwrap();
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(path).unwrap();
    with_edu(|client| {
        client.greet("{}");
        let both = map(0, 0, PAGE);
        assert_eq!(client.ask(DMA_MAP, &both, &[read_only.as_fd()]).err(), Some(libc::EACCES));
        let reading = [&words(&[32, 1]), &both[8..]].concat();
        client.ask(DMA_MAP, &reading, &[read_only.as_fd()]).unwrap();
        client.edu_copies(0, 7, false);
        assert_eq!(client.read(0, 0x4_0000, 7), b"read me");
        client.edu_copies(0x10, 7, true);
        let mut data = [9; 8];
        file.read_exact_at(&mut data, 0x10).unwrap();
        assert_eq!(data, [0; 8]);
    });
}

/// A mapping of its own, and no descriptor: what is unmapped is given back.
#[test]
fn mapped_files_are_closed_and_unmapped() {
    let Some(file) = on_disk(PAGE) else { return };
    let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap()).to_string();
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(&*inode)).count()
    };
    with_edu(|client| {
        client.greet("{}");
        for page in 0..4 {
            client.ask(DMA_MAP, &map(0, page * PAGE, PAGE), &[file.as_fd()]).unwrap();
        }
        assert_eq!(mappings(), 4);
        client.ask(DMA_MAP, &map(0, PAGE, PAGE), &[file.as_fd()]).err().unwrap();
        assert_eq!(mappings(), 4, "what is refused is not kept");
        let unmap = [&words(&[24, 0])[..], &PAGE.to_ne_bytes(), &PAGE.to_ne_bytes()].concat();
        client.ask(DMA_UNMAP, &unmap, &[]).unwrap();
        assert_eq!(mappings(), 3);
    });
    assert_eq!(mappings(), 0, "a client that leaves takes its memory along");
}

/// A file in FUSE whose file system has stopped answering: a thread that asks it waits.
#[test]
fn a_file_in_fuse_is_refused_and_holds_up_nobody() {
    alone(|| {
        let Some(mut fuse) = Fuse::mount() else { return };
        let file = fuse.open();
        fuse.fall_silent();
        // Dropped in this order: by then the file is not waited for.
        let both = (fuse, Arc::new(file));
        let sent = both.1.clone();
        watch::in_time(move || {
            // It may notice that the client has left by not being able to reply.
            let _ = served(AMPLE, |client| {
                client.greet("{}");
                for _ in 0..3 {
                    let refused = client.ask(DMA_MAP, &map(0, 0, PAGE), &[sent.as_fd()]).err();
                    assert_eq!(refused, Some(libc::EOPNOTSUPP));
                }
                let eventfds = words(&[20, 0x24, 1, 0, 1]);
                let refused = client.ask(SET_IRQS, &eventfds, &[sent.as_fd()]).err();
                assert_eq!(refused, Some(libc::EINVAL));
                // Beside a command that takes none, and with one that may not be served any more.
                client.ask(GET_INFO, &words(&[16, 0, 0, 0]), &[sent.as_fd()]).unwrap();
                client.send(GET_INFO, &words(&[16, 0, 0, 0]), &[sent.as_fd()]);
            });
        });
    });
}
