//! Faults and mappings, counted.

use nix::sys::resource::{UsageWho, getrusage};
use vfio_remap::Placement;

use crate::{lab, leftovers};

/// The faults of this process so far that needed no disk.
pub fn faults() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF).unwrap().minor_page_faults()
}

#[test]
fn the_first_touch_of_64_mib_costs_at_most_32_faults() {
    let device = lab::open("ivshmem64m");
    let window = lab::map_all(&device, 2);
    let pages = window.register_array::<u32>(0, 4096, window.size() / 4096).unwrap();
    // The loop and its like are in memory already.
    pages.clone().count();
    let before = faults();
    let mut sum = 0u32;
    for page in 0..pages.count() {
        sum = sum.wrapping_add(pages.read(page));
    }
    let faults = faults() - before;
    std::hint::black_box(sum);
    println!("64 MiB: {faults} faults");
    assert!(faults <= 32, "{faults}");
}

#[test]
fn ten_thousand_windows_cost_one_mapping_each() {
    let count = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let device = lab::open("edu");
    leftovers::none_of(|| {
        let window = lab::map_all(&device, 0);
        let before = count();
        let windows: Vec<_> =
            (0..10_000).map(|_| window.duplicate(Placement::Anywhere).unwrap().0).collect();
        let mappings = count() - before;
        println!("{} windows: {mappings} mappings", windows.len());
        assert!(mappings <= windows.len() + 16, "{mappings}");
        let last = windows.last().unwrap();
        assert_eq!(last.register::<u32>(0).unwrap().read(), lab::EDU_ID);
    });
    device.close().unwrap();
}
