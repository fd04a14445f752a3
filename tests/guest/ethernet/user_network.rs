//! Frames from and to QEMU's user network.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vfio_remap::ErrorKind;
use vfio_remap_ethernet::{Frame, MacAddress, Nic, QueuePair, Settings};

use super::station::{BUFFERS, GATEWAY, Station, arp_reply, arp_request, ethernet, ping, pong};
use super::{BURST, CARDS, LONG, bring_up, on_both};
use crate::machine::Machine;
use crate::{lab, leftovers};

#[test]
fn frames_go_both_ways() {
    leftovers::none_of(|| {
        on_both(|name, model| {
            let mut station = Station::new(name, Settings::default());
            let nic = station.nic.clone();
            assert_eq!(nic.model(), model);
            let link = nic.link().unwrap().expect("it was waited for");
            assert_eq!((link.speed, link.full_duplex), (1000, true));
            assert_ne!(nic.phy_identifier().unwrap(), 0);
            let gateway = station.gateway();
            for (sequence, len) in [(1, 56), (2, 1472), (3, 0)] {
                let data: Vec<u8> = (0..len).map(|at| (7 * at + 3) as u8).collect();
                station.send(&ping(gateway, nic.address(), sequence, &data));
                let answer = |frame: &[u8]| pong(frame, sequence).map(<[u8]>::to_vec);
                assert!(station.receive("answer to a ping", answer) == data, "{len} bytes");
            }
            let statistics = nic.statistics().unwrap();
            assert_eq!(statistics.sent, 4, "{statistics:?}");
            assert_eq!(statistics.sent_broadcast, 1, "{statistics:?}");
            assert!(statistics.received >= 4, "{statistics:?}");
            assert!(statistics.received_bytes >= 4 * 64 + 1472, "{statistics:?}");
            // Counts add up.
            assert!(nic.statistics().unwrap().received_bytes >= statistics.received_bytes);
            drop(nic);
            station.stop();
        });
    });
}

#[test]
fn has_a_pair_of_queues_for_each_thread() {
    const FRAMES: usize = 2000;
    on_both(|name, model| {
        let count = model.queues().min(4);
        let nic = bring_up(name, Settings::DEFAULT.with_queues(count));
        let pairs: Vec<_> = (0..count).map(|_| nic.queue().unwrap()).collect();
        assert_eq!(nic.queue().unwrap_err().kind(), ErrorKind::InUse);
        for (number, pair) in (0..).zip(&pairs) {
            assert_eq!((pair.receiver.queue(), pair.transmitter.queue()), (number, number));
            assert!(pair.receiver.has_window() && pair.transmitter.has_window());
            assert_eq!(pair.receiver.registers().end - pair.receiver.registers().start, 0x40);
        }
        std::thread::scope(|scope| {
            for mut pair in pairs {
                let nic = &nic;
                scope.spawn(move || {
                    let mut pool = nic.pool(BUFFERS).unwrap();
                    let mut received = Vec::with_capacity(BURST);
                    let mut frames = Vec::with_capacity(BURST);
                    // To nobody: the user network ignores it.
                    let bytes =
                        ethernet(MacAddress([2, 0, 0, 0, 0, 1]), nic.address(), 0x88b5, &[0; 50]);
                    let mut sent = 0;
                    let end = Instant::now() + LONG;
                    while sent < FRAMES {
                        assert!(Instant::now() < end, "{sent} sent");
                        pair.receiver.receive(&mut pool, &mut received, BURST).unwrap();
                        received.drain(..).for_each(|frame: Frame| pool.put(frame).unwrap());
                        while frames.len() < BURST.min(FRAMES - sent)
                            && let Some(frame) = pool.frame_of(&bytes)
                        {
                            frames.push(frame);
                        }
                        sent += pair.transmitter.transmit(&mut frames, &mut pool).unwrap();
                        pair.transmitter.reclaim(&mut pool);
                    }
                    assert_eq!(pair.transmitter.stop(&mut pool).unwrap(), 0);
                    pair.receiver.stop(&mut pool).unwrap();
                    assert_eq!(pool.len(), BUFFERS);
                });
            }
        });
        assert_eq!(nic.statistics().unwrap().sent, u64::from(count) * FRAMES as u64);
        // Numbers are free again.
        let pair = nic.queue().unwrap();
        assert_eq!(pair.receiver.queue(), 0);
        drop(pair);
        nic.close().unwrap();
    });
}

