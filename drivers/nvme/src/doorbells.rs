//! The doorbells of a queue pair, in a window of their own.

use vfio_remap::{Device, Error, ErrorKind, IoRegister, Placement, Result, Window};

use super::registers::DOORBELLS;

/// The doorbells of one pair of queues (NVMe Base 1.4 §3.1.24): the submission queue's tail and the
/// completion queue's head.
///
/// The window covers these eight bytes and, with a stride larger than four, the bytes between. So its holder
/// can make registers for no other doorbells. The processor maps the whole page: see [`pairs_sharing_a_page`].
#[derive(Debug)]
pub struct Doorbells {
    pub tail: IoRegister<u32>,
    pub head: IoRegister<u32>,
    window: Option<Window>,
}

impl Doorbells {
    pub fn new(device: &Device, queue: u16, stride: u64) -> Result<Self> {
        let bar = device.bar(0)?;
        let start = offset(queue, stride);
        let end = start + stride + 4;
        if end > bar.size() {
            return Err(outside(device, queue, stride, bar.size()));
        }
        match bar.map(start..end, Placement::Anywhere) {
            Ok(window) => Ok(Self {
                tail: window.register(0)?.into(),
                head: window.register(stride as usize)?.into(),
                window: Some(window),
            }),
            Err(failed) => {
                // For example, a page that also holds the MSI-X table.
                log::info!("doorbells by system calls: {}", Error::from(failed));
                let register = |offset| bar.trapped_register(offset);
                Ok(Self { tail: register(start)?, head: register(start + stride)?, window: None })
            }
        }
    }

    /// The bytes of BAR 0 that the window covers; `None` if they could not be mapped.
    pub fn range(&self) -> Option<std::ops::Range<u64>> {
        self.window.as_ref().map(Window::region_range)
    }
}

/// How many pairs of doorbells fit into a BAR of `size` bytes.
pub fn room(stride: u64, size: u64) -> u64 {
    // The last doorbell needs no space after it.
    (size.saturating_sub(DOORBELLS) + stride).saturating_sub(4) / (2 * stride)
}

/// How many pairs of doorbells lie on one page of `page` bytes. A thread can reach the other doorbells of the
/// page by a wrong pointer, but not by a register. With one pair on each page (CAP.DSTRD of 9 for pages of 4
/// KiB), it cannot reach them at all.
pub fn pairs_sharing_a_page(stride: u64, page: u64) -> u64 {
    (page / (2 * stride)).max(1)
}

pub fn outside(device: &Device, queue: u16, stride: u64, size: u64) -> Error {
    Error::new(
        ErrorKind::Malformed,
        "find",
        format!("the doorbells of queue {queue} of {}", device.name()),
    )
    .with_reason(format!(
        "{stride:#x} bytes apart (CAP.DSTRD), they would lie at {:#x}, but BAR 0 has {size:#x} bytes",
        offset(queue, stride)
    ))
}

fn offset(queue: u16, stride: u64) -> u64 {
    DOORBELLS + 2 * u64::from(queue) * stride
}
