//! Compares the verbs with the same system calls, alternately in one run.
//!
//! It uses a memfd, and in the lab (`cargo lab bench remap --kernel NAME`) also a BAR.

use std::hint::black_box;
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use vfio_remap::transport::{MemoryDevice, RegionFile};
use vfio_remap::{Device, Placement, Reservation, Strategy};

/// Calls in a batch, and batches of each side. Short batches are disturbed less often.
const BATCH: usize = 25;
const BATCHES: usize = 2001;

/// The additional time that a verb may take: a share or nanoseconds, whichever is more.
const SHARE: f64 = 0.05;
const NANOSECONDS: f64 = 300.0;

/// How much longer a revocation may take than `mmap` with `MAP_FIXED`, and how much longer each of the last of
/// ten thousand windows may take than each of the first.
const REVOKE: f64 = 1.5;

/// How much slower a duplicate may become while the count of duplicates grows to ten thousand.
const GROWTH: f64 = 2.0;

fn main() -> ExitCode {
    let mut good = true;
    let memory = Device::new(Arc::new(MemoryDevice::new(1 << 20).expect("a memfd")));
    good &= compare("memfd, 1 MiB", &memory, 0);
    if let Some(edu) = lab_device("edu") {
        edu.config().and_then(|config| config.set_memory_decoding(true)).expect("edu answers");
        good &= compare("edu, 1 MiB", &edu, 0);
        good &= flat("edu, 1 MiB", &edu, 0);
    } else {
        good &= flat("memfd, 1 MiB", &memory, 0);
    }
    good &= revoke("memfd, 1 MiB", &memory, 0);
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn lab_device(name: &str) -> Option<Device> {
    let devices = std::env::var("LAB_DEVICES").ok()?;
    let address = devices
        .split_ascii_whitespace()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))?;
    Device::open(address).ok()
}

/// A mapping made by system calls, of the same bytes as the crate's windows.
struct Hand<'a> {
    calls: &'a Calls,
    at: usize,
}

/// The system calls of each verb, on the same file, offset and length.
struct Calls {
    file: RegionFile,
    len: usize,
    marker: std::fs::File,
}

impl Calls {
    fn map(&self, address: usize, fixed: i32) -> usize {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, start) = (self.file.fd().as_raw_fd(), self.file.start() as i64);
        // SAFETY: without MAP_FIXED the kernel chooses an unused range; with it the benchmark owns the
        // range.
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
        // SAFETY: the benchmark owns the old range, and faults in shared memory fill it again.
        let at = unsafe { libc::mremap(old as *mut _, self.len, self.len, flags, nowhere) };
        assert_ne!(at, libc::MAP_FAILED);
        at as usize
    }

    /// A second mapping, made from the first.
    fn old_len_zero(&self, old: usize) -> usize {
        let nowhere = std::ptr::null_mut::<libc::c_void>();
        let flags = libc::MREMAP_MAYMOVE;
        // SAFETY: it leaves the old range as it is.
        let at = unsafe { libc::mremap(old as *mut _, 0, self.len, flags, nowhere) };
        assert_ne!(at, libc::MAP_FAILED);
        at as usize
    }

    /// Covers a range as the crate does, by an inaccessible mapping of a file.
    fn cover(&self, address: usize) {
        let (flags, fd) = (libc::MAP_SHARED | libc::MAP_FIXED, self.marker.as_fd().as_raw_fd());
        // SAFETY: the benchmark owns the range.
        let at = unsafe { libc::mmap(address as *mut _, self.len, libc::PROT_NONE, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
    }

    fn unmap(&self, address: usize) {
        // SAFETY: the benchmark owns the range.
        assert_eq!(unsafe { libc::munmap(address as *mut _, self.len) }, 0);
    }

    fn mapped(&self) -> Hand<'_> {
        Hand { calls: self, at: self.map(0, 0) }
    }
}

impl Hand<'_> {
    /// What a relocation does with the old side after it has made the new one.
    fn leave_for(&mut self, new: usize) {
        self.calls.cover(self.at);
        self.calls.unmap(self.at);
        self.at = new;
    }
}

impl Drop for Hand<'_> {
    fn drop(&mut self) {
        self.calls.unmap(self.at);
    }
}

