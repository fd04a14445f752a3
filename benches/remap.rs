//! Verbs against the same system calls by hand, in turns within one run.
//!
//! On a memfd anywhere; in the lab (`cargo lab bench remap --kernel NAME`) on a BAR, too.

use std::hint::black_box;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use vfio_remap::transport::{MemoryDevice, RegionFile};
use vfio_remap::{Device, Placement, Reservation, Strategy, Window};

/// Calls in a batch, and batches of each side.
const BATCH: usize = 200;
const BATCHES: usize = 101;

/// What the verbs may cost above the system calls: a share, or nanoseconds, whichever is more.
const SHARE: f64 = 0.05;
const NANOSECONDS: f64 = 300.0;

fn main() -> ExitCode {
    let mut good = true;
    let memory = Device::new(Arc::new(MemoryDevice::new(1 << 20).expect("a memfd")));
    good &= compare("memfd, 1 MiB", &memory, 0);
    if let Some(edu) = lab_device("edu") {
        edu.config().and_then(|config| config.set_memory_decoding(true)).expect("edu answers");
        good &= compare("edu, 1 MiB", &edu, 0);
        flat("edu, 1 MiB", &edu, 0);
    } else {
        flat("memfd, 1 MiB", &memory, 0);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn lab_device(name: &str) -> Option<Device> {
    let devices = std::env::var("LAB_DEVICES").ok()?;
    let address = devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))?;
    Device::open(address.parse().ok()?).ok()
}

/// The calls of each verb by hand, on the same file, offset and length.
struct Hand {
    file: RegionFile,
    len: usize,
    placeholder: std::fs::File,
}

