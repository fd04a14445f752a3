//! The windows that may be revoked by a signal handler, found by an address without a lock.
//!
//! A handler finds the entry of a window and pins it. A pinned entry is neither changed nor given to another
//! window, so the range that the handler read in it stays the window's until it is unpinned. Whoever drops,
//! relocates or restores a window first takes the entry out of the state in which handlers act, and then waits
//! until none has it pinned. State and number of pins are one atomic word, so one of the two always sees the
//! other.
//!
//! Entries and tables are never freed: a handler may hold them at any time. Entries are used again; a table is
//! replaced by one of twice its size.
//!
//! # Lookup
//! The size of a window, rounded up to a power of two, is its class, and a window of class `k` overlaps one or
//! two blocks of 2^k bytes. It is in a hash table by class and block. So a lookup looks at one bucket for each
//! class, of which there are no more than an address has bits, and inserting and removing touch two buckets.
//!
//! A link that is removed keeps its successor, so a handler that stands on it goes on. If the entry is used
//! again meanwhile, the handler may get into another bucket. The end of a chain names its bucket; if that is
//! not the one in which the lookup began, it begins again.

#![deny(unsafe_code)]

#[cfg(all(test, vfio_remap_loom))]
mod interleavings;
#[cfg(all(test, not(vfio_remap_loom)))]
mod tests;

use std::ops::Range;

use super::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Mutex, Ordering, spin};

/// What handlers do at a fault in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(in crate::space) enum State {
    /// The entry has no window, or one that is about to be unmapped: nothing.
    Dead = 0,
    /// The window reaches its device: revoke it.
    Live = 1,
    /// The window is revoked, and shows its pages: repeat the access.
    Revoked = 2,
    /// A verb changes the window, which reaches its device: repeat the access until that has ended.
    Busy = 3,
    /// A verb restores the window: as busy, but it still counts as revoked.
    Restoring = 4,
    /// The handler that marked it so is about to replace the window, or to fail, but it already counts as revoked:
    /// repeat the access until that has ended. Only who marked it changes it.
    Revoking = 5,
    /// As revoking, by a verb: replace the window for it. A handler that interrupted the thread of the verb cannot wait
    /// for it.
    RevokingByVerb = 6,
    /// The kernel has refused that verb the pages, but a handler may still replace the window for it: repeat the access
    /// until that is known. It still counts as revoked.
    Undecided = 7,
}

/// The number of pins is below, the state above.
const SHIFT: u32 = 32;
const PINS: u64 = (1 << SHIFT) - 1;

impl State {
    fn of(word: u64) -> Self {
        match word >> SHIFT {
            0 => Self::Dead,
            1 => Self::Live,
            2 => Self::Revoked,
            3 => Self::Busy,
            4 => Self::Restoring,
            5 => Self::Revoking,
            6 => Self::RevokingByVerb,
            _ => Self::Undecided,
        }
    }

    /// Whether it is about to be known what the window shows.
    fn is_revoking(self) -> bool {
        matches!(self, Self::Revoking | Self::RevokingByVerb | Self::Undecided)
    }

    /// Whether the window counts as revoked.
    pub(super) fn is_revoked(self) -> bool {
        matches!(self, Self::Revoked | Self::Restoring) || self.is_revoking()
    }
}

/// One window.
pub(super) struct Entry {
    /// [`State`], and by how many handlers it is pinned.
    word: AtomicU64,
    start: AtomicUsize,
    size: AtomicUsize,
    /// What the user of the registry needs to know of a window.
    note: AtomicUsize,
}

impl Entry {
    fn unused() -> Self {
        Self {
            word: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            size: AtomicUsize::new(0),
            note: AtomicUsize::new(0),
        }
    }

    pub(super) fn state(&self) -> State {
        State::of(self.word.load(Ordering::Acquire))
    }

