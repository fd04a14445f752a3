//! `/proc/self/maps`: what is mapped where in this process.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;

/// A line of `/proc/self/maps` (`man 5 proc_pid_maps`).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub range: Range<usize>,
    pub inaccessible: bool,
    pub offset: u64,
    pub device: u64,
    pub inode: u64,
    pub name: String,
}

impl Mapped {
    fn parse(line: &str) -> Option<Self> {
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?;
        let offset = hex(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let inode = fields.next()?.parse().ok()?;
        Some(Self {
            range: usize::try_from(hex(start)?).ok()?..usize::try_from(hex(end)?).ok()?,
            inaccessible: permissions.starts_with("---"),
            offset,
            device: nix::sys::stat::makedev(hex(major)?, hex(minor)?),
            inode,
            name: fields.collect::<Vec<_>>().join(" "),
        })
    }
}

/// The mappings that overlap `range`, by address. Empty where `/proc` is not mounted.
pub(crate) fn overlapping(range: &Range<usize>) -> Vec<Mapped> {
    let Ok(file) = File::open("/proc/self/maps") else { return Vec::new() };
    BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| Mapped::parse(&line))
        .filter(|mapped| mapped.range.start < range.end && range.start < mapped.range.end)
        .collect()
}

/// Whether all of `range` maps the file with this device and inode number: with an `offset`, from there
/// on; with `inaccessible`, without any rights.
///
/// False where `/proc` is not mounted: see [`are_told`].
pub(crate) fn is_file(
    range: &Range<usize>,
    (device, inode): (u64, u64),
    offset: Option<u64>,
    inaccessible: bool,
) -> bool {
    let mut reached = range.start;
    for mapped in overlapping(range) {
        let expected = offset.map_or(mapped.offset, |offset| {
            offset.wrapping_add(mapped.range.start as u64).wrapping_sub(range.start as u64)
        });
        let same = (mapped.device, mapped.inode, mapped.offset) == (device, inode, expected)
            && mapped.inaccessible == inaccessible;
        if !same || mapped.range.start > reached {
            return false;
        }
        reached = mapped.range.end;
    }
    reached >= range.end
}

/// Whether this process can learn what it has mapped.
pub(crate) fn are_told() -> bool {
    File::open("/proc/self/maps").is_ok()
}

/// How many mappings this process has, and how many it may have (`vm.max_map_count`).
pub(crate) fn count_and_limit() -> Option<(usize, usize)> {
    let count = BufReader::new(File::open("/proc/self/maps").ok()?).lines().count();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?;
    Some((count, limit.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_files_and_of_anonymous_memory_are_understood() {
        let line = "7f12a0000000-7f12a0021000 ---s 00010000 00:01 1029  /memfd:x (deleted)";
        let mapped = Mapped::parse(line).unwrap();
        assert_eq!(mapped.range, 0x7f12_a000_0000..0x7f12_a002_1000);
        assert_eq!((mapped.inaccessible, mapped.offset), (true, 0x1_0000));
        assert_eq!((mapped.device, mapped.inode), (1, 1029));
        assert_eq!(mapped.name, "/memfd:x (deleted)");
        assert_eq!(Mapped::parse("1000-2000 rw-p 00000000 00:00 0").unwrap().name, "");
        assert_eq!(Mapped::parse("nonsense"), None);
    }

    #[test]
    fn this_function_is_mapped() {
        let here = this_function_is_mapped as *const () as usize;
        let found = overlapping(&(here..here + 1));
        assert_eq!(found.len(), 1);
        assert!(!found[0].inaccessible && found[0].inode != 0);
    }
}
