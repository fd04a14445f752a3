//! Two cards in one address space, of which one sends what the other has received.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_remap::Device;
use vfio_remap::transport::Vfio;
use vfio_remap_ethernet::{Nic, Settings};

use super::{BURST, LONG};
use crate::{lab, leftovers};

const FRAMES: usize = 10_000;
const BUFFERS: usize = 600;
/// After so long without a frame, those that were on their way are lost.
const LOST: Duration = Duration::from_secs(1);

/// The cards are joined: what the first sends the second receives, and gives to the first to send.
#[test]
fn frames_go_round_between_two_cards_without_a_copy() {
    let mut ways = vec![Vfio::options().by_group()];
    if lab::kernel() == "patched" {
        ways.push(Vfio::options().by_cdev());
    }
    for way in ways {
        leftovers::none_of(|| {
            let first = Device::new(Arc::new(way.open(lab::address("port0")).unwrap()));
            let second = first.open_beside(lab::address("port1")).unwrap();
            let [first, second] =
                [first, second].map(|device| Nic::new(device, Settings::DEFAULT).unwrap());
            for nic in [&first, &second] {
                nic.wait_for_link(LONG).unwrap();
            }
            let (mut to, mut from) = (first.queue().unwrap(), second.queue().unwrap());
            let mut pool = first.pool(BUFFERS).unwrap();
            let mut frames = Vec::with_capacity(BURST);
            from.receiver.receive(&mut pool, &mut frames, BURST).unwrap();

            let mut bytes = [0x55; 60];
            bytes[..6].copy_from_slice(&second.address().0);
            bytes[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
            let (mut count, end) = (0, Instant::now() + 3 * LONG);
            while count < FRAMES {
                if !from.receiver.wait(LOST).unwrap() {
                    frames.extend((0..BURST).filter_map(|_| pool.frame_of(&bytes)));
                }
                count += from.receiver.receive(&mut pool, &mut frames, BURST).unwrap();
                assert!(frames.iter().all(|frame| frame.to_vec() == bytes));
                to.transmitter.transmit(&mut frames, &mut pool).unwrap();
                assert!(Instant::now() < end, "{count}: {:?}", first.statistics());
            }
            frames.into_iter().for_each(|frame| pool.put(frame).unwrap());
            to.transmitter.stop(&mut pool).unwrap();
            from.receiver.stop(&mut pool).unwrap();
            assert_eq!(pool.len(), BUFFERS);
            drop((to.receiver, from.transmitter, pool));
            // The first has mapped what both have used.
            second.close().unwrap();
            first.close().unwrap();
        });
    }
}
