//! All interleavings of handlers with verbs, by loom:
//!
//! ```sh
//! RUSTFLAGS="--cfg vfio_remap_loom" CARGO_TARGET_DIR=target/loom \
//!     cargo test --release --lib interleavings
//! ```
//!
//! What is mapped at a window is a number here. The kernel changes it in one step, as `mmap(2)` does.

use loom::sync::Arc;
use loom::sync::atomic::AtomicU8;
use loom::thread;

use super::super::sweeps::Sweeps;
use super::*;

/// Nothing of ours: another thread may have mapped anything there.
const FOREIGN: u8 = 0;
const DEVICE: u8 = 1;
const PAGES: u8 = 2;

const RANGE: Range<usize> = 0x1000..0x2000;
/// Other windows of the same size.
const OTHERS: [Range<usize>; 2] = [0x2000..0x3000, 0x3000..0x4000];

struct Model {
    registry: Registry,
    mapped: AtomicU8,
}

impl Model {
    fn new(room: usize) -> Arc<Self> {
        Arc::new(Self { registry: Registry::new(room), mapped: AtomicU8::new(DEVICE) })
    }

    /// What a signal handler does at a fault in the window.
    fn handle(&self) {
        let Some(pin) = self.registry.find(RANGE.start + 8) else { return };
        assert_eq!(pin.range(), RANGE);
        if pin.state() == State::Live && pin.mark() {
            let before = self.mapped.swap(PAGES, Ordering::AcqRel);
            assert_eq!(before, DEVICE, "replaced what is not the window's, or twice");
            pin.has_revoked(true);
        } else if pin.state() == State::RevokingByVerb {
            let before = self.mapped.swap(PAGES, Ordering::AcqRel);
            assert_ne!(before, FOREIGN, "replaced what is not the window's");
            pin.has_revoked_for_verb();
        }
    }

    /// As [`handle`](Self::handle), if the kernel refuses the pages.
    fn fail(&self) {
        let Some(pin) = self.registry.find(RANGE.start + 8) else { return };
        if pin.state() == State::Live && pin.mark() {
            pin.has_revoked(false);
        }
    }

    fn handler(model: &Arc<Self>) -> thread::JoinHandle<()> {
        let model = model.clone();
        thread::spawn(move || model.handle())
    }

    /// `Control::revoke`
    fn revoke(&self, entry: &Entry) {
        if entry.mark() {
            self.mapped.store(PAGES, Ordering::Release);
            entry.has_revoked();
        }
    }

    /// As [`revoke`](Self::revoke), if the kernel refuses the pages. Returns whether the window is revoked.
    fn revoke_refused(&self, entry: &Entry) -> bool {
        let failed = entry.mark() && entry.has_failed();
        if failed {
            assert_eq!(self.mapped.load(Ordering::Acquire), DEVICE);
            entry.change(State::Undecided, State::Live).unwrap();
        }
        !failed
    }

    /// `Control::restore`
    fn restore(&self, entry: &Entry) {
        if entry.stop_if(State::Revoked, State::Restoring).is_ok() {
            self.mapped.store(DEVICE, Ordering::Release);
            entry.change(State::Restoring, State::Live).unwrap();
        }
    }

    fn agrees(&self, entry: &Entry) {
        let expected = if entry.state() == State::Live { DEVICE } else { PAGES };
        assert_eq!(self.mapped.load(Ordering::Acquire), expected, "{:?}", entry.state());
    }
}

/// Reads the window, and then asks whether it is revoked, as `Register::try_read` does.
#[test]
fn whoever_reads_the_pages_sees_that_the_window_is_revoked() {
    all(4, || {
        let model = Model::new(1);
        let entry = model.registry.insert(&RANGE, 0).entry;
        let handler = Model::handler(&model);
        if model.mapped.load(Ordering::Acquire) == PAGES {
            assert!(entry.state().is_revoked());
        }
        handler.join().unwrap();
        model.agrees(entry);
    });
}

fn all(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// One of the handlers may run in the verb's own thread: it ends before the verb goes on.
#[test]
fn a_handler_revokes_for_a_verb_that_fails() {
    all(4, || {
        let model = Model::new(1);
        let entry = model.registry.insert(&RANGE, 0).entry;
        let handlers = [Model::handler(&model), Model::handler(&model)];
        let revoked = model.revoke_refused(entry);
        if revoked {
            assert_eq!(entry.state(), State::Revoked);
            model.agrees(entry);
            model.restore(entry);
        }
        for handler in handlers {
            handler.join().unwrap();
        }
        model.agrees(entry);
    });
}

#[test]
fn a_window_is_not_replaced_after_it_was_dropped() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let handlers = [Model::handler(&model), Model::handler(&model)];
        model.registry.remove(slot);
        model.mapped.store(FOREIGN, Ordering::Release);
        for handler in handlers {
            handler.join().unwrap();
        }
        assert_eq!(model.mapped.load(Ordering::Acquire), FOREIGN);
    });
}

#[test]
fn an_entry_that_is_used_again_is_not_mistaken() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let handler = Model::handler(&model);
        model.registry.remove(slot);
        model.mapped.store(FOREIGN, Ordering::Release);
        let other = model.registry.insert(&OTHERS[0], 0);
        handler.join().unwrap();
        assert_eq!(other.entry.state(), State::Live);
        assert_eq!(model.mapped.load(Ordering::Acquire), FOREIGN);
    });
}

