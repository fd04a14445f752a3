//! Two cards that fail, each with smoltcp on top: streams of TCP in both directions, in which every byte is known.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{IpAddress, IpCidr};
use vfio_remap::emulated::Emulated;
use vfio_remap::emulated::igb::{Fault, Faults, Igb, Port};
use vfio_remap::{Device, Result};
use vfio_remap_ethernet::smoltcp::StackDevice;
use vfio_remap_ethernet::{Nic, Settings};

const STREAMS: usize = 2;
const BUFFER: usize = 16 << 10;
const ENTRIES: u16 = 64;
/// Of a [`StackDevice`]: as many as it has descriptors, and two bursts.
const BUFFERS: usize = 2 * ENTRIES as usize + 2 * 32;
/// What each stream still sends once all faults have struck.
const REST: u64 = 64 << 10;
/// Packets between two faults: few enough that they strike recoveries, too.
const APART: std::ops::RangeInclusive<u64> = 5..=120;
/// So much faster goes the stack's clock: it waits for a second and more before it sends again.
const HASTE: u64 = 20;
/// The driver's patience with a card that sends nothing.
const TIMEOUT: Duration = Duration::from_millis(100);
/// Within this a call of the driver returns ([`Nic::reset`]), beside the time that it is told to wait.
const STATED: Duration = Duration::from_secs(10);
/// The longest wait that it is told.
const NAP: Duration = Duration::from_millis(5);
/// Attempts to bring a card back while faults go on.
const ATTEMPTS: u32 = 20;

/// What one end tells the other.
#[derive(Default)]
struct Side {
    /// How many bytes of each stream it sends in all, plus one; 0 while faults go on.
    totals: [AtomicU64; STREAMS],
    is_done: AtomicBool,
    has_failed: AtomicBool,
}

/// What came of a run.
#[derive(Default)]
pub struct Outcome {
    pub struck: Vec<Fault>,
    /// How long the driver took for its slowest call, beside the time that it was told to wait.
    pub longest: Duration,
    /// The longest time in which no byte came.
    pub silence: Duration,
    /// Bytes that were received.
    pub bytes: u64,
    /// How often a card was brought up again, and how often a queue was stopped and another taken.
    pub resets: u32,
    pub exchanges: u32,
}

/// Runs one seed: two cards, and `faults` faults in all.
pub fn perform(seed: u64, faults: usize) -> Outcome {
    let plans = [0, 1]
        .map(|end| Faults::seeded(2 * seed + end, &Fault::ALL, (faults + end as usize) / 2, APART));
    let sides: Arc<[Side; 2]> = Arc::default();
    let start = Arc::new(Barrier::new(2));
    let (one, other) = Port::pair();
    let threads = [(0, one), (1, other)].map(|(end, port)| {
        let (sides, start, plans) = (sides.clone(), start.clone(), plans.clone());
        let name = format!("seed {seed} end {end}");
        let run = move || {
            let failed = Failed(&sides[end]);
            let outcome = End::new(seed, end, port, &plans, &sides).perform(&start);
            std::mem::forget(failed);
            outcome
        };
        thread::Builder::new().name(name).spawn(run).unwrap()
    });
    let mut all = Outcome::default();
    for thread in threads {
        let one = thread.join().unwrap_or_else(|_| panic!("an end of seed {seed} has failed"));
        all.longest = all.longest.max(one.longest);
        all.silence = all.silence.max(one.silence);
        all.bytes += one.bytes;
        all.resets += one.resets;
        all.exchanges += one.exchanges;
    }
    all.struck = plans.iter().flat_map(|plan| plan.injected()).map(|(_, fault)| fault).collect();
    all
}

/// Says that an end has panicked, so that the other does not wait for it.
struct Failed<'a>(&'a Side);

impl Drop for Failed<'_> {
    fn drop(&mut self) {
        self.0.has_failed.store(true, Ordering::Relaxed);
    }
}

#[derive(Clone, Copy, Default)]
struct Stream {
    handle: SocketHandle,
    sent: u64,
    received: u64,
}

struct End<'a> {
    seed: u64,
    random: u64,
    end: usize,
    plans: &'a [Faults; 2],
    sides: &'a [Side; 2],
    nic: Arc<Nic>,
    /// `None` only while it is exchanged.
    device: Option<StackDevice>,
    streams: [Stream; STREAMS],
    begun: Instant,
    outcome: Outcome,
}

