//! Queues and links that are waited for by interrupts.

use std::sync::Mutex;
use std::time::Duration;

use vfio_remap_ethernet::{Model, Settings};

use super::loopback::Loop;
use super::packets::{ip, tcp};
use super::station::{GATEWAY, Station, arp_reply, arp_request};
use super::{BURST, LONG, on_both};
use crate::machine::Machine;

const INTERRUPTS: Settings = Settings::DEFAULT.with_interrupts(true).with_poll(Duration::ZERO);

#[test]
fn a_thread_sleeps_until_a_frame_has_come() {
    on_both(|name, _| {
        let mut station = Station::new(name, INTERRUPTS);
        station.gateway();
        for round in 0..20 {
            let Station { queues, pool, frames, .. } = &mut station;
            queues.receiver.arm().unwrap();
            let vector = queues.receiver.vector().expect("there are vectors").clone();
            vector.take().unwrap();
            while queues.receiver.receive(pool, frames, BURST).unwrap() > 0 {}
            frames.drain(..).for_each(|frame| pool.put(frame).unwrap());
            queues.receiver.arm().unwrap();
            station.send(&arp_request(station.nic.address(), GATEWAY));
            assert!(vector.wait(LONG).unwrap() > 0, "{name}, round {round}: no interrupt");
            // By waiting, too, however the answer comes.
            station.send(&arp_request(station.nic.address(), GATEWAY));
            let mut answers = 0;
            while answers < 2 {
                let Station { queues, pool, frames, .. } = &mut station;
                assert!(queues.receiver.wait(LONG).unwrap(), "{name}, round {round}");
                assert!(queues.receiver.has_frame());
                queues.receiver.receive(pool, frames, BURST).unwrap();
                for frame in frames.drain(..) {
                    answers += u32::from(arp_reply(&frame.to_vec(), GATEWAY).is_some());
                    pool.put(frame).unwrap();
                }
            }
        }
        assert!(!station.queues.receiver.wait(Duration::from_millis(1)).unwrap());
        assert!(station.queues.transmitter.wait(LONG).unwrap());
        station.stop();
    });
}

/// How many frames come to a queue. One that is armed interrupts for each.
const ROUNDS: u64 = 20;
/// How many interrupts may come without a reason, however many frames come. QEMU's cards interrupt once more when the
/// time is over in which a vector is silent (8.0 to 11.1 at least), and on a busy machine the kernel tells of one or two
/// late.
const STRAY: u64 = 4;

#[test]
fn each_queue_interrupts_by_its_own_vector_if_armed() {
    for (name, queues) in [("igb", 4), ("e1000e", 2)] {
        let mut card = Loop::new(name, INTERRUPTS.with_queues(queues));
        let flow = |card: &mut Loop, queue: u16| {
            card.nic.set_rss_table(Some(&[queue; 128])).unwrap();
            let (kind, packet) = ip(true, 6, 5000, &tcp(20));
            let bytes = card.ethernet(kind, &packet);
            let frame = card.frame(&bytes);
            card.send(vec![frame]);
        };
        let take = |card: &mut Loop, queue: u16| {
            let receiver = &mut card.pairs[usize::from(queue)].receiver;
            let mut frames = Vec::with_capacity(BURST);
            assert_eq!(receiver.receive(&mut card.pool, &mut frames, BURST).unwrap(), 1);
            frames.into_iter().for_each(|frame| card.pool.put(frame).unwrap());
        };
        let receive = |card: &mut Loop, queue: u16| {
            assert!(card.pairs[usize::from(queue)].receiver.wait(LONG).unwrap());
            take(card, queue);
        };
        let vectors: Vec<_> = card
            .pairs
            .iter()
            .map(|pair| pair.receiver.vector().expect("it has one").clone())
            .collect();
        let interrupts = |card: &mut Loop, queue: u16, round: u64| {
            card.pairs[usize::from(queue)].receiver.arm().unwrap();
            flow(card, queue);
            let vector = &vectors[usize::from(queue)];
            assert!(vector.wait(LONG).unwrap() > 0, "{name}, queue {queue}, {round}");
            receive(card, queue);
        };
        let drain = || vectors.iter().for_each(|vector| _ = vector.take().unwrap());
        for queue in 0..queues {
            let at = usize::from(queue);
            drain();
            for round in 0..ROUNDS {
                for pair in &mut card.pairs {
                    pair.receiver.arm().unwrap();
                }
                interrupts(&mut card, queue, round);
            }
            for (other, vector) in vectors.iter().enumerate().filter(|(other, _)| *other != at) {
                let count = vector.take().unwrap().unwrap_or(0);
                assert!(count <= STRAY, "{name}: {count} of {other} instead of {queue}");
            }
            for pair in &mut card.pairs {
                pair.receiver.disarm().unwrap();
            }
            drain();
            let clock = (queue + 1) % queues;
            for round in 0..ROUNDS {
                // The 82574 disarms a queue that has interrupted.
                card.pairs[at].receiver.arm().unwrap();
                card.pairs[at].receiver.disarm().unwrap();
                flow(&mut card, queue);
                while !card.pairs[at].receiver.has_frame() {}
                take(&mut card, queue);
                // By then an interrupt for that frame would have come, too.
                interrupts(&mut card, clock, round);
            }
            let count = vectors[at].take().unwrap().unwrap_or(0);
            assert!(count <= STRAY, "{name}: {count} of {queue}, which is not armed");
        }
        for pair in &mut card.pairs {
            assert!(pair.transmitter.vector().is_some());
            assert!(pair.transmitter.wait(LONG).unwrap());
        }
        drop(vectors);
        card.stop();
    }
}

