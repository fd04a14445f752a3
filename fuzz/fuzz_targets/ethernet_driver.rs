//! The Ethernet driver on a card that writes anything into rings, buffers and registers.
//!
//! The input is a list of steps: of the card, and of the program that uses it. Afterwards the card behaves again: it
//! can be reset, and all buffers are back.

#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{IpAddress, IpCidr};
use vfio_remap::Device;
use vfio_remap::device::DmaBuffer;
use vfio_remap_ethernet::smoltcp::StackDevice;
use vfio_remap_ethernet::{Frame, Nic, Pool, QueuePair, Settings};
use vfio_remap_fuzz::card::{Direct, Hand};
use vfio_remap_fuzz::input::Input;
use vfio_remap_fuzz::{seeds_of_cards, start};

const BUFFERS: usize = 24;
const SETTINGS: Settings = Settings::DEFAULT
    .with_receive_entries(8)
    .with_transmit_entries(8)
    .with_poll(Duration::ZERO)
    .with_timeout(Duration::ZERO);
const BURST: usize = 8;

/// A card that is up.
struct Up {
    hand: Hand,
    transport: Arc<Direct>,
    nic: Arc<Nic>,
    /// Where the registers of its queues begin.
    rings: [u32; 2],
    /// Keeps a mapping, so that a run makes none.
    _memory: DmaBuffer,
}

impl Up {
    fn new(device: u16, rings: [u32; 2]) -> Self {
        let hand = Hand::default();
        let transport = Arc::new(Direct::new(&hand, device).expect("a device"));
        let nic = Nic::new(Device::new(transport.clone()), SETTINGS).expect("a card");
        hand.card().is_well();
        let _memory = nic.device().dma().expect("a space").buffer(4096).expect("a buffer");
        Self { hand, transport, nic, rings, _memory }
    }
}

static CARDS: LazyLock<[Up; 2]> =
    LazyLock::new(|| [Up::new(0x10c9, [0xc000, 0xe000]), Up::new(0x10d3, [0x2800, 0x3800])]);

/// A step of the card; `false` if it is none.
fn misbehave(up: &Up, step: u8, input: &mut Input<'_>) -> bool {
    let mut card = up.hand.card();
    match step {
        // A word of a descriptor.
        0 => {
            let which = input.u8();
            let at = card.descriptor(up.rings[usize::from(which & 1)], u32::from(which >> 1 & 7));
            card.writes.push((at + u64::from(which >> 4 & 1) * 8, input.u64()));
        }
        // All is done.
        1 => {
            let (ring, status) = (up.rings[usize::from(input.u8() & 1)], input.u64());
            for index in 0..8 {
                let at = card.descriptor(ring, index) + 8;
                card.writes.push((at, status));
            }
        }
        // A frame has come.
        2 => {
            let (index, flags, len) = (input.u8(), input.u32(), input.u16());
            let at = card.descriptor(up.rings[0], u32::from(index & 7));
            let bytes = input.bytes(usize::from(index >> 3) * 4).to_vec();
            let len = if len == 0 { bytes.len() as u64 } else { len.into() };
            card.frames.push((at, len << 32 | u64::from(flags) | 3, bytes));
        }
        3 => card.set(input.u16().into(), input.u32()),
        4 => card
            .set(up.rings[usize::from(input.u8() & 1)] + u32::from(input.u8() & 0x3c), input.u32()),
        5 => card.freeze(input.u16().into(), input.u32()),
        6 => card.freeze(
            up.rings[usize::from(input.u8() & 1)] + u32::from(input.u8() & 0x3c),
            input.u32(),
        ),
        7 => card.toggle(),
        _ => return false,
    }
    drop(card);
    up.transport.model().poll().expect("the model does not panic");
    true
}

/// A packet of TCP, of which segments can be made.
fn header() -> [u8; 54] {
    let mut bytes = [0; 54];
    bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
    bytes[16..18].copy_from_slice(&[0, 40]);
    bytes[23] = 6;
    bytes[46] = 0x50;
    bytes
}

/// Frames to send, as the input wants them.
fn compose(pool: &mut Pool, input: &mut Input<'_>) -> Option<Frame> {
    let (flags, len) = (input.u8(), usize::from(input.u16()) % (pool.buffer_size() + 1));
    let mut frame = pool.frame(len)?;
    if flags & 1 != 0 && len >= 54 {
        frame.buffer().write(0, &header());
    } else {
        let noise = input.bytes(usize::from(flags >> 3).min(len));
        frame.buffer().write(0, noise);
    }
    // Whether it can be so is the driver's to say.
    match flags >> 1 & 3 {
        1 => drop(frame.offload_checksums()),
        2 => drop(frame.offload_segments(input.u16())),
        3 => frame.set_vlan(Some(input.u16())),
        _ => {}
    }
    frame.set_goes_on(flags & 0x80 != 0);
    Some(frame)
}

