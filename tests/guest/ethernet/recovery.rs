//! Cards that are reset, hang, or are pulled.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vfio_remap::ErrorKind;
use vfio_remap_ethernet::{Frame, Model, Nic, Settings};

use super::loopback::Loop;
use super::station::{BUFFERS, GATEWAY, Station, arp_request};
use super::{BURST, LONG, bring_up, on_both};
use crate::lab;
use crate::machine::Machine;
use crate::removal::pull;

const SETTINGS: Settings = Settings::DEFAULT.with_timeout(Duration::from_millis(200));

/// Sends and receives until `until` frames have come. Those that come are those that went, in order, but for
/// those that a reset has lost.
fn traffic(card: &mut Loop, sequence: &mut u64, received: &AtomicU64, until: u64) {
    let template = card.ethernet([0x88, 0xb5], &[0; 60]);
    let mut last = None;
    let mut frames: Vec<Frame> = Vec::with_capacity(BURST);
    let mut outgoing = Vec::with_capacity(BURST);
    let end = Instant::now() + LONG;
    let Loop { nic, pairs, pool } = card;
    let pair = &mut pairs[0];
    while received.load(Ordering::Relaxed) < until {
        assert!(Instant::now() < end, "{received:?} of {until}: {:?}", nic.statistics());
        while outgoing.len() < BURST
            && let Some(frame) = pool.frame_of(&template)
        {
            frame.buffer().write(14, &sequence.to_be_bytes());
            *sequence += 1;
            outgoing.push(frame);
        }
        pair.transmitter.transmit(&mut outgoing, pool).unwrap();
        pair.transmitter.reclaim(pool);
        pair.receiver.receive(pool, &mut frames, BURST).unwrap();
        for frame in frames.drain(..) {
            let mut number = [0; 8];
            frame.read(14, &mut number);
            let number = u64::from_be_bytes(number);
            assert!(last.is_none_or(|last| last < number), "{number} after {last:?}");
            last = Some(number);
            pool.put(frame).unwrap();
            received.fetch_add(1, Ordering::Relaxed);
        }
    }
    outgoing.into_iter().for_each(|frame| pool.put(frame).unwrap());
}

/// A reset that the driver is not told of: of the function, where that does something to QEMU's card, or else
/// by CTRL.RST.
fn reset_by_others(nic: &Nic) -> vfio_remap::Result<()> {
    if nic.model() == Model::I82576 {
        return nic.device().reset().map(drop);
    }
    nic.device().bar(0)?.trapped_register::<u32>(0)?.update(|value| value | 1 << 26)
}

#[test]
fn traffic_goes_on_after_resets_by_the_driver_and_by_others() {
    const RESETS: u64 = 4;
    on_both(|name, _| {
        for interrupts in [false, true] {
            let mut card = Loop::new(name, SETTINGS.with_interrupts(interrupts));
            let nic = card.nic.clone();
            let group = "01:00:5e:00:00:fb".parse().unwrap();
            nic.join(group).unwrap();
            let all = card.pool.len() + card.pairs[0].receiver.outstanding();
            let (received, mut sequence) = (AtomicU64::new(0), 0);
            for reset in 0..RESETS {
                let by_others = reset % 2 == 1;
                std::thread::scope(|scope| {
                    let (nic, received) = (&nic, &received);
                    let begin = received.load(Ordering::Relaxed);
                    scope.spawn(move || {
                        while received.load(Ordering::Relaxed) < begin + 100 {
                            std::thread::yield_now();
                        }
                        if by_others { reset_by_others(nic) } else { nic.reset() }.unwrap();
                    });
                    traffic(&mut card, &mut sequence, received, begin + 100);
                });
                let begin = received.load(Ordering::Relaxed);
                traffic(&mut card, &mut sequence, &received, begin + 500);
                assert_eq!(nic.generation(), reset as u32 + 1, "{name}");
            }
            assert_eq!(nic.statistics().unwrap().crc_errors, 0);
            // Filters are as they were.
            assert!(nic.leave(group).unwrap());
            let transmitter = &mut card.pairs[0].transmitter;
            while transmitter.outstanding() > 0 {
                assert!(transmitter.wait(LONG).unwrap());
                transmitter.reclaim(&mut card.pool);
            }
            let here = card.pool.len() + card.pairs[0].receiver.outstanding();
            assert_eq!(here, all, "{name}: every buffer is somewhere");
            drop(nic);
            card.stop();
        }
    });
}

#[test]
fn a_transmitter_that_hangs_is_reset() {
    const TCTL: u64 = 0x400;
    on_both(|name, _| {
        let mut card = Loop::new(name, SETTINGS);
        let received = AtomicU64::new(0);
        traffic(&mut card, &mut 0, &received, 100);
        let control = card.nic.device().bar(0).unwrap().trapped_register::<u32>(TCTL).unwrap();
        control.update(|value| value & !2).unwrap();
        drop(control);
        traffic(&mut card, &mut 1_000_000, &received, 1000);
        assert_eq!(card.nic.generation(), 1, "{name}");
        assert!(card.pairs[0].transmitter.lost() > 0, "{name}");
        card.stop();
    });
}

#[test]
fn a_card_that_is_pulled_gives_all_back() {
    let mut station = Station::new("hot", SETTINGS);
    station.gateway();
    pull(lab::address("hot"));
    let Station { nic, queues, mut pool, mut frames } = station;
    let (mut receiver, mut transmitter) = (queues.receiver, queues.transmitter);
    let end = Instant::now() + LONG;
    let error = loop {
        if let Err(error) = receiver.receive(&mut pool, &mut frames, BURST) {
            break error;
        }
        frames.drain(..).for_each(|frame| pool.put(frame).unwrap());
        assert!(Instant::now() < end, "nobody has noticed");
    };
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    let mut outgoing = vec![pool.frame_of(&arp_request(nic.address(), GATEWAY)).unwrap()];
    let error = transmitter.transmit(&mut outgoing, &mut pool).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    outgoing.into_iter().for_each(|frame| pool.put(frame).unwrap());
    assert_eq!(nic.reset().unwrap_err().kind(), ErrorKind::Gone);
    assert!(pool.len() < BUFFERS);
    // What the card may still access is kept until it cannot.
    assert!(receiver.stop(&mut pool).is_err());
    assert!(transmitter.stop(&mut pool).is_err());
    drop(pool);
    nic.close().unwrap();
    lab::until_gone("hot");
    // The slot stays without power for a second (PCIe 5.0 §6.7.1.8).
    std::thread::sleep(Duration::from_millis(1200));
    lab::plug_hot_in(&mut Machine::open());
    bring_up("hot", SETTINGS).close().unwrap();
    assert!(Nic::new(lab::open("hot"), SETTINGS).is_ok());
}
