//! smoltcp on top of the driver: DHCP, pings, and TCP with stations of QEMU's user network.

use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::time::Instant;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress, IpCidr, Ipv4Address, Ipv4Cidr};
use vfio_remap_ethernet::smoltcp::StackDevice;
use vfio_remap_ethernet::{Nic, Settings};

use super::{LONG, bring_up, on_both};
use crate::leftovers;

const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
const SERVER: IpAddress = IpAddress::v4(10, 0, 2, 100);
const IDENTIFIER: u16 = 0x4711;
/// How long a transfer may take.
const VERY_LONG: Duration = Duration::from_secs(90);

struct Host {
    nic: std::sync::Arc<Nic>,
    device: StackDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
}

impl Host {
    fn new(name: &str, settings: Settings) -> Self {
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
    fn configure(&mut self) -> Ipv4Cidr {
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
    fn ping(&mut self, sequence: u16, len: usize) {
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
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_535]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.connect(self.interface.context(), (SERVER, port), local).unwrap();
        self.sockets.add(socket)
    }

    /// All that an HTTP server sends.
    fn get(&mut self, local: u16) -> Vec<u8> {
        let socket = self.connect(80, local);
        let mut request = &b"GET / HTTP/1.1\r\nHost: server\r\n\r\n"[..];
        let mut answer = Vec::new();
        self.run("end of the answer", VERY_LONG, |host| {
            let socket = host.sockets.get_mut::<tcp::Socket>(socket);
            if socket.can_send() && !request.is_empty() {
                let sent = socket.send_slice(request).unwrap();
                request = &request[sent..];
            }
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        answer.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            (request.is_empty() && !socket.may_recv() && !answer.is_empty()).then_some(())
        });
        self.sockets.get_mut::<tcp::Socket>(socket).abort();
        self.sockets.remove(socket);
        answer
    }

    /// Sends bytes to a server that sends them back.
    fn echo(&mut self, local: u16, data: &[u8]) {
        let socket = self.connect(7, local);
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
        self.sockets.get_mut::<tcp::Socket>(socket).abort();
        self.sockets.remove(socket);
    }

    fn stop(self) {
        let Self { nic, device, .. } = self;
        device.stop().unwrap();
        nic.close().unwrap();
    }
}

#[test]
fn a_stack_has_an_address_pings_and_transfers() {
    const ECHOED: usize = 2 << 20;
    let numbers: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
    let data: Vec<u8> = (0..ECHOED).map(|at| (at * 13 + (at >> 9)) as u8).collect();
    leftovers::none_of(|| {
        on_both(|name, _| {
            for interrupts in [true, false] {
                let mut host = Host::new(name, Settings::DEFAULT.with_interrupts(interrupts));
                let address = host.configure();
                assert_eq!(address, Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 15), 24));
                for (sequence, len) in [(1, 56), (2, 1472), (3, 4000)] {
                    host.ping(sequence, len);
                }
                if interrupts {
                    let answer = host.get(50_000);
                    let header =
                        answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
                    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
                    assert!(answer[header..] == *numbers.as_bytes(), "{} bytes", answer.len());
                } else {
                    host.echo(50_001, &data);
                }
                let counts = host.device.counts();
                assert!(counts.received_bytes + counts.sent_bytes > ECHOED as u64, "{counts:?}");
                assert_eq!(counts.dropped, 0, "{counts:?}");
                host.stop();
            }
        });
    });
}