    /// The addresses; only for whoever keeps the entry from being used again.
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.start.load(Ordering::Relaxed);
        start..start.wrapping_add(self.size.load(Ordering::Relaxed))
    }

    /// Changes the state if it is `from`; else returns what it is.
    #[inline(always)]
    pub(super) fn change(&self, from: State, to: State) -> Result<(), State> {
        let mut word = self.word.load(Ordering::Acquire);
        loop {
            if State::of(word) != from {
                return Err(State::of(word));
            }
            let next = (to as u64) << SHIFT | word & PINS;
            match self.word.compare_exchange(word, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Ok(()),
                Err(now) => word = now,
            }
        }
    }

    /// Changes the state to one in which handlers do not act, and waits until those that acted have ended.
    /// Returns the state before, which is not that of a window that is about to be revoked: what the window shows is
    /// known.
    #[inline(always)]
    pub(super) fn stop(&self, to: State) -> State {
        let before = loop {
            let state = self.state();
            if state.is_revoking() {
                self.drain();
            } else if self.change(state, to).is_ok() {
                break state;
            }
        };
        self.drain();
        before
    }

    /// As [`stop`](Self::stop), if the state is `from`; else returns what it is.
    pub(super) fn stop_if(&self, from: State, to: State) -> Result<(), State> {
        self.change(from, to)?;
        self.drain();
        Ok(())
    }

    /// Marks a live window, for a verb: it is [`RevokingByVerb`](State::RevokingByVerb). False if it is revoked. A
    /// handler that has marked it may fail and take the mark back, so this waits for it. Verbs on one window take turns.
    pub(super) fn mark(&self) -> bool {
        loop {
            self.drain();
            match self.change(State::Live, State::RevokingByVerb) {
                Ok(()) => return true,
                Err(State::Revoking) => {}
                Err(_) => return false,
            }
        }
    }

    /// Ends what [`mark`](Self::mark) began, if the window was replaced.
    pub(super) fn has_revoked(&self) {
        let _ = self.change(State::RevokingByVerb, State::Revoked);
    }

    /// After the kernel has refused to replace a window that was [marked](Self::mark): waits for handlers that replace
    /// it. False if one has; then it is revoked. Else it is [`Undecided`](State::Undecided), and the caller ends that.
    /// No signal handler of the program may interrupt the caller until then.
    pub(super) fn has_failed(&self) -> bool {
        let _ = self.change(State::RevokingByVerb, State::Undecided);
        self.drain();
        self.state() == State::Undecided
    }

    /// Waits for handlers, which make a few system calls each.
    pub(super) fn drain(&self) {
        let mut turn = 0;
        while self.word.load(Ordering::Acquire) & PINS != 0 {
            spin(turn);
            turn += 1;
        }
    }

    /// Pins the entry if its window has `address`.
    fn pin_at(&self, address: usize) -> Option<Pin<'_>> {
        // A glance, which spares most entries of a chain the two writes. The window that faulted was made
        // before, so its own entry is not passed over.
        if !self.range().contains(&address) {
            return None;
        }
        self.pin().filter(|pin| pin.range().contains(&address))
    }

    fn pin(&self) -> Option<Pin<'_>> {
        let state = State::of(self.word.fetch_add(1, Ordering::Acquire));
        let pin = Pin { entry: self, state };
        (state != State::Dead).then_some(pin)
    }
}

/// An entry that keeps its range while this lives.
pub(super) struct Pin<'a> {
    entry: &'a Entry,
    state: State,
}

impl Pin<'_> {
    pub(super) fn range(&self) -> Range<usize> {
        self.entry.range()
    }

    pub(super) fn note(&self) -> usize {
        self.entry.note.load(Ordering::Relaxed)
    }

    /// The state when it was pinned.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Marks the window. If this returns true, the caller replaces its range, and says whether it
    /// [has](Self::has_revoked), before it drops the pin. Marked first, so that whoever reads the pages also sees the
    /// mark.
    pub(super) fn mark(&self) -> bool {
        self.entry.change(State::Live, State::Revoking).is_ok()
    }

    /// Ends what [`mark`](Self::mark) began: the window is revoked, or what it was.
    pub(super) fn has_revoked(&self, revoked: bool) {
        let state = if revoked { State::Revoked } else { State::Live };
        let _ = self.entry.change(State::Revoking, state);
    }

    /// Says for the verb that has marked the window that it is revoked: also if the verb has failed since, and waits
    /// for this pin.
    pub(super) fn has_revoked_for_verb(&self) {
        if self.entry.change(State::RevokingByVerb, State::Revoked) == Err(State::Undecided) {
            let _ = self.entry.change(State::Undecided, State::Revoked);
        }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.entry.word.fetch_sub(1, Ordering::Release);
    }
}

