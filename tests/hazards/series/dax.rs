//! Entries of 1 GiB that map memory, not a device: dev-dax with an alignment of 1 GiB, on the NVDIMM of
//! the lab's machine. A fault fills in an entry of 1 GiB, or is answered with SIGBUS.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;

use crate::probe;
use crate::raw::{self, GIB, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE, peek, poke};

const ND: &str = "/sys/bus/nd";

/// dev-dax on the NVDIMM, which is taken away when this is dropped: the kernel waits for that until
/// nobody refers to the memory any more.
struct Dax {
    /// The device that has the NVDIMM; the one that maps it has a name of its own.
    name: String,
    file: File,
    size: usize,
}

fn get(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().to_owned()
}

fn put(path: &str, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{text} > {path}: {error}"));
}

impl Dax {
    /// What `ndctl create-namespace --mode=devdax --align=1G` does.
    fn new() -> Self {
        let seed = get(&format!("{ND}/devices/region0/dax_seed"));
        let device = format!("{ND}/devices/{seed}");
        put(&format!("{device}/uuid"), "6a1e2f3c-0000-4000-8000-000000000001");
        put(&format!("{device}/mode"), "pmem");
        put(&format!("{device}/align"), &GIB.to_string());
        put(&format!("{device}/namespace"), "namespace0.0");
        put(&format!("{ND}/drivers/dax_pmem/bind"), &seed);
        let [name] = &names("/sys/bus/dax/devices")[..] else { panic!("one NVDIMM, one device") };
        let name = name.clone();
        assert_eq!(get(&format!("/sys/bus/dax/devices/{name}/align")), GIB.to_string());
        let size = get(&format!("/sys/bus/dax/devices/{name}/size")).parse().unwrap();
        let file = OpenOptions::new().read(true).write(true).open(format!("/dev/{name}")).unwrap();
        println!("{name}: {size:#x} bytes");
        Self { name: seed, file, size }
    }

    /// Maps all of it, and touches all of it.
    fn map(&self) -> usize {
        let at = raw::reserve(self.size, GIB);
        let flags = MAP_SHARED | raw::MAP_FIXED;
        // SAFETY: the range was reserved above; the memory is nobody else's.
        unsafe {
            raw::map_file(at, self.size, flags, self.file.as_fd(), 0).unwrap();
            for word in self.words() {
                poke(at + word, !word as u32);
            }
        }
        at
    }

    /// A word in each GiB.
    fn words(&self) -> impl Iterator<Item = usize> {
        (0x1234..self.size).step_by(GIB)
    }

    /// # Safety
    /// All of it is mapped there.
    unsafe fn assert_marks(&self, at: usize) {
        for word in self.words() {
            // SAFETY: the caller vouches for it.
            assert_eq!(unsafe { peek(at + word) }, !word as u32, "{word:#x}");
        }
    }
}

impl Drop for Dax {
    fn drop(&mut self) {
        put(&format!("{ND}/drivers/dax_pmem/unbind"), &self.name);
        put(&format!("{ND}/devices/{}/namespace", self.name), "\n");
    }
}

fn names(directory: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new(directory)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn gib_entries_of_memory_move() {
    let dax = Dax::new();
    let old = dax.map();
    let new = raw::reserve(dax.size, GIB);
    // SAFETY: the mapping and the reservation are ours.
    unsafe {
        raw::mremap(old, dax.size, MREMAP_MAYMOVE | MREMAP_FIXED, new).unwrap();
        raw::cover_with_memory(old, dax.size);
        for word in dax.words() {
            assert_eq!(peek(old + word), 0, "the old address reaches the memory");
        }
        dax.assert_marks(new);
        raw::munmap(new, dax.size);
        raw::munmap(old, dax.size);
    }
}

/// The entry cannot be moved and cannot be filled in again: the memory is unmapped, and nobody refers
/// to it any more.
#[test]
fn gib_entries_of_memory_go_where_they_cannot_be() {
    for shift in [2 << 20, PAGE] {
        let dax = Dax::new();
        let old = dax.map();
        let new = raw::reserve(dax.size + shift, GIB) + shift;
        // SAFETY: the mapping and the reservation are ours.
        unsafe {
            raw::mremap(old, dax.size, MREMAP_MAYMOVE | MREMAP_FIXED, new).unwrap();
            raw::cover_with_memory(old, dax.size);
            for word in dax.words() {
                assert_eq!(peek(old + word), 0, "the old address reaches the memory");
                assert_eq!(probe::load(new + word), None, "{shift:#x}: {word:#x}");
            }
            // Where it can be, the memory still has what was written.
            let again = raw::reserve(dax.size, GIB);
            raw::mremap(new, dax.size, MREMAP_MAYMOVE | MREMAP_FIXED, again).unwrap();
            dax.assert_marks(again);
            raw::munmap(again, dax.size);
            raw::munmap(old, dax.size);
        }
    }
}
