//! The data of Identify (NVMe Base 1.4 §5.15.2), checked before use.

use std::time::Duration;

use vfio_remap::{Error, ErrorKind, Result};

use super::admin::PAGE;
use super::registers::Capabilities;

/// The bytes 0 to 4095.
type Data = [u8; PAGE];

/// The largest transfer if the controller states none.
const UNLIMITED: usize = 1 << 20;
/// The largest transfer of any driver: a command has at most 65536 blocks, and this counts them with 512 bytes.
const MOST_BYTES: usize = 65536 * 512;

/// The identity of a controller.
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
    /// The highest namespace ID.
    pub max_namespace_id: u32,
    /// Whether there is a volatile write cache. While it is enabled, a power loss loses data that was not
    /// flushed.
    pub has_write_cache: bool,
    /// Whether the controller has the command Write Zeroes.
    pub has_write_zeroes: bool,
    /// Whether the controller has Deallocate, of the command Dataset Management.
    pub has_deallocate: bool,
    /// The time limit of a shutdown (RTD3E, NVMe Base 1.4 §5.15.2.2); zero if the controller states none.
    pub shutdown_time: Duration,
    /// How many Asynchronous Event Requests can be outstanding.
    pub event_limit: usize,
    /// How many entries the error log has.
    pub error_entries: usize,
}

impl Identity {
    /// Parses the data structure of a controller. `page` is the driver's page size in bytes.
    pub(super) fn parse(
        data: &Data,
        name: &str,
        capabilities: Capabilities,
        page: usize,
    ) -> Result<Self> {
        let malformed = |reason: String| {
            Err(Error::new(ErrorKind::Malformed, "identify", name).with_reason(reason))
        };
        for (what, at, size) in [("submission", 512, 6), ("completion", 513, 4)] {
            let (least, most) = (data[at] & 0xf, data[at] >> 4);
            if !(least..=most).contains(&size) {
                return malformed(format!(
                    "it requires {what} queue entries of 2^{least} to 2^{most} bytes; the driver uses 2^{size}"
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
            max_transfer: max_transfer.min(super::prp::LIST * page).min(MOST_BYTES),
            max_namespace_id: u32_at(data, 516),
            has_write_cache: data[525] & 1 != 0,
            has_write_zeroes: optional & 1 << 3 != 0,
            has_deallocate: optional & 1 << 2 != 0,
            shutdown_time: Duration::from_micros(u32_at(data, 88).into()),
            event_limit: usize::from(data[259]) + 1,
            error_entries: usize::from(data[262]) + 1,
        })
    }
}

/// A namespace: blocks, numbered from zero. [`Controller::namespace`](crate::Controller::namespace) returns it,
/// with values that were checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    id: u32,
    block_count: u64,
    /// 9 to 30, such that the size in bytes fits into 64 bits.
    block_shift: u32,
    deallocated_reads_zeros: bool,
}

impl Namespace {
    /// Parses the data structure of namespace `id`.
    pub(super) fn parse(data: &Data, id: u32, name: &str, max_transfer: usize) -> Result<Self> {
        let error = |kind, reason: String| {
            let object = format!("namespace {id} of {name}");
            Err(Error::new(kind, "identify", object).with_reason(reason))
        };
        let blocks = u64::from_le_bytes(bytes(data, 0));
        // FLBAS: bits 6:5 are the upper ones if there are more than 16 formats (NVMe Base 2.0).
        let (formats, in_use) = (usize::from(data[25]) + 1, data[26]);
        let format = match formats {
            ..=16 => in_use & 0xf,
            _ => in_use & 0xf | (in_use >> 5 & 3) << 4,
        };
        if usize::from(format) >= formats.min(64) {
            return error(
                ErrorKind::Malformed,
                format!("its format has the zero-based number {format}, but there are {formats}"),
            );
        }
        let format = u32_at(data, 128 + 4 * usize::from(format));
        let (metadata, shift) = (format & 0xffff, format >> 16 & 0xff);
        if !(9..=30).contains(&shift)
            || blocks.checked_shl(shift).is_none_or(|size| size >> shift != blocks)
        {
            return error(
                ErrorKind::Malformed,
                format!("{blocks} blocks of 2^{shift} bytes are impossible"),
            );
        }
        if 1usize << shift > max_transfer {
            return error(
                ErrorKind::Unsupported,
                format!("a block has 2^{shift} bytes, but a transfer has at most {max_transfer}"),
            );
        }
        if metadata != 0 || data[29] & 7 != 0 {
            return error(
                ErrorKind::Unsupported,
                format!("its blocks have protection information or {metadata} bytes of metadata"),
            );
        }
        let deallocated_reads_zeros = data[33] & 7 == 1;
        Ok(Self { id, block_count: blocks, block_shift: shift, deallocated_reads_zeros })
    }

    /// The namespace ID (NSID).
    #[inline]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// How many blocks there are.
    #[inline]
    pub fn block_count(&self) -> u64 {
        self.block_count
    }

    /// The binary logarithm of the block size in bytes.
    #[inline]
    pub fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// Whether the namespace states that deallocated blocks read as zeros (DLFEAT).
    pub fn deallocated_reads_zeros(&self) -> bool {
        self.deallocated_reads_zeros
    }

    /// The block size in bytes.
    #[inline]
    pub fn block_size(&self) -> usize {
        1 << self.block_shift
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.block_count << self.block_shift
    }
}

/// The IDs in a list of namespaces: above `after`, up to `most`, in order, followed by zeros. `None` if the
/// data is not such a list.
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

/// Whether a namespace has blocks. The data of a namespace that is not attached is zeros.
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

/// ASCII text, padded with spaces. Other bytes become a dot.
fn text(bytes: &[u8]) -> String {
    let shown = |byte: &u8| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' };
    let end = bytes.iter().rposition(|byte| ![b' ', 0].contains(byte)).map_or(0, |last| last + 1);
    bytes[..end].iter().map(shown).collect()
}