#[test]
fn writes_to_no_buffer_of_a_queue_that_was_stopped() {
    const PATTERN: u8 = 0xa5;
    on_both(|name, _| {
        let mut station = Station::new(name, Settings::default());
        station.gateway();
        let Station { nic, queues, mut pool, .. } = station;
        let QueuePair { receiver, mut transmitter, .. } = queues;
        receiver.stop(&mut pool).unwrap();
        transmitter.reclaim(&mut pool);
        let buffers: Vec<_> = std::iter::from_fn(|| pool.frame(2048)).collect();
        assert_eq!(buffers.len(), BUFFERS);
        let fill = [PATTERN; 2048];
        buffers.iter().for_each(|frame| frame.buffer().write(0, &fill));
        // An answer comes for a queue that is not there.
        let mut others = nic.pool(BUFFERS).unwrap();
        let mut frames = vec![others.frame_of(&arp_request(nic.address(), GATEWAY)).unwrap()];
        transmitter.transmit(&mut frames, &mut others).unwrap();
        assert_eq!(transmitter.stop(&mut others).unwrap(), 0);
        // Once there is one again, answers come to it.
        let queues = nic.queue().unwrap();
        let mut station = Station { nic, queues, pool: others, frames: Vec::with_capacity(BURST) };
        station.gateway();
        let mut found = [0; 2048];
        for buffer in buffers {
            buffer.read(0, &mut found);
            assert!(found == fill, "{buffer:?}");
        }
        drop(pool);
        station.stop();
    });
}

#[test]
fn receives_for_the_addresses_that_it_was_given() {
    const OTHER: MacAddress = MacAddress([0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
    on_both(|name, model| {
        let mut station = Station::new(name, Settings::default());
        let nic = station.nic.clone();
        // The gateway answers to who has asked: an address that is not the card's.
        let ask_as_other = |station: &mut Station, address: [u8; 4]| {
            station.send(&arp_request(OTHER, address));
        };
        station.gateway();
        nic.set_promiscuous(true).unwrap();
        ask_as_other(&mut station, GATEWAY);
        station.receive("answer to another", |frame| {
            (frame[..6] == OTHER.0).then(|| arp_reply(frame, GATEWAY))?
        });
        nic.set_promiscuous(false).unwrap();
        nic.add_address(OTHER).unwrap();
        nic.add_address(OTHER).unwrap();
        ask_as_other(&mut station, GATEWAY);
        station.receive("answer to an address that was added", |frame| {
            (frame[..6] == OTHER.0).then(|| arp_reply(frame, GATEWAY))?
        });
        assert!(nic.remove_address(OTHER).unwrap());
        assert!(!nic.remove_address(OTHER).unwrap());
        // Answers come in order: none to the other may come before ours. The user network keeps the last
        // address that it has seen for its guest, so that ours is asked for last.
        ask_as_other(&mut station, GATEWAY);
        station.send(&arp_request(nic.address(), GATEWAY));
        station.receive("answer to our own", |frame| {
            assert_ne!(frame[..6], OTHER.0, "an address that was removed");
            (frame[..6] == nic.address().0).then(|| arp_reply(frame, GATEWAY))?
        });
        for number in 0..model.addresses() {
            nic.add_address(MacAddress([2, 0, 0, 0, 1, number as u8])).unwrap();
        }
        assert_eq!(nic.add_address(OTHER).unwrap_err().kind(), ErrorKind::InUse);
        let error = nic.add_address(MacAddress::BROADCAST).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        drop(nic);
        station.stop();
    });
}

#[test]
fn refuses_what_is_no_card_and_what_a_card_has_not() {
    leftovers::none_of(|| {
        for (name, text) in [("nvme", "a mass storage controller"), ("edu", "1234:11e8")] {
            let error = Nic::new(lab::open(name), Settings::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        for (name, model) in CARDS {
            let refused = [
                Settings::DEFAULT.with_queues(model.queues() + 1),
                Settings::DEFAULT.with_queues(0),
                Settings::DEFAULT.with_mtu(9001),
                Settings::DEFAULT.with_mtu(67),
                Settings::DEFAULT.with_receive_entries(100),
                Settings::DEFAULT.with_transmit_entries(4),
            ];
            for settings in refused {
                let error = Nic::new(lab::open(name), settings).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::OutOfRange, "{settings:?}: {error}");
            }
        }
    });
}

#[test]
fn is_usable_by_the_next_whatever_state_it_was_left_in() {
    on_both(|name, _| {
        {
            // Dropped with frames on their way, and buffers with the card.
            let mut station = Station::new(name, Settings::default());
            station.gateway();
            station.send(&arp_request(station.nic.address(), GATEWAY));
            let Station { nic, queues, .. } = station;
            assert_eq!(nic.close().unwrap_err().kind(), ErrorKind::InUse);
            drop(queues);
            // The pool, which holds the device's file, is dropped here.
        }
        let mut station = Station::new(name, Settings::default());
        station.gateway();
        station.stop();
    });
}

#[test]
fn waits_for_a_link_that_is_down_and_goes_on_when_up() {
    let machine = Mutex::new(Machine::open());
    let say = |command: String| assert_eq!(machine.lock().unwrap().say(&command), "");
    on_both(|name, _| {
        say(format!("set_link {name} off"));
        let nic = Nic::new(lab::open(name), Settings::default()).unwrap();
        assert_eq!(nic.link().unwrap(), None);
        let error = nic.wait_for_link(Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("no link"), "{error}");
        say(format!("set_link {name} on"));
        nic.wait_for_link(LONG).unwrap();
        nic.close().unwrap();
        Station::new(name, Settings::default()).stop();
    });
}