impl<'a> End<'a> {
    fn new(
        seed: u64,
        end: usize,
        port: Port,
        plans: &'a [Faults; 2],
        sides: &'a [Side; 2],
    ) -> Self {
        let address = [2, 0, 0, 0, 0, end as u8 + 1];
        let model = Igb::new(address).with_wire(port).with_faults(&plans[end]);
        let device = Device::new(Arc::new(Emulated::new(model).unwrap()));
        let settings = Settings::DEFAULT
            .with_receive_entries(ENTRIES)
            .with_transmit_entries(ENTRIES)
            .with_interrupts((seed + end as u64).is_multiple_of(2))
            .with_timeout(TIMEOUT);
        let nic = Nic::new(device, settings).unwrap();
        let device = StackDevice::new(nic.queue().unwrap()).unwrap();
        Self {
            seed,
            random: seed << 1 | end as u64 ^ 0x5eed_0000,
            end,
            plans,
            sides,
            nic,
            device: Some(device),
            streams: Default::default(),
            begun: Instant::now(),
            outcome: Outcome::default(),
        }
    }

    fn perform(mut self, start: &Barrier) -> Outcome {
        let mut device = self.device.take().unwrap();
        let mut config = Config::new(device.hardware_address().into());
        config.random_seed = self.random;
        let mut interface = Interface::new(config, &mut device, self.now());
        self.device = Some(device);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, self.end as u8 + 1), 24)).unwrap();
        });
        let mut sockets = SocketSet::new(Vec::new());
        for (stream, number) in self.streams.iter_mut().zip(0u16..) {
            let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
            let mut socket = tcp::Socket::new(buffer(), buffer());
            if self.end == 1 {
                socket.listen(7000 + number).unwrap();
            }
            stream.handle = sockets.add(socket);
        }
        // Nobody connects before the other listens.
        start.wait();
        if self.end == 0 {
            for (stream, number) in self.streams.iter().zip(0u16..) {
                let remote = (IpAddress::v4(10, 0, 0, 2), 7000 + number);
                let socket = sockets.get_mut::<tcp::Socket<'_>>(stream.handle);
                socket.connect(interface.context(), remote, 50_000 + number).unwrap();
            }
        }
        let mut heard = Instant::now();
        while !self.is_over() {
            let before = self.outcome.bytes;
            self.poll(&mut interface, &mut sockets);
            let moved = self.work(&mut sockets);
            if self.outcome.bytes > before {
                self.outcome.silence = self.outcome.silence.max(heard.elapsed());
                heard = Instant::now();
            }
            self.have_a_mishap();
            if !moved {
                let delay = interface.poll_delay(self.now(), &sockets);
                let delay = delay.map_or(NAP, |delay| Duration::from(delay) / HASTE as u32);
                self.call(NAP, |device, _| device.wait(delay.min(NAP)).map(drop));
            }
        }
        self.exchange(false);
        self.nic.close().unwrap();
        self.outcome
    }

    /// The stack's clock.
    fn now(&self) -> Moment {
        Moment::from_micros((self.begun.elapsed().as_micros() as u64 * HASTE) as i64)
    }

    fn poll(&mut self, interface: &mut Interface, sockets: &mut SocketSet<'_>) {
        let now = self.now();
        self.call(Duration::ZERO, |device, _| {
            interface.poll(now, device, sockets);
            device.flush()
        });
    }

    /// A call of the driver, which may wait so long on purpose. If it fails, the card is brought back.
    fn call(&mut self, wait: Duration, call: impl FnOnce(&mut StackDevice, &Nic) -> Result<()>) {
        let mut device = self.device.take().unwrap();
        let nic = self.nic.clone();
        let done = self.in_time(wait, || call(&mut device, &nic));
        self.device = Some(device);
        if done.is_err() {
            self.bring_back();
        }
    }

    fn in_time<T>(&mut self, wait: Duration, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = call();
        let took = start.elapsed().saturating_sub(wait);
        self.outcome.longest = self.outcome.longest.max(took);
        done
    }

    fn bring_back(&mut self) {
        for _ in 0..ATTEMPTS {
            self.plans[self.end].plug_in();
            let nic = self.nic.clone();
            self.outcome.resets += 1;
            match self.in_time(Duration::ZERO, || nic.reset()) {
                Ok(()) => return,
                Err(error) => log(self.seed, &error),
            }
        }
        panic!("seed {}: it does not come back", self.seed);
    }

    /// Sends and receives what there is room for; whether there was any.
    fn work(&mut self, sockets: &mut SocketSet<'_>) -> bool {
        let mut moved = false;
        let is_quiet = self.plans.iter().all(|plan| plan.remaining() == 0);
        for number in 0..STREAMS {
            let Stream { handle, mut sent, mut received } = self.streams[number];
            let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
            let total = &self.sides[self.end].totals[number];
            if is_quiet && total.load(Ordering::Relaxed) == 0 {
                total.store(sent + REST + 1, Ordering::Release);
            }
            let most = total.load(Ordering::Relaxed).checked_sub(1).unwrap_or(u64::MAX);
            if socket.can_send() && sent < most {
                let count = socket.send(|room| {
                    let count = room.len().min((most - sent) as usize);
                    for (byte, at) in room[..count].iter_mut().zip(sent..) {
                        *byte = content(self.end, number, at);
                    }
                    (count, count)
                });
                sent += count.unwrap() as u64;
                moved = true;
            }
            if socket.can_recv() {
                let count = socket.recv(|bytes| {
                    for (byte, at) in bytes.iter().zip(received..) {
                        let expected = content(1 - self.end, number, at);
                        assert_eq!(*byte, expected, "seed {}: byte {at}", self.seed);
                    }
                    (bytes.len(), bytes.len())
                });
                let count = count.unwrap() as u64;
                received += count;
                self.outcome.bytes += count;
                moved = true;
            }
            self.streams[number] = Stream { handle, sent, received };
        }
        moved
    }

    /// Whether all that both ends send has come.
    fn is_over(&self) -> bool {
        let [mine, theirs] = [&self.sides[self.end], &self.sides[1 - self.end]];
        assert!(!theirs.has_failed.load(Ordering::Relaxed), "the other end has failed");
        let has_all = self
            .streams
            .iter()
            .zip(&theirs.totals)
            .all(|(stream, total)| total.load(Ordering::Acquire) == stream.received + 1);
        if has_all {
            mine.is_done.store(true, Ordering::Release);
        }
        // The other may not know yet that what it has sent has come.
        has_all && theirs.is_done.load(Ordering::Acquire)
    }

    /// Now and then somebody resets the card, has it negotiate, or takes another queue.
    fn have_a_mishap(&mut self) {
        match self.random() % 4000 {
            0 => self.bring_back(),
            1 => self.call(Duration::ZERO, |_, nic| nic.renegotiate()),
            2..5 => self.exchange(true),
            _ => {}
        }
    }

    /// Stops the queue, sees that all buffers are back, and may take another queue.
    fn exchange(&mut self, again: bool) {
        let (queues, mut pool) = self.device.take().unwrap().into_parts();
        let sent = self.in_time(Duration::ZERO, || queues.transmitter.stop(&mut pool));
        let received = self.in_time(Duration::ZERO, || queues.receiver.stop(&mut pool));
        match sent.and(received) {
            Ok(()) => assert_eq!(pool.len(), BUFFERS, "seed {}: buffers are lost", self.seed),
            Err(error) => {
                // What is lost to the pool is kept until now.
                log(self.seed, &error);
                self.bring_back();
            }
        }
        if !again {
            return;
        }
        self.outcome.exchanges += 1;
        drop(pool);
        for _ in 0..ATTEMPTS {
            let nic = self.nic.clone();
            match self.in_time(Duration::ZERO, || StackDevice::new(nic.queue()?)) {
                Ok(device) => {
                    self.device = Some(device);
                    return;
                }
                Err(error) => {
                    log(self.seed, &error);
                    self.bring_back();
                }
            }
        }
        panic!("seed {}: no queue can be had", self.seed);
    }

    /// xorshift64* (Vigna 2014).
    fn random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

fn log(seed: u64, error: &vfio_remap::Error) {
    if std::env::var_os("VFIO_REMAP_TEST_VERBOSE").is_some() {
        println!("seed {seed}: {error}");
    }
}

/// The byte of a stream.
fn content(end: usize, stream: usize, at: u64) -> u8 {
    let word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (2 * stream + end) as u64;
    (word ^ word >> 29).to_le_bytes()[at as usize % 8]
}

/// What a run must keep to.
pub fn check(seed: u64, faults: usize, outcome: &Outcome) {
    assert_eq!(outcome.struck.len(), faults, "seed {seed}");
    assert!(outcome.longest < STATED, "seed {seed}: a call took {:?}", outcome.longest);
}
