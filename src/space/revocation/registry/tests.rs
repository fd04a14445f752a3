//! The registry by one thread, against a list.

use super::*;

const PAGE: usize = 4096;

#[test]
fn addresses_are_found_as_in_a_list() {
    let registry = Registry::new(1);
    let mut windows: Vec<Slot> = Vec::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |below: usize| {
        // xorshift64
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut most = 0;
    for round in 0..20_000 {
        most = most.max(windows.len());
        // More and more at first, and then fewer.
        let adds = random(10) < if round < 10_000 { 7 } else { 4 };
        if adds || windows.is_empty() {
            let most = 1 << random(12);
            let size = PAGE * (1 + random(most));
            let start = PAGE * (1 + random(1 << 22));
            let range = start..start + size;
            let overlaps = |slot: &Slot| {
                let taken = slot.entry.range();
                taken.start < range.end && range.start < taken.end
            };
            let free = !windows.iter().any(overlaps);
            match windows.len() {
                // Every fourth moves one instead.
                count if free && count > 0 && random(4) == 0 => {
                    let slot = &windows[random(count)];
                    slot.entry.stop_if(State::Live, State::Busy).unwrap();
                    registry.relocate(slot, &range);
                    assert_eq!(slot.entry.state(), State::Live);
                }
                _ if free => windows.push(registry.insert(&range, round)),
                _ => {}
            }
        } else {
            let index = random(windows.len());
            registry.remove(windows.swap_remove(index));
        }
        let near =
            windows.get(random(windows.len().max(1))).map_or(0, |slot| slot.entry.range().start);
        for address in [near.wrapping_sub(1), near, near + PAGE - 1, random(PAGE << 23)] {
            let expected = windows.iter().find(|slot| slot.entry.range().contains(&address));
            let found = registry.find(address);
            assert_eq!(
                found.map(|pin| (pin.range(), pin.note())),
                expected
                    .map(|slot| { (slot.entry.range(), slot.entry.note.load(Ordering::Relaxed)) }),
                "{address:#x} in round {round}"
            );
        }
    }
    assert!(most > 500, "{most}");
    assert_eq!(registry.each().count(), windows.len());
    assert!(windows.iter().all(|slot| slot.entry.word.load(Ordering::Relaxed) & PINS == 0));
}

/// How many links a lookup follows in the longest chain.
fn longest(registry: &Registry) -> usize {
    let table = registry.table();
    let length = |head: &AtomicU32| {
        let mut link = head.load(Ordering::Relaxed);
        std::iter::from_fn(|| {
            let here = (link & END == 0).then_some(link)?;
            link = table.links[here as usize].load(Ordering::Relaxed);
            Some(())
        })
        .count()
    };
    table.heads.iter().map(length).max().unwrap_or(0)
}

#[test]
fn chains_stay_short_for_a_hundred_thousand_windows() {
    let registry = Registry::new(64);
    // Beside each other, as the kernel places them, and at distances of powers of two.
    for (count, distance) in [(100_000, PAGE), (2_000, 64 << 20), (2_000, 1 << 30)] {
        let first = 0x7000_0000_0000 + (distance << 20);
        for index in 0..count {
            let start = first + index * distance;
            let _ = registry.insert(&(start..start + PAGE), 0);
        }
    }
    assert!(longest(&registry) <= 16, "{}", longest(&registry));
}
