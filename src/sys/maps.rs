//! `/proc/self/maps`: the mappings of this process.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
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

/// The device and inode number of what maps no file.
pub(crate) const ANONYMOUS: (u64, u64) = (0, 0);

/// By what a mapping of a file is recognized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Device and inode number of the file.
    file: (u64, u64),
    /// Whether the driver of the file may map a dma-buf in its place.
    or_dma_buf: bool,
}

impl Origin {
    /// Of a file whose driver may map a dma-buf in its place, as vfio-pci will: the series "vfio/pci: Add mmap() for
    /// DMABUFs" (2026, not in Linux 7.3) makes a dma-buf for each `mmap` of a BAR. `/proc/self/maps` then shows
    /// `/dmabuf:` and a name, another inode for each mapping, and offsets that count from the start of the BAR or,
    /// in later versions of the series, of the mapping.
    ///
    /// None of these is known before, so any dma-buf counts that is mapped in exactly the expected range.
    pub(crate) fn or_dma_buf(file: (u64, u64)) -> Self {
        Self { file, or_dma_buf: true }
    }
}

impl From<(u64, u64)> for Origin {
    fn from(file: (u64, u64)) -> Self {
        Self { file, or_dma_buf: false }
    }
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

    /// Whether it maps this file, at such an offset that the start of `range` corresponds to `offset` of the file.
    /// Anonymous memory has no offset.
    fn shows(&self, origin: Origin, offset: u64, range: &Range<usize>) -> bool {
        let (device, inode) = origin.file;
        if (device, inode) == ANONYMOUS {
            return (self.device, self.inode) == ANONYMOUS;
        }
        let expected =
            offset.wrapping_add(self.range.start as u64).wrapping_sub(range.start as u64);
        (self.device, self.inode, self.offset) == (device, inode, expected)
            || origin.or_dma_buf && self.is_dma_buf() && self.range == *range
    }

    /// Whether it maps a dma-buf (`dmabuffs_dname` in `drivers/dma-buf/dma-buf.c` of Linux 7.3).
    fn is_dma_buf(&self) -> bool {
        self.name.starts_with("/dmabuf:")
    }
}

/// The lines of a file. Names of mapped files in them may be any bytes, not only UTF-8.
fn lines(file: impl io::Read) -> impl Iterator<Item = String> {
    let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
    lines.map(|line| String::from_utf8_lossy(&line).into_owned())
}

/// The mappings that overlap `range`, in order of address. Empty if `/proc` is not mounted.
pub(crate) fn overlapping(range: &Range<usize>) -> Vec<Mapped> {
    let Ok(file) = File::open("/proc/self/maps") else { return Vec::new() };
    lines(file)
        .filter_map(|line| Mapped::parse(&line))
        .take_while(|mapped| mapped.range.start < range.end)
        .filter(|mapped| range.start < mapped.range.end)
        .collect()
}

/// Whether all of `range` maps the file with this device and inode number, from `offset` on, inaccessibly
/// (`PROT_NONE`). False if `/proc` is not mounted.
pub(crate) fn is_reserved(range: &Range<usize>, file: (u64, u64), offset: u64) -> bool {
    all_match(range, &overlapping(range), |mapped| {
        mapped.inaccessible && mapped.shows(file.into(), offset, range)
    })
}

/// Whether all of `range` maps this file, from `offset` on, accessibly, and children do not inherit it
/// (`MADV_DONTFORK`). False or an error if that cannot be queried: `/proc` is not mounted, or the kernel was
/// built without `CONFIG_PROC_PAGE_MONITOR`.
pub(crate) fn is_kept_from_children(
    range: &Range<usize>,
    file: Origin,
    offset: u64,
) -> io::Result<bool> {
    let with_flags = kept_from_children(lines(File::open("/proc/self/smaps")?), range);
    Ok(all_match(range, &with_flags, |mapped| {
        !mapped.inaccessible && mapped.shows(file, offset, range)
    }))
}

