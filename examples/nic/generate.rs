//! `nic generate`: frames per second by size and burst.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use vfio_remap::{Error, ErrorKind, Result};
use vfio_remap_ethernet::{MacAddress, Nic, Pool, QueuePair};

use crate::card::{Card, LOOK, settings};
use crate::options::{Common, Generate};
use crate::progress::Progress;
use crate::stop::Stop;

/// The checksum of Ethernet, which the card appends.
const CHECKSUM: usize = 4;
/// The shortest frame without it (IEEE 802.3 §4.4.2).
const SHORTEST: usize = 60;
/// For experiments (IEEE 802 §9.2.4): local experimental EtherType 1.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// How many bytes a frame takes on the wire beyond its own: preamble and gap.
const BETWEEN: usize = 20;
/// How long a ring may have no room.
const PATIENCE: Duration = Duration::from_secs(30);
const MOST_BURST: u16 = 256;

/// What was measured for a size and a burst.
struct Rate {
    size: usize,
    burst: u16,
    frames: u64,
    seconds: f64,
}

impl Rate {
    fn frames_per_second(&self) -> f64 {
        self.frames as f64 / self.seconds
    }

    /// Bits per second on the wire, in millions.
    fn megabits(&self) -> f64 {
        self.frames_per_second() * ((self.size + BETWEEN) * 8) as f64 / 1e6
    }

    fn row(&self) -> String {
        let (Self { size, burst, .. }, rate) = (self, self.frames_per_second());
        format!("{size:>6} {burst:>6} {rate:>12.0} {:>12.1}", self.megabits())
    }
}

const TITLE: &str = "  size  burst frames a second  Mb/s on the wire";

pub fn run(common: &Common, generate: &Generate, stop: &Stop) -> Result<()> {
    let settings = settings(common).with_queues(generate.queues);
    let rates = Card::open(common, settings)?.run(|card| {
        check(generate, &card.nic)?;
        card.link(common, stop)?;
        let mut senders = Vec::new();
        for _ in 0..generate.queues {
            senders.push(Sender::new(&card.nic, generate)?);
        }
        measure(common, generate, &mut senders, stop)
            .and_then(|rates| senders.into_iter().try_for_each(Sender::stop).map(|()| rates))
    })?;
    if common.json {
        let rates = rates.iter().map(|rate| {
            json!({"size": rate.size, "burst": rate.burst, "frames": rate.frames,
                "seconds": rate.seconds, "frames_per_second": rate.frames_per_second(),
                "megabits_per_second": rate.megabits()})
        });
        say!("{}", json!({"queues": generate.queues, "rates": rates.collect::<Vec<_>>()}));
    } else {
        say!("{TITLE}");
        rates.iter().for_each(|rate| say!("{}", rate.row()));
    }
    Ok(())
}

fn check(generate: &Generate, nic: &Nic) -> Result<()> {
    let refuse = |reason: String, advice: String| {
        Err(Error::new(ErrorKind::OutOfRange, "generate", "frames")
            .with_reason(reason)
            .with_advice(advice))
    };
    // The longest has room for a tag that is not sent.
    let sizes = SHORTEST + CHECKSUM..=nic.settings().mtu + 14 + CHECKSUM;
    if let Some(size) = generate.sizes.iter().find(|size| !sizes.contains(size)) {
        let (least, most) = (sizes.start(), sizes.end());
        return refuse(
            format!("{} sends frames of {least} to {most} bytes, not of {size}", nic.name()),
            "correct --sizes, or raise --mtu".to_owned(),
        );
    }
    if let Some(burst) = generate.bursts.iter().find(|burst| !(1..=MOST_BURST).contains(burst)) {
        return refuse(
            format!("a burst of {burst}"),
            format!("correct --bursts: 1 to {MOST_BURST}"),
        );
    }
    Ok(())
}

