//! Wires: what a card is connected to.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

/// How many bytes and frames wait at an end of a cable.
const ROOM: usize = 1 << 20;
pub(super) const MAX_FRAMES: usize = 4096;
/// How many buffers are kept for later frames.
const MAX_SPARE: usize = 64;
/// The longest frame, in bytes; the 82576 sends and receives up to 9.5 KiB.
pub(super) const MAX_FRAME: usize = 9728;

/// What a card is connected to: it takes the frames that the card sends, and provides those that it receives.
///
/// A frame starts with the destination address and ends with the payload, without preamble and check sequence.
/// The card's thread calls these methods, and they must not block.
pub trait Wire: Send {
    /// Takes a frame that the card sends. It may be lost, as on any Ethernet.
    fn send(&mut self, frame: &[u8]);

    /// Puts the next frame for the card into `frame`, in place of its content. Returns whether there was one.
    fn receive(&mut self, frame: &mut Vec<u8>) -> bool;

    /// Whether there is a link to the other end.
    fn is_up(&self) -> bool {
        true
    }

    /// How many frames for the card were lost since the last call, because there was no room for them.
    fn missed(&mut self) -> u32 {
        0
    }

    /// Sets the thread to unpark when a frame arrives or the link changes. If the wire does not do that, the
    /// card notices within about a millisecond.
    fn watch(&mut self, reader: Thread) {
        drop(reader);
    }
}

/// One end of a cable in this process, for a card ([`Igb::with_wire`](super::Igb::with_wire)) or for a program
/// that simulates the rest of the network.
///
/// Up to a mebibyte of frames waits at each end. Further frames are lost.
///
/// ```
/// use vfio_remap::emulated::igb::Port;
///
/// let (one, other) = Port::pair();
/// one.send(&[0xff; 60]);
/// assert_eq!(other.receive().as_deref(), Some(&[0xff; 60][..]));
/// assert_eq!(other.receive(), None);
/// drop(one);
/// assert!(!other.is_up());
/// ```
pub struct Port {
    cable: Arc<Cable>,
    /// 0 or 1.
    end: usize,
}

struct Cable {
    ends: [Mutex<End>; 2],
    plugged: Mutex<Plugged>,
}

struct Plugged {
    ends: [bool; 2],
    enabled: bool,
}

/// The frames that have arrived at an end.
#[derive(Default)]
struct End {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    missed: u32,
    reader: Option<Thread>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    /// The two ends of a cable.
    pub fn pair() -> (Self, Self) {
        let cable = Arc::new(Cable {
            ends: Default::default(),
            plugged: Mutex::new(Plugged { ends: [true; 2], enabled: true }),
        });
        (Self { cable: cable.clone(), end: 0 }, Self { cable, end: 1 })
    }

    fn mine(&self) -> MutexGuard<'_, End> {
        lock(&self.cable.ends[self.end])
    }

    fn theirs(&self) -> MutexGuard<'_, End> {
        lock(&self.cable.ends[1 - self.end])
    }

    /// Sends a frame to the other end. It is lost if the cable is unplugged, or if it is longer than 9,728 bytes.
    pub fn send(&self, frame: &[u8]) {
        let mut end = self.theirs();
        // Checked with the end locked: unplugging discards what was sent before.
        if !self.is_up() || frame.len() > MAX_FRAME {
            return;
        }
        if end.bytes + frame.len() > ROOM || end.frames.len() >= MAX_FRAMES {
            end.missed = end.missed.saturating_add(1);
        } else {
            let mut buffer = end.spare.pop().unwrap_or_default();
            buffer.clear();
            buffer.extend_from_slice(frame);
            end.bytes += buffer.len();
            end.frames.push_back(buffer);
        }
        if let Some(reader) = &end.reader {
            reader.unpark();
        }
    }

    /// Takes the next frame that has arrived at this end.
    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut end = self.mine();
        let frame = end.frames.pop_front()?;
        end.bytes -= frame.len();
        Some(frame)
    }

    /// Whether the cable is plugged, and its other end still exists.
    pub fn is_up(&self) -> bool {
        let plugged = lock(&self.cable.plugged);
        plugged.enabled && plugged.ends == [true; 2]
    }

    /// Plugs the cable in, or unplugs it and discards the frames on it.
    pub fn set_up(&self, up: bool) {
        lock(&self.cable.plugged).enabled = up;
        self.changed();
    }

    fn changed(&self) {
        let up = self.is_up();
        for end in &self.cable.ends {
            let mut end = lock(end);
            if !up {
                end.frames.clear();
                end.bytes = 0;
            }
            if let Some(reader) = &end.reader {
                reader.unpark();
            }
        }
    }
}

