//! What the card does wrong if it is asked to.

use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Fault, Faults, Igb, Port};
use vfio_remap::transport::Transport;

use super::driver::{Driver, MAC, OTHER, STATUS, datagram, frame, taken, transport_checksum};
use crate::support::watch;

const ADVANCED: u32 = 0x2b30_0000;

/// A card with one fault, at packet 2.
fn with(fault: Fault) -> (Driver, Port, Faults) {
    let faults = Faults::new([(2, fault)]);
    let (port, network) = Port::pair();
    let igb = Igb::new(MAC).with_wire(port).with_faults(&faults);
    let mut driver = Driver::of(Emulated::polled(igb).unwrap());
    driver.transmit_queue(0);
    driver.receive_queue(0, 1, 2);
    (driver, network, faults)
}

fn send(driver: &mut Driver, data: &[u8]) -> bool {
    let at = driver.send(0, data, ADVANCED, 0);
    driver.poll();
    driver.sent(0, at)
}

fn receive(driver: &mut Driver, network: &Port, data: &[u8]) -> Option<(Vec<u8>, u32)> {
    network.send(data);
    driver.poll();
    driver.received(0).map(|received| (received.data, received.words[2]))
}

#[test]
fn a_lost_interrupt_is_one_that_is_not_sent() {
    let (mut driver, network, faults) = with(Fault::LostInterrupt);
    let events = driver.vectors(1);
    driver.write(0x1514, 0xc000_0011);
    driver.write(0x152c, 1);
    driver.write(0x1524, 1);
    driver.write(0x1700, 0x8080);
    let counts = [1, 1, 0, 1].map(|_| {
        assert!(send(&mut driver, &frame(OTHER, 60)));
        assert!(network.receive().is_some());
        taken(&events[0])
    });
    assert_eq!(counts, [1, 1, 0, 1]);
    assert_eq!((faults.injected(), faults.remaining()), (vec![(2, Fault::LostInterrupt)], 0));
}

#[test]
fn a_ring_is_stuck_until_it_is_set_up_again() {
    for seen in [true, false] {
        let (mut driver, network, _) = with(Fault::StuckRing);
        let done = [(); 4].map(|()| send(&mut driver, &frame(OTHER, 60)));
        assert_eq!(done, [true, true, false, false]);
        assert_eq!(std::iter::from_fn(|| network.receive()).count(), 2);
        if seen {
            driver.transmit_page.register::<u32>(0x28).unwrap().write(0);
            driver.poll();
        }
        driver.transmit_queue(0);
        assert!(send(&mut driver, &frame(OTHER, 61)), "{seen}");
        assert_eq!(network.receive(), Some(frame(OTHER, 61)));
    }
    // At a frame that is received: the next packet.
    let (mut driver, network, _) = with(Fault::StuckRing);
    for _ in 0..3 {
        assert!(receive(&mut driver, &network, &frame(MAC, 60)).is_some());
    }
    assert!(!send(&mut driver, &frame(OTHER, 60)));
}

#[test]
fn a_corrupt_payload_has_a_wrong_checksum_and_a_wrong_check_sequence_loses_the_frame() {
    let good = datagram(6, 9, 50);
    let (mut driver, network, _) = with(Fault::CorruptPayload);
    let status = [(); 4].map(|()| receive(&mut driver, &network, &good).unwrap());
    assert_eq!(
        status.map(|(data, status)| (data == good, status >> 29)),
        [(true, 0), (true, 0), (false, 1), (true, 0)]
    );
    let (mut driver, network, _) = with(Fault::CorruptPayload);
    for round in 0..4 {
        assert!(send(&mut driver, &good));
        let sent = network.receive().unwrap();
        assert_eq!((sent != good, transport_checksum(&sent, 14) != 0), (round == 2, round == 2));
    }
    for (fault, data) in [(Fault::CorruptPayload, frame(MAC, 60)), (Fault::CrcError, good)] {
        let (mut driver, network, _) = with(fault);
        let received = [(); 4].map(|()| receive(&mut driver, &network, &data).is_some());
        assert_eq!(received, [true, true, false, true]);
        assert_eq!((driver.read(0x4000), driver.read(0x4074)), (1, 3), "counted");
        let (mut driver, network, _) = with(fault);
        let arrived = [(); 4].map(|()| {
            assert!(send(&mut driver, &data));
            network.receive().is_some()
        });
        assert_eq!(arrived, [true, true, false, true]);
    }
}

#[test]
fn a_link_flap_interrupts_both_ways_and_loses_nothing_that_was_not_sent() {
    let (mut driver, network, _) = with(Fault::LinkFlap);
    let events = driver.vectors(1);
    driver.write(0x1514, 0xc000_0011);
    driver.write(0x1740, 0x8000);
    driver.write(0x152c, 1);
    driver.write(0x1524, 1);
    driver.read(0x1500);
    driver.write(0x1508, 4);
    for _ in 0..4 {
        driver.send(0, &frame(OTHER, 60), ADVANCED, 0);
    }
    driver.poll();
    assert_eq!((taken(&events[0]), driver.read(STATUS) & 2), (1, 0));
    assert_eq!(std::iter::from_fn(|| network.receive()).count(), 2);
    driver.read(0x1500);
    watch::until("the link comes back", || {
        driver.poll();
        driver.read(STATUS) & 2 != 0
    });
    driver.poll();
    assert_eq!(taken(&events[0]), 1);
    assert_eq!(std::iter::from_fn(|| network.receive()).count(), 2);
}

#[test]
fn a_reset_or_a_removal_happens_at_any_packet() {
    for fault in [Fault::Reset, Fault::Removal] {
        for sent in [true, false] {
            let (mut driver, network, faults) = with(fault);
            for round in 0..3 {
                let done = if sent {
                    send(&mut driver, &frame(OTHER, 60))
                } else {
                    receive(&mut driver, &network, &frame(MAC, 60)).is_some()
                };
                assert_eq!(done, round < 2);
            }
            let removed = fault == Fault::Removal;
            assert_eq!(driver.read(STATUS), if removed { !0 } else { 0x0008_0081 });
            let tail = driver.receive_page.register::<u32>(0x18).unwrap();
            assert_eq!(tail.read(), if removed { !0 } else { 0 });
            let mut id = [0; 4];
            driver.card.read_at(7, 0, &mut id).unwrap();
            assert_eq!(id, if removed { [0xff; 4] } else { [0x86, 0x80, 0xc9, 0x10] });
            driver.start();
            driver.transmit_queue(0);
            driver.receive_queue(0, 1, 2);
            assert_eq!(send(&mut driver, &frame(OTHER, 60)), !removed);
            faults.plug_in();
            driver.start();
            driver.transmit_queue(0);
            driver.receive_queue(0, 1, 2);
            assert!(send(&mut driver, &frame(OTHER, 60)));
            assert!(receive(&mut driver, &network, &frame(MAC, 60)).is_some());
        }
    }
}
