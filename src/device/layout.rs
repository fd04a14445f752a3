//! Which parts of a region can be mapped, and which are trapped.

use std::fmt;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::transport::RegionInfo;

/// Why a part of a region cannot be mapped. It is reached by reads and writes of the device's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Trap {
    /// The region holds I/O ports.
    IoPorts,
    /// The transport does not let the region be mapped.
    NotMappable,
    /// Only parts of the region can be mapped, and this is not one of them.
    OutsideAreas,
    /// These pages hold the MSI-X table (PCIe 5.0 §7.7.2), which VFIO programs.
    MsixTable,
    /// These pages hold the MSI-X pending bits.
    MsixPending,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IoPorts => "I/O ports",
            Self::NotMappable => "not mappable",
            Self::OutsideAreas => "outside the mappable areas",
            Self::MsixTable => "MSI-X table",
            Self::MsixPending => "MSI-X pending bits",
        })
    }
}

/// A part of a region, mappable or trapped as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Span {
    /// The bytes of the region. A mappable span starts at a page boundary, and ends at one or at the region's
    /// end.
    pub range: Range<u64>,
    /// `None` if the span can be mapped.
    pub trap: Option<Trap>,
}

/// A region as a sequence of adjacent spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    spans: Vec<Span>,
}

/// Pages that are not mapped although the region could be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reserved {
    pub(crate) table: Option<Range<u64>>,
    pub(crate) pending: Option<Range<u64>>,
}

impl Layout {
    /// The layout of a region of I/O ports.
    pub(crate) fn io_ports(info: &RegionInfo) -> Self {
        Self { spans: vec![Span { range: 0..info.size, trap: Some(Trap::IoPorts) }] }
    }

    /// The layout of a region, in pages of `page_size` bytes.
    ///
    /// # Errors
    /// `Malformed` if its areas leave it or overlap.
    pub(crate) fn new(info: &RegionInfo, reserved: &Reserved, page_size: u64) -> Result<Self> {
        if !info.mappable {
            let trap = Some(Trap::NotMappable);
            return Ok(Self { spans: vec![Span { range: 0..info.size, trap }] });
        }
        let mut layout = Self { spans: Vec::new() };
        let outside = if info.areas.is_some() { Trap::OutsideAreas } else { Trap::NotMappable };
        let mut reached = 0;
        for area in mappable_pages(info, page_size)? {
            layout.push(reached..area.start, Some(outside));
            reached = area.end;
            layout.push(area, None);
        }
        layout.push(reached..info.size, Some(outside));
        for (range, trap) in
            [(&reserved.table, Trap::MsixTable), (&reserved.pending, Trap::MsixPending)]
        {
            if let Some(range) = range {
                layout.cut(range, trap, page_size);
            }
        }
        Ok(layout)
    }

    /// The spans in order.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The parts that can be mapped, each as one window.
    pub fn mappable(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.spans.iter().filter(|span| span.trap.is_none()).map(|span| span.range.clone())
    }

    /// The first span that `range` touches and that cannot be mapped.
    pub(crate) fn obstacle(&self, range: &Range<u64>) -> Option<&Span> {
        self.spans.iter().find(|span| {
            span.trap.is_some() && span.range.start < range.end && range.start < span.range.end
        })
    }

    /// Appends a span, or extends the last one if it is of the same kind.
    fn push(&mut self, range: Range<u64>, trap: Option<Trap>) {
        if range.is_empty() {
            return;
        }
        match self.spans.last_mut() {
            Some(last) if last.trap == trap && last.range.end == range.start => {
                last.range.end = range.end;
            }
            _ => self.spans.push(Span { range, trap }),
        }
    }

    /// Removes the pages of `range` from what can be mapped.
    fn cut(&mut self, range: &Range<u64>, trap: Trap, page_size: u64) {
        let start = range.start - range.start % page_size;
        let end = range.end.checked_next_multiple_of(page_size).unwrap_or(u64::MAX);
        for Span { range, trap: was } in std::mem::take(&mut self.spans) {
            let from = start.clamp(range.start, range.end);
            let to = end.clamp(from, range.end);
            self.push(range.start..from, was);
            self.push(from..to, was.or(Some(trap)));
            self.push(to..range.end, was);
        }
    }
}

/// The areas in order, shrunk to whole pages. The region's end may cut its last page short, as in a BAR smaller
/// than a page.
fn mappable_pages(info: &RegionInfo, page_size: u64) -> Result<Vec<Range<u64>>> {
    let malformed = |reason: String| {
        Err(Error::new(ErrorKind::Malformed, "read", "the layout of a region").with_reason(reason))
    };
    let Some(areas) = &info.areas else { return Ok(vec![0..info.size]) };
    let mut areas = areas.clone();
    areas.sort_by_key(|area| area.start);
    let room = info.size.checked_next_multiple_of(page_size).unwrap_or(info.size);
    let mut reached = 0;
    let mut pages = Vec::with_capacity(areas.len());
    for area in areas {
        if area.start > area.end || area.end > room {
            return malformed(format!(
                "the mappable area {:#x}..{:#x} leaves its {:#x} bytes",
                area.start, area.end, info.size
            ));
        }
        if area.start < reached {
            return malformed(format!("the mappable areas overlap at {:#x}", area.start));
        }
        reached = area.end;
        let Some(start) = area.start.checked_next_multiple_of(page_size) else { continue };
        let end = if area.end >= info.size { info.size } else { area.end - area.end % page_size };
        if start < end {
            pages.push(start..end);
        }
    }
    Ok(pages)
}

