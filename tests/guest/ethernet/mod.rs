//! The Ethernet driver of `drivers/ethernet` on QEMU's igb and e1000e.

mod flaps;
mod forwarding;
mod host;
mod interrupts;
mod loopback;
mod offloads;
mod packets;
mod recovery;
mod stack;
mod station;
mod user_network;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use vfio_remap_ethernet::{Model, Nic, Settings};

use crate::lab;

const CARDS: [(&str, Model); 2] = [("igb", Model::I82576), ("e1000e", Model::I82574)];
/// For an answer: QEMU's user network takes its time.
const LONG: Duration = Duration::from_secs(60);
const BURST: usize = 32;

fn bring_up(name: &str, settings: Settings) -> Arc<Nic> {
    let nic = Nic::new(lab::open(name), settings).unwrap();
    nic.wait_for_link(LONG).unwrap();
    nic
}

/// Runs `f` for both cards at the same time: most of it is waiting.
fn on_both(f: impl Fn(&'static str, Model) + Sync) {
    std::thread::scope(|scope| {
        for (name, model) in CARDS {
            let f = &f;
            scope.spawn(move || f(name, model));
        }
    });
}
