//! Protects the machine's own network from losing its card.

use vfio_remap::{Error, ErrorKind, Result};

/// How the machine uses a card, as [`survey`](crate::survey) finds it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The driver that the card is bound to.
    pub driver: Option<String>,
    /// Its network interfaces that this process can see.
    pub interfaces: Vec<Interface>,
    /// How many virtual functions it has (SR-IOV): they go with it.
    pub virtual_functions: u32,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    /// Its addresses, as text.
    pub addresses: Vec<String>,
    /// Whether packets to other networks go through it.
    pub has_default_route: bool,
    /// The bridge or bond that it is a part of.
    pub master: Option<String>,
    /// Interfaces on top of it, such as VLANs.
    pub uppers: Vec<String>,
}

/// What has to be done before a card can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// It is bound to vfio-pci.
    Open,
    /// It has to be bound to vfio-pci, and given back.
    Bind,
}

const VFIO_PCI: &str = "vfio-pci";

/// Decides whether a card may be used: it carries no traffic of the machine, or the user has allowed it.
///
/// # Errors
/// `InUse`, with what the card is used for.
pub fn permit(name: &str, usage: &Usage, taken: bool) -> Result<Permit> {
    if usage.driver.as_deref() == Some(VFIO_PCI) {
        return Ok(Permit::Open);
    }
    let reasons = reasons(usage);
    if reasons.is_empty() || taken {
        return Ok(Permit::Bind);
    }
    Err(Error::new(ErrorKind::InUse, "take", name)
        .with_reason(format!("it carries traffic of this machine: {}", reasons.join("; ")))
        .with_advice("add --yes-take-it if that may be interrupted"))
}

/// What a card is used for.
fn reasons(usage: &Usage) -> Vec<String> {
    let mut reasons: Vec<String> = usage.interfaces.iter().filter_map(reason).collect();
    if let (Some(driver), []) = (&usage.driver, &usage.interfaces[..]) {
        reasons.push(format!(
            "it is bound to {driver}, and its interface is not in this network namespace"
        ));
    }
    if usage.virtual_functions > 0 {
        reasons.push(format!("it has {} virtual functions", usage.virtual_functions));
    }
    reasons
}

/// What an interface is used for; `None` if for nothing.
fn reason(interface: &Interface) -> Option<String> {
    let Interface { name, addresses, has_default_route, master, uppers } = interface;
    let mut uses = Vec::new();
    if !addresses.is_empty() {
        uses.push(format!("has the address {}", addresses.join(", ")));
    }
    if *has_default_route {
        uses.push("has a default route".to_owned());
    }
    if let Some(master) = master {
        uses.push(format!("is a part of {master}"));
    }
    if !uppers.is_empty() {
        uses.push(format!("is below {}", uppers.join(", ")));
    }
    (!uses.is_empty()).then(|| format!("{name} {}", uses.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle() -> Usage {
        let interface = Interface { name: "eth0".to_owned(), ..Interface::default() };
        Usage { driver: Some("igb".to_owned()), interfaces: vec![interface], virtual_functions: 0 }
    }

    #[test]
    fn a_card_of_a_user_space_driver_is_opened_and_an_idle_one_bound() {
        let open = Usage { driver: Some("vfio-pci".to_owned()), ..Usage::default() };
        assert_eq!(permit("card", &open, false).unwrap(), Permit::Open);
        assert_eq!(permit("card", &Usage::default(), false).unwrap(), Permit::Bind);
        assert_eq!(permit("card", &idle(), false).unwrap(), Permit::Bind);
    }

    #[test]
    fn a_card_that_carries_traffic_is_refused_with_the_reason() {
        type Change = fn(&mut Usage);
        let changes: [(Change, &str); 6] = [
            (
                |usage| usage.interfaces[0].addresses.push("10.0.2.15".to_owned()),
                "eth0 has the address 10.0.2.15",
            ),
            (|usage| usage.interfaces[0].has_default_route = true, "eth0 has a default route"),
            (
                |usage| usage.interfaces[0].master = Some("the bridge br0".to_owned()),
                "eth0 is a part of the bridge br0",
            ),
            (|usage| usage.interfaces[0].uppers.push("eth0.5".to_owned()), "eth0 is below eth0.5"),
            (|usage| usage.interfaces.clear(), "bound to igb"),
            (|usage| usage.virtual_functions = 2, "2 virtual functions"),
        ];
        for (change, says) in changes {
            let mut usage = idle();
            change(&mut usage);
            let error = permit("0000:00:03.0", &usage, false).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse);
            let text = error.to_string();
            assert!(text.contains(says), "{text}");
            assert!(text.contains("0000:00:03.0") && text.contains("--yes-take-it"), "{text}");
            assert_eq!(permit("0000:00:03.0", &usage, true).unwrap(), Permit::Bind);
        }
    }

    #[test]
    fn all_reasons_are_named() {
        let mut usage = idle();
        usage.interfaces[0].has_default_route = true;
        usage.interfaces[0].addresses.push("10.0.2.15".to_owned());
        usage.interfaces.push(Interface {
            name: "eth1".to_owned(),
            master: Some("the bond bond0".to_owned()),
            ..Interface::default()
        });
        let text = permit("card", &usage, false).unwrap_err().to_string();
        assert!(text.contains("eth0 has the address 10.0.2.15, has a default route"), "{text}");
        assert!(text.contains("; eth1 is a part of the bond bond0"), "{text}");
    }
}