fn compare(what: &str, device: &Device, index: u32) -> bool {
    let bar = device.bar(index).expect("a bar");
    let window = || bar.map(.., Placement::Anywhere).expect("a window");
    let file = device.transport().backing(index).expect("a file");
    let marker = std::fs::File::from(
        nix::sys::memfd::memfd_create("bench", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .expect("a memfd"),
    );
    let calls = Calls { file, len: window().addresses().len(), marker };
    let mapped = || calls.mapped();
    let accepted = |strategy| window().duplicate(Placement::Anywhere.only(strategy)).is_ok();
    let dont_unmap = accepted(Strategy::DontUnmap);
    println!("{what}\n  {:<22} {:>9} {:>9} {:>9}", "", "calls", "crate", "excess");
    let mut good = true;
    let again = || Placement::Anywhere.only(Strategy::MapAgain);
    good &= row(
        "duplicate, MapAgain",
        (mapped, |_| calls.unmap(black_box(calls.map(0, 0)))),
        (window, |window| drop(black_box(window.duplicate(again()).expect("a duplicate")))),
    );
    if dont_unmap {
        good &= row(
            "duplicate, DontUnmap",
            (mapped, |hand| calls.unmap(black_box(calls.dont_unmap(hand.at)))),
            (window, |window| {
                drop(black_box(window.duplicate(Placement::Anywhere).expect("a duplicate")));
            }),
        );
    }
    if accepted(Strategy::OldLenZero) {
        let cheapest = || Placement::Anywhere.cheapest();
        good &= row(
            "duplicate, OldLenZero",
            (mapped, |hand| calls.unmap(black_box(calls.old_len_zero(hand.at)))),
            (window, |window| {
                drop(black_box(window.duplicate(cheapest()).expect("a duplicate")));
            }),
        );
    }
    good &= row(
        "relocate, MapAgain",
        (mapped, |hand| hand.leave_for(calls.map(0, 0))),
        (window, |window| drop(black_box(window.relocate(again()).expect("a relocation")))),
    );
    if dont_unmap {
        good &= row(
            "relocate, DontUnmap",
            (mapped, |hand| hand.leave_for(calls.dont_unmap(hand.at))),
            (window, |window| {
                drop(black_box(window.relocate(Placement::Anywhere).expect("a relocation")));
            }),
        );
    }
    good & row(
        "relocate in place",
        (
            || {
                let (here, there) = (calls.mapped(), calls.mapped());
                calls.cover(there.at);
                (here, there)
            },
            |(here, there)| {
                calls.map(there.at, libc::MAP_FIXED);
                calls.cover(here.at);
                std::mem::swap(here, there);
            },
        ),
        (
            // Between two ranges, as a hypervisor does.
            || (window(), Some(Reservation::new(calls.len).expect("address space"))),
            |(window, place)| {
                let to = Placement::In(place.take().expect("a place")).only(Strategy::MapAgain);
                *place = window.relocate(to).expect("a relocation").old;
            },
        ),
    )
}

/// Compares the revocation of a window with one `mmap` over it, by medians of windows that were touched; and the
/// first thousand of ten thousand windows that are revoked at once with the last.
fn revoke(what: &str, device: &Device, index: u32) -> bool {
    let bar = device.bar(index).expect("a bar");
    let window = bar.map(.., Placement::Anywhere).expect("a window");
    let (start, len) = (window.addresses().start, window.addresses().len());
    let register = window.register::<u32>(0).expect("a register");
    let time = |call: &dyn Fn()| {
        let begin = Instant::now();
        call();
        begin.elapsed().as_nanos() as f64
    };
    let ones = nix::sys::memfd::memfd_create("bench", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
    let ones = std::fs::File::from(ones.expect("a memfd"));
    ones.set_len(len as u64).expect("its size");
    let calls = Calls {
        file: device.transport().backing(index).expect("a file"),
        len,
        marker: ones.try_clone().expect("a descriptor"),
    };
    let hand = calls.mapped();
    let cover = || {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the benchmark owns the range.
        let at =
            unsafe { libc::mmap(hand.at as *mut _, len, protection, flags, ones.as_raw_fd(), 0) };
        assert_eq!(at as usize, hand.at);
    };
    let (mut by_hand, mut by_crate) = (Vec::new(), Vec::new());
    for _ in 0..BATCHES {
        calls.map(hand.at, libc::MAP_FIXED);
        // SAFETY: the mapping was made above.
        black_box(unsafe { (hand.at as *const u32).read_volatile() });
        by_hand.push(time(&cover));
        black_box(register.read());
        by_crate.push(time(&|| {
            black_box(window.revoke().expect("a revocation"));
        }));
        window.restore().expect("the device again");
    }
    let (hand, library) = (median(by_hand), median(by_crate));
    let mut good = library <= hand * REVOKE;
    println!(
        "{what}, revoke: mmap {hand:.0} ns, crate {library:.0} ns, {:.2} times, at most {REVOKE} allowed",
        library / hand
    );
    assert_eq!(window.addresses(), start..start + len);
    let again = || window.duplicate(Placement::Anywhere.only(Strategy::MapAgain));
    let windows: Vec<_> = (0..10_000).map(|_| again().expect("a duplicate").0).collect();
    let times = |part: &[vfio_remap::Window]| {
        median(part.iter().map(|window| time(&|| drop(window.revoke()))).collect())
    };
    let (first, last) = (times(&windows[..1000]), {
        let _ = times(&windows[1000..9000]);
        times(&windows[9000..])
    });
    let linear = last <= first * REVOKE;
    println!("  of 10,000 windows each of the first takes {first:.0} ns, of the last {last:.0} ns");
    let all = time(&|| drop(device.restore()));
    let revoked = time(&|| drop(device.revoke()));
    println!(
        "  all of a device: revoked in {:.1} ms, restored in {:.1} ms",
        revoked / 1e6,
        all / 1e6
    );
    good &= linear;
    if !good {
        println!("  more than allowed");
    }
    good
}

/// Prints one line: the medians of alternating batches, and the median difference of the pairs. Returns
/// whether the difference is within the limit.
///
/// Each batch starts with new mappings of its side and none of the other, so that both use the same
/// addresses. Shared page tables and the place in the kernel's tree of mappings make more difference than
/// the crate.
fn row<H, L>(
    name: &str,
    hand: (impl Fn() -> H, impl Fn(&mut H)),
    library: (impl Fn() -> L, impl Fn(&mut L)),
) -> bool {
    let mut pairs = Vec::new();
    // The first pairs are a warm-up.
    for pair in 0..BATCHES + BATCHES / 4 {
        // Each side is first in every second pair, so that neither has an advantage.
        let (by_hand, by_library) = if pair % 2 == 0 {
            let by_hand = batch(&hand);
            (by_hand, batch(&library))
        } else {
            let by_library = batch(&library);
            (batch(&hand), by_library)
        };
        if pair >= BATCHES / 4 {
            pairs.push((by_hand, by_library));
        }
    }
    let hand = median(pairs.iter().map(|(by_hand, _)| *by_hand).collect());
    let library = median(pairs.iter().map(|(_, by_library)| *by_library).collect());
    let over = median(pairs.iter().map(|(by_hand, by_library)| by_library - by_hand).collect());
    let good = over <= (hand * SHARE).max(NANOSECONDS);
    let verdict = if good { "" } else { "  more than allowed" };
    let share = 100.0 * over / hand;
    println!(
        "  {name:<22} {hand:>6.0} ns {library:>6.0} ns {over:>6.0} ns {share:>5.1} %{verdict}"
    );
    good
}

/// The time of each call in nanoseconds.
fn batch<S>((ready, call): &(impl Fn() -> S, impl Fn(&mut S))) -> f64 {
    let mut state = ready();
    let start = Instant::now();
    for _ in 0..BATCH {
        call(&mut state);
    }
    start.elapsed().as_nanos() as f64 / BATCH as f64
}

/// Prints the time of a duplicate while their count grows to 10,000. Returns whether the last thousand is
/// about as fast as the first.
fn flat(what: &str, device: &Device, index: u32) -> bool {
    let bar = device.bar(index).expect("a bar");
    let window = bar.map(.., Placement::Anywhere).expect("a window");
    let mut windows = Vec::with_capacity(10_000);
    let mut thousands = Vec::with_capacity(10);
    print!("{what}, ns for each of 10,000 duplicates, by the thousand:");
    for _ in 0..10 {
        let mut times = Vec::with_capacity(1000);
        for _ in 0..1000 {
            let start = Instant::now();
            let duplicate = window.duplicate(Placement::Anywhere.only(Strategy::MapAgain));
            times.push(start.elapsed().as_nanos() as f64);
            windows.push(duplicate.expect("a duplicate"));
        }
        let time = median(times);
        print!(" {time:.0}");
        thousands.push(time);
    }
    let growth = thousands[9] / thousands[0];
    let good = growth <= GROWTH;
    let verdict = if good { "" } else { ", more than allowed" };
    println!("; the last {growth:.2} times the first, at most {GROWTH:.0} times allowed{verdict}");
    good
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
