//! The data of Identify (NVMe 1.4 §5.15) and of Get Log Page (§5.14).

use super::storage::Namespace;
use super::{MAX_EVENTS, MAX_TRANSFER_PAGES, VENDOR, VERSION};

/// The size of a data structure of Identify, in bytes.
pub(super) const SIZE: usize = 4096;

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes text, padded with spaces as specified.
fn text(data: &mut [u8], at: usize, len: usize, text: &str) {
    data[at..at + len].fill(b' ');
    put(data, at, text.as_bytes());
}

pub(super) fn controller(namespaces: u32, identity: u64) -> Vec<u8> {
    let mut data = vec![0; SIZE];
    put(&mut data, 0, &VENDOR.to_le_bytes());
    put(&mut data, 2, &VENDOR.to_le_bytes());
    text(&mut data, 4, 20, "1");
    text(&mut data, 24, 40, "vfio-remap emulated NVMe");
    text(&mut data, 64, 8, "1.0");
    data[77] = MAX_TRANSFER_PAGES.trailing_zeros() as u8;
    put(&mut data, 80, &VERSION.to_le_bytes());
    // An I/O controller.
    data[111] = 1;
    // At most four Abort commands and four event requests at once (both zero-based), and one read-only firmware
    // slot.
    data[258] = 3;
    data[259] = MAX_EVENTS as u8 - 1;
    data[260] = 1 << 1 | 1;
    // The warning and the critical composite temperature, in kelvins.
    put(&mut data, 266, &343u16.to_le_bytes());
    put(&mut data, 268, &353u16.to_le_bytes());
    // The minimum and the maximum entry size: 64 and 16 bytes.
    data[512] = 0x66;
    data[513] = 0x44;
    put(&mut data, 516, &namespaces.to_le_bytes());
    // Dataset Management, Write Zeroes.
    put(&mut data, 520, &(1u16 << 2 | 1 << 3).to_le_bytes());
    // A volatile write cache; a flush may name all namespaces at once.
    data[525] = 0b111;
    let name = format!("nqn.2024-01.io.github.vfio-remap:emulated:{identity:016x}");
    put(&mut data, 768, name.as_bytes());
    data
}

pub(super) fn namespace(namespace: &Namespace) -> Vec<u8> {
    let mut data = vec![0; SIZE];
    for at in [0, 8, 16] {
        put(&mut data, at, &namespace.blocks().to_le_bytes());
    }
    // Deallocated blocks read as zeros.
    data[33] = 1;
    // Namespace attributes: write protected.
    data[99] = namespace.is_read_only().into();
    // One format without metadata, and the binary logarithm of its block size.
    data[130] = namespace.shift() as u8;
    data
}

/// The namespaces above `after`.
pub(super) fn list(count: u32, after: u32) -> Vec<u8> {
    let mut data = vec![0; SIZE];
    let (words, _) = data.as_chunks_mut::<4>();
    for (word, id) in words.iter_mut().zip((1..=count).filter(|&id| id > after)) {
        *word = id.to_le_bytes();
    }
    data
}

/// The identifiers of a namespace: an EUI-64.
pub(super) fn descriptors(id: u32) -> Vec<u8> {
    let mut data = vec![0; SIZE];
    put(&mut data, 0, &[1, 8, 0, 0]);
    put(&mut data, 4, &[2, 0, 0, 0xff]);
    put(&mut data, 8, &id.to_be_bytes());
    data
}

/// The bytes of a log page; `None` if it does not exist.
pub(super) fn log(page: u32) -> Option<Vec<u8>> {
    let mut data = vec![0; 512];
    match page {
        // No errors.
        1 => data.truncate(64),
        // Health: 300 kelvins, 100 % spare, a spare threshold of 10 %.
        2 => put(&mut data, 1, &[44, 1, 100, 10]),
        // The firmware of slot 1 is active.
        3 => {
            data[0] = 1;
            text(&mut data, 8, 8, "1.0");
        }
        _ => return None,
    }
    Some(data)
}
