//! Cards that share an address space, and cards that do not.

use std::sync::Arc;
use std::time::Instant;

use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Igb, Port};
use vfio_remap::{Device, ErrorKind};
use vfio_remap_ethernet::{Frame, Nic, Settings};

use super::{BURST, LONG};

const FRAMES: u64 = 10_000;
const BUFFERS: usize = 400;

/// Two cards, and the other ends of their wires.
fn two_cards(shared: bool) -> ([Arc<Nic>; 2], [Port; 2]) {
    let [(one, left), (other, right)] = [Port::pair(), Port::pair()];
    let [one, other] = [(1, one), (2, other)]
        .map(|(number, port)| Igb::new([2, 0, 0, 0, 0, number]).with_wire(port));
    let one = Emulated::new(one).unwrap();
    let other = if shared { one.beside(other) } else { Emulated::new(other) }.unwrap();
    let nics = [one, other].map(|model| {
        let settings = Settings::DEFAULT.with_receive_entries(128).with_transmit_entries(128);
        let nic = Nic::new(Device::new(Arc::new(model)), settings).unwrap();
        nic.wait_for_link(LONG).unwrap();
        nic
    });
    (nics, [left, right])
}

/// Waits for a frame, which is this one.
fn watch_wire(port: &Port, expected: &[u8]) {
    let end = Instant::now() + LONG;
    let frame = loop {
        match port.receive() {
            Some(frame) => break frame,
            None => assert!(Instant::now() < end, "no frame has come"),
        }
        std::thread::yield_now();
    };
    assert_eq!(frame, expected);
}

fn numbered(number: u64) -> [u8; 60] {
    let mut bytes = [0; 60];
    bytes[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes[14..22].copy_from_slice(&number.to_be_bytes());
    bytes
}

#[test]
fn what_one_card_received_the_other_sends_without_a_copy() {
    let ([one, other], [left, right]) = two_cards(true);
    let (mut from, mut to) = (one.queue().unwrap(), other.queue().unwrap());
    let mut pool = one.pool(BUFFERS).unwrap();
    let mut frames = Vec::with_capacity(BURST);
    // The card gets buffers.
    from.receiver.receive(&mut pool, &mut frames, BURST).unwrap();
    let (mut sent, mut arrived, mut last) = (0, 0, None);
    let end = Instant::now() + LONG;
    while arrived < FRAMES {
        // So few are on their way that none gets lost.
        while sent < FRAMES && sent - arrived < 64 {
            left.send(&numbered(sent));
            sent += 1;
        }
        from.receiver.receive(&mut pool, &mut frames, BURST).unwrap();
        to.transmitter.transmit(&mut frames, &mut pool).unwrap();
        while let Some(frame) = right.receive() {
            assert_eq!(frame, numbered(arrived), "after {last:?}");
            last = Some(arrived);
            arrived += 1;
        }
        assert!(Instant::now() < end, "{arrived} of {sent} have arrived");
    }
    assert!(frames.is_empty());
    to.transmitter.stop(&mut pool).unwrap();
    from.receiver.stop(&mut pool).unwrap();
    assert_eq!(pool.len(), BUFFERS);
    // The memory is the first card's: the second may go before it, and the first with it only.
    drop((from.transmitter, to.receiver));
    other.close().unwrap();
    drop(pool);
    one.close().unwrap();
}

#[test]
fn a_card_refuses_buffers_that_it_does_not_reach() {
    let ([one, other], [left, _right]) = two_cards(false);
    let mut queues = one.queue().unwrap();
    let (mut ours, mut theirs) = (one.pool(BUFFERS).unwrap(), other.pool(BUFFERS).unwrap());
    assert_ne!(ours.address_space(), theirs.address_space());
    let foreign = theirs.frame_of(&numbered(0)).unwrap();

    let foreign = ours.put(foreign).unwrap_err();
    let error = queues.receiver.receive(&mut theirs, &mut Vec::new(), BURST).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!((theirs.len(), queues.receiver.outstanding()), (BUFFERS - 1, 0));
    let error = queues.transmitter.transmit(&mut vec![], &mut theirs).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");

    // What comes before it is sent, and it stays, alone or as a part of a packet.
    let whole = ours.frame_of(&numbered(1)).unwrap();
    let mut frames = vec![whole, foreign];
    assert_eq!(queues.transmitter.transmit(&mut frames, &mut ours).unwrap(), 1);
    let error = queues.transmitter.transmit(&mut frames, &mut ours).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("open_beside"), "{error}");
    let mut first: Frame = ours.frame_of(&numbered(2)).unwrap();
    first.set_goes_on(true);
    frames.insert(0, first);
    let error = queues.transmitter.transmit(&mut frames, &mut ours).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(frames.len(), 2);
    let foreign = frames.pop().unwrap();
    frames.drain(..).for_each(|frame| ours.put(frame).unwrap());
    theirs.put(foreign).unwrap();

    let end = Instant::now() + LONG;
    while queues.transmitter.outstanding() > 0 {
        queues.transmitter.reclaim(&mut ours);
        assert!(Instant::now() < end);
    }
    queues.transmitter.stop(&mut ours).unwrap();
    queues.receiver.stop(&mut ours).unwrap();
    // A descriptor is done when its frame was read, which is a moment before it is on the wire.
    watch_wire(&left, &numbered(1));
    assert_eq!(left.receive(), None);
    assert_eq!((ours.len(), theirs.len()), (BUFFERS, BUFFERS));
    drop((ours, theirs));
    one.close().unwrap();
    other.close().unwrap();
}
