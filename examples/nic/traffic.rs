//! Stations at both ends of a forwarder of emulated cards, which send each other frames.

use std::collections::VecDeque;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vfio_remap::Result;
use vfio_remap::emulated::igb::Port;

use crate::stop::Stop;

/// Frames of these sizes, without the checksum of Ethernet, in turn.
const SIZES: [usize; 4] = [60, 252, 60, 1514];
/// How many frames of a direction are on their way: a wire holds a mebibyte.
const WINDOW: usize = 512;
/// After which frames that have not arrived are lost.
const LATE: Duration = Duration::from_secs(10);
/// Where a frame has its number: after its header.
const NUMBER: std::ops::Range<usize> = 14..22;

/// What arrived of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    pub frames: u64,
    /// Frames that did not arrive, or not as they were sent.
    pub lost: u64,
}

/// A thread that sends and receives at both ends.
pub struct Traffic {
    stop: Stop,
    thread: JoinHandle<[Arrived; 2]>,
}

impl Traffic {
    /// # Errors
    /// Why there is no thread.
    pub fn start(one: Port, other: Port) -> Result<Self> {
        let stop = Stop::default();
        let ended = stop.clone();
        let thread = thread::Builder::new().name("traffic".to_owned());
        let thread = thread.spawn(move || {
            let mut streams = [Stream::default(), Stream::default()];
            while !ended.is_set() {
                let moved = streams[0].go_on(&one, &other) | streams[1].go_on(&other, &one);
                if !moved {
                    thread::sleep(Duration::from_micros(50));
                }
            }
            streams.map(|stream| stream.arrived)
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends it. What arrived from the one to the other, and the other way; frames that are on their way are
    /// not lost.
    pub fn stop(self) -> [Arrived; 2] {
        self.stop.set();
        self.thread.join().unwrap_or_default()
    }
}

/// Frames of one direction.
#[derive(Default)]
struct Stream {
    next: u64,
    /// The numbers of frames on their way, and when they were sent.
    waiting: VecDeque<(u64, Instant)>,
    arrived: Arrived,
}

impl Stream {
    /// Sends and receives what can be; whether there was any.
    fn go_on(&mut self, from: &Port, to: &Port) -> bool {
        let mut moved = false;
        while let Some(frame) = to.receive() {
            moved = true;
            self.arrive(&frame);
        }
        let now = Instant::now();
        while self.waiting.front().is_some_and(|(_, sent)| now - *sent > LATE) {
            self.waiting.pop_front();
            self.arrived.lost += 1;
        }
        while self.waiting.len() < WINDOW {
            moved = true;
            from.send(&frame(self.next));
            self.waiting.push_back((self.next, now));
            self.next += 1;
        }
        moved
    }

    fn arrive(&mut self, bytes: &[u8]) {
        let number = bytes.get(NUMBER).and_then(|number| number.try_into().ok());
        let Some(number) = number.map(u64::from_le_bytes) else { return };
        // Those before it are lost: they are in order.
        while let Some((expected, _)) = self.waiting.front().filter(|(first, _)| *first <= number) {
            if *expected == number && bytes == frame(number) {
                self.arrived.frames += 1;
            } else {
                self.arrived.lost += 1;
            }
            self.waiting.pop_front();
        }
    }
}

/// A frame with a number, for a station that nobody has.
fn frame(number: u64) -> Vec<u8> {
    let mut bytes = vec![number as u8; SIZES[(number % SIZES.len() as u64) as usize]];
    bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xfd, 2, 0, 0, 0, 0, 0xfe, 0x88, 0xb5]);
    bytes[NUMBER].copy_from_slice(&number.to_le_bytes());
    bytes
}
