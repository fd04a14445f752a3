//! `nic capture`: frames to a file.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Address,
    Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use vfio_remap::Result;
use vfio_remap::emulated::igb::Port;
use vfio_remap_ethernet::{Frame, Nic};

use crate::card::{Card, LOOK, emulated_address, settings};
use crate::options::{Capture, Common};
use crate::pcap::Pcap;
use crate::peer::ADDRESS;
use crate::progress::Progress;
use crate::stop::Stop;

const BURST: usize = 32;
const ENTRIES: u16 = 2048;
/// Where the tag of a VLAN is in a frame, and what it begins with (IEEE 802.1Q §9.4).
const TAG_AT: usize = 12;
const TAG: [u8; 2] = [0x81, 0x00];
/// The time between two frames at the other end of an emulated card's wire.
const PAUSE: Duration = Duration::from_millis(5);

/// What was captured.
#[derive(Default)]
pub struct Tally {
    pub frames: u64,
    bytes: u64,
    /// Frames for which the card had no room.
    missed: u64,
}

pub fn run(common: &Common, capture: &Capture, stop: &Stop) -> Result<()> {
    // Before the card is touched.
    let mut pcap = Pcap::create(&capture.file, capture.snapshot_length)?;
    let settings = settings(common).with_receive_entries(ENTRIES);
    let tally = Card::open(common, settings)?.run(|card| {
        let _talk = card.wire.take().map(Talk::start).transpose()?;
        card.nic.set_promiscuous(true)?;
        card.link(common, stop)?;
        receive(common, capture, &card.nic, &mut pcap, stop)
    })?;
    let Tally { frames, bytes, missed } = tally;
    let file = capture.file.display();
    if common.json {
        let file = file.to_string();
        say!("{}", json!({"file": file, "frames": frames, "bytes": bytes, "missed": missed}));
    } else {
        say!("{frames} frames, {bytes} bytes in {file}; {missed} were missed");
    }
    Ok(())
}

/// Receives frames until there are enough, and writes them.
pub fn receive(
    common: &Common,
    capture: &Capture,
    nic: &std::sync::Arc<Nic>,
    pcap: &mut Pcap,
    stop: &Stop,
) -> Result<Tally> {
    let mut pool = nic.pool(usize::from(ENTRIES) + BURST)?;
    let mut queues = nic.queue()?;
    // A time beyond what the clock can say is no limit.
    let time = capture.seconds.map(Duration::from_secs);
    let end = time.and_then(|time| Instant::now().checked_add(time));
    let progress = Progress::table(common);
    let mut shown = Instant::now();
    let mut tally = Tally::default();
    let mut frames = Vec::with_capacity(BURST);
    let mut bytes = vec![0; nic.longest_frame() + 4];
    let is_enough = |tally: &Tally| capture.count.is_some_and(|count| tally.frames >= count);
    let is_late = || end.is_some_and(|end| end <= Instant::now());
    // The first call gives the card its descriptors: what has come before is not of this capture.
    queues.receiver.receive(&mut pool, &mut frames, BURST)?;
    let missed_before = nic.statistics()?.missed;
    while !is_enough(&tally) && !is_late() && !stop.is_set() {
        if frames.is_empty() && queues.receiver.receive(&mut pool, &mut frames, BURST)? == 0 {
            pcap.flush()?;
            let left = end.map_or(LOOK, |end| end.saturating_duration_since(Instant::now()));
            queues.receiver.wait(left.min(LOOK))?;
        }
        let time = SystemTime::now();
        for frame in frames.drain(..) {
            if !is_enough(&tally) {
                let len = copy(&frame, &mut bytes);
                pcap.write(time, &bytes[..len])?;
                tally.frames += 1;
                tally.bytes += len as u64;
            }
            // It is of this pool.
            let _ = pool.put(frame);
        }
        if shown.elapsed() >= LOOK {
            shown = Instant::now();
            let Tally { frames, bytes, .. } = tally;
            progress.show(format!("{frames} frames, {bytes} bytes"));
        }
    }
    pcap.flush()?;
    progress.done();
    // Nor are those that come while the queues are stopped.
    tally.missed = nic.statistics()?.missed.saturating_sub(missed_before);
    queues.transmitter.stop(&mut pool)?;
    queues.receiver.stop(&mut pool)?;
    Ok(tally)
}

/// Copies a frame as it was on the wire: the card has taken the VLAN's tag out.
fn copy(frame: &Frame, bytes: &mut [u8]) -> usize {
    let len = frame.read(0, bytes);
    match frame.vlan() {
        Some(tag) if len >= TAG_AT && len + 4 <= bytes.len() => {
            bytes.copy_within(TAG_AT..len, TAG_AT + 4);
            bytes[TAG_AT..TAG_AT + 2].copy_from_slice(&TAG);
            bytes[TAG_AT + 2..TAG_AT + 4].copy_from_slice(&tag.to_be_bytes());
            len + 4
        }
        _ => len,
    }
}

/// A thread that sends something for a capture by an emulated card; it ends when this is dropped.
struct Talk {
    stop: Stop,
    thread: Option<thread::JoinHandle<()>>,
}

impl Talk {
    fn start(wire: Port) -> Result<Self> {
        let stop = Stop::default();
        let ended = stop.clone();
        let thread = thread::Builder::new().name("talk".to_owned());
        let thread = thread.spawn(move || {
            for number in 0u64.. {
                if ended.is_set() {
                    return;
                }
                wire.send(&hello(number));
                thread::sleep(PAUSE);
            }
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.stop.set();
        // It does not panic.
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

/// A UDP packet for everybody, to port 9, which discards (RFC 863).
pub fn hello(number: u64) -> Vec<u8> {
    let text = format!("frame {number} for nic capture\n");
    let (source, broadcast) = (ADDRESS, Ipv4Address::BROADCAST);
    let udp = UdpRepr { src_port: 49_152, dst_port: 9 };
    let ip = Ipv4Repr {
        src_addr: source,
        dst_addr: broadcast,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + text.len(),
        hop_limit: 64,
    };
    let ethernet = EthernetRepr {
        src_addr: EthernetAddress(emulated_address(0xfe)),
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Ipv4,
    };
    let len = ethernet.buffer_len() + ip.buffer_len() + ip.payload_len;
    let mut bytes = vec![0; len.max(60)];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..len]);
    ethernet.emit(&mut frame);
    let checksums = ChecksumCapabilities::default();
    let mut packet = Ipv4Packet::new_unchecked(frame.payload_mut());
    ip.emit(&mut packet, &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(packet.payload_mut()),
        &source.into(),
        &broadcast.into(),
        text.len(),
        |payload| payload.copy_from_slice(text.as_bytes()),
        &checksums,
    );
    bytes
}
