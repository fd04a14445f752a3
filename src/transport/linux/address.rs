//! PCI addresses.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// A PCI address in the notation of Linux, `0000:00:03.0`: domain, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The domain, also called segment. It is above 0xffff on machines with Intel VMD.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, below 32.
    pub device: u8,
    /// The function of the device, below 8.
    pub function: u8,
}

/// The text is not a PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address such as 0000:00:03.0 or 00:03.0")]
pub struct ParseAddressError(String);

impl From<ParseAddressError> for Error {
    fn from(error: ParseAddressError) -> Self {
        Error::new(ErrorKind::InvalidInput, "read", format!("{:?}", error.0))
            .with_reason("it is not a PCI address such as 0000:00:03.0 or 00:03.0")
    }
}

impl TryFrom<&str> for PciAddress {
    type Error = ParseAddressError;

    fn try_from(text: &str) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl TryFrom<&String> for PciAddress {
    type Error = ParseAddressError;

    fn try_from(text: &String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl TryFrom<String> for PciAddress {
    type Error = ParseAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl FromStr for PciAddress {
    type Err = ParseAddressError;

    /// Reads `0000:00:03.0`, or `00:03.0` for domain 0.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| ParseAddressError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<PciAddress> {
    let (slot, function) = text.rsplit_once('.')?;
    let (rest, device) = slot.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    let hex = |text: &str, digits: usize| {
        let plain = text.len() <= digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| u32::from_str_radix(text, 16).ok())?
    };
    let address = PciAddress {
        domain: hex(domain, 8)?,
        bus: hex(bus, 2)? as u8,
        device: hex(device, 2)? as u8,
        function: hex(function, 1)? as u8,
    };
    (address.device < 32 && address.function < 8).then_some(address)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Sysfs, Vfio};
    use super::*;

    #[test]
    fn the_notations_of_linux_and_lspci_are_parsed() {
        for (text, canonical) in [
            ("0000:00:03.0", "0000:00:03.0"),
            ("3a:1f.7", "0000:3a:1f.7"),
            ("10000:01:00.0", "10000:01:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), canonical);
        }
        for text in [
            "",
            "0000:00:20.0",
            "00:03.8",
            "00:03",
            "+0:03.0",
            "0:0:0:0.0",
            "00:zz.0",
            "123456789:00:00.0",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
            // What takes an address takes text too.
            let error = Vfio::open(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            let error = Vfio::options().by_group().open(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            let error = Sysfs::default().device(text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
    }
}
