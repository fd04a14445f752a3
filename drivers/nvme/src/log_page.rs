//! Log pages (NVMe Base 1.4 §5.14.1).

use super::admin::PAGE;
use super::identify::{bytes, u16_at, u32_at};
use super::status::Status;

/// The error log, and the health log.
pub const ERRORS: u8 = 0x01;
pub const HEALTH: u8 = 0x02;

/// Bytes of an entry of the error log.
pub const ERROR_ENTRY: usize = 64;

/// The health of the controller (SMART / Health Information, log page 02h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// Critical warnings, one for each bit: 0 spare, 1 temperature, 2 reliability, 3 read-only, 4 backup of the
    /// volatile memory.
    pub warnings: u8,
    /// The temperature in kelvins.
    pub temperature: u16,
    /// The remaining spare blocks, in per cent.
    pub spare: u8,
    /// The warning threshold for spare blocks, in per cent.
    pub spare_threshold: u8,
    /// The used part of the expected life, in per cent; may exceed 100.
    pub used: u8,
    /// The data that was read, in thousands of 512 bytes.
    pub units_read: u128,
    /// The data that was written, in thousands of 512 bytes.
    pub units_written: u128,
    /// How often it was powered on.
    pub power_cycles: u128,
    /// The time with power, in hours.
    pub power_on_hours: u128,
    /// How often power was lost without a shutdown.
    pub unsafe_shutdowns: u128,
    /// Media errors that the controller could not correct.
    pub media_errors: u128,
}

impl Health {
    pub(super) fn parse(data: &[u8; PAGE]) -> Self {
        let wide = |at| u128::from_le_bytes(bytes(data, at));
        Self {
            warnings: data[0],
            temperature: u16_at(data, 1),
            spare: data[3],
            spare_threshold: data[4],
            used: data[5],
            units_read: wide(32),
            units_written: wide(48),
            power_cycles: wide(112),
            power_on_hours: wide(128),
            unsafe_shutdowns: wide(144),
            media_errors: wide(160),
        }
    }
}

/// An entry of the error log (log page 01h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ErrorEntry {
    /// The number of the error, counted from one over the controller's life.
    pub number: u64,
    /// The submission queue of the command.
    pub queue: u16,
    /// The command's identifier; FFFFh if the error belongs to no command.
    pub command: u16,
    /// The command's status.
    pub status: Status,
    /// The first logical block that has an error.
    pub block: u64,
    /// The namespace.
    pub namespace: u32,
}

impl ErrorEntry {
    /// The entries in the first `len` bytes of a page. Entries with the number zero are unused.
    pub(super) fn parse(data: &[u8; PAGE], len: usize) -> Vec<Self> {
        let entries = (0..len.min(PAGE) / ERROR_ENTRY).map(|index| index * ERROR_ENTRY);
        entries
            .map(|at| Self {
                number: u64::from_le_bytes(bytes(data, at)),
                queue: u16_at(data, at + 8),
                command: u16_at(data, at + 10),
                status: Status::from_field(u16_at(data, at + 12) >> 1),
                block: u64::from_le_bytes(bytes(data, at + 16)),
                namespace: u32_at(data, at + 24),
            })
            .filter(|entry| entry.number != 0)
            .collect()
    }
}
