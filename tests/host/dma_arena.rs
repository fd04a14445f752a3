//! Buffers that share mappings, with transports that have few.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, Mutex};

use vfio_remap::device::{BufferRequest, DmaBuffer, DmaSpace, Iova, IovaPlacement};
use vfio_remap::space::Access;
use vfio_remap::transport::DmaLimits;
use vfio_remap::{Device, ErrorKind};

use crate::support::few_mappings::{Few, MOST};

const PAGE: usize = 4096;

fn space_of(few: Few) -> (Arc<Few>, DmaSpace) {
    let few = Arc::new(few);
    let space = Device::new(few.clone()).dma().unwrap();
    (few, space)
}

fn space() -> (Arc<Few>, DmaSpace) {
    space_of(Few::default())
}

/// xorshift64
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[track_caller]
fn assert_zero(buffer: &DmaBuffer) {
    let mut bytes = vec![1; buffer.size()];
    buffer.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0), "{buffer:?}");
}

fn fill(buffer: &DmaBuffer, byte: u8) {
    buffer.write(0, &vec![byte; buffer.size()]);
}

/// Whether no two of them have a byte in common, here or for the device.
fn are_apart<'a>(buffers: impl Iterator<Item = &'a DmaBuffer> + Clone) -> bool {
    let apart = |start: fn(&DmaBuffer) -> u64| {
        let mut ranges: Vec<_> =
            buffers.clone().map(|buffer| (start(buffer), buffer.size() as u64)).collect();
        ranges.sort_unstable();
        ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0)
    };
    apart(|buffer| buffer.iova().0) && apart(|buffer| buffer.as_ptr() as u64)
}

#[test]
fn a_thousand_buffers_of_mixed_sizes_take_16_mappings_at_most() {
    let (few, space) = space();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let sizes = [1, PAGE, 5000, 16 << 10, 64 << 10, 300_000, 1 << 20];
    let mut buffers = Vec::new();
    let mut bytes = 0;
    for _ in 0..1000 {
        let size = sizes[random.below(sizes.len() as u64) as usize];
        let buffer = space.buffer(size).unwrap();
        assert_eq!(buffer.size(), size.next_multiple_of(PAGE));
        assert!((buffer.iova().0 | buffer.as_ptr() as u64).is_multiple_of(PAGE as u64));
        assert!(few.reaches(&buffer));
        bytes += buffer.size();
        buffers.push(buffer);
    }
    assert!(are_apart(buffers.iter()));
    assert!(bytes > 128 << 20 && space.mapping_count() <= MOST, "{space:?}: {:x?}", few.sizes());
    // What is left free is less than the rest.
    assert!(few.sizes().iter().sum::<u64>() <= 2 * bytes as u64, "{:x?}", few.sizes());
    drop(buffers);
    assert_eq!((few.sizes(), space.mapping_count()), (vec![], 0));
}

/// From 64 KiB to 64 MiB, where no single buffer is larger.
#[test]
fn an_arena_doubles_within_bounds() {
    let (few, space) = space_of(Few { most: 64, ..Few::default() });
    let mut buffers = Vec::new();
    let mut grow = |size: usize| {
        let before = few.mapped.lock().unwrap().clone();
        loop {
            buffers.push(space.buffer(size).unwrap());
            let now = few.mapped.lock().unwrap().clone();
            if let Some((_, size)) = now.iter().find(|(iova, _)| !before.contains_key(iova)) {
                return *size;
            }
        }
    };
    const KIB: u64 = 1 << 10;
    let doubled = [64, 64, 128, 256, 512].map(|size| size * KIB);
    assert_eq!(doubled.map(|_| grow(PAGE)), doubled);
    assert_eq!(grow(16 << 20), 16 << 20, "one that is larger is all of its mapping");
    // There are 17 MiB.
    assert_eq!([(); 4].map(|()| grow(1 << 20) / KIB), [17 << 10, 34 << 10, 64 << 10, 64 << 10]);
    assert_eq!(grow(100 << 20), 100 << 20);
}

