//! `nic info`: what a card is, its link, and what it has counted.

use std::time::Duration;

use serde_json::{Value, json};
use vfio_remap::{ErrorKind, Result};
use vfio_remap_ethernet::{Link, Model, Nic, Settings, Statistics};

use crate::card::{Card, settings, wait_for_link};
use crate::options::Common;
use crate::stop::Stop;

/// How long a link is waited for: to negotiate one takes up to some seconds.
const LINK: Duration = Duration::from_secs(5);

pub fn run(common: &Common, stop: &Stop) -> Result<()> {
    Card::open(common, settings(common))?.run(|card| {
        let limit = LINK.min(Duration::from_secs(common.link_timeout));
        let link = match wait_for_link(&card.nic, limit, stop) {
            Ok(link) => Some(link),
            Err(error) if error.kind() == ErrorKind::TimedOut => None,
            Err(error) => return Err(error),
        };
        let (nic, statistics) = (&card.nic, card.nic.statistics()?);
        let phy = nic.phy_identifier()?;
        if common.json {
            say!("{}", as_json(nic, link, phy, &statistics));
        } else {
            print(nic, link, phy, &statistics);
        }
        Ok(())
    })
}

/// What a card does beyond sending and receiving.
fn features(model: Model) -> Vec<&'static str> {
    let mut features = vec![
        "checksum offload in both directions",
        "TCP segmentation (TSO)",
        "VLAN insertion, stripping and filtering",
        "multicast filter",
        "jumbo frames",
        "interrupts per queue (MSI-X), with moderation",
    ];
    if model.queues() > 1 {
        features.push("flows spread over queues (RSS)");
    }
    features
}

/// The counts, by name.
fn counts(statistics: &Statistics) -> [(&'static str, u64); 17] {
    let Statistics { received, received_bytes, sent, sent_bytes, .. } = *statistics;
    [
        ("received", received),
        ("received_bytes", received_bytes),
        ("received_broadcast", statistics.received_broadcast),
        ("received_multicast", statistics.received_multicast),
        ("seen", statistics.seen),
        ("missed", statistics.missed),
        ("no_buffer", statistics.no_buffer),
        ("crc_errors", statistics.crc_errors),
        ("symbol_errors", statistics.symbol_errors),
        ("length_errors", statistics.length_errors),
        ("too_short", statistics.too_short),
        ("too_long", statistics.too_long),
        ("sent", sent),
        ("sent_bytes", sent_bytes),
        ("sent_broadcast", statistics.sent_broadcast),
        ("sent_multicast", statistics.sent_multicast),
        ("segmented", statistics.segmented),
    ]
}

fn as_json(nic: &Nic, link: Option<Link>, phy: u32, statistics: &Statistics) -> Value {
    let model = nic.model();
    let counts =
        counts(statistics).into_iter().map(|(name, count)| (name.to_owned(), json!(count)));
    json!({
        "device": nic.name(), "model": model.to_string(), "mac": nic.address().to_string(),
        "phy": format!("{phy:#010x}"), "queues": model.queues(), "addresses": 1 + model.addresses(),
        "mtu": nic.settings().mtu, "most_mtu": Settings::MOST_MTU, "features": features(model),
        "link": link.map(|link| json!({"speed": link.speed, "full_duplex": link.full_duplex})),
        "statistics": Value::Object(counts.collect()),
    })
}

fn print(nic: &Nic, link: Option<Link>, phy: u32, statistics: &Statistics) {
    let model = nic.model();
    say!("{}: {model}, address {}, PHY {phy:#010x}", nic.name(), nic.address());
    match link {
        Some(link) => say!("  link: {link}"),
        None => say!("  no link: plug its cable in, or look whether the other end is on"),
    }
    say!("  {} queues in each direction, {} addresses", model.queues(), 1 + model.addresses());
    say!("  MTU {}, at most {}", nic.settings().mtu, Settings::MOST_MTU);
    say!("  {}", features(model).join(", "));
    let counts = counts(statistics);
    let counts = counts.iter().filter(|(_, count)| *count > 0);
    let counts: Vec<_> = counts.map(|(name, count)| format!("{name} {count}")).collect();
    say!("  counted since it was reset: {}", or_nothing(&counts.join(", ")));
}

fn or_nothing(text: &str) -> &str {
    if text.is_empty() { "nothing" } else { text }
}
