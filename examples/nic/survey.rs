//! Finds out how the machine uses a card: sysfs, the routing tables in /proc, and the interfaces' addresses.

use std::fs;
use std::io::ErrorKind as Io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use vfio_remap::{Error, PciAddress, Result};

use crate::guard::{Interface, Usage};

/// The machine, or a copy of its files.
pub struct Machine {
    /// Has `sys` and `proc`.
    pub root: PathBuf,
    /// Names of interfaces, and an address of each.
    pub addresses: Vec<(String, String)>,
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// Why the kernel does not tell the addresses.
    pub fn this() -> Result<Self> {
        let failed = |errno| Error::from_errno(errno as i32, "list", "the addresses of interfaces");
        let addresses = getifaddrs().map_err(failed)?.filter_map(|interface| {
            let address = interface.address?;
            let text = address
                .as_sockaddr_in()
                .map(|v4| v4.ip().to_string())
                .or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().to_string()))?;
            Some((interface.interface_name, text))
        });
        Ok(Self { root: PathBuf::from("/"), addresses: addresses.collect() })
    }

    /// How a card is used.
    ///
    /// # Errors
    /// What cannot be read: it is not guessed.
    pub fn usage(&self, address: PciAddress) -> Result<Usage> {
        let device = self.root.join("sys/bus/pci/devices").join(address.to_string());
        let names = list(&device.join("net"))?;
        let default_routes = self.default_routes()?;
        let interfaces = names.into_iter().map(|name| self.interface(name, &default_routes));
        let virtual_functions = match fs::read_to_string(device.join("sriov_numvfs")) {
            Ok(text) => text.trim().parse().unwrap_or(0),
            Err(_) => 0,
        };
        let driver = target(&device.join("driver"));
        Ok(Usage { driver, interfaces: interfaces.collect::<Result<_>>()?, virtual_functions })
    }

    fn interface(&self, name: String, default_routes: &[String]) -> Result<Interface> {
        let path = self.root.join("sys/class/net").join(&name);
        let mine = |(of, address): &(String, String)| (*of == name).then(|| address.clone());
        let master = target(&path.join("master")).map(|master| {
            let kind = match () {
                () if path.join("brport").exists() => "the bridge",
                () if path.join("bonding_slave").exists() => "the bond",
                () => "the device",
            };
            format!("{kind} {master}")
        });
        // The kernel has a link for each interface on top (net/core/dev.c), and one of them is the master.
        let uppers = list(&path)?
            .into_iter()
            .filter_map(|entry| entry.strip_prefix("upper_").map(str::to_owned));
        let uppers = uppers.filter(|upper| {
            master.as_deref().is_none_or(|master| !master.ends_with(&format!(" {upper}")))
        });
        Ok(Interface {
            addresses: self.addresses.iter().filter_map(mine).collect(),
            has_default_route: default_routes.contains(&name),
            uppers: uppers.collect(),
            master,
            name,
        })
    }

    /// The interfaces of default routes (`man 5 proc_pid_net`).
    fn default_routes(&self) -> Result<Vec<String>> {
        let read = |file| {
            let path = self.root.join("proc/net").join(file);
            match fs::read_to_string(&path) {
                Ok(text) => Ok(text),
                // A kernel without IPv6.
                Err(error) if error.kind() == Io::NotFound => Ok(String::new()),
                Err(error) => Err(Error::from_io(error, "read", path.display())),
            }
        };
        let (v4, v6) = (read("route")?, read("ipv6_route")?);
        let v4 = v4.lines().filter_map(default_v4);
        let v6 = v6.lines().filter_map(default_v6);
        Ok(v4.chain(v6).map(str::to_owned).collect())
    }
}

/// The interface of a line of /proc/net/route, if it is a default route: name, destination, gateway, flags, …,
/// mask.
fn default_v4(line: &str) -> Option<&str> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| u32::from_str_radix(fields.get(at)?, 16).ok().map(Ipv4Addr::from);
    let everywhere = number(1)?.is_unspecified() && number(7)?.is_unspecified();
    everywhere.then(|| fields[0])
}

/// The interface of a line of /proc/net/ipv6_route, if it is a default route: destination, its length, …, name.
/// The kernel has one of its own on `lo`, which rejects.
fn default_v6(line: &str) -> Option<&str> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let destination = u128::from_str_radix(fields.first()?, 16).ok().map(Ipv6Addr::from)?;
    let everywhere = destination.is_unspecified() && *fields.get(1)? == "00";
    everywhere.then(|| fields.last().copied()).flatten().filter(|name| *name != "lo")
}