#[test]
fn state_and_pages_agree_after_revoke_and_restore() {
    all(3, || {
        let model = Model::new(1);
        let entry = model.registry.insert(&RANGE, 0).entry;
        let handlers = [Model::handler(&model), Model::handler(&model)];
        model.revoke(entry);
        model.restore(entry);
        for handler in handlers {
            handler.join().unwrap();
        }
        model.agrees(entry);
    });
}

#[test]
fn a_window_is_revoked_although_a_handler_fails() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let handler = {
            let model = model.clone();
            thread::spawn(move || model.fail())
        };
        model.revoke(slot.entry);
        assert_eq!(slot.entry.state(), State::Revoked);
        model.agrees(slot.entry);
        handler.join().unwrap();
        assert_eq!(slot.entry.stop(State::Busy), State::Revoked);
    });
}

#[test]
fn a_window_that_is_suspended_shows_what_its_state_says() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let handlers = {
            let failing = model.clone();
            [Model::handler(&model), thread::spawn(move || failing.fail())]
        };
        let before = slot.entry.stop(State::Busy);
        let expected = if before == State::Live { DEVICE } else { PAGES };
        assert_eq!(model.mapped.load(Ordering::Acquire), expected, "{before:?}");
        for handler in handlers {
            handler.join().unwrap();
        }
    });
}

#[test]
fn a_window_that_is_relocated_is_not_replaced() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let handler = Model::handler(&model);
        if slot.entry.stop_if(State::Live, State::Busy).is_ok() {
            model.mapped.store(FOREIGN, Ordering::Release);
            model.registry.relocate(&slot, &OTHERS[1]);
            handler.join().unwrap();
            assert_eq!(slot.entry.state(), State::Live);
            assert_eq!(model.mapped.load(Ordering::Acquire), FOREIGN);
        } else {
            handler.join().unwrap();
            model.agrees(slot.entry);
        }
    });
}

#[test]
fn a_window_is_found_while_others_come_and_go() {
    for room in [1, 2, 3] {
        all(3, move || {
            let model = Model::new(room);
            let _slot = model.registry.insert(&RANGE, 0);
            let other = model.registry.insert(&OTHERS[0], 0);
            let finder = {
                let model = model.clone();
                thread::spawn(move || {
                    let pin = model.registry.find(RANGE.end - 1).expect("it is there");
                    assert_eq!(pin.range(), RANGE);
                })
            };
            // The link of the first is used for the second, in another chain or in the same.
            model.registry.remove(other);
            let other = model.registry.insert(&OTHERS[1], 0);
            model.registry.remove(other);
            finder.join().unwrap();
        });
    }
}

/// A handler that revokes all windows while one is relocated finds it, or the verb finds that it has begun.
#[test]
fn a_window_that_is_relocated_is_swept_or_follows() {
    all(4, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let group = Arc::new(Sweeps::default());
        let handler = {
            let (model, group) = (model.clone(), group.clone());
            thread::spawn(move || {
                group.sweep(|| {
                    for pin in model.registry.each() {
                        if pin.state() == State::Live && pin.mark() {
                            pin.has_revoked(true);
                        }
                    }
                });
            })
        };
        let swept = group.swept();
        if slot.entry.stop_if(State::Live, State::Busy).is_ok() {
            model.registry.relocate(&slot, &OTHERS[0]);
            if group.has_begun_more_than(swept) && slot.entry.mark() {
                slot.entry.has_revoked();
            }
        }
        handler.join().unwrap();
        assert_eq!(slot.entry.state(), State::Revoked);
    });
}

/// The table is replaced meanwhile, and what is found is the window.
#[test]
fn a_window_is_found_while_another_one_is_relocated_and_the_table_grows() {
    all(3, || {
        let model = Model::new(1);
        let slot = model.registry.insert(&RANGE, 0);
        let finder = {
            let model = model.clone();
            thread::spawn(move || model.registry.find(RANGE.start).map(|pin| pin.range()))
        };
        let adder = {
            let model = model.clone();
            thread::spawn(move || drop(model.registry.insert(&OTHERS[0], 0)))
        };
        slot.entry.stop_if(State::Live, State::Busy).unwrap();
        model.registry.relocate(&slot, &OTHERS[1]);
        adder.join().unwrap();
        assert!(finder.join().unwrap().is_none_or(|range| range == RANGE));
        for range in [&OTHERS[0], &OTHERS[1]] {
            assert_eq!(
                model.registry.find(range.start).map(|pin| pin.range()).as_ref(),
                Some(range)
            );
        }
        assert!(model.registry.find(RANGE.start).is_none());
    });
}

#[test]
fn a_window_is_found_while_another_one_is_relocated() {
    for room in [1, 2, 3] {
        all(3, move || {
            let model = Model::new(room);
            let _slot = model.registry.insert(&RANGE, 0);
            let other = model.registry.insert(&OTHERS[0], 0);
            let finders = [&RANGE, &OTHERS[1]].map(|range| {
                let model = model.clone();
                thread::spawn(move || model.registry.find(range.start).map(|pin| pin.range()))
            });
            other.entry.stop_if(State::Live, State::Busy).unwrap();
            model.registry.relocate(&other, &OTHERS[1]);
            let [found, moved] = finders.map(|finder| finder.join().unwrap());
            assert_eq!(found, Some(RANGE));
            assert!(moved.is_none_or(|range| range == OTHERS[1]));
            assert!(model.registry.find(OTHERS[0].start).is_none());
            assert!(model.registry.find(OTHERS[1].start).is_some());
        });
    }
}