fn measure(
    common: &Common,
    generate: &Generate,
    senders: &mut [Sender],
    stop: &Stop,
) -> Result<Vec<Rate>> {
    let progress = Progress::table(common);
    let time = Duration::from_millis(generate.milliseconds.max(1));
    let mut rates = Vec::new();
    for &size in &generate.sizes {
        for &burst in &generate.bursts {
            if stop.is_set() {
                return Ok(rates);
            }
            let rows: Vec<_> = rates.iter().map(Rate::row).collect();
            progress.show(format!("{TITLE}\n{}\n{size:>6} {burst:>6}", rows.join("\n")));
            let start = Barrier::new(senders.len());
            let start = &start;
            let results: Result<Vec<(u64, f64)>> = thread::scope(|scope| {
                let threads: Vec<_> = senders
                    .iter_mut()
                    .map(|sender| {
                        scope.spawn(move || {
                            start.wait();
                            sender.send(size - CHECKSUM, burst.into(), time, stop)
                        })
                    })
                    .collect();
                let panicked = || Error::new(ErrorKind::Os, "run", "a thread that has panicked");
                threads.into_iter().map(|t| t.join().map_err(|_| panicked())?).collect()
            });
            let results = results?;
            let frames = results.iter().map(|(frames, _)| frames).sum();
            let seconds = results.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
            rates.push(Rate { size, burst, frames, seconds });
        }
    }
    progress.done();
    Ok(rates)
}

/// A queue with buffers that have a header.
struct Sender {
    queues: QueuePair,
    pool: Pool,
}

impl Sender {
    fn new(nic: &Arc<Nic>, generate: &Generate) -> Result<Self> {
        let entries = usize::from(nic.settings().transmit_entries);
        let mut pool = nic.pool(entries + usize::from(MOST_BURST))?;
        let mut header = generate.to.0.to_vec();
        let MacAddress(source) = nic.address();
        header.extend_from_slice(&source);
        header.extend_from_slice(&EXPERIMENT);
        let mut start = vec![0; pool.buffer_size()];
        start[..header.len()].copy_from_slice(&header);
        // What a buffer holds stays in it when a frame was sent.
        let mut frames = Vec::with_capacity(pool.len());
        while let Some(frame) = pool.frame(SHORTEST) {
            frame.buffer().write(0, &start);
            frames.push(frame);
        }
        for frame in frames {
            // It is of this pool.
            let _ = pool.put(frame);
        }
        Ok(Self { queues: nic.queue()?, pool })
    }

    /// Sends frames of `len` bytes for a time. How many, and how long that took.
    fn send(
        &mut self,
        len: usize,
        burst: usize,
        time: Duration,
        stop: &Stop,
    ) -> Result<(u64, f64)> {
        let Self { queues: QueuePair { transmitter, .. }, pool } = self;
        let mut frames = Vec::with_capacity(burst);
        let start = Instant::now();
        let mut sent = 0;
        let mut moved = start;
        let mut now = start;
        while now - start < time && !stop.is_set() {
            // The clock is read rarely: that takes as long as to send a frame.
            for _ in 0..32 {
                while frames.len() < burst {
                    match pool.frame(len) {
                        Some(frame) => frames.push(frame),
                        None => break,
                    }
                }
                let count = transmit(transmitter, &mut frames, pool)?;
                if count == 0 {
                    break;
                }
                sent += count as u64;
                moved = now;
            }
            now = Instant::now();
            if now - moved > PATIENCE {
                return Err(Error::new(ErrorKind::TimedOut, "generate", "frames")
                    .with_reason(format!("the card has sent nothing for {PATIENCE:?}"))
                    .with_advice("look whether its link is up (nic info)"));
            }
        }
        for frame in frames {
            let _ = pool.put(frame);
        }
        // Those that are on their way count: the ring is full before and after.
        Ok((sent, start.elapsed().as_secs_f64()))
    }

    fn stop(self) -> Result<()> {
        let Self { queues, mut pool } = self;
        queues.transmitter.stop(&mut pool)?;
        queues.receiver.stop(&mut pool)
    }
}

/// Gives the card frames; how many.
fn transmit(
    transmitter: &mut vfio_remap_ethernet::Transmitter,
    frames: &mut Vec<vfio_remap_ethernet::Frame>,
    pool: &mut Pool,
) -> Result<usize> {
    let count = transmitter.transmit(frames, pool)?;
    if count == 0 {
        // All buffers are on their way.
        transmitter.wait(LOOK)?;
        transmitter.reclaim(pool);
    }
    Ok(count)
}