/// As [`is_kept_from_children`], for a mapping of which that is known if it is still there. `None` if `/proc` cannot
/// be read. On a kernel without `CONFIG_PROC_PAGE_MONITOR` any accessible mapping of the file counts.
pub(crate) fn still_shows(range: &Range<usize>, file: Origin, offset: u64) -> Option<bool> {
    if let Ok(known) = is_kept_from_children(range, file, offset) {
        return Some(known);
    }
    let found = overlapping(&(0..usize::MAX));
    let overlaps =
        |mapped: &Mapped| mapped.range.start < range.end && range.start < mapped.range.end;
    let (is_read, found) = (!found.is_empty(), found.into_iter().filter(overlaps));
    let found: Vec<_> = found.collect();
    is_read.then(|| {
        all_match(range, &found, |mapped| !mapped.inaccessible && mapped.shows(file, offset, range))
    })
}

/// From the lines of `/proc/self/smaps`, the mappings that overlap `range` and have the flag `dc`.
fn kept_from_children(lines: impl Iterator<Item = String>, range: &Range<usize>) -> Vec<Mapped> {
    let mut found = Vec::new();
    let mut current = None;
    for line in lines {
        if let Some(mapped) = Mapped::parse(&line) {
            if mapped.range.start >= range.end {
                break;
            }
            current = Some(mapped).filter(|mapped| range.start < mapped.range.end);
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_ascii_whitespace().any(|flag| flag == "dc")
        {
            found.extend(current.take());
        }
    }
    found
}

/// Whether `mappings` cover `range` without a hole, and `matches` accepts each of them.
fn all_match(range: &Range<usize>, mappings: &[Mapped], matches: impl Fn(&Mapped) -> bool) -> bool {
    let mut reached = range.start;
    for mapped in mappings {
        if mapped.range.start > reached || !matches(mapped) {
            return false;
        }
        reached = mapped.range.end;
    }
    reached >= range.end
}

/// How many mappings this process has, and how many it may have (`vm.max_map_count`).
pub(crate) fn count_and_limit() -> Option<(usize, usize)> {
    let count = BufReader::new(File::open("/proc/self/maps").ok()?).lines().count();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok()?;
    Some((count, limit.trim().parse().ok()?))
}

/// How many bytes of address space this process has in use, as RLIMIT_AS counts them.
pub(crate) fn address_space() -> Option<u64> {
    status("VmSize:")
}

/// How many bytes this process has locked, as RLIMIT_MEMLOCK counts them for `mmap`.
pub(crate) fn locked() -> Option<u64> {
    status("VmLck:")
}

/// A size from `/proc/self/status` (`man 5 proc_pid_status`), in bytes.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = field.split_ascii_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_files_and_of_anonymous_memory_are_parsed() {
        let line = "7f12a0000000-7f12a0021000 ---s 00010000 00:01 1029  /memfd:x (deleted)";
        let mapped = Mapped::parse(line).unwrap();
        assert_eq!(mapped.range, 0x7f12_a000_0000..0x7f12_a002_1000);
        assert_eq!((mapped.inaccessible, mapped.offset), (true, 0x1_0000));
        assert_eq!((mapped.device, mapped.inode), (1, 1029));
        assert_eq!(mapped.name, "/memfd:x (deleted)");
        assert_eq!(Mapped::parse("1000-2000 rw-p 00000000 00:00 0").unwrap().name, "");
        assert_eq!(Mapped::parse("malformed"), None);
    }

    /// As the series "vfio/pci: Add mmap() for DMABUFs" shows a BAR: the name is that of its fifth patch, the
    /// offset is 0, or that in the BAR.
    #[test]
    fn a_dma_buf_in_place_of_a_device_file_is_recognized() {
        const DEVICE_FILE: (u64, u64) = (5, 611);
        const OFFSET: u64 = 2 << 40 | 0x2000;
        let line = |offset: u64, name: &str| {
            let line = format!("7f1200000000-7f1200004000 rw-s {offset:08x} 00:0f 2053  {name}");
            Mapped::parse(&line).unwrap()
        };
        let exactly = 0x7f12_0000_0000..0x7f12_0000_4000;
        let shows = |mapped: &Mapped, origin: Origin, range: &Range<usize>| {
            all_match(range, std::slice::from_ref(mapped), |it| it.shows(origin, OFFSET, range))
        };
        let of_device = Origin::or_dma_buf(DEVICE_FILE);
        for offset in [0, 0x2000] {
            let mapped = line(offset, "/dmabuf:vfio3:0000:00:04.0/2");
            assert!(shows(&mapped, of_device, &exactly), "{mapped:?}");
            assert!(!shows(&mapped, DEVICE_FILE.into(), &exactly), "the driver maps its file");
            let part = exactly.start + 0x1000..exactly.end;
            assert!(!shows(&mapped, of_device, &part), "a window is one mapping");
        }
        assert!(!shows(&line(0, "/memfd:dmabuf: (deleted)"), of_device, &exactly));
        assert!(!shows(&line(0, "/tmp/dmabuf:x"), of_device, &exactly));
        let file = Mapped { device: 5, inode: 611, ..line(OFFSET, "/dev/vfio/devices/vfio3") };
        assert!(shows(&file, of_device, &exactly) && shows(&file, DEVICE_FILE.into(), &exactly));
    }

    #[test]
    fn mappings_kept_from_children_have_the_flag_dc() {
        let smaps = [
            "1000-2000 rw-s 00000000 00:01 1029  /memfd:x (deleted)",
            "Size:                  4 kB",
            "VmFlags: rd wr sh mr mw me ms dc sd",
            "2000-3000 rw-s 00001000 00:01 1029  /memfd:x (deleted)",
            "VmFlags: rd wr sh mr mw me ms sd",
            "3000-5000 rw-s 00002000 00:01 1029  /memfd:x (deleted)",
            "VmFlags: rd wr sh mr mw me ms dc",
        ];
        let kept = |range: Range<usize>| {
            let kept = kept_from_children(smaps.iter().map(|line| line.to_string()), &range);
            kept.into_iter().map(|mapped| mapped.range).collect::<Vec<_>>()
        };
        assert_eq!(kept(0x1000..0x5000), [0x1000..0x2000, 0x3000..0x5000]);
        assert_eq!(kept(0x1fff..0x3000), [0x1000..0x2000]);
        assert!(kept(0x2000..0x3000).is_empty());
        assert_eq!(kept(0x4000..0x9000), [0x3000..0x5000]);
    }

    #[test]
    fn a_range_matches_only_without_holes() {
        let mapping = |start, end| {
            Mapped::parse(&format!("{start:x}-{end:x} ---s {:08x} 00:01 7", start - 0x1000))
                .unwrap()
        };
        let all_match = |range: Range<usize>, mappings: &[Mapped]| {
            all_match(&range, mappings, |mapped| {
                mapped.shows((1, 7).into(), range.start as u64 - 0x1000, &range)
            })
        };
        let both = [mapping(0x1000, 0x2000), mapping(0x2000, 0x4000)];
        assert!(all_match(0x1000..0x4000, &both) && all_match(0x1800..0x3000, &both));
        assert!(!all_match(0x1000..0x5000, &both), "the end");
        assert!(!all_match(0x0800..0x4000, &both), "the start");
        let torn = [mapping(0x1000, 0x2000), mapping(0x3000, 0x4000)];
        assert!(!all_match(0x1000..0x4000, &torn), "the middle");
        assert!(!all_match(0x1000..0x2000, &[]), "all of it");
        let strange = Mapped { offset: 0x9000, ..mapping(0x2000, 0x4000) };
        assert!(!all_match(0x1000..0x4000, &[mapping(0x1000, 0x2000), strange]), "another offset");
        let strange = Mapped { inode: 8, ..mapping(0x2000, 0x4000) };
        assert!(!all_match(0x1000..0x4000, &[mapping(0x1000, 0x2000), strange]), "another file");
    }

    #[test]
    fn a_name_of_any_bytes_hides_no_line() {
        let text = b"1000-2000 r--p 00000000 00:01 7  /tmp/\xff\xfe\n3000-4000 r--p 00000000 00:01 8  /x\n";
        let inodes = lines(&text[..]).filter_map(|line| Mapped::parse(&line)).map(|it| it.inode);
        assert!(inodes.eq([7, 8]));
    }

    #[test]
    fn this_function_is_mapped() {
        let here = this_function_is_mapped as *const () as usize;
        let found = overlapping(&(here..here + 1));
        assert_eq!(found.len(), 1);
        assert!(!found[0].inaccessible && found[0].inode != 0);
    }
}
