//! `nic ping`: ICMP echo requests (RFC 792).

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde_json::json;
use smoltcp::iface::SocketHandle;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::icmp;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};
use vfio_remap::{Error, ErrorKind, Result};

use crate::card::{Card, settings};
use crate::options::{Common, Ping};
use crate::progress::Progress;
use crate::stack::{Stack, random};
use crate::stop::Stop;

/// The stack puts fragments together up to 4,096 bytes, with the header of ICMP.
const MOST: usize = 4000;

/// What has come back.
#[derive(Default)]
struct Tally {
    sent: u16,
    /// The times that answers took.
    times: Vec<Duration>,
    /// Answers with other data than was sent.
    wrong: u64,
}

pub fn run(common: &Common, ping: &Ping, stop: &Stop) -> Result<()> {
    if ping.size > MOST {
        return Err(Error::new(ErrorKind::OutOfRange, "send", format!("{} bytes", ping.size))
            .with_reason(format!("a ping has at most {MOST} here"))
            .with_advice("pass a smaller --size"));
    }
    let progress = Progress::table(common);
    let (address, tally) = Card::open(common, settings(common))?.run(|card| {
        let _peer = card.connect(common, stop)?;
        let mut stack = Stack::new(&card.nic, stop)?;
        stack.configure(common)?;
        let address = match (&ping.host, stack.network.router) {
            (Some(host), _) => stack.resolve(host)?,
            (None, Some(router)) => router,
            (None, None) => {
                return Err(Error::new(ErrorKind::InvalidInput, "ping", "a station")
                    .with_reason("this network has no router that is known")
                    .with_advice("pass the address of a station"));
            }
        };
        let tally = Pinger::new(&mut stack, address, ping)?.run(&mut stack, common, &progress)?;
        stack.close()?;
        Ok((address, tally))
    })?;
    progress.done();
    report(common, ping, address, &tally);
    if tally.times.is_empty() {
        return Err(Error::new(ErrorKind::TimedOut, "ping", address)
            .with_reason(format!("none of {} pings was answered", tally.sent))
            .with_advice("look whether the address is right, the host is on, and answers pings"));
    }
    Ok(())
}

/// Pings that are on their way.
struct Pinger<'p> {
    ping: &'p Ping,
    address: Ipv4Addr,
    socket: SocketHandle,
    identifier: u16,
    data: Vec<u8>,
    /// When those were sent that are not answered.
    waiting: HashMap<u16, Instant>,
    tally: Tally,
}

impl<'p> Pinger<'p> {
    fn new(stack: &mut Stack, address: Ipv4Addr, ping: &'p Ping) -> Result<Self> {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 16], vec![0; 64 << 10]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        let identifier = random() as u16;
        socket.bind(icmp::Endpoint::Ident(identifier)).map_err(|error| {
            Error::new(ErrorKind::Unsupported, "ping", address).with_reason(error.to_string())
        })?;
        Ok(Self {
            ping,
            address,
            socket: stack.sockets.add(socket),
            identifier,
            data: (0..ping.size).map(|at| at as u8).collect(),
            waiting: HashMap::new(),
            tally: Tally::default(),
        })
    }

    fn run(mut self, stack: &mut Stack, common: &Common, progress: &Progress) -> Result<Tally> {
        let interval = Duration::from_millis(self.ping.interval);
        for sequence in 1..=self.ping.count {
            self.send(stack, sequence)?;
            let is_last = sequence == self.ping.count;
            let pause = if is_last { Duration::from_secs(common.timeout) } else { interval };
            stack.run(Some(pause), |stack| {
                self.receive(stack, progress)?;
                // The next is sent after the interval; nothing follows the last.
                let is_over = is_last && self.waiting.is_empty();
                Ok((is_over || stack.stop.is_set()).then_some(()))
            })?;
            if stack.stop.is_set() {
                break;
            }
        }
        Ok(self.tally)
    }

    fn send(&mut self, stack: &mut Stack, sequence: u16) -> Result<()> {
        let request =
            Icmpv4Repr::EchoRequest { ident: self.identifier, seq_no: sequence, data: &self.data };
        let socket = stack.sockets.get_mut::<icmp::Socket>(self.socket);
        // Without room, as many pings are on their way: this one is lost.
        if let Ok(payload) = socket.send(request.buffer_len(), self.address.into()) {
            let checksums = ChecksumCapabilities::default();
            request.emit(&mut Icmpv4Packet::new_unchecked(payload), &checksums);
        }
        self.waiting.insert(sequence, Instant::now());
        self.tally.sent += 1;
        Ok(())
    }

    fn receive(&mut self, stack: &mut Stack, progress: &Progress) -> Result<()> {
        let socket = stack.sockets.get_mut::<icmp::Socket>(self.socket);
        while let Ok((payload, from)) = socket.recv() {
            let Ok(packet) = Icmpv4Packet::new_checked(payload) else { continue };
            // The stack has looked at the checksum.
            let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) =
                Icmpv4Repr::parse(&packet, &ChecksumCapabilities::ignored())
            else {
                continue;
            };
            if from != self.address.into() {
                continue;
            }
            // One that comes twice is counted once.
            let Some(sent) = self.waiting.remove(&seq_no) else { continue };
            if data != self.data {
                self.tally.wrong += 1;
                progress.line(&format!("{from}: {seq_no}, with other data than was sent"))?;
                continue;
            }
            let time = sent.elapsed();
            let (len, ms) = (data.len(), milliseconds(time));
            progress.line(&format!("{len} bytes from {from}: {seq_no}, {ms:.3} ms"))?;
            self.tally.times.push(time);
        }
        Ok(())
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn report(common: &Common, ping: &Ping, address: Ipv4Addr, tally: &Tally) {
    let Tally { sent, times, wrong } = tally;
    let least = times.iter().min().copied().map(milliseconds);
    let most = times.iter().max().copied().map(milliseconds);
    let mean = least.map(|_| milliseconds(times.iter().sum::<Duration>()) / times.len() as f64);
    if common.json {
        say!(
            "{}",
            json!({"address": address.to_string(), "size": ping.size, "sent": sent,
                "received": times.len(), "wrong": wrong, "min_ms": least, "mean_ms": mean,
                "max_ms": most})
        );
        return;
    }
    let wrong = if *wrong > 0 { format!(", {wrong} with other data") } else { String::new() };
    say!("{address}: {sent} sent, {} answered{wrong}", times.len());
    if let (Some(least), Some(mean), Some(most)) = (least, mean, most) {
        say!("round trip: {least:.3} ms at least, {mean:.3} on average, {most:.3} at most");
    }
}