impl Hand {
    fn map(&self, address: usize, fixed: i32) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, start) = (self.file.fd().as_raw_fd(), self.file.start() as i64);
        // SAFETY: without MAP_FIXED, or over a range that the benchmark owns.
        let at = unsafe {
            libc::mmap(address as *mut _, self.len, protection, libc::MAP_SHARED | fixed, fd, start)
        };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the mapping was made above.
        assert_eq!(unsafe { libc::madvise(at, self.len, libc::MADV_DONTFORK) }, 0);
        at as usize
    }

    fn dont_unmap(&self, old: usize) -> usize {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        let nowhere = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: the benchmark owns the old range, which shared memory fills again.
        let at = unsafe { libc::mremap(old as *mut _, self.len, self.len, flags, nowhere) };
        assert_ne!(at, libc::MAP_FAILED);
        at as usize
    }

    /// As the library covers a range: by an inaccessible mapping of a file.
    fn cover(&self, address: usize) {
        let (flags, fd) =
            (libc::MAP_SHARED | libc::MAP_FIXED, self.placeholder.as_fd().as_raw_fd());
        // SAFETY: the benchmark owns the range.
        let at = unsafe { libc::mmap(address as *mut _, self.len, libc::PROT_NONE, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
    }

    fn unmap(&self, address: usize) {
        // SAFETY: the benchmark owns the range.
        assert_eq!(unsafe { libc::munmap(address as *mut _, self.len) }, 0);
    }
}

fn compare(what: &str, device: &Device, index: u32) -> bool {
    let bar = device.bar(index).expect("a bar");
    let mut window = bar.map(.., Placement::Anywhere).expect("a window");
    let file = device.transport().backing(index).expect("a file");
    let placeholder = std::fs::File::from(
        nix::sys::memfd::memfd_create("bench", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .expect("a memfd"),
    );
    let hand = Hand { file, len: window.addresses().len(), placeholder };
    let by_hand = hand.map(0, 0);
    let dont_unmap = window.duplicate(Placement::Anywhere.only(Strategy::DontUnmap)).is_ok();
    println!("{what}\n  {:<22} {:>9} {:>9} {:>9}", "", "by hand", "library", "over");
    let mut good = true;
    let again = || Placement::Anywhere.only(Strategy::MapAgain);
    good &= row(
        "duplicate, MapAgain",
        || hand.unmap(black_box(hand.map(0, 0))),
        || drop(black_box(window.duplicate(again()).expect("a duplicate"))),
    );
    if dont_unmap {
        good &= row(
            "duplicate, DontUnmap",
            || hand.unmap(black_box(hand.dont_unmap(by_hand))),
            || drop(black_box(window.duplicate(Placement::Anywhere).expect("a duplicate"))),
        );
    }
    let mut at = by_hand;
    good &= row(
        "relocate, MapAgain",
        || {
            let new = hand.map(0, 0);
            hand.cover(at);
            hand.unmap(at);
            at = new;
        },
        || drop(black_box(window.relocate(again()).expect("a relocation"))),
    );
    if dont_unmap {
        good &= row(
            "relocate, DontUnmap",
            || {
                let new = hand.dont_unmap(at);
                hand.cover(at);
                hand.unmap(at);
                at = new;
            },
            || drop(black_box(window.relocate(Placement::Anywhere).expect("a relocation"))),
        );
    }
    good &= placed(&hand, &mut window);
    hand.unmap(at);
    good
}

/// Relocation between two reservations, as a hypervisor does.
fn placed(hand: &Hand, window: &mut Window) -> bool {
    let reserve = || Reservation::new(hand.len).expect("address space");
    let (mut here, mut there) = (reserve().address(), reserve().address());
    // The benchmark keeps the two ranges for the calls by hand.
    for address in [here, there] {
        hand.cover(address);
    }
    hand.map(here, libc::MAP_FIXED);
    let mut place = Some(reserve());
    let again = |place| Placement::In(place).only(Strategy::MapAgain);
    let good = row(
        "relocate in place",
        || {
            hand.map(there, libc::MAP_FIXED);
            hand.cover(here);
            std::mem::swap(&mut here, &mut there);
        },
        || {
            let relocation = window.relocate(again(place.take().expect("a place")));
            place = relocation.expect("a relocation").old;
        },
    );
    hand.unmap(here);
    hand.unmap(there);
    good
}

/// One line: medians of alternating batches.
fn row(name: &str, mut by_hand: impl FnMut(), mut by_library: impl FnMut()) -> bool {
    let batch = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        for _ in 0..BATCH {
            f();
        }
        start.elapsed().as_nanos() as f64 / BATCH as f64
    };
    // The first of all rows would pay for what all of them need.
    for _ in 0..BATCHES / 4 {
        batch(&mut by_hand);
        batch(&mut by_library);
    }
    let (mut hand, mut library) = (Vec::new(), Vec::new());
    for _ in 0..BATCHES {
        hand.push(batch(&mut by_hand));
        library.push(batch(&mut by_library));
    }
    let (hand, library) = (median(hand), median(library));
    let over = library - hand;
    let good = over <= (hand * SHARE).max(NANOSECONDS);
    let verdict = if good { "" } else { "  more than allowed" };
    let share = 100.0 * over / hand;
    println!(
        "  {name:<22} {hand:>6.0} ns {library:>6.0} ns {over:>6.0} ns {share:>5.1} %{verdict}"
    );
    good
}

/// The time of a duplicate while their number grows to 10,000.
fn flat(what: &str, device: &Device, index: u32) {
    let bar = device.bar(index).expect("a bar");
    let window = bar.map(.., Placement::Anywhere).expect("a window");
    let mut windows = Vec::with_capacity(10_000);
    print!("{what}, ns for each of 10,000 duplicates, by the thousand:");
    for _ in 0..10 {
        let mut times = Vec::with_capacity(1000);
        for _ in 0..1000 {
            let start = Instant::now();
            let duplicate = window.duplicate(Placement::Anywhere.only(Strategy::MapAgain));
            times.push(start.elapsed().as_nanos() as f64);
            windows.push(duplicate.expect("a duplicate"));
        }
        print!(" {:.0}", median(times));
    }
    println!();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
