//! A TCP/IP stack on a card: smoltcp, with addresses by DHCP or from the command line.

use std::hash::{BuildHasher, RandomState};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet,
};
use smoltcp::socket::{dhcpv4, dns, tcp};
use smoltcp::time::{Duration as Period, Instant as Now};
use smoltcp::wire::{DnsQueryType, IpAddress, IpCidr};
use vfio_remap::{Error, ErrorKind, Result};
use vfio_remap_ethernet::Nic;
use vfio_remap_ethernet::smoltcp::StackDevice;

use crate::card::{LOOK, RECEIVE_ENTRIES};
use crate::network::Network;
use crate::options::Common;
use crate::stop::Stop;

/// How long a DHCP server has to offer an address before it is asked again.
const ASK_AGAIN: Period = Period::from_secs(2);

/// The headers of IP and TCP, and the most that is buffered of what a server sends.
const HEADERS: usize = 40;
const MOST_WINDOW: usize = 512 << 10;

/// More fragments than a packet has: the stack makes some of 4,096 bytes, and a frame carries 48 of them at least
/// (RFC 791 §3.2).
const MOST_FRAGMENTS: usize = 4096 / 48 + 2;

/// A card with a TCP/IP stack.
pub struct Stack {
    device: StackDevice,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    /// The DHCP client, which renews the lease.
    dhcp: Option<SocketHandle>,
    /// Why the last lease was not taken.
    refused: Option<Error>,
    pub network: Network,
    pub stop: Stop,
    mtu: usize,
}

impl Stack {
    /// A stack on a pair of queues of the card. It has no address yet.
    pub fn new(nic: &Arc<Nic>, stop: &Stop) -> Result<Self> {
        let mut device = StackDevice::new(nic.queue()?)?;
        let mut config = Config::new(device.hardware_address().into());
        config.random_seed = random();
        let interface = Interface::new(config, &mut device, Now::now());
        Ok(Self {
            device,
            interface,
            sockets: SocketSet::new(Vec::new()),
            dhcp: None,
            refused: None,
            network: Network::default(),
            stop: stop.clone(),
            mtu: nic.settings().mtu,
        })
    }

    /// Has the addresses of the command line, or asks for some by DHCP.
    ///
    /// # Errors
    /// `TimedOut` if no DHCP server answers with what can be used.
    pub fn configure(&mut self, common: &Common) -> Result<()> {
        let given = Network::given(common);
        if given.address.is_some() {
            return self.apply(given);
        }
        let mut socket = dhcpv4::Socket::new();
        let mut retry = socket.get_retry_config();
        retry.discover_timeout = ASK_AGAIN;
        socket.set_retry_config(retry);
        self.dhcp = Some(self.sockets.add(socket));
        let limit = Duration::from_secs(common.link_timeout);
        let found = self.run(Some(limit), |stack| Ok(stack.network.address.map(drop)))?;
        found.ok_or_else(|| {
            let seconds = common.link_timeout;
            let reason = match &self.refused {
                None => format!("no server answered within {seconds} s"),
                Some(why) => format!("no lease could be used within {seconds} s: {}", why.reason()),
            };
            Error::new(ErrorKind::TimedOut, "get", "an address by DHCP")
                .with_reason(reason)
                .with_advice("wait longer (--link-timeout), or pass --address, and --gateway for other networks")
        })?;
        given.check()?;
        if !given.dns.is_empty() {
            self.network.dns = given.dns;
        }
        Ok(())
    }

