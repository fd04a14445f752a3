//! What Identify answers (NVMe Base 1.4 §5.15.2), checked before anything is computed from it.

use std::time::Duration;

use vfio_remap::{Error, ErrorKind, Result};

use super::admin::PAGE;
use super::registers::Capabilities;

/// Offset 0 to 4095.
type Data = [u8; PAGE];

/// The largest transfer where the controller states none.
const UNLIMITED: usize = 1 << 20;
/// A command has 65536 blocks at most, and no block is smaller than 512 bytes.
const MOST_BYTES: usize = 65536 * 512;

/// What the controller says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// The PCI vendor ID.
    pub vendor: u16,
    /// The serial number.
    pub serial: String,
    /// The model number.
    pub model: String,
    /// The firmware revision.
    pub firmware: String,
    /// The largest transfer of a command, in bytes.
    pub max_transfer: usize,
    /// The highest number of a namespace.
    pub namespaces: u32,
    /// What was written and not flushed is lost with the power, while this is on.
    pub has_write_cache: bool,
    /// The command Write Zeroes.
    pub has_write_zeroes: bool,
    /// Deallocate, of the Dataset Management command.
    pub has_deallocate: bool,
    /// How long a shutdown may take (RTD3E, NVMe Base 1.4 §5.15.2.2); zero where it does not say.
    pub shutdown_time: Duration,
    /// How many requests for events it holds.
    pub event_limit: usize,
    /// How many errors its log holds.
    pub error_entries: usize,
}

impl Identity {
    /// From the data structure of a controller, where `page` is the driver's page size in bytes.
    pub(super) fn parse(
        data: &Data,
        name: &str,
        capabilities: Capabilities,
        page: usize,
    ) -> Result<Self> {
        let nonsense = |reason: String| {
            Err(Error::new(ErrorKind::Malformed, "identify", name).because(reason))
        };
        for (what, at, size) in [("submission", 512, 6), ("completion", 513, 4)] {
            let (least, most) = (data[at] & 0xf, data[at] >> 4);
            if !(least..=most).contains(&size) {
                return nonsense(format!(
                    "it wants {what} queue entries of 2^{least} to 2^{most} bytes, and not of 2^{size}"
                ));
            }
        }
        let smallest = 1usize << capabilities.page_shift();
        let max_transfer = match data[77] {
            0 => UNLIMITED,
            shift => smallest
                .checked_shl(shift.into())
                .filter(|&max| max >> shift == smallest)
                .unwrap_or(UNLIMITED),
        };
        let optional = u16_at(data, 520);
        Ok(Self {
            vendor: u16_at(data, 0),
            serial: text(&data[4..24]),
            model: text(&data[24..64]),
            firmware: text(&data[64..72]),
            max_transfer: max_transfer.min(super::pair::LIST * page).min(MOST_BYTES),
            namespaces: u32_at(data, 516),
            has_write_cache: data[525] & 1 != 0,
            has_write_zeroes: optional & 1 << 3 != 0,
            has_deallocate: optional & 1 << 2 != 0,
            shutdown_time: Duration::from_micros(u32_at(data, 88).into()),
            event_limit: usize::from(data[259]) + 1,
            error_entries: usize::from(data[262]) + 1,
        })
    }
}

/// A namespace: blocks, numbered from zero on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its number (NSID).
    pub id: u32,
    /// How many blocks there are.
    pub blocks: u64,
    /// A block's size as a power of two, in bytes.
    pub block_shift: u32,
    /// Whether deallocated blocks read zeros (DLFEAT), as far as it says.
    pub deallocated_reads_zeros: bool,
}

impl Namespace {
    /// From the data structure of namespace `id`.
    pub(super) fn parse(data: &Data, id: u32, name: &str, max_transfer: usize) -> Result<Self> {
        let error = |kind, reason: String| {
            let object = format!("namespace {id} of {name}");
            Err(Error::new(kind, "identify", object).because(reason))
        };
        let blocks = u64::from_le_bytes(bytes(data, 0));
        // FLBAS: bits 6:5 are the higher ones where there are more than 16 formats (NVMe Base 2.0).
        let (formats, in_use) = (usize::from(data[25]) + 1, data[26]);
        let format = match formats {
            ..=16 => in_use & 0xf,
            _ => in_use & 0xf | (in_use >> 5 & 3) << 4,
        };
        if usize::from(format) >= formats.min(64) {
            return error(
                ErrorKind::Malformed,
                format!("its format is number {format} of {formats}, counted from zero"),
            );
        }
        let format = u32_at(data, 128 + 4 * usize::from(format));
        let (metadata, shift) = (format & 0xffff, format >> 16 & 0xff);
        if !(9..=30).contains(&shift)
            || blocks.checked_shl(shift).is_none_or(|size| size >> shift != blocks)
        {
            return error(
                ErrorKind::Malformed,
                format!("{blocks} blocks of 2^{shift} bytes make no sense"),
            );
        }
        if 1usize << shift > max_transfer {
            return error(
                ErrorKind::Unsupported,
                format!("a block has 2^{shift} bytes, and a transfer {max_transfer} at most"),
            );
        }
        if metadata != 0 || data[29] & 7 != 0 {
            return error(
                ErrorKind::Unsupported,
                format!("{metadata} bytes of metadata belong to each block, or protect it"),
            );
        }
        let deallocated_reads_zeros = data[33] & 7 == 1;
        Ok(Self { id, blocks, block_shift: shift, deallocated_reads_zeros })
    }

    /// A block's size in bytes.
    #[inline]
    pub fn block_size(&self) -> usize {
        1 << self.block_shift
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.blocks << self.block_shift
    }
}

/// The numbers in a list of namespaces above `after`, up to `most`: in order, and zeros behind them. `None`
/// where the data are no such list.
pub(super) fn list(data: &Data, after: u32, most: u32) -> Option<Vec<u32>> {
    let (words, _) = data.as_chunks::<4>();
    let ids: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let end = ids.iter().position(|id| *id == 0).unwrap_or(ids.len());
    let (ids, zeros) = ids.split_at(end);
    let is_list = ids.first().is_none_or(|first| *first > after)
        && ids.last().is_none_or(|last| *last <= most)
        && ids.is_sorted_by(|id, next| id < next)
        && zeros.iter().all(|id| *id == 0);
    is_list.then(|| ids.to_vec())
}

/// Whether a namespace has blocks: the data of one that is not attached are zeros.
pub(super) fn is_there(data: &Data) -> bool {
    data[..8].iter().any(|byte| *byte != 0)
}

pub(super) fn bytes<const N: usize>(data: &Data, at: usize) -> [u8; N] {
    std::array::from_fn(|index| data[at + index])
}

pub(super) fn u16_at(data: &Data, at: usize) -> u16 {
    u16::from_le_bytes(bytes(data, at))
}

pub(super) fn u32_at(data: &Data, at: usize) -> u32 {
    u32::from_le_bytes(bytes(data, at))
}

/// Text, which is ASCII and padded with spaces; anything else shows as a dot.
fn text(bytes: &[u8]) -> String {
    let shown = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
    let end = bytes.iter().rposition(|byte| ![b' ', 0].contains(byte)).map_or(0, |last| last + 1);
    bytes[..end].iter().map(shown).collect()
}
