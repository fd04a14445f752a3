//! The machine of the benchmark `nic`: network cards of two models, as many of each as it
//! compares programs, so that each program keeps its cards while another has its turn.
//!
//! A card to transmit with is alone on its hub, which drops its frames. Cards to forward
//! between share a hub with each other.

use crate::machine::{Device, RootPort, VFIO};

/// `$driver` has it when the payload starts.
macro_rules! card {
    ($model:literal, $name:literal, $driver:expr, $address:literal) => {
        Device {
            name: $name,
            address: $address,
            driver: $driver,
            about: "a card of the benchmark nic",
            qemu: concat!($model, ",netdev=net-", $name, ",romfile="),
        }
    };
}

const UNBOUND: &str = "none";

/// igb's virtual functions take the addresses of neighbouring slots, so each has a root port.
pub const DEVICES: [Device; 14] = [
    card!("igb", "igb-driver", VFIO, "0000:01:00.0"),
    card!("igb", "igb-dpdk", VFIO, "0000:02:00.0"),
    card!("igb", "igb-kernel", UNBOUND, "0000:03:00.0"),
    card!("igb", "igb-driver-a", VFIO, "0000:04:00.0"),
    card!("igb", "igb-driver-b", VFIO, "0000:05:00.0"),
    card!("igb", "igb-dpdk-a", VFIO, "0000:06:00.0"),
    card!("igb", "igb-dpdk-b", VFIO, "0000:07:00.0"),
    card!("e1000e", "e1000e-driver", VFIO, "0000:00:03.0"),
    card!("e1000e", "e1000e-dpdk", VFIO, "0000:00:04.0"),
    card!("e1000e", "e1000e-kernel", UNBOUND, "0000:00:05.0"),
    card!("e1000e", "e1000e-driver-a", VFIO, "0000:00:06.0"),
    card!("e1000e", "e1000e-driver-b", VFIO, "0000:00:07.0"),
    card!("e1000e", "e1000e-dpdk-a", VFIO, "0000:00:08.0"),
    card!("e1000e", "e1000e-dpdk-b", VFIO, "0000:00:09.0"),
];

/// Bus 1 is behind the first.
pub const ROOT_PORTS: [RootPort; 7] = [
    RootPort { id: "port-1", qemu: "addr=10.0,hotplug=off" },
    RootPort { id: "port-2", qemu: "addr=11.0,hotplug=off" },
    RootPort { id: "port-3", qemu: "addr=12.0,hotplug=off" },
    RootPort { id: "port-4", qemu: "addr=13.0,hotplug=off" },
    RootPort { id: "port-5", qemu: "addr=14.0,hotplug=off" },
    RootPort { id: "port-6", qemu: "addr=15.0,hotplug=off" },
    RootPort { id: "port-7", qemu: "addr=16.0,hotplug=off" },
];

pub const BACKENDS: [&str; 14] = [
    "hubport,id=net-igb-driver,hubid=1",
    "hubport,id=net-igb-dpdk,hubid=2",
    "hubport,id=net-igb-kernel,hubid=3",
    "hubport,id=net-igb-driver-a,hubid=4",
    "hubport,id=net-igb-driver-b,hubid=4",
    "hubport,id=net-igb-dpdk-a,hubid=5",
    "hubport,id=net-igb-dpdk-b,hubid=5",
    "hubport,id=net-e1000e-driver,hubid=6",
    "hubport,id=net-e1000e-dpdk,hubid=7",
    "hubport,id=net-e1000e-kernel,hubid=8",
    "hubport,id=net-e1000e-driver-a,hubid=9",
    "hubport,id=net-e1000e-driver-b,hubid=9",
    "hubport,id=net-e1000e-dpdk-a,hubid=10",
    "hubport,id=net-e1000e-dpdk-b,hubid=10",
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of a card's hub.
    fn hub(card: &str) -> &'static str {
        let id = format!("hubport,id=net-{card},hubid=");
        let mut hubs = BACKENDS.iter().filter_map(|backend| backend.strip_prefix(&*id));
        let hub = hubs.next().unwrap_or_else(|| panic!("{card} has no hub"));
        assert_eq!(hubs.next(), None, "{card}");
        hub
    }

    #[test]
    fn only_cards_to_forward_between_share_a_hub() {
        for card in DEVICES {
            let pair = card.name.strip_suffix("-a").or(card.name.strip_suffix("-b"));
            let sharing = DEVICES.iter().filter(|other| hub(other.name) == hub(card.name));
            let names: Vec<_> = sharing.map(|card| card.name).collect();
            match pair {
                Some(pair) => assert_eq!(names, [format!("{pair}-a"), format!("{pair}-b")]),
                None => assert_eq!(names, [card.name]),
            }
        }
    }

    #[test]
    fn each_igb_is_alone_behind_a_root_port() {
        let igbs: Vec<_> = DEVICES.iter().filter(|card| card.name.starts_with("igb")).collect();
        assert_eq!(igbs.len(), ROOT_PORTS.len());
        for (number, card) in (1..).zip(igbs) {
            assert_eq!(card.address, format!("0000:{number:02}:00.0"));
        }
    }
}