/// RFCTL and ICR of the 82574, the bit that keeps an acknowledgement of TCP from being a cause, and the cause.
const RFCTL: u64 = 0x5008;
const ICR: u64 = 0xc0;
const NO_ACK_ACCELERATION: u32 = 1 << 12;
const ACK: u32 = 1 << 17;

#[test]
fn an_acknowledgement_wakes_as_any_other_frame_does() {
    on_both(|name, model| {
        let mut card = Loop::new(name, INTERRUPTS);
        let mut content = tcp(0);
        // ACK and nothing else, without data.
        content[13] = 0x10;
        let (kind, packet) = ip(true, 6, 5000, &content);
        let bytes = card.ethernet(kind, &packet);
        let wakes = |card: &mut Loop| {
            card.pairs[0].receiver.vector().expect("it has one").take().unwrap();
            card.pairs[0].receiver.arm().unwrap();
            let frame = card.frame(&bytes);
            card.send(vec![frame]);
            let receiver = &mut card.pairs[0].receiver;
            let vector = receiver.vector().expect("it has one");
            assert!(vector.wait(LONG).unwrap() > 0, "{name}: no interrupt");
            let mut frames = Vec::with_capacity(BURST);
            assert_eq!(receiver.receive(&mut card.pool, &mut frames, BURST).unwrap(), 1);
            frames.into_iter().for_each(|frame| card.pool.put(frame).unwrap());
        };
        if model == Model::I82576 {
            wakes(&mut card);
            return card.stop();
        }
        let nic = card.nic.clone();
        let register = |at| nic.device().bar(0).unwrap().trapped_register::<u32>(at).unwrap();
        let is_cause = || register(ICR).read().unwrap() & ACK != 0;
        wakes(&mut card);
        assert!(!is_cause(), "{name}: its vector fires whatever the moderation");
        // The same with the cause of its own, so that this test could have seen it.
        register(RFCTL).update(|value| value & !NO_ACK_ACCELERATION).unwrap();
        wakes(&mut card);
        assert!(is_cause(), "{name}");
        drop(nic);
        card.stop();
    });
}

#[test]
fn queues_without_a_vector_take_naps() {
    // QEMU's igb has ten vectors: for the link, and nine queues.
    let mut card = Loop::new("igb", INTERRUPTS.with_queues(12));
    let with_vector = card.pairs.iter().filter(|pair| pair.receiver.vector().is_some()).count();
    assert_eq!(with_vector, 9);
    assert!(card.pairs.iter().all(|pair| pair.transmitter.vector().is_none()));
    card.nic.set_rss_table(Some(&[11; 128])).unwrap();
    let (kind, packet) = ip(true, 6, 5000, &tcp(20));
    let bytes = card.ethernet(kind, &packet);
    let frame = card.frame(&bytes);
    card.send(vec![frame]);
    assert!(card.pairs[11].receiver.wait(LONG).unwrap());
    assert!(!card.pairs[10].receiver.wait(Duration::from_millis(1)).unwrap());
    card.stop();
}

#[test]
fn a_link_that_changes_is_seen_without_interrupts() {
    let machine = Mutex::new(Machine::open());
    let say = |command: String| assert_eq!(machine.lock().unwrap().say(&command), "");
    on_both(|name, _| {
        let mut station = Station::new(name, Settings::DEFAULT);
        let nic = station.nic.clone();
        assert!(nic.link_vector().unwrap().is_none());
        // What has come so far.
        while nic.wait_for_link_change(Duration::from_millis(1)).unwrap() {}
        for flap in 0..2 {
            for (state, is_up) in [("off", false), ("on", true)] {
                say(format!("set_link {name} {state}"));
                while nic.link().unwrap().is_some() != is_up {
                    let seen = nic.wait_for_link_change(LONG).unwrap();
                    assert!(seen, "{name}, flap {flap}: nobody has seen that it is {state}");
                }
            }
        }
        station.gateway();
        drop(nic);
        station.stop();
    });
}
