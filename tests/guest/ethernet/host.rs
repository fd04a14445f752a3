//! smoltcp on top of the driver: a host of QEMU's user network.

use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};
use vfio_remap_ethernet::smoltcp::StackDevice;
use vfio_remap_ethernet::{Nic, Settings};

use super::{LONG, bring_up};

const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
const SERVER: IpAddress = IpAddress::v4(10, 0, 2, 100);
/// The ports of the server: that sends back what comes, that answers HTTP, that gets what a port of QEMU's host
/// has and answers with its SHA-256, and that answers with the frames that were captured.
const ECHO: u16 = 7;
const HTTP: u16 = 80;
const GETTER: u16 = 81;
const CAPTURED: u16 = 82;
/// The port that we serve at.
pub const OURS: u16 = 8080;
const IDENTIFIER: u16 = 0x4711;
/// How long a transfer may take.
const VERY_LONG: Duration = Duration::from_secs(240);

pub struct Host {
    nic: std::sync::Arc<Nic>,
    pub device: StackDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
}

impl Host {
    pub fn new(name: &str, settings: Settings) -> Self {
        let nic = bring_up(name, settings);
        let mut device = StackDevice::new(nic.queue().unwrap()).unwrap();
        let mut config = Config::new(device.hardware_address().into());
        config.random_seed = 0x1234_5678;
        let interface = Interface::new(config, &mut device, Instant::now());
        Self { nic, device, interface, sockets: SocketSet::new(Vec::new()) }
    }

