//! Which packets a card receives (82576 datasheet §7.1.1, 82574 datasheet §7.1).

use std::collections::BTreeSet;

use vfio_remap::{Error, ErrorKind, Result};

use super::super::address::MacAddress;
use super::super::model::Model;
use super::super::registers::Port;
use super::{Nic, State};

/// What was asked for.
#[derive(Debug, Default)]
pub struct Filters {
    /// Addresses beside the card's own, from the second register on.
    addresses: Vec<MacAddress>,
    groups: Vec<MacAddress>,
    vlans: BTreeSet<u16>,
    promiscuous: bool,
    vlan_filter: bool,
    loopback: bool,
}

impl Model {
    /// Addresses that the card can have beside its own. The last of the 82574's sixteen is its firmware's
    /// (82574 datasheet §10.2.5.22; Linux uses as many).
    pub const fn addresses(self) -> usize {
        match self {
            Self::I82576 => 15,
            Self::I82574 => 14,
        }
    }
}

impl Nic {
    /// Receives packets whoever they are for, or only those for its addresses and groups (82576 datasheet
    /// §8.10.1, RCTL.UPE and RCTL.MPE).
    ///
    /// # Errors
    /// What the transport answers.
    pub fn set_promiscuous(&self, on: bool) -> Result<()> {
        let mut state = self.state();
        state.filters.promiscuous = on;
        self.control(&state.filters)
    }

    /// Receives packets for another address, too (82576 datasheet §8.10.15). One that it has already changes
    /// nothing.
    ///
    /// # Errors
    /// `Unsupported` if the address is a group's or zero; `InUse` if the card has as many
    /// [as it can](Model::addresses); what the transport answers.
    pub fn add_address(&self, address: MacAddress) -> Result<()> {
        let refused = |kind, reason: String, remedy| {
            let object = format!("the address {address} to {}", self.name());
            Err(Error::new(kind, "add", object).with_reason(reason).with_advice(remedy))
        };
        if !address.is_station() {
            let reason = "it is a group's, or zero".to_owned();
            return refused(ErrorKind::Unsupported, reason, "give it that of a station");
        }
        let mut state = self.state();
        if address == self.hardware_address || state.filters.addresses.contains(&address) {
            return Ok(());
        }
        let room = self.model().addresses();
        if state.filters.addresses.len() >= room {
            let reason = format!("it has {room} of them");
            return refused(ErrorKind::InUse, reason, "remove one, or receive all packets");
        }
        self.hardware.set_address(1 + state.filters.addresses.len(), Some(address))?;
        state.filters.addresses.push(address);
        Ok(())
    }

