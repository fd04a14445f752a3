//! `nic forward`: frames between two cards, in both directions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vfio_remap::emulated::igb::Port;
use vfio_remap::{Error, ErrorKind, Result};
use vfio_remap_ethernet::{Frame, Nic, Pool, Receiver, Transmitter};

use crate::card::{Card, LOOK, settings};
use crate::options::{Common, Forward};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::traffic::{Arrived, Traffic};

const ENTRIES: u16 = 1024;
const EMULATED: &str = "emulated:igb";
/// How long is forwarded between emulated cards.
const DEMONSTRATION: Duration = Duration::from_secs(2);
/// The shortest frame that the cards send.
const SHORTEST: usize = 17;

/// What went in one direction.
#[derive(Default)]
struct Count {
    frames: AtomicU64,
    bytes: AtomicU64,
    /// Frames that the other card cannot send.
    dropped: AtomicU64,
}

pub fn run(common: &Common, forward: &Forward, stop: &Stop) -> Result<()> {
    let [a, b] = match &forward.cards[..] {
        [a, b] => [&a[..], &b[..]],
        _ => [EMULATED; 2],
    };
    if common.tap.is_some() && [a, b] == [EMULATED; 2] {
        return Err(Error::new(ErrorKind::InvalidInput, "forward", "frames")
            .with_reason("one TAP interface cannot be at the end of two wires")
            .with_advice("leave --tap out, or forward between an emulated card and another one"));
    }
    let settings = settings(common).with_receive_entries(ENTRIES).with_transmit_entries(ENTRIES);
    let [first, second] = Card::open_two(common, [a, b], settings)?;
    let outcome = first.run(|first| {
        second.run(|second| {
            first.link(common, stop)?;
            second.link(common, stop)?;
            let wires = first.wire.take().zip(second.wire.take());
            between(common, forward, [&first.nic, &second.nic], wires, stop)
        })
    })?;
    report(common, [a, b], &outcome);
    Ok(())
}

/// What was done.
pub struct Outcome {
    seconds: f64,
    counts: [Count; 2],
    /// Whether each frame was copied, since the cards are not in one address space.
    pub copied: bool,
    arrived: Option<[Arrived; 2]>,
}

/// Forwards until it is over; between emulated cards, their wires have stations at the ends.
pub fn between(
    common: &Common,
    forward: &Forward,
    nics: [&Arc<Nic>; 2],
    wires: Option<(Port, Port)>,
    stop: &Stop,
) -> Result<Outcome> {
    let end = match (forward.seconds, &wires) {
        (Some(seconds), _) => Some(Duration::from_secs(seconds)),
        (None, Some(_)) => Some(DEMONSTRATION),
        (None, None) => None,
    };
    let mut lanes = lanes(forward, nics)?;
    let copied = lanes.iter().any(|lane| lane.copies.is_some());
    nics.iter().try_for_each(|nic| nic.set_promiscuous(true))?;
    for lane in &mut lanes {
        // The card has buffers before the first frame comes: without, it drops frames.
        lane.receiver.receive(&mut lane.pool, &mut Vec::new(), 0)?;
    }
    let counts = [Count::default(), Count::default()];
    // Ends the threads, also when one of them has failed.
    let over = Stop::default();
    let start = Instant::now();
    let traffic = wires.map(|(one, other)| Traffic::start(one, other)).transpose()?;
    let passed: Result<()> = thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .iter_mut()
            .zip(&counts)
            .map(|(lane, count)| {
                let over = &over;
                scope.spawn(move || lane.run(count, over).inspect_err(|_| over.set()))
            })
            .collect();
        let progress = Progress::table(common);
        while !over.is_set() && !stop.is_set() && end.is_none_or(|end| start.elapsed() < end) {
            thread::sleep(LOOK.min(end.unwrap_or(LOOK)));
            progress.show(table(start.elapsed().as_secs_f64(), &counts));
        }
        over.set();
        progress.done();
        let panicked = || Error::new(ErrorKind::Os, "run", "a thread that has panicked");
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| panicked())?)
    });
    let seconds = start.elapsed().as_secs_f64();
    let arrived = traffic.map(Traffic::stop);
    let stopped = lanes.into_iter().try_for_each(Lane::stop);
    passed.and(stopped)?;
    Ok(Outcome { seconds, counts, copied, arrived })
}

/// One direction: what one card receives is sent by the other.
struct Lane {
    receiver: Receiver,
    transmitter: Transmitter,
    /// Buffers of the card that receives.
    pool: Pool,
    /// Buffers for copies, if the card that sends does not reach those.
    copies: Option<Pool>,
    burst: usize,
}

fn lanes(forward: &Forward, nics: [&Arc<Nic>; 2]) -> Result<[Lane; 2]> {
    let [first, second] = nics;
    let (first, second) = (first.queue()?, second.queue()?);
    Ok([
        Lane::new(first.receiver, second.transmitter, forward)?,
        Lane::new(second.receiver, first.transmitter, forward)?,
    ])
}