fn look_at(frame: &Frame, most: usize) {
    assert!((1..=most).contains(&frame.len()), "a frame of {} bytes", frame.len());
    assert_eq!(frame.to_vec().len(), frame.len());
    let _ = (frame.checksums(), frame.hash(), frame.vlan());
}

/// A step of the program. Errors are what it gets.
fn use_card(
    nic: &Nic,
    queues: &mut QueuePair,
    pool: &mut Pool,
    frames: &mut Vec<Frame>,
    step: u8,
    input: &mut Input<'_>,
) {
    match step {
        8 => {
            let before = frames.len();
            let _ = queues.receiver.receive(pool, frames, usize::from(input.u8() & 15));
            frames[before..].iter().for_each(|frame| look_at(frame, pool.buffer_size()));
        }
        9 => {
            let count = input.u8() & 7;
            frames.extend((0..count).map_while(|_| compose(pool, input)));
            let _ = queues.transmitter.transmit(frames, pool);
        }
        10 => drop(frames.drain(..).map(|frame| pool.put(frame)).collect::<Result<Vec<_>, _>>()),
        11 => drop(queues.transmitter.reclaim(pool)),
        12 => drop(queues.receiver.wait(Duration::ZERO)),
        13 => drop(queues.transmitter.wait(Duration::ZERO)),
        14 => drop(nic.reset()),
        _ => match input.u8() % 8 {
            0 => drop(nic.link()),
            1 => drop(nic.statistics()),
            2 => drop(nic.wait_for_link(Duration::ZERO)),
            3 => drop(nic.renegotiate()),
            4 => drop(nic.phy_identifier()),
            5 => drop(nic.set_promiscuous(true)),
            6 => drop(nic.add_vlan(input.u16())),
            _ => drop(nic.wait_for_link_change(Duration::ZERO)),
        },
    }
}

/// Whether the queues could be stopped.
fn by_queues(up: &Up, queues: QueuePair, input: &mut Input<'_>) -> bool {
    let (nic, mut queues) = (&up.nic, queues);
    let mut pool = nic.pool(BUFFERS).expect("a pool");
    let mut frames = Vec::with_capacity(BURST);
    while !input.is_over() {
        let step = input.u8() & 15;
        if !misbehave(up, step, input) {
            use_card(nic, &mut queues, &mut pool, &mut frames, step, input);
        }
    }
    up.hand.card().heal();
    for frame in frames {
        pool.put(frame).expect("it is one of the pool's");
    }
    let QueuePair { transmitter, receiver, .. } = queues;
    let sent = transmitter.stop(&mut pool);
    // What could not be stopped is kept until the card was reset.
    let stopped = receiver.stop(&mut pool).is_ok() && sent.is_ok();
    if stopped {
        assert_eq!(pool.len(), BUFFERS, "buffers are lost");
    }
    stopped
}

/// With a TCP/IP stack on top.
fn by_stack(up: &Up, queues: QueuePair, input: &mut Input<'_>) -> bool {
    let mut device = StackDevice::new(queues).expect("it is well");
    let now = Instant::ZERO;
    let mut interface =
        Interface::new(Config::new(device.hardware_address().into()), &mut device, now);
    interface.update_ip_addrs(|addresses| {
        let _ = addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, 1), 24));
    });
    let buffer = || tcp::SocketBuffer::new(vec![0; 256]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.listen(80).expect("nobody listens there");
    let mut sockets = SocketSet::new(Vec::new());
    sockets.add(socket);
    while !input.is_over() {
        let step = input.u8() & 15;
        if !misbehave(up, step, input) {
            interface.poll(now, &mut device, &mut sockets);
            let _ = device.flush();
        }
    }
    up.hand.card().heal();
    device.stop().is_ok()
}

fuzz_target!(init: start(seeds_of_cards::of_ethernet_driver), |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let choice = input.u8();
    let up = &CARDS[usize::from(choice & 1)];
    // The last run may have left a driver that waits for the card to be back.
    let queues = up.nic.queue().or_else(|_| up.nic.reset().and_then(|()| up.nic.queue()));
    let queues = queues.expect("the card is well, and nobody has its queues");
    let has_stopped = match choice & 6 {
        6 => by_stack(up, queues, &mut input),
        _ => by_queues(up, queues, &mut input),
    };
    if has_stopped {
        up.hand.card().restore();
    } else {
        up.nic.reset().expect("it is well again");
    }
    let space = up.nic.device().dma().expect("a space");
    assert_eq!(space.mapping_count(), 1, "memory is lost");
});
