//! Files that servers send for their regions: what cannot be mapped is reached by messages.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vfio_remap::space::BackingKind;
use vfio_remap::transport::VfioUser;
use vfio_remap::{Device, Placement};

use crate::support::peer::{Device as Served, Peer, REGION};

/// How long a server may take, on a machine that is busy.
const AMPLE: Duration = Duration::from_secs(60);

fn memory(size: u64) -> OwnedFd {
    let file = File::from(memfd_create("vfio-remap-test-bar", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file.into()
}

/// A file of a file system on a disk, if the machine has its build folder on one: it has no name any more.
fn on_disk(size: u64) -> OwnedFd {
    let path = format!("{}/vfio-remap-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(size).unwrap();
    file.into()
}

/// A client of a server whose BAR 0, of 0x4000 bytes, comes with `fds` and these areas, first byte and size.
fn with_files(fds: Vec<OwnedFd>, areas: &[(u64, u64)]) -> (Peer, Device) {
    let areas = areas.to_vec();
    let (peer, stream) = Peer::start(Served::default(), move |_, asked, answer| {
        if asked.command != REGION || asked.word(8) != 0 {
            return;
        }
        answer.fds = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let caps = if areas.is_empty() { 0 } else { 16 + 16 * areas.len() as u32 };
        let flags: u32 = if areas.is_empty() { 7 } else { 15 };
        for (at, value) in [(0, 32 + caps), (4, flags), (12, if caps > 0 { 32 } else { 0 })] {
            answer.body[at..at + 4].copy_from_slice(&u32::to_ne_bytes(value));
        }
        if caps > 0 {
            answer.body.extend([1, 0, 1, 0, 0, 0, 0, 0]);
            answer.body.extend((areas.len() as u64).to_ne_bytes());
            let words = areas.iter().flat_map(|&(start, size)| [start, size]);
            answer.body.extend(words.flat_map(u64::to_ne_bytes));
        }
    });
    (peer, connect(stream))
}

fn connect(stream: UnixStream) -> Device {
    Device::new(Arc::new(VfioUser::from_stream(stream, AMPLE).unwrap()))
}

/// What of BAR 0 can be mapped; all of it is reached by messages.
fn mappable(device: &Device) -> Vec<std::ops::Range<u64>> {
    let bar = device.bar(0).unwrap();
    assert_eq!(bar.trapped_register::<u32>(0).unwrap().read().unwrap(), 0x0707_0707);
    bar.trapped_register::<u32>(0x3ffc).unwrap().write(1).unwrap();
    bar.layout().mappable().collect()
}

#[test]
fn a_region_whose_file_cannot_be_mapped_is_reached_by_messages() {
    let pipe = OwnedFd::from(std::io::pipe().unwrap().0);
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let huge = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB;
    let files = [pipe, open("/dev/zero"), open("/proc/self/status"), open("/proc")];
    for file in files.into_iter().chain(memfd_create("vfio-remap-test-huge", huge)) {
        let (_peer, device) = with_files(vec![file], &[]);
        assert_eq!(mappable(&device), []);
        device.close().unwrap();
    }
}

#[test]
fn messages_reach_what_a_short_file_does_not_hold() {
    for size in [0, 0x3fff] {
        let (_peer, device) = with_files(vec![memory(size)], &[]);
        assert_eq!(mappable(&device), []);
    }
    let (_peer, device) = with_files(vec![memory(0x3fff)], &[(0, 0x2000), (0x3000, 0x1000)]);
    assert_eq!(mappable(&device), [0..0x2000]);
}

#[test]
fn messages_reach_a_region_of_more_files_than_areas() {
    let (_peer, device) = with_files(vec![memory(0x4000), memory(0x4000)], &[]);
    assert_eq!(mappable(&device), []);
    let files = vec![memory(0x4000), memory(0x4000)];
    let (_peer, device) = with_files(files, &[(0, 0x1000), (0x1000, 0x1000), (0x3000, 0x1000)]);
    assert_eq!(mappable(&device), []);
}

/// One of them is a pipe.
#[test]
fn an_area_whose_file_cannot_be_mapped_is_reached_by_messages() {
    let pipe = OwnedFd::from(std::io::pipe().unwrap().0);
    let (_peer, device) = with_files(vec![pipe, memory(0x4000)], &[(0, 0x1000), (0x2000, 0x1000)]);
    assert_eq!(mappable(&device), [0x2000..0x3000]);
}

#[test]
fn a_file_on_a_disk_is_mapped_and_not_trusted_to_refault() {
    let file = on_disk(0x4000);
    let known = ["ext4", "xfs", "btrfs"];
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).unwrap().trim();
    let mount = mounts.lines().find(|line| line.split(' ').next() == Some(id)).unwrap();
    let is_known = known.iter().any(|name| mount.contains(&format!(" - {name} ")));
    let (_peer, device) = with_files(vec![file.try_clone().unwrap()], &[]);
    if !is_known {
        // tmpfs, or a file system that the client does not know.
        eprintln!("skipped: the build folder is on {mount}");
        return;
    }
    assert_eq!(mappable(&device), [0..0x4000]);
    assert_eq!(device.transport().backing(0).unwrap().kind(), BackingKind::Other);
    let bar = device.bar(0).unwrap();
    let mut window = bar.map(0..0x4000, Placement::Anywhere).unwrap();
    window.relocate(Placement::Anywhere).unwrap();
    window.register::<u32>(0x10).unwrap().write(0xcafe_f00d);
    let mut word = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&File::from(file), &mut word, 0x10).unwrap();
    assert_eq!(u32::from_ne_bytes(word), 0xcafe_f00d);
    drop(window);
    device.close().unwrap();
}
