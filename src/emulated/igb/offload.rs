//! Transmit offloads: checksums, segmentation, VLAN tags (82576 datasheet §7.2).

use super::packet::{TCP, UDP, fold, pseudo_sum, sum};
use super::wire::MAX_FRAME;

/// The shortest frame without its check sequence.
pub(super) const MIN_FRAME: usize = 60;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// A context descriptor, by its words.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Context(pub(super) [u32; 4]);

impl Context {
    fn network_at(&self) -> usize {
        (self.0[0] >> 9 & 0x7f) as usize
    }

    fn network_len(&self) -> usize {
        (self.0[0] & 0x1ff) as usize
    }

    fn transport_at(&self) -> usize {
        self.network_at() + self.network_len()
    }

    pub(super) fn tag(&self) -> u16 {
        (self.0[0] >> 16) as u16
    }

    fn is_v4(&self) -> bool {
        self.0[2] & 1 << 10 != 0
    }

    /// The protocol, and the offset of its checksum in its header; `None` for SCTP.
    fn transport(&self) -> Option<(u8, usize)> {
        match self.0[2] >> 11 & 3 {
            0 => Some((UDP, 6)),
            1 => Some((TCP, 16)),
            _ => None,
        }
    }

    fn transport_len(&self) -> usize {
        (self.0[3] >> 8 & 0xff) as usize
    }

    fn segment_size(&self) -> usize {
        (self.0[3] >> 16) as usize
    }
}

/// What is to be done to a packet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Request {
    pub(super) context: Context,
    pub(super) network_sum: bool,
    pub(super) transport_sum: bool,
    pub(super) segment: bool,
    /// For a legacy descriptor: where the sum starts, and where it is stored.
    pub(super) legacy_sum: Option<(usize, usize)>,
    pub(super) tag: Option<u16>,
}

/// A packet whose frames are to be sent.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    data: Vec<u8>,
    request: Request,
    /// The length of the headers before each segment.
    header: usize,
    /// How many bytes have been sent.
    at: usize,
    frames: u16,
}

impl Outgoing {
    /// Returns the data if the packet cannot be sent.
    pub(super) fn new(data: Vec<u8>, request: Request) -> Result<Self, Vec<u8>> {
        let mut packet = Self { data, request, header: 0, at: 0, frames: 0 };
        let valid = if request.segment { packet.prepare() } else { packet.data.len() <= MAX_FRAME };
        if valid && !packet.data.is_empty() { Ok(packet) } else { Err(packet.data) }
    }

    /// Checks that the context's headers lie in the packet.
    fn prepare(&mut self) -> bool {
        let context = &self.request.context;
        let Some((protocol, _)) = context.transport() else { return false };
        let least = if context.is_v4() { IPV4_HEADER } else { IPV6_HEADER };
        let transport = if protocol == TCP { 20 } else { 8 };
        self.header = context.transport_at() + context.transport_len();
        self.at = self.header;
        let size = context.segment_size();
        size > 0
            && context.network_at() >= 14
            && context.network_len() >= least
            && context.transport_len() >= transport
            && self.header < self.data.len()
            && self.header + size <= MAX_FRAME - 4
    }

    /// Puts the next frame into `frame`, in place of its content. Returns whether there was one.
    pub(super) fn next(&mut self, vlan: u16, pad: bool, frame: &mut Vec<u8>) -> bool {
        if self.at >= self.data.len() {
            return false;
        }
        frame.clear();
        if self.request.segment {
            self.segment(frame);
        } else {
            frame.extend_from_slice(&self.data);
            self.at = self.data.len();
            self.request.insert_sums(frame);
        }
        if let Some(tag) = self.request.tag
            && frame.len() >= 12
        {
            let [a, b] = vlan.to_be_bytes();
            let [c, d] = tag.to_be_bytes();
            frame.splice(12..12, [a, b, c, d]);
        }
        if pad && frame.len() < MIN_FRAME {
            frame.resize(MIN_FRAME, 0);
        }
        true
    }