/// The place of a window in the registry.
pub(super) struct Slot {
    pub entry: &'static Entry,
    index: u32,
}

pub(super) struct Registry {
    table: AtomicPtr<Table>,
    /// A bit for each class that a window has had.
    classes: AtomicU64,
    writer: Mutex<Writer>,
}

/// What only inserting and removing use.
struct Writer {
    table: &'static Table,
    free: Vec<u32>,
}

/// All entries, and chains of links through them. Entry `i` has the links `2 * i` and `2 * i + 1`.
struct Table {
    entries: Box<[&'static Entry]>,
    /// The first link of each bucket.
    heads: Box<[AtomicU32]>,
    /// The next link of each link.
    links: Box<[AtomicU32]>,
}

/// The end of the chain of a bucket, which the lower bits name.
const END: u32 = 1 << 31;

impl Table {
    fn new(entries: Vec<&'static Entry>) -> Self {
        let buckets = entries.len().next_power_of_two() as u32;
        let heads = (0..buckets).map(|bucket| AtomicU32::new(END | bucket)).collect();
        let links = (0..2 * entries.len()).map(|_| AtomicU32::new(END)).collect();
        Self { entries: entries.into(), heads, links }
    }

    fn bucket(&self, class: u32, block: usize) -> usize {
        let mixed = (block as u64 ^ u64::from(class) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize & (self.heads.len() - 1)
    }

    /// The buckets of a range, one for each link.
    #[inline(always)]
    fn buckets(&self, range: &Range<usize>) -> [Option<usize>; 2] {
        let class = class_of(range.len());
        let [first, last] = [range.start >> class, (range.end - 1) >> class];
        [Some(first), (first != last).then_some(last)]
            .map(|block| block.map(|block| self.bucket(class, block)))
    }

    #[inline(always)]
    fn link(&self, index: u32, range: &Range<usize>) {
        for (bucket, link) in self.buckets(range).into_iter().zip(2 * index..) {
            let Some(bucket) = bucket else { continue };
            let head = self.heads[bucket].load(Ordering::Relaxed);
            // A handler that stands on this link since it was another window's goes on from here, and must see
            // the entries that follow.
            self.links[link as usize].store(head, Ordering::Release);
            self.heads[bucket].store(link, Ordering::Release);
        }
    }

    #[inline(always)]
    fn unlink(&self, index: u32, range: &Range<usize>) {
        for (bucket, link) in self.buckets(range).into_iter().zip(2 * index..) {
            let Some(bucket) = bucket else { continue };
            let mut at = &self.heads[bucket];
            loop {
                let next = at.load(Ordering::Relaxed);
                if next == link || next & END != 0 {
                    break;
                }
                at = &self.links[next as usize];
            }
            let after = self.links[link as usize].load(Ordering::Relaxed);
            at.store(after, Ordering::Release);
        }
    }

    /// Looks for the window that has `address` in one bucket. `Err` if the chain led to another.
    fn find(&self, class: u32, address: usize) -> Result<Option<Pin<'_>>, ()> {
        let bucket = self.bucket(class, address >> class);
        let mut link = self.heads[bucket].load(Ordering::Acquire);
        while link & END == 0 {
            let entry = self.entries[link as usize / 2];
            if let Some(pin) = entry.pin_at(address) {
                return Ok(Some(pin));
            }
            link = self.links[link as usize].load(Ordering::Acquire);
        }
        if link == END | bucket as u32 { Ok(None) } else { Err(()) }
    }
}

/// The logarithm of a size that is rounded up to a power of two.
fn class_of(size: usize) -> u32 {
    size.next_power_of_two().trailing_zeros()
}

fn unused(count: usize) -> impl Iterator<Item = &'static Entry> {
    let entries: &'static [Entry] = Box::leak((0..count).map(|_| Entry::unused()).collect());
    entries.iter()
}

impl Registry {
    /// A registry with room for `count` windows, which grows.
    pub(super) fn new(count: usize) -> Self {
        let table: &'static Table = Box::leak(Box::new(Table::new(unused(count).collect())));
        let free = (0..count as u32).rev().collect();
        Self {
            table: AtomicPtr::new(std::ptr::from_ref(table).cast_mut()),
            classes: AtomicU64::new(0),
            writer: Mutex::new(Writer { table, free }),
        }
    }