#[test]
fn a_buffer_that_was_dropped_is_given_out_again_as_zeros() {
    let (few, space) = space();
    let held = space.buffer(PAGE).unwrap();
    let asked = few.asked();
    let buffer = space.buffer(3 * PAGE).unwrap();
    assert_zero(&buffer);
    fill(&buffer, 0xa5);
    let was = (buffer.iova(), buffer.as_ptr());
    // It is one buffer's until all its parts are dropped.
    let (first, rest) = buffer.split_at(100).unwrap();
    let (middle, last) = rest.split_at(PAGE).unwrap();
    drop((last, first));
    let other = space.buffer(3 * PAGE).unwrap();
    assert!(are_apart([&held, &middle, &other].into_iter()));
    fill(&other, 0x5a);
    drop(middle);
    let again = space.buffer(3 * PAGE).unwrap();
    assert_eq!((again.iova(), again.as_ptr()), was);
    assert_zero(&again);
    // A part of what was used, and what was not.
    drop((again, other));
    let large = space.buffer(8 * PAGE).unwrap();
    assert_eq!(large.iova(), was.0);
    assert_zero(&large);
    let entries = space.array::<u64, 8>(64).unwrap();
    assert!((0..64).all(|index| entries.load(index, 7) == 0));
    assert_eq!((few.asked(), space.mapping_count()), (asked, 1), "without a system call");
}

#[test]
fn memory_at_the_last_address_of_all_is_zeroed() {
    let first = u64::MAX - 0xffff;
    let few = Few::with_limits(|limits| *limits = DmaLimits::new(vec![first..=u64::MAX], 4096));
    let (few, space) = space_of(few);
    let held = space.buffer(15 * PAGE).unwrap();
    for _ in 0..2 {
        let last = space.buffer(PAGE).unwrap();
        assert_eq!(last.iova(), Iova(u64::MAX - 0xfff));
        assert_zero(&last);
        fill(&last, 0xff);
    }
    assert_eq!((few.sizes(), held.iova()), (vec![0x1_0000], Iova(first)));
}

#[test]
fn a_mapping_goes_with_its_last_buffer() {
    let (few, space) = space();
    for order in [[0, 1], [1, 0]] {
        let mut buffers = [0, 1].map(|_| Some(space.buffer(PAGE).unwrap()));
        assert_eq!(space.mapping_count(), 1);
        buffers[order[0]] = None;
        assert!(few.reaches(buffers[order[1]].as_ref().unwrap()));
        buffers[order[1]] = None;
        assert_eq!((few.sizes(), space.mapping_count()), (vec![], 0));
    }
}

#[test]
fn a_buffer_that_wants_a_mapping_of_its_own_has_it_to_the_page() {
    let (few, space) = space();
    let shared = space.buffer(PAGE).unwrap();
    let own = space.buffer_with(BufferRequest::new(PAGE + 1).own_mapping()).unwrap();
    assert_eq!(few.mapped.lock().unwrap().get(&own.iova().0), Some(&(2 * PAGE as u64)));
    let other = space.buffer(PAGE).unwrap();
    assert!(are_apart([&shared, &own, &other].into_iter()));
    assert_eq!(space.mapping_count(), 2);
    drop(own);
    assert_eq!(space.mapping_count(), 1, "the device reaches it no more");
}

#[test]
fn what_is_placed_or_not_translated_has_a_mapping_of_its_own() {
    let (few, space) = space();
    let at = BufferRequest::new(PAGE).placement(IovaPlacement::At(Iova(0x10_0000)));
    let same = BufferRequest::new(PAGE).placement(IovaPlacement::SameAsAddress);
    let placed = [at, same].map(|request| space.buffer_with(request).unwrap());
    assert_eq!(
        (placed[0].iova(), placed[1].iova().0),
        (Iova(0x10_0000), placed[1].as_ptr() as u64)
    );
    assert_eq!(few.sizes(), [PAGE as u64; 2]);
    let (few, space) = space_of(Few::with_limits(|limits| limits.translated = false));
    let _two = [(); 2].map(|()| space.buffer(PAGE).unwrap());
    assert_eq!(few.sizes(), [PAGE as u64; 2]);
}