/// The names in a directory, in order; none if it does not exist.
fn list(path: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::from_io(error, "list", path.display());
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == Io::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// The name that a link leads to.
fn target(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::guard::{Permit, permit};
    use crate::tests::Scratch;

    const CARD: &str = "0000:00:03.0";
    const ROUTES: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
        eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";

    /// A copy of sysfs and procfs with a card that is bound to igb, and its interface `eth0`.
    fn machine(name: &str) -> (Scratch, Machine) {
        let scratch = Scratch::new(name);
        let root = scratch.path().to_owned();
        let device = root.join("sys/bus/pci/devices").join(CARD);
        for directory in
            [device.join("net/eth0"), root.join("sys/class/net/eth0"), root.join("proc/net")]
        {
            fs::create_dir_all(directory).unwrap();
        }
        symlink("../../drivers/igb", device.join("driver")).unwrap();
        fs::write(device.join("sriov_numvfs"), "0\n").unwrap();
        fs::write(root.join("proc/net/route"), ROUTES).unwrap();
        (scratch, Machine { root, addresses: vec![("lo".to_owned(), "127.0.0.1".to_owned())] })
    }

    fn usage(machine: &Machine) -> Usage {
        machine.usage(CARD.parse().unwrap()).unwrap()
    }

    #[test]
    fn an_idle_card_is_found_idle() {
        let (_scratch, machine) = machine("idle");
        let found = usage(&machine);
        assert_eq!(found.driver.as_deref(), Some("igb"));
        assert_eq!(
            found.interfaces,
            [Interface { name: "eth0".to_owned(), ..Interface::default() }]
        );
        assert_eq!(permit(CARD, &found, false).unwrap(), Permit::Bind);
    }

    #[test]
    fn addresses_routes_bridges_and_vlans_are_found() {
        let (_scratch, mut machine) = machine("busy");
        machine.addresses.push(("eth0".to_owned(), "10.0.2.15".to_owned()));
        let class = machine.root.join("sys/class/net");
        for (link, to) in [("master", "br0"), ("upper_br0", "br0"), ("upper_eth0.5", "eth0.5")] {
            symlink(format!("../{to}"), class.join("eth0").join(link)).unwrap();
        }
        fs::create_dir(class.join("eth0/brport")).unwrap();
        let route = "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
        fs::write(machine.root.join("proc/net/route"), format!("{ROUTES}{route}")).unwrap();
        let device = machine.root.join("sys/bus/pci/devices").join(CARD);
        fs::write(device.join("sriov_numvfs"), "3\n").unwrap();
        let found = usage(&machine);
        let expected = Interface {
            name: "eth0".to_owned(),
            addresses: vec!["10.0.2.15".to_owned()],
            has_default_route: true,
            master: Some("the bridge br0".to_owned()),
            uppers: vec!["eth0.5".to_owned()],
        };
        assert_eq!((&found.interfaces[..], found.virtual_functions), (&[expected][..], 3));
        assert!(permit(CARD, &found, false).is_err());
    }

    #[test]
    fn a_default_route_of_ipv6_is_found_and_that_of_lo_is_none() {
        let (_scratch, machine) = machine("v6");
        let zero = "0".repeat(32);
        let line = |length: &str, name: &str| {
            format!(
                "{zero} {length} {zero} 00 {zero} 00000400 00000001 00000000 00000003 {name:>8}\n"
            )
        };
        let write =
            |lines: String| fs::write(machine.root.join("proc/net/ipv6_route"), lines).unwrap();
        write(line("00", "lo") + &line("40", "eth0"));
        assert!(!usage(&machine).interfaces[0].has_default_route);
        write(line("00", "eth0"));
        assert!(usage(&machine).interfaces[0].has_default_route);
    }

    #[test]
    fn an_interface_of_another_namespace_is_not_taken_for_idle() {
        let (_scratch, machine) = machine("namespace");
        let device = machine.root.join("sys/bus/pci/devices").join(CARD);
        fs::remove_dir_all(device.join("net")).unwrap();
        let text = permit(CARD, &usage(&machine), false).unwrap_err().to_string();
        assert!(text.contains("not in this network namespace"), "{text}");
    }

    #[test]
    fn this_machine_can_be_surveyed() {
        let machine = Machine::this().unwrap();
        assert!(
            machine.addresses.iter().any(|(name, address)| name == "lo" && address == "127.0.0.1")
        );
        machine.default_routes().unwrap();
    }
}