    /// Adds a window in the state [`Live`](State::Live). The range is not empty.
    #[inline(always)]
    pub(super) fn insert(&self, range: &Range<usize>, note: usize) -> Slot {
        let mut writer = lock(&self.writer);
        if writer.free.is_empty() {
            self.grow(&mut writer);
        }
        let index = writer.free.pop().unwrap_or_default();
        let entry = writer.table.entries[index as usize];
        entry.note.store(note, Ordering::Relaxed);
        let slot = Slot { entry, index };
        self.link(&writer, &slot, range);
        slot
    }

    /// Gives a window that is [`Busy`](State::Busy) another range, after its handlers have ended. It is live
    /// then.
    pub(super) fn relocate(&self, slot: &Slot, range: &Range<usize>) {
        let Slot { entry, index } = slot;
        entry.stop(State::Dead);
        let writer = lock(&self.writer);
        writer.table.unlink(*index, &entry.range());
        self.link(&writer, slot, range);
    }

    /// Links an entry that is dead, and makes it live.
    #[inline(always)]
    fn link(&self, writer: &Writer, slot: &Slot, range: &Range<usize>) {
        let Slot { entry, index } = slot;
        entry.start.store(range.start, Ordering::Relaxed);
        entry.size.store(range.len(), Ordering::Relaxed);
        let class = 1 << class_of(range.len());
        // No bit is ever cleared: whoever learns of the window from this thread sees what it sees.
        if self.classes.load(Ordering::Relaxed) & class == 0 {
            self.classes.fetch_or(class, Ordering::Relaxed);
        }
        writer.table.link(*index, range);
        // Handlers see the range if they see the state.
        let made_live = entry.change(State::Dead, State::Live);
        debug_assert!(made_live.is_ok());
    }

    /// Removes a window, after its handlers have ended. Its entry may be used for another one. Returns the state
    /// before.
    #[inline(always)]
    pub(super) fn remove(&self, slot: Slot) -> State {
        let before = slot.entry.stop(State::Dead);
        let mut writer = lock(&self.writer);
        writer.table.unlink(slot.index, &slot.entry.range());
        writer.free.push(slot.index);
        before
    }

    /// Doubles the number of entries. A handler may be in the old table, which stays as it is.
    #[cold]
    fn grow(&self, writer: &mut Writer) {
        let old = &writer.table.entries;
        let count = old.len();
        let all = old.iter().copied().chain(unused(count)).collect();
        let table: &'static Table = Box::leak(Box::new(Table::new(all)));
        for (index, entry) in (0..).zip(old) {
            table.link(index, &entry.range());
        }
        self.table.store(std::ptr::from_ref(table).cast_mut(), Ordering::Release);
        writer.table = table;
        writer.free.extend((count as u32..2 * count as u32).rev());
    }

    #[expect(unsafe_code, reason = "tables are reached by an atomic pointer")]
    fn table(&self) -> &'static Table {
        // SAFETY: only references to leaked tables are stored, after all writes to them that are not atomic.
        unsafe { &*self.table.load(Ordering::Acquire) }
    }

    /// Pins the window that has `address`. For signal handlers: no lock, no allocation.
    pub(super) fn find(&self, address: usize) -> Option<Pin<'static>> {
        'again: loop {
            let table = self.table();
            let mut classes = self.classes.load(Ordering::Relaxed);
            while classes != 0 {
                let class = classes.trailing_zeros();
                classes &= classes - 1;
                match table.find(class, address) {
                    Ok(None) => {}
                    Ok(found) => return found,
                    Err(()) => {
                        spin(0);
                        continue 'again;
                    }
                }
            }
            return None;
        }
    }

    /// Pins each window in turn. For signal handlers: no lock, no allocation.
    pub(super) fn each(&self) -> impl Iterator<Item = Pin<'static>> {
        let entries = self.table().entries.iter();
        entries.filter(|entry| entry.state() != State::Dead).filter_map(|entry| entry.pin())
    }
}

#[cfg(not(all(test, vfio_remap_loom)))]
fn lock(writer: &Mutex<Writer>) -> std::sync::MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(all(test, vfio_remap_loom))]
fn lock(writer: &Mutex<Writer>) -> loom::sync::MutexGuard<'_, Writer> {
    writer.lock().expect("no thread has panicked")
}