    /// Writes the next segment with updated headers.
    fn segment(&mut self, frame: &mut Vec<u8>) {
        let context = self.request.context;
        let len = context.segment_size().min(self.data.len() - self.at);
        let (first, last) = (self.frames == 0, self.at + len == self.data.len());
        frame.extend_from_slice(&self.data[..self.header]);
        frame.extend_from_slice(&self.data[self.at..self.at + len]);
        let (network_at, transport_at) = (context.network_at(), context.transport_at());
        let (network, transport) = frame[network_at..].split_at_mut(transport_at - network_at);
        if context.is_v4() {
            let total = (network.len() + transport.len()) as u16;
            put(network, 2, total);
            let id = get(network, 4).wrapping_add(self.frames);
            put(network, 4, id);
        } else {
            put(network, 4, (network.len() - IPV6_HEADER + transport.len()) as u16);
        }
        let protocol = context.transport().map_or(TCP, |(protocol, _)| protocol);
        if protocol == TCP {
            let sent = (self.at - self.header) as u32;
            let number = u32::from(get(transport, 4)) << 16 | u32::from(get(transport, 6));
            let number = number.wrapping_add(sent);
            put(transport, 4, (number >> 16) as u16);
            put(transport, 6, number as u16);
            transport[13] &= if last { !0 } else { !FIN_PSH } & if first { !0 } else { !CWR };
        } else {
            put(transport, 4, transport.len() as u16);
        }
        if self.request.transport_sum {
            let addresses = if context.is_v4() { &network[12..20] } else { &network[8..40] };
            let seed = fold(pseudo_sum(addresses, protocol, transport.len()));
            put(transport, if protocol == TCP { 16 } else { 6 }, seed);
        }
        self.request.insert_sums(frame);
        self.at += len;
        self.frames = self.frames.wrapping_add(1);
    }

    pub(super) fn into_data(self) -> Vec<u8> {
        self.data
    }
}

impl Request {
    /// Inserts checksums, unless they lie outside of the frame.
    fn insert_sums(&self, frame: &mut [u8]) {
        let context = &self.context;
        if self.transport_sum
            && let Some((protocol, field)) = context.transport()
        {
            // The field holds the sum of the pseudo header, which is part of the sum.
            insert(frame, context.transport_at(), usize::MAX, field, protocol == UDP);
        }
        if self.network_sum {
            let at = context.network_at();
            if let Some(field) = frame.get_mut(at + 10..at + 12) {
                field.fill(0);
            }
            insert(frame, at, context.network_len(), 10, false);
        }
        if let Some((start, at)) = self.legacy_sum
            && let Some(field) = at.checked_sub(start)
        {
            insert(frame, start, usize::MAX, field, false);
        }
    }
}

