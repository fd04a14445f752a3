//! Context descriptors: what a card does to the packets after them, until there is another (82576
//! datasheet §7.2.2.2, 82574 datasheet §7.2.10).

use super::descriptors::transmit;
use super::model::Model;
use super::offload::Request;

/// The 82576: fields of the words of a context.
mod advanced {
    pub const KIND: u32 = 2 << 20;
    pub const ETHERNET_SHIFT: u32 = 9;
    pub const TAG_SHIFT: u32 = 16;
    pub const IPV4: u32 = 1 << 10;
    pub const TCP: u32 = 1 << 11;
    pub const TRANSPORT_SHIFT: u32 = 8;
    pub const MSS_SHIFT: u32 = 16;
}

/// The 82574: commands of a context.
mod extended {
    pub const TCP: u32 = 1 << 24;
    pub const IPV4: u32 = 1 << 25;
    pub const SEGMENTS: u32 = 1 << 26;
    pub const HEADERS_SHIFT: u32 = 8;
    pub const MSS_SHIFT: u32 = 16;
}

/// Options of a data descriptor: put in the checksum of IPv4, that of TCP or UDP.
const IP_CHECKSUM: u32 = 1 << 8;
const TRANSPORT_CHECKSUM: u32 = 1 << 9;

/// A context, and what the data descriptors of its packet have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloaded {
    /// The words of the context; `None` if the packet needs none.
    pub context: Option<[u64; 2]>,
    pub command: u32,
    pub options: u32,
}

/// What the card needs to be told for a packet of `len` bytes.
pub fn offloaded(model: Model, request: Request, len: usize) -> Offloaded {
    match model {
        Model::I82576 => for_82576(request, len),
        Model::I82574 => for_82574(request, len),
    }
}

fn for_82576(request: Request, len: usize) -> Offloaded {
    let (checksums, segments, tagged) = asked(request);
    let mut command = 0;
    let mut options = 0;
    let mut payload = len;
    if tagged {
        command |= transmit::INSERT_TAG;
    }
    if checksums {
        options |= TRANSPORT_CHECKSUM | if request.has(Request::IPV4) { IP_CHECKSUM } else { 0 };
    }
    if segments {
        command |= transmit::ADVANCED_SEGMENTS;
        payload -= request.headers_len();
    }
    options |= (payload as u32) << transmit::PAYLOAD_SHIFT;
    // Without checksums, the headers are of no interest but for the tag's place.
    let ethernet = if checksums { request.ethernet } else { 14 };
    let places = u32::from(request.tag) << advanced::TAG_SHIFT
        | u32::from(ethernet) << advanced::ETHERNET_SHIFT
        | if checksums { request.ip.into() } else { 0 };
    let mut kinds = advanced::KIND | transmit::EXTENDED;
    if checksums && request.has(Request::IPV4) {
        kinds |= advanced::IPV4;
    }
    if checksums && request.has(Request::TCP) {
        kinds |= advanced::TCP;
    }
    let sizes = if segments {
        u32::from(request.mss) << advanced::MSS_SHIFT
            | u32::from(request.transport) << advanced::TRANSPORT_SHIFT
    } else {
        0
    };
    let context = [u64::from(places), u64::from(sizes) << 32 | u64::from(kinds)];
    Offloaded { context: (checksums || tagged).then_some(context), command, options }
}

fn for_82574(request: Request, len: usize) -> Offloaded {
    let (checksums, segments, tagged) = asked(request);
    let mut command = 0;
    let mut options = 0;
    if tagged {
        command |= transmit::INSERT_TAG;
        options |= u32::from(request.tag) << 16;
    }
    if !checksums {
        return Offloaded { context: None, command, options };
    }
    let is_ipv4 = request.has(Request::IPV4);
    let is_tcp = request.has(Request::TCP);
    options |= TRANSPORT_CHECKSUM | if is_ipv4 { IP_CHECKSUM } else { 0 };
    let ip = u32::from(request.ethernet);
    let transport = ip + u32::from(request.ip);
    let ip_places = if is_ipv4 { (transport - 1) << 16 | (ip + 10) << 8 | ip } else { 0 };
    // The last byte of what is summed is the packet's last: 0.
    let transport_places = (transport + if is_tcp { 16 } else { 6 }) << 8 | transport;
    let mut commands = transmit::EXTENDED;
    if is_tcp {
        commands |= extended::TCP;
    }
    if is_ipv4 {
        commands |= extended::IPV4;
    }
    let mut sizes = 0;
    if segments {
        command |= transmit::EXTENDED_SEGMENTS;
        commands |= extended::SEGMENTS | (len - request.headers_len()) as u32;
        sizes = u32::from(request.mss) << extended::MSS_SHIFT
            | (request.headers_len() as u32) << extended::HEADERS_SHIFT;
    }
    let context = [
        u64::from(transport_places) << 32 | u64::from(ip_places),
        u64::from(sizes) << 32 | u64::from(commands),
    ];
    Offloaded { context: Some(context), command, options }
}

/// Checksums, segments, a tag.
fn asked(request: Request) -> (bool, bool, bool) {
    let has = |flag| request.has(flag);
    (has(Request::CHECKSUMS), has(Request::SEGMENTS), has(Request::TAGGED))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP4: Request = Request {
        flags: Request::CHECKSUMS | Request::IPV4 | Request::TCP,
        ethernet: 14,
        ip: 20,
        transport: 32,
        mss: 0,
        tag: 0,
    };
    const SEGMENTS: Request = Request { flags: TCP4.flags | Request::SEGMENTS, mss: 1448, ..TCP4 };

    #[test]
    fn a_context_of_the_82576_is_as_in_its_datasheet() {
        let Offloaded { context, command, options } = offloaded(Model::I82576, SEGMENTS, 66 + 5000);
        assert_eq!(context, Some([14 << 9 | 20, (1448 << 16 | 32 << 8) << 32 | 0x2020_0c00]));
        assert_eq!(command, 1 << 31);
        assert_eq!(options, 5000 << 14 | 3 << 8);
        let tagged = Request { flags: Request::TAGGED, tag: 0x2005, ..Request::default() };
        let Offloaded { context, command, options } = offloaded(Model::I82576, tagged, 60);
        assert_eq!(context, Some([0x2005 << 16 | 14 << 9, 0x2020_0000]));
        assert_eq!((command, options), (1 << 30, 60 << 14));
    }

    #[test]
    fn a_context_of_the_82574_is_as_in_its_datasheet() {
        let Offloaded { context, command, options } = offloaded(Model::I82574, SEGMENTS, 66 + 5000);
        let places = (50 << 8 | 34) << 32 | 33 << 16 | 24 << 8 | 14;
        assert_eq!(context, Some([places, (1448 << 16 | 66 << 8) << 32 | 0x2700_0000 | 5000]));
        assert_eq!((command, options), (1 << 26, 3 << 8));
        let udp6 =
            Request { flags: Request::CHECKSUMS, ethernet: 14, ip: 40, transport: 8, ..TCP4 };
        let Offloaded { context, command, options } = offloaded(Model::I82574, udp6, 100);
        assert_eq!(context, Some([(60 << 8 | 54) << 32, 0x2000_0000]));
        assert_eq!((command, options), (0, 2 << 8));
        let tagged = Request { flags: Request::TAGGED, tag: 0x2005, ..Request::default() };
        let tag_only = Offloaded { context: None, command: 1 << 30, options: 0x2005 << 16 };
        assert_eq!(offloaded(Model::I82574, tagged, 60), tag_only);
    }
}