/// One line for each span: "0x0..0x2000 mappable".
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Span { range, trap }) in self.spans.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{:#x}..{:#x} ", range.start, range.end)?;
            match trap {
                None => f.write_str("mappable")?,
                Some(trap) => write!(f, "trapped: {trap}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    fn sparse(size: u64, areas: &[Range<u64>]) -> RegionInfo {
        RegionInfo { areas: Some(areas.to_vec()), ..RegionInfo::mappable(size) }
    }

    fn msix(table: Range<u64>, pending: Range<u64>) -> Reserved {
        Reserved { table: Some(table), pending: Some(pending) }
    }

    fn layout(info: &RegionInfo, reserved: &Reserved, page: u64) -> String {
        Layout::new(info, reserved, page).unwrap().to_string().replace('\n', ", ")
    }

    #[test]
    fn a_plain_bar_is_one_span_on_every_page_size() {
        for page in [4 * K, 16 * K, 64 * K] {
            let info = RegionInfo::mappable(128 * K);
            assert_eq!(layout(&info, &Reserved::default(), page), "0x0..0x20000 mappable");
        }
    }

    #[test]
    fn a_bar_smaller_than_a_page_is_mappable_where_the_kernel_says_so() {
        for page in [4 * K, 16 * K, 64 * K] {
            let none = Reserved::default();
            assert_eq!(layout(&RegionInfo::mappable(256), &none, page), "0x0..0x100 mappable");
            let text = layout(&sparse(256, &[0..256]), &none, page);
            assert_eq!(text, "0x0..0x100 mappable");
            let text = layout(&RegionInfo::trapped(256), &none, page);
            assert_eq!(text, "0x0..0x100 trapped: not mappable");
        }
    }

    #[test]
    fn msix_takes_its_pages_out_and_larger_pages_take_more() {
        let info = RegionInfo::mappable(128 * K);
        let reserved = msix(0x2000..0x2100, 0x3000..0x3008);
        assert_eq!(
            layout(&info, &reserved, 4 * K),
            "0x0..0x2000 mappable, 0x2000..0x3000 trapped: MSI-X table, \
             0x3000..0x4000 trapped: MSI-X pending bits, 0x4000..0x20000 mappable"
        );
        assert_eq!(
            layout(&info, &reserved, 64 * K),
            "0x0..0x10000 trapped: MSI-X table, 0x10000..0x20000 mappable"
        );
    }

    #[test]
    fn a_bar_that_msix_fills_is_trapped_whole() {
        let info = RegionInfo::mappable(4 * K);
        let reserved = msix(0..0x400, 0x800..0x808);
        assert_eq!(layout(&info, &reserved, 4 * K), "0x0..0x1000 trapped: MSI-X table");
    }

    #[test]
    fn sparse_areas_in_any_order_and_number_are_kept_and_neighbours_joined() {
        let none = Reserved::default();
        let info = sparse(0x10000, &[0x8000..0x9000, 0..0x1000, 0x1000..0x2000]);
        assert_eq!(
            layout(&info, &none, 4 * K),
            "0x0..0x2000 mappable, 0x2000..0x8000 trapped: outside the mappable areas, \
             0x8000..0x9000 mappable, 0x9000..0x10000 trapped: outside the mappable areas"
        );
        let many: Vec<_> = (0..5000).map(|n| n * 0x2000..n * 0x2000 + 0x1000).collect();
        let layout = Layout::new(&sparse(5000 * 0x2000, &many), &none, 4 * K).unwrap();
        assert_eq!(layout.mappable().count(), 5000);
        let empty = Layout::new(&sparse(0x1000, &[]), &none, 4 * K).unwrap();
        assert_eq!(empty.mappable().count(), 0, "no area, nothing mappable");
    }

    #[test]
    fn areas_that_are_no_whole_pages_shrink() {
        let info = sparse(0x40000, &[0x800..0x2800, 0x11000..0x2f000]);
        let none = Reserved::default();
        let mappable =
            |page| -> Vec<_> { Layout::new(&info, &none, page).unwrap().mappable().collect() };
        assert_eq!(mappable(4 * K), [0x1000..0x2000, 0x11000..0x2f000]);
        assert_eq!(mappable(16 * K), [0x14000..0x2c000]);
        assert!(mappable(64 * K).is_empty());
    }

    #[test]
    fn areas_that_leave_the_region_or_overlap_are_malformed() {
        let none = Reserved::default();
        for areas in [&[0..0x3000u64][..], &[0..0x1000, 0x800..0x1800], &[u64::MAX - 1..u64::MAX]] {
            let error = Layout::new(&sparse(0x2000, areas), &none, 4 * K).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Malformed, "{areas:?}");
        }
    }
}
