//! VF tokens: the driver of an SR-IOV physical function sets one, and opening a virtual function requires
//! it (Linux 5.7).

use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;

use super::PciDevice;
use crate::error::{Error, ErrorKind};

/// A VF token: a UUID that the user of the physical function shares with trusted users of its virtual
/// functions. The 16 bytes are in the order of the written UUID.
///
/// ```
/// use vfio_remap::transport::VfToken;
/// let token: VfToken = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3".parse()?;
/// assert_eq!(token.to_string(), "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3");
/// # Ok::<(), vfio_remap::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VfToken(pub [u8; 16]);

/// The positions of the hyphens in a written UUID (RFC 9562 §4).
const HYPHENS: [usize; 4] = [8, 13, 18, 23];

impl FromStr for VfToken {
    type Err = Error;

    /// Parses a UUID: 32 hexadecimal digits in five groups.
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).ok_or_else(|| {
            // The error does not show the text: it may be a secret token with a typing error.
            Error::new(
                ErrorKind::InvalidInput,
                "read",
                format!("a VF token of {} bytes", text.len()),
            )
            .with_reason("it is not a UUID")
            .with_advice("write it like bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3; uuidgen makes one")
        })
    }
}

fn parse(text: &str) -> Option<VfToken> {
    if text.len() != 36 || HYPHENS.iter().any(|&at| text.as_bytes()[at] != b'-') {
        return None;
    }
    let digits: String = text.split('-').collect();
    // Rejects other hyphens, signs and non-ASCII characters.
    if digits.len() != 32 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    Some(VfToken(u128::from_str_radix(&digits, 16).ok()?.to_be_bytes()))
}

impl fmt::Display for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let hyphen = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{hyphen}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Hides the token, which is a secret, from logs.
impl fmt::Debug for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

/// Whether the device takes a token: it is a physical function, or a virtual one whose physical function
/// is bound to a VFIO driver.
pub(super) fn is_taken(device: &PciDevice) -> bool {
    match device.physical_function() {
        Some(physical) => physical.driver().is_some_and(|driver| driver.contains("vfio")),
        None => device.path().join("sriov_totalvfs").exists(),
    }
}

/// The error if opening a device failed because of the token, or of its absence; `None` for other reasons.
pub(super) fn refused(errno: Errno, device: &PciDevice, token: Option<VfToken>) -> Option<Error> {
    let (reason, advice) = match (errno, token) {
        (Errno::EACCES, None) => (
            "other functions of this SR-IOV device are bound to VFIO drivers too, so opening it requires a \
             VF token",
            "open it with the token that the driver of the physical function has set: \
             VfioOptions::vf_token",
        ),
        (Errno::EACCES, Some(_)) => (
            "the VF token is not the one that the driver of the physical function has set",
            "get the token from that driver, which sets it by Vfio::set_vf_token",
        ),
        (Errno::EINVAL, Some(_)) => (
            "it takes no VF token: it is not a function of an SR-IOV device whose physical function is \
             bound to vfio-pci",
            "open it without a token",
        ),
        _ => return None,
    };
    Some(
        Error::os(errno, "open", device.address())
            .into_kind(ErrorKind::VfToken)
            .with_reason(reason)
            .with_advice(advice),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_uuid_is_a_token() {
        let text = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
        let token: VfToken = text.parse().unwrap();
        assert_eq!((token.0[0], token.0[15], token.to_string()), (0xbd, 0xf3, text.to_owned()));
        assert_eq!(text.to_uppercase().parse::<VfToken>().unwrap(), token);
        assert_eq!(format!("{token:?}"), "VfToken(..)");
        for bad in [
            "",
            "bd8d9d2b5a5f4f5aa211f591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f",
            "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f33",
            "bd8d9d2b-5a5f-4f5a-a211-+591514ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211-f59151-ba1f3",
            "bd8d9d2b-5a5f-4f5a-a211-f591514bé1f3",
            "éd8d9d2b-5a5f-4f5a-a211-f591514ba1f3",
        ] {
            let error = bad.parse::<VfToken>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{bad}");
        }
    }
}