    /// Receives packets for an address no longer that was [added](Self::add_address). Whether it was.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn remove_address(&self, address: MacAddress) -> Result<bool> {
        let mut state = self.state();
        let addresses = &mut state.filters.addresses;
        let Some(index) = addresses.iter().position(|other| *other == address) else {
            return Ok(false);
        };
        // The last one takes its place.
        let last = addresses.len() - 1;
        self.hardware
            .set_address(1 + index, addresses.get(last).copied().filter(|_| index != last))?;
        if index != last {
            self.hardware.set_address(1 + last, None)?;
        }
        addresses.swap_remove(index);
        Ok(true)
    }

    /// Receives packets for a group, too. The card's table has a bit for every twelve bits of an address
    /// (82576 datasheet §8.10.14): it lets packets for some other groups pass.
    ///
    /// # Errors
    /// `Unsupported` if the address is no group's; what the transport answers.
    pub fn join(&self, group: MacAddress) -> Result<()> {
        if !group.is_multicast() {
            return Err(Error::new(ErrorKind::Unsupported, "join", format!("the group {group}"))
                .with_reason("it is the address of a station")
                .with_advice("add it as an address instead (Nic::add_address)"));
        }
        let mut state = self.state();
        let (word, bit) = group.table_bit();
        self.hardware.port.update(Port::MTA.at(word), |bits| bits | bit)?;
        if !state.filters.groups.contains(&group) {
            state.filters.groups.push(group);
        }
        Ok(())
    }

    /// Receives packets for a group no longer that was [joined](Self::join). Whether it was.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn leave(&self, group: MacAddress) -> Result<bool> {
        let mut state = self.state();
        let groups = &mut state.filters.groups;
        let Some(index) = groups.iter().position(|other| *other == group) else {
            return Ok(false);
        };
        let (word, _) = group.table_bit();
        let others = groups.iter().filter(|other| **other != group);
        let bits = others
            .map(|other| other.table_bit())
            .filter(|(other, _)| *other == word)
            .fold(0, |bits, (_, bit)| bits | bit);
        self.hardware.port.write(Port::MTA.at(word), bits)?;
        groups.swap_remove(index);
        Ok(true)
    }

    /// Receives packets of all VLANs, as at first, or, of those with a tag, only those of the VLANs that were
    /// [added](Self::add_vlan) (82576 datasheet §7.4.5, RCTL.VFE). Packets without a tag pass.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn set_vlan_filter(&self, on: bool) -> Result<()> {
        let mut state = self.state();
        state.filters.vlan_filter = on;
        self.control(&state.filters)
    }

    /// Receives packets of a VLAN, once there is a [filter](Self::set_vlan_filter) (82576 datasheet §8.10.20).
    ///
    /// # Errors
    /// `OutOfRange` if `vlan` is past 4,095; what the transport answers.
    pub fn add_vlan(&self, vlan: u16) -> Result<()> {
        if vlan > 0xfff {
            return Err(Error::new(ErrorKind::OutOfRange, "filter", format!("VLAN {vlan}"))
                .with_reason("a tag has twelve bits for it")
                .with_advice("choose one of 0 to 4095"));
        }
        let mut state = self.state();
        state.filters.vlans.insert(vlan);
        self.write_vlans(&state.filters, vlan)
    }

    /// Receives packets of a VLAN no longer that was [added](Self::add_vlan). Whether it was.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn remove_vlan(&self, vlan: u16) -> Result<bool> {
        let mut state = self.state();
        let removed = state.filters.vlans.remove(&vlan);
        if removed {
            self.write_vlans(&state.filters, vlan)?;
        }
        Ok(removed)
    }

    /// Writes the word of the filter that has a VLAN.
    fn write_vlans(&self, filters: &Filters, vlan: u16) -> Result<()> {
        let first = vlan & !31;
        let bits =
            filters.vlans.range(first..=first | 31).fold(0, |bits, vlan| bits | 1 << (vlan & 31));
        self.hardware.port.write(Port::VFTA.at(usize::from(vlan >> 5)), bits)
    }

    /// What RCTL has of the filters.
    fn control(&self, filters: &Filters) -> Result<()> {
        self.hardware.port.update(Port::RCTL, |control| {
            control
                .with_unicast_promiscuous(filters.promiscuous)
                .with_multicast_promiscuous(filters.promiscuous)
                .with_vlan_filter(filters.vlan_filter)
                .with_loopback(filters.loopback.into())
        })
    }

    /// Tells a card that was reset of all that was asked for.
    pub(super) fn restore_filters(&self, state: &State) -> Result<()> {
        let filters = &state.filters;
        for (index, address) in (1..).zip(&filters.addresses) {
            self.hardware.set_address(index, Some(*address))?;
        }
        for group in &filters.groups {
            let (word, bit) = group.table_bit();
            self.hardware.port.update(Port::MTA.at(word), |bits| bits | bit)?;
        }
        for vlan in &filters.vlans {
            self.write_vlans(filters, *vlan)?;
        }
        self.control(filters)
    }

    /// Leads what the card sends back to it, rather than to the wire: to test it without another end (82576
    /// datasheet §3.5.6, RCTL.LBM). The link must be up.
    ///
    /// # Errors
    /// What the transport answers.
    pub fn set_loopback(&self, on: bool) -> Result<()> {
        let mut state = self.state();
        state.filters.loopback = on;
        self.control(&state.filters)
    }
}