    /// Runs the stack until `done` has found what it looks for.
    fn run<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        let end = std::time::Instant::now() + limit;
        loop {
            self.interface.poll(Instant::now(), &mut self.device, &mut self.sockets);
            if let Some(found) = done(self) {
                self.device.flush().unwrap();
                return found;
            }
            let now = std::time::Instant::now();
            assert!(
                now < end,
                "no {what}: {:?}, {:?}",
                self.device.counts(),
                self.nic.statistics()
            );
            let delay = self.interface.poll_delay(Instant::now(), &self.sockets);
            let delay = delay.map_or(Duration::from_millis(50), Duration::from);
            self.device.wait(delay.min(Duration::from_millis(50))).unwrap();
        }
    }

    /// Has an address by DHCP.
    pub fn configure(&mut self) -> Ipv4Cidr {
        let socket = self.sockets.add(dhcpv4::Socket::new());
        let address = self.run("lease", LONG, |host| {
            let Some(dhcpv4::Event::Configured(lease)) =
                host.sockets.get_mut::<dhcpv4::Socket>(socket).poll()
            else {
                return None;
            };
            host.interface.update_ip_addrs(|addresses| {
                addresses.push(IpCidr::Ipv4(lease.address)).unwrap();
            });
            if let Some(router) = lease.router {
                host.interface.routes_mut().add_default_ipv4_route(router).unwrap();
            }
            Some(lease.address)
        });
        self.sockets.remove(socket);
        address
    }

    /// Pings the gateway; the data that came back is what went.
    pub fn ping(&mut self, sequence: u16, len: usize) {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 2], vec![0; 10_000]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(icmp::Endpoint::Ident(IDENTIFIER)).unwrap();
        let data: Vec<u8> = (0..len).map(|at| (at * 5) as u8).collect();
        let request = Icmpv4Repr::EchoRequest { ident: IDENTIFIER, seq_no: sequence, data: &data };
        let payload = socket.send(request.buffer_len(), GATEWAY.into()).unwrap();
        let checksums = ChecksumCapabilities::default();
        request.emit(&mut Icmpv4Packet::new_unchecked(payload), &checksums);
        let socket = self.sockets.add(socket);
        self.run("answer to a ping", LONG, |host| {
            let socket = host.sockets.get_mut::<icmp::Socket>(socket);
            let (payload, _) = socket.can_recv().then(|| socket.recv().unwrap())?;
            let packet = Icmpv4Packet::new_checked(payload).unwrap();
            let expected =
                Icmpv4Repr::EchoReply { ident: IDENTIFIER, seq_no: sequence, data: &data };
            assert_eq!(Icmpv4Repr::parse(&packet, &checksums).unwrap(), expected);
            Some(())
        });
        self.sockets.remove(socket);
    }

    fn connect(&mut self, port: u16, local: u16) -> SocketHandle {
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.connect(self.interface.context(), (SERVER, port), local).unwrap();
        self.sockets.add(socket)
    }

    /// All that a port of the server sends, once it has `request`.
    fn answer(&mut self, port: u16, local: u16, request: &str) -> Vec<u8> {
        let socket = self.connect(port, local);
        let mut request = request.as_bytes();
        let mut answer = Vec::new();
        self.run("end of the answer", VERY_LONG, |host| {
            let socket = host.sockets.get_mut::<tcp::Socket>(socket);
            if socket.can_send() && !request.is_empty() {
                let sent = socket.send_slice(request).unwrap();
                request = &request[sent..];
            }
            take(socket, &mut answer);
            (request.is_empty() && !socket.may_recv() && !answer.is_empty()).then_some(())
        });
        self.forget(socket);
        answer
    }

    /// All that an HTTP server sends.
    pub fn get(&mut self, local: u16) -> Vec<u8> {
        self.answer(HTTP, local, "GET / HTTP/1.1\r\nHost: server\r\n\r\n")
    }

    /// What was captured of our network, in the format of pcap.
    pub fn captured(&mut self, local: u16) -> Vec<u8> {
        self.answer(CAPTURED, local, "\n")
    }

    /// Serves `body` by HTTP, and has QEMU's host get it through its port `forwarded`, which leads to ours.
    /// What the host says is the SHA-256 of what it got.
    pub fn served(&mut self, forwarded: u16, body: &[u8]) -> String {
        let mut server = tcp::Socket::new(buffer(), buffer());
        server.listen(OURS).unwrap();
        let server = self.sockets.add(server);
        let getter = self.connect(GETTER, 50_002);
        let order = format!("{forwarded}\n");
        let mut order = order.as_bytes();
        let header = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let mut left = [header.as_bytes(), body].into_iter().filter(|part| !part.is_empty());
        let mut part = left.next();
        let (mut request, mut said) = (Vec::new(), Vec::new());
        self.run("SHA-256 of what was served", VERY_LONG, |host| {
            let socket = host.sockets.get_mut::<tcp::Socket>(server);
            take(socket, &mut request);
            while request.ends_with(b"\r\n\r\n")
                && socket.can_send()
                && let Some(bytes) = &mut part
            {
                let sent = socket.send_slice(bytes).unwrap();
                *bytes = &bytes[sent..];
                if bytes.is_empty() {
                    part = left.next();
                }
                if part.is_none() {
                    socket.close();
                }
            }
            let socket = host.sockets.get_mut::<tcp::Socket>(getter);
            if socket.can_send() && !order.is_empty() {
                order = &order[socket.send_slice(order).unwrap()..];
            }
            take(socket, &mut said);
            said.ends_with(b"\n").then_some(())
        });
        assert!(request.starts_with(b"GET / HTTP/1.0\r\n"), "{request:?}");
        self.forget(server);
        self.forget(getter);
        // sha256sum adds the name of what it has read: "-".
        String::from_utf8(said).unwrap().split_whitespace().next().unwrap().to_owned()
    }

    /// Sends bytes to a server that sends them back.
    pub fn echo(&mut self, local: u16, data: &[u8]) {
        let socket = self.connect(ECHO, local);
        let (mut sent, mut received) = (0, 0);
        self.run("echo", VERY_LONG, |host| {
            let socket = host.sockets.get_mut::<tcp::Socket>(socket);
            if socket.can_send() && sent < data.len() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            while socket.can_recv() {
                received += socket
                    .recv(|bytes| {
                        assert!(data[received..].starts_with(bytes), "at {received}");
                        (bytes.len(), bytes.len())
                    })
                    .unwrap();
            }
            (received == data.len()).then_some(())
        });
        self.forget(socket);
    }

    fn forget(&mut self, socket: SocketHandle) {
        self.sockets.get_mut::<tcp::Socket>(socket).abort();
        self.sockets.remove(socket);
    }

    pub fn stop(self) {
        let Self { nic, device, .. } = self;
        device.stop().unwrap();
        nic.close().unwrap();
    }
}

fn buffer() -> tcp::SocketBuffer<'static> {
    tcp::SocketBuffer::new(vec![0; 65_535])
}

/// Appends what a socket has received.
fn take(socket: &mut tcp::Socket, all: &mut Vec<u8>) {
    while socket.can_recv() {
        socket
            .recv(|bytes| {
                all.extend_from_slice(bytes);
                (bytes.len(), ())
            })
            .unwrap();
    }
}
