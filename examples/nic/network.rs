//! Where a stack is: what the command line or a DHCP server says, as far as a stack can use it.

use std::net::Ipv4Addr;

use smoltcp::socket::dhcpv4;
use smoltcp::wire::Ipv4Cidr;
use vfio_remap::{Error, ErrorKind, Result};

use crate::options::Common;

/// Where a stack is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    pub address: Option<Ipv4Cidr>,
    pub router: Option<Ipv4Addr>,
    pub dns: Vec<Ipv4Addr>,
}

impl Network {
    /// What the command line says.
    pub fn given(common: &Common) -> Self {
        let dns = common.dns.into_iter().collect();
        Self { address: common.address, router: common.gateway, dns }
    }

    /// What a DHCP server says; without its router, if that is no station.
    ///
    /// # Errors
    /// `Malformed` if the rest cannot be used: smoltcp would panic when it renews the lease.
    pub fn leased(lease: &dhcpv4::Config<'_>) -> Result<Self> {
        let (offered, server) = (lease.address.address(), lease.server.address);
        for (what, address) in [("it offers the address", offered), ("its own address is", server)]
        {
            if !is_station(address) {
                return Err(Error::new(ErrorKind::Malformed, "use", "the lease of a DHCP server")
                    .with_reason(format!("{what} {address}")));
            }
        }
        Ok(Self {
            address: Some(lease.address),
            router: lease.router.filter(|router| is_station(*router)),
            dns: lease.dns_servers.iter().copied().filter(|dns| is_station(*dns)).collect(),
        })
    }

    /// # Errors
    /// `InvalidInput` if an address is not that of a station: smoltcp would panic.
    pub fn check(&self) -> Result<()> {
        let address = self.address.map(|address| address.address());
        let mut all = address.into_iter().chain(self.router).chain(self.dns.iter().copied());
        match all.find(|address| !is_station(*address)) {
            None => Ok(()),
            Some(address) => Err(Error::new(ErrorKind::InvalidInput, "use", address)
                .with_reason(NO_STATION)
                .with_advice("pass others: --address, --gateway, --dns")),
        }
    }
}

/// What is wrong with an address for which [`is_station`] is false.
pub const NO_STATION: &str = "a station has no such address: it means several, or none";

/// Whether an address can be that of one station (RFC 1122 §3.2.1.3).
pub fn is_station(address: Ipv4Addr) -> bool {
    !(address.is_broadcast() || address.is_multicast() || address.is_unspecified())
}