#[test]
fn limits_and_alignments_are_kept_in_shared_mappings() {
    let (few, space) = space_of(Few { most: 64, ..Few::default() });
    let request = |alignment, limit| {
        let placement = IovaPlacement::up_to(limit).aligned(alignment);
        space.buffer_with(BufferRequest::new(PAGE).placement(placement)).unwrap()
    };
    const LIMITS: [u64; 3] = [0xfff_ffff, 0xffff_ffff, u64::MAX];
    let mut buffers = Vec::new();
    for shift in [0, 12, 13, 16, 20, 14] {
        for limit in LIMITS {
            for _ in 0..4 {
                let buffer = request(1 << shift, limit);
                assert!(buffer.iova().0.is_multiple_of(1 << shift), "{buffer:?}");
                assert!(buffer.iova().0 + PAGE as u64 - 1 <= limit, "{buffer:?}");
                assert!(limit != u64::MAX || buffer.iova().0 >= 1 << 32, "{buffer:?}");
                assert!(few.reaches(&buffer));
                buffers.push(buffer);
            }
        }
    }
    assert!(are_apart(buffers.iter()));
    let placement = IovaPlacement::default().aligned(3);
    let error = space.buffer_with(BufferRequest::new(PAGE).placement(placement)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unaligned, "{error}");
    assert!(error.to_string().contains("0x1000 bytes"), "what was asked for: {error}");
}

/// An IOMMU, or a server, may have larger pages than this machine.
#[test]
fn buffers_that_share_are_aligned_to_the_pages_of_the_iommu() {
    for page in [16 << 10, 64 << 10, 4 << 20] {
        let few =
            Few::with_limits(|limits| *limits = DmaLimits::new(vec![0..=(1 << 39) - 1], page));
        let (few, space) = space_of(few);
        let buffers: Vec<_> = (1..=100).map(|size| space.buffer(size * 5000).unwrap()).collect();
        for buffer in &buffers {
            assert!((buffer.size() as u64 | buffer.iova().0).is_multiple_of(page));
            assert!((buffer.as_ptr() as u64).is_multiple_of(page));
            buffer.store(buffer.size() - 4, 7u32);
        }
        assert!(are_apart(buffers.iter()) && space.mapping_count() <= MOST, "{:x?}", few.sizes());
    }
}