/// Stores the checksum of `len` bytes at `start`, `field` bytes from there.
fn insert(frame: &mut [u8], start: usize, len: usize, field: usize, never_zero: bool) {
    let Some(part) = frame.get_mut(start..) else { return };
    let end = len.min(part.len());
    let part = &mut part[..end];
    if field + 2 > part.len() {
        return;
    }
    let value = !fold(sum(part));
    put(part, field, if never_zero && value == 0 { 0xffff } else { value });
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::super::packet::Headers;
    use super::*;

    fn context(network: usize, transport: usize, v4: bool, tcp: bool, size: usize) -> Context {
        let kind = u32::from(v4) << 10 | u32::from(tcp) << 11 | 2 << 20;
        let last = (size << 16 | transport << 8) as u32;
        Context([(14 << 9 | network) as u32, 0, kind, last])
    }

    fn frames(data: Vec<u8>, request: Request) -> Vec<Vec<u8>> {
        let mut packet = Outgoing::new(data, request).unwrap();
        let (mut frames, mut frame) = (Vec::new(), Vec::new());
        while packet.next(0x8100, true, &mut frame) {
            frames.push(frame.clone());
        }
        frames
    }

    fn headers(v4: bool, protocol: u8) -> Vec<u8> {
        let mut data = vec![2; 12];
        if v4 {
            data.extend([8, 0, 0x45, 0, 0, 0, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0]);
            data.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            data.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 64]);
            data.extend([0xfd; 32]);
        }
        data
    }

    #[test]
    fn segments_are_packets_of_their_own_with_valid_sums() {
        for (v4, tcp) in [(true, true), (false, true), (true, false), (false, false)] {
            let mut data = headers(v4, if tcp { TCP } else { UDP });
            let network = data.len() - 14;
            data.extend([0, 1, 0, 2, 0xff, 0xff, 0xff, 0xf0]);
            if tcp {
                data.extend([0, 0, 0, 0, 0x50, 0x99, 1, 0, 0, 0, 0, 0]);
            }
            let transport = data.len() - 14 - network;
            let header = data.len();
            data.extend((0..2500).map(|index| index as u8));
            let request = Request {
                context: context(network, transport, v4, tcp, 1000),
                network_sum: v4,
                transport_sum: true,
                segment: true,
                tag: Some(7),
                ..Request::default()
            };
            let frames = frames(data.clone(), request);
            assert_eq!(
                frames.iter().map(Vec::len).collect::<Vec<_>>(),
                [1000, 1000, 500].map(|len| header + len + 4)
            );
            let payload: Vec<u8> =
                frames.iter().flat_map(|frame| &frame[header + 4..]).copied().collect();
            assert_eq!(payload, data[header..]);
            for (index, frame) in frames.iter().enumerate() {
                let found = Headers::parse(frame, 0x8100);
                assert_eq!(found.end, frame.len());
                assert_eq!(found.check_network(frame), v4.then_some(true));
                assert_eq!(found.check_transport(frame), Some(true), "{v4} {tcp} {index}");
                if tcp {
                    let at = found.transport.unwrap().1;
                    let number = 0xffff_fff0u32.wrapping_add(1000 * index as u32);
                    assert_eq!(frame[at + 4..at + 8], number.to_be_bytes());
                    assert_eq!(frame[at + 13], [0x90, 0x10, 0x19][index]);
                }
                if v4 {
                    assert_eq!(frame[22..24], 0xffffu16.wrapping_add(index as u16).to_be_bytes());
                }
            }
        }
    }

    #[test]
    fn contexts_that_cannot_be_are_refused_and_none_leads_outside() {
        let data = || [headers(true, TCP), vec![0; 100]].concat();
        let segment =
            |context| Request { context, segment: true, transport_sum: true, ..Request::default() };
        for bad in [
            context(20, 20, true, true, 0),
            context(20, 19, true, true, 100),
            context(19, 20, true, true, 100),
            context(20, 20, false, true, 100),
            context(20, 200, true, true, 100),
            context(20, 20, true, true, 65535),
            Context([u32::MAX; 4]),
            Context([0; 4]),
        ] {
            assert!(Outgoing::new(data(), segment(bad)).is_err(), "{bad:?}");
        }
        assert!(Outgoing::new(vec![0; MAX_FRAME + 1], Request::default()).is_err());
        assert!(Outgoing::new(Vec::new(), Request::default()).is_err());
        for word in [0, 1 << 9, 0x7f << 9, 0x1ff, u32::MAX] {
            for kind in [0, 1 << 10, 1 << 11, u32::MAX] {
                let request = Request {
                    context: Context([word, 0, kind, 0]),
                    network_sum: true,
                    transport_sum: true,
                    legacy_sum: Some((word as usize & 0xff, kind as usize & 0xff)),
                    tag: Some(1),
                    ..Request::default()
                };
                for len in [1, 11, 12, 14, 30, 60, 9000] {
                    assert_eq!(frames(vec![3; len], request).len(), 1);
                }
            }
        }
    }
}