    /// Is in this network from now on.
    ///
    /// # Errors
    /// `InvalidInput` if an address is not that of a station.
    pub fn apply(&mut self, network: Network) -> Result<()> {
        network.check()?;
        let routes = self.interface.routes_mut();
        routes.remove_default_ipv4_route();
        let added = match network.router {
            Some(router) => routes.add_default_ipv4_route(router).is_ok(),
            None => true,
        };
        let mut fits = added;
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            fits &= network.address.is_none_or(|new| addresses.push(IpCidr::Ipv4(new)).is_ok());
        });
        self.network = network;
        if fits {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported, "use", "an address and a router")
            .with_reason("the stack has no room for them"))
    }

    /// Does what the DHCP server says.
    fn follow_lease(&mut self) -> Result<()> {
        let Some(dhcp) = self.dhcp else { return Ok(()) };
        let socket = self.sockets.get_mut::<dhcpv4::Socket>(dhcp);
        let leased = match socket.poll() {
            None => return Ok(()),
            Some(dhcpv4::Event::Deconfigured) => Ok(Network::default()),
            Some(dhcpv4::Event::Configured(lease)) => Network::leased(&lease),
        };
        let network = leased.unwrap_or_else(|why| {
            // It asks again, and another server may answer.
            socket.reset();
            self.refused = Some(why);
            Network::default()
        });
        self.apply(network)
    }

    /// Takes what has come, and sends what there is to say.
    ///
    /// In steps, not by `Interface::poll`: smoltcp keeps the rest of one packet that goes in fragments, and the next
    /// such packet would take its place.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn poll(&mut self) -> Result<()> {
        self.interface.poll_maintenance(Now::now());
        loop {
            let taken =
                self.interface.poll_ingress_single(Now::now(), &mut self.device, &mut self.sockets);
            if matches!(taken, PollIngressSingleResult::None) {
                break;
            }
            self.send_fragments();
        }
        // Before anything is sent by it.
        self.follow_lease()?;
        while self.interface.poll_egress(Now::now(), &mut self.device, &mut self.sockets)
            != PollResult::None
        {
            self.send_fragments();
        }
        // A lease ends when there is something to send.
        self.follow_lease()
    }

    /// Sends the rest of a packet that goes in fragments.
    fn send_fragments(&mut self) {
        // Without sockets, nothing but fragments is waiting.
        let mut none = SocketSet::new(&mut [][..]);
        for _ in 0..MOST_FRAGMENTS {
            let now = Now::now();
            if self.interface.poll_at(now, &none).is_none() {
                break;
            }
            self.interface.poll_egress(now, &mut self.device, &mut none);
        }
    }

    /// Runs the stack until `done` has a result; `None` if it has none in time.
    ///
    /// # Errors
    /// Those of `done` and of the card.
    pub fn run<T>(
        &mut self,
        limit: Option<Duration>,
        mut done: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        loop {
            self.poll()?;
            let found = done(self)?;
            if found.is_some() || end.is_some_and(|end| end <= Instant::now()) {
                // What was said last goes.
                self.poll()?;
                self.device.flush()?;
                return Ok(found);
            }
            self.stop.check("the command")?;
            let delay = self.interface.poll_delay(Now::now(), &self.sockets);
            self.device.wait(delay.map_or(LOOK, Duration::from).min(LOOK))?;
        }
    }

    /// The address of a host.
    ///
    /// # Errors
    /// `NotFound` if it has none, or there is no DNS server to ask.
    pub fn resolve(&mut self, host: &str) -> Result<Ipv4Addr> {
        if let Ok(address) = host.parse() {
            return Ok(address);
        }
        let failed = |kind, reason: String| {
            Error::new(kind, "find", format!("the host {host}"))
                .with_reason(reason)
                .with_advice("correct its name, pass its address instead, or name a server (--dns)")
        };
        let servers: Vec<IpAddress> = self.network.dns.iter().map(|dns| (*dns).into()).collect();
        if servers.is_empty() {
            return Err(failed(ErrorKind::NotFound, "no DNS server is known".to_owned()));
        }
        let socket = self.sockets.add(dns::Socket::new(&servers[..1], vec![None]));
        let asked = self.sockets.get_mut::<dns::Socket>(socket).start_query(
            self.interface.context(),
            host,
            DnsQueryType::A,
        );
        let query = match asked {
            Ok(query) => query,
            Err(error) => {
                self.sockets.remove(socket);
                return Err(failed(ErrorKind::InvalidInput, error.to_string()));
            }
        };
        // The query itself has a limit.
        let found = self.run(None, |stack| {
            match stack.sockets.get_mut::<dns::Socket>(socket).get_query_result(query) {
                Ok(addresses) => Ok(Some(addresses.first().copied())),
                Err(dns::GetQueryResultError::Pending) => Ok(None),
                Err(dns::GetQueryResultError::Failed) => Ok(Some(None)),
            }
        });
        self.sockets.remove(socket);
        match found?.flatten() {
            Some(IpAddress::Ipv4(address)) => Ok(address),
            None => {
                let server = servers[0];
                Err(failed(ErrorKind::NotFound, format!("{server} knows no address of it")))
            }
        }
    }

    /// How much a server may send to a socket before it is answered: so much as the card has room for, since a
    /// card drops what it has no descriptor for.
    pub fn window(&self) -> usize {
        let segment = self.mtu.saturating_sub(HEADERS).max(1);
        (segment * usize::from(RECEIVE_ENTRIES) / 2).min(MOST_WINDOW)
    }

    /// A TCP socket with buffers of these sizes.
    pub fn tcp(receive: usize, send: usize) -> tcp::Socket<'static> {
        let buffer = |size| tcp::SocketBuffer::new(vec![0; size]);
        tcp::Socket::new(buffer(receive), buffer(send))
    }

    /// A port of this end for a connection.
    pub fn local_port() -> u16 {
        // RFC 6335 §6: dynamic ports.
        49_152 + (random() % 16_384) as u16
    }

    /// Stops the queues, after what was said last is sent.
    pub fn close(mut self) -> Result<()> {
        self.poll()?;
        self.device.stop()
    }
}

/// A number that nobody guesses.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}