impl Lane {
    fn new(receiver: Receiver, transmitter: Transmitter, forward: &Forward) -> Result<Self> {
        let burst = usize::from(forward.burst);
        // For both rings, and for what is between them.
        let count = 2 * (usize::from(ENTRIES) + burst);
        let pool = receiver.nic().pool(count)?;
        let theirs = transmitter.nic().pool(count)?;
        let copies = Some(theirs).filter(|theirs| theirs.address_space() != pool.address_space());
        Ok(Self { receiver, transmitter, pool, copies, burst })
    }

    /// Passes frames on until it is over.
    fn run(&mut self, count: &Count, over: &Stop) -> Result<()> {
        let Self { receiver, transmitter, pool, copies, burst } = self;
        let longest = transmitter.nic().longest_frame();
        let mut received = Vec::with_capacity(*burst);
        let mut ready: Vec<Frame> = Vec::with_capacity(*burst);
        while !over.is_set() {
            // What could not be sent goes first, and the card keeps what comes meanwhile.
            if ready.is_empty() && receiver.receive(pool, &mut received, *burst)? == 0 {
                transmitter.reclaim(copies.as_mut().unwrap_or(pool));
                receiver.wait(LOOK)?;
                continue;
            }
            let (mut bytes, mut dropped) = (0, 0);
            for frame in received.drain(..) {
                let len = frame.len();
                let fits = (SHORTEST..=longest).contains(&len);
                match if fits { pass(frame, pool, copies) } else { Err(frame) } {
                    Ok(frame) => {
                        bytes += len as u64;
                        ready.push(frame);
                    }
                    Err(frame) => {
                        dropped += 1;
                        // It is of this pool.
                        let _ = pool.put(frame);
                    }
                }
            }
            count.bytes.fetch_add(bytes, Ordering::Relaxed);
            count.dropped.fetch_add(dropped, Ordering::Relaxed);
            let sent = transmitter.transmit(&mut ready, copies.as_mut().unwrap_or(pool))?;
            count.frames.fetch_add(sent as u64, Ordering::Relaxed);
            if !ready.is_empty() {
                transmitter.wait(LOOK)?;
            }
        }
        Ok(())
    }

    fn stop(self) -> Result<()> {
        let Self { receiver, transmitter, mut pool, mut copies, .. } = self;
        transmitter.stop(copies.as_mut().unwrap_or(&mut pool))?;
        receiver.stop(&mut pool)
    }
}

/// The frame for the other card: itself if that reaches it, or a copy; or the frame, if there is no buffer.
fn pass(
    frame: Frame,
    pool: &mut Pool,
    copies: &mut Option<Pool>,
) -> std::result::Result<Frame, Frame> {
    let Some(copies) = copies else { return Ok(frame) };
    let Some(mut copy) = copies.frame_of(&frame.to_vec()) else { return Err(frame) };
    copy.set_vlan(frame.vlan());
    // It is of this pool.
    let _ = pool.put(frame);
    Ok(copy)
}

fn table(seconds: f64, counts: &[Count; 2]) -> String {
    let row = |direction: &str, count: &Count| {
        let (frames, bytes) = (load(&count.frames), load(&count.bytes));
        let (rate, megabits) = (frames as f64 / seconds, bytes as f64 * 8e-6 / seconds);
        let dropped = load(&count.dropped);
        format!("{direction:<7} {frames:>12} {rate:>14.0} {megabits:>9.1} {dropped:>8}")
    };
    let [one, other] = counts;
    let title = "             frames frames a second      Mb/s  dropped";
    format!("{title}\n{}\n{}", row("A to B", one), row("B to A", other))
}

fn load(count: &AtomicU64) -> u64 {
    count.load(Ordering::Relaxed)
}

fn report(common: &Common, names: [&str; 2], outcome: &Outcome) {
    let Outcome { seconds, counts, copied, arrived } = outcome;
    if !common.json {
        say!("{}", table(*seconds, counts));
        let how = if *copied { "each frame was copied once" } else { "no frame was copied" };
        say!("{how}");
        if let Some([one, other]) = arrived {
            let (frames, lost) = (one.frames + other.frames, one.lost + other.lost);
            say!("between the stations at the ends: {frames} frames arrived, {lost} were lost");
        }
        return;
    }
    let directions = counts.iter().enumerate().map(|(at, count)| {
        let mut direction = json!({"from": names[at], "to": names[1 - at],
            "frames": load(&count.frames), "bytes": load(&count.bytes),
            "dropped": load(&count.dropped)});
        if let Some(arrived) = &arrived {
            direction["arrived"] = arrived[at].frames.into();
            direction["lost"] = arrived[at].lost.into();
        }
        direction
    });
    let directions: Vec<_> = directions.collect();
    say!("{}", json!({"seconds": seconds, "copied": copied, "directions": directions}));
}