impl Wire for Port {
    fn send(&mut self, frame: &[u8]) {
        Port::send(self, frame);
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let mut end = self.mine();
        let Some(next) = end.frames.pop_front() else { return false };
        end.bytes -= next.len();
        let spare = std::mem::replace(frame, next);
        if spare.capacity() > 0 && end.spare.len() < MAX_SPARE {
            end.spare.push(spare);
        }
        true
    }

    fn is_up(&self) -> bool {
        Port::is_up(self)
    }

    fn missed(&mut self) -> u32 {
        std::mem::take(&mut self.mine().missed)
    }

    fn watch(&mut self, reader: Thread) {
        self.mine().reader = Some(reader);
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.mine().reader = None;
        lock(&self.cable.plugged).ends[self.end] = false;
        self.changed();
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("waiting", &self.mine().frames.len()).finish_non_exhaustive()
    }
}

/// A network that is a function. Its arguments are a frame that the card sends, and a function that sends an
/// answer to the card.
///
/// ```
/// use vfio_remap::emulated::igb::{Igb, Respond};
///
/// // Returns each frame to its sender.
/// let echo = Respond::new(|frame: &[u8], answer: &mut dyn FnMut(&[u8])| {
///     let mut frame = frame.to_vec();
///     let (to, from) = frame[..12].split_at_mut(6);
///     to.swap_with_slice(from);
///     answer(&frame);
/// });
/// let card = Igb::new([2, 0, 0, 0, 0, 1]).with_wire(echo);
/// # drop(card);
/// ```
pub struct Respond<F> {
    function: F,
    answers: End,
}

impl<F: FnMut(&[u8], &mut dyn FnMut(&[u8])) + Send> Respond<F> {
    /// A wire to `function`.
    pub fn new(function: F) -> Self {
        Self { function, answers: End::default() }
    }
}

impl<F: FnMut(&[u8], &mut dyn FnMut(&[u8])) + Send> Wire for Respond<F> {
    fn send(&mut self, frame: &[u8]) {
        let answers = &mut self.answers;
        (self.function)(frame, &mut |frame| {
            let fits = frame.len() <= MAX_FRAME && answers.bytes + frame.len() <= ROOM;
            if fits && answers.frames.len() < MAX_FRAMES {
                answers.bytes += frame.len();
                answers.frames.push_back(frame.to_vec());
            } else {
                answers.missed = answers.missed.saturating_add(1);
            }
        });
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> bool {
        let Some(next) = self.answers.frames.pop_front() else { return false };
        self.answers.bytes -= next.len();
        *frame = next;
        true
    }

    fn missed(&mut self) -> u32 {
        std::mem::take(&mut self.answers.missed)
    }
}

impl<F> fmt::Debug for Respond<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Respond").finish_non_exhaustive()
    }
}

/// No cable.
pub(super) struct Unplugged;

impl Wire for Unplugged {
    fn send(&mut self, _: &[u8]) {}

    fn receive(&mut self, _: &mut Vec<u8>) -> bool {
        false
    }

    fn is_up(&self) -> bool {
        false
    }
}