#[test]
fn a_buffer_is_mapped_alone_if_a_larger_mapping_is_refused() {
    for refusal in [ErrorKind::LockedMemory, ErrorKind::Os, ErrorKind::OutOfRange] {
        let (few, space) = space_of(Few { refusal, ..Few::default() });
        few.largest(2 * PAGE);
        let buffers = [1, 2, 1].map(|pages| space.buffer(pages * PAGE).unwrap());
        assert_eq!(few.sizes().iter().sum::<u64>(), 4 * PAGE as u64);
        assert_eq!(space.mapping_count(), 3);
        let error = space.buffer(3 * PAGE).unwrap_err();
        assert_eq!((error.kind(), space.mapping_count()), (refusal, 3), "{error}");
        assert!(error.to_string().contains("..0x"), "{error}");
        drop(buffers);
        assert_eq!((few.sizes(), space.mapping_count()), (vec![], 0));
        few.largest(usize::MAX);
        let _one = space.buffer(PAGE).unwrap();
        assert_eq!(few.sizes(), [64 << 10], "there is room again");
    }
    // 32 KiB of addresses, of which the first page is not given out.
    let few = Few::with_limits(|limits| *limits = DmaLimits::new(vec![0..=0x7fff], 4096));
    let (_few, space) = space_of(few);
    let buffers: Vec<_> = (0..7).map(|_| space.buffer(PAGE).unwrap()).collect();
    assert!(are_apart(buffers.iter()));
    let error = space.buffer(PAGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    assert!(error.to_string().contains("0x1000 bytes"), "what was asked for: {error}");
}

#[test]
fn a_device_that_is_gone_or_does_not_answer_is_asked_once() {
    for refusal in [ErrorKind::Gone, ErrorKind::TimedOut] {
        let (few, space) = space_of(Few { refusal, ..Few::default() });
        few.largest(0);
        let error = space.buffer(PAGE).unwrap_err();
        assert_eq!((error.kind(), few.asked(), space.mapping_count()), (refusal, 1, 0), "{error}");
        few.largest(usize::MAX);
        drop(space.buffer(PAGE).unwrap());
    }
}

/// A mapping takes a quarter of it at most, but for a buffer that needs more.
#[test]
fn what_may_be_locked_is_not_spent_on_what_nobody_asked_for() {
    const LIMIT: u64 = 8 << 20;
    let (few, space) = space();
    few.lockable.store(LIMIT, Ordering::Relaxed);
    let mut buffers = Vec::new();
    loop {
        let (left, before) = (few.lockable.load(Ordering::Relaxed), space.mapping_count());
        if left < LIMIT / 2 {
            break;
        }
        buffers.push(space.buffer(PAGE).unwrap());
        if space.mapping_count() > before {
            let taken = left - few.lockable.load(Ordering::Relaxed);
            assert!(taken <= left / 4, "{taken:#x} of {left:#x}");
        }
    }
    // All of what is left is one buffer's.
    let rest = few.lockable.load(Ordering::Relaxed);
    drop(space.buffer(rest as usize).unwrap());
    let error = space.buffer(rest as usize + PAGE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LockedMemory, "{error}");
    // Everything can be had by small buffers, too.
    let (few, space) = space_of(Few { most: usize::MAX, ..Few::default() });
    few.lockable.store(LIMIT, Ordering::Relaxed);
    let buffers: Vec<_> = (0..LIMIT / PAGE as u64).map(|_| space.buffer(PAGE).unwrap()).collect();
    assert_eq!(few.lockable.load(Ordering::Relaxed), 0);
    assert!(space.mapping_count() < 64, "{space:?}");
    space.buffer(PAGE).unwrap_err();
    drop(buffers);
    assert_eq!(few.lockable.load(Ordering::Relaxed), LIMIT);
}

#[test]
fn huge_pages_have_an_arena_of_their_own() {
    const HUGE: usize = 2 << 20;
    let (few, space) = space();
    let request = BufferRequest::new(1).huge_pages();
    let buffers: Vec<_> = (0..6).map(|_| space.buffer_with(request).unwrap()).collect();
    let ordinary = space.buffer(PAGE).unwrap();
    assert!(!ordinary.has_huge_pages() && ordinary.huge_pages_refused().is_none());
    for buffer in &buffers {
        // A machine may have none to spare.
        assert_eq!(buffer.has_huge_pages(), buffer.huge_pages_refused().is_none(), "{buffer:?}");
        if buffer.has_huge_pages() {
            assert!((buffer.iova().0 | buffer.size() as u64).is_multiple_of(HUGE as u64));
        }
        assert!(few.reaches(buffer));
        assert_zero(buffer);
    }
    assert!(are_apart(buffers.iter().chain([&ordinary])));
}

#[test]
fn memory_that_another_device_reaches_is_not_reused() {
    let ((_, space), (_, other)) = (space(), space());
    let held = space.buffer(PAGE).unwrap();
    let buffer = space.buffer(2 * PAGE).unwrap();
    let address = buffer.as_ptr() as usize;
    let (first, second) = buffer.split_at(PAGE).unwrap();
    let memory = second.memory();
    assert_eq!((memory.address(), memory.size()), (address, 2 * PAGE));
    // The file has all buffers of the mapping in it.
    assert!(memory.file().is_none());
    let own = space.buffer_with(BufferRequest::new(PAGE).own_mapping()).unwrap();
    assert!(own.memory().file().is_some());
    let mapping = other.map(memory, IovaPlacement::default(), Access::ReadOnly).unwrap();
    drop((first, second));
    let another = space.buffer(2 * PAGE).unwrap();
    assert_ne!(another.as_ptr() as usize, address, "the other device reaches it still");
    drop(mapping);
    assert_eq!(space.buffer(2 * PAGE).unwrap().as_ptr() as usize, address);
    drop(held);
}

/// Who shares the address space, and not the stock of addresses, may have mapped what is chosen first.
#[test]
fn an_arena_grows_around_what_neighbours_have_mapped() {
    // Up to 28 TiB more than what is chosen first.
    for theirs in [1 << 12, 1 << 30, 28 << 40] {
        let few = Few { neighbours: 1 << 32..=(1 << 32) + theirs - 1, ..Few::default() };
        let (few, space) = space_of(few);
        let buffers: Vec<_> = (0..100).map(|_| space.buffer(PAGE).unwrap()).collect();
        assert_eq!(few.sizes().iter().sum::<u64>(), 512 << 10);
        assert!(buffers.iter().all(|buffer| !few.neighbours.contains(&buffer.iova().0)));
        drop(buffers);
        assert_eq!(format!("{space:?}"), "DmaSpace(0 mappings, 2 free ranges)");
    }
}

/// Two threads allocate, split and drop at random, and see that nobody else has what they have.
#[test]
fn threads_that_allocate_at_random_agree_with_a_naive_model() {
    let (few, space) = space();
    /// What is given out, page by page, by the IOVA of the page.
    type Pages = Mutex<BTreeMap<u64, u8>>;
    let pages = Pages::default();
    let work = |thread: u8| {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(thread) << 40);
        let mut held: Vec<(u8, DmaBuffer)> = Vec::new();
        let number = |buffer: &DmaBuffer| buffer.iova().0 / PAGE as u64;
        // The model forgets first: from the last part on the pages are anybody's.
        let forget = |buffer: &DmaBuffer| {
            let (first, count) = (number(buffer), buffer.size() as u64 / PAGE as u64);
            let mut pages = pages.lock().unwrap();
            (first..first + count).for_each(|page| assert_eq!(pages.remove(&page), Some(thread)));
        };
        for round in 0..4000u32 {
            if held.len() < 64 && random.below(5) < 3 {
                let most = if random.below(50) == 0 { 300 } else { 8 };
                let count = 1 + random.below(most) as usize;
                let alignment = 1 << random.below(16);
                let placement = IovaPlacement::default().aligned(alignment);
                let request = BufferRequest::new(count * PAGE).placement(placement);
                let buffer = space.buffer_with(request).unwrap();
                assert!(buffer.iova().0.is_multiple_of(alignment) && few.reaches(&buffer));
                let mut pages = pages.lock().unwrap();
                for page in number(&buffer)..number(&buffer) + count as u64 {
                    assert_eq!(pages.insert(page, thread), None, "page {page:#x}, round {round}");
                }
                drop(pages);
                for at in (0..buffer.size()).step_by(512) {
                    assert_eq!(buffer.load::<u64>(at), 0, "{buffer:?}, round {round}");
                }
                let mark = 1 + random.below(255) as u8;
                fill(&buffer, mark);
                held.push((mark, buffer));
            } else if !held.is_empty() {
                let (mark, buffer) = held.swap_remove(random.below(held.len() as u64) as usize);
                let mut bytes = vec![0; buffer.size()];
                buffer.read(0, &mut bytes);
                assert!(bytes.iter().all(|byte| *byte == mark), "{buffer:?}, round {round}");
                forget(&buffer);
                drop(buffer.chunks(random.below(3) as usize * 1000 + 700).collect::<Vec<_>>());
            }
            assert!(space.mapping_count() <= MOST);
        }
        held.iter().for_each(|(_, buffer)| forget(buffer));
    };
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
    assert!(pages.lock().unwrap().is_empty());
    assert_eq!((few.sizes(), space.mapping_count()), (vec![], 0));
    assert_eq!(format!("{space:?}"), "DmaSpace(0 mappings, 2 free ranges)");
}

/// The others wait for one mapping, and none makes a second one.
#[test]
fn threads_without_room_share_what_one_of_them_maps() {
    let (few, space) = space_of(Few { waits: true, ..Few::default() });
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let thread = || {
            start.wait();
            space.buffer(PAGE).unwrap()
        };
        let buffers = [scope.spawn(thread), scope.spawn(thread)];
        let buffers = buffers.map(|thread| thread.join().unwrap());
        assert_eq!(few.sizes(), [64 << 10]);
        assert!(are_apart(buffers.iter()));
    });
}
