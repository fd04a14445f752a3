//! What two peers tell each other at first: version and capabilities.

use serde_json::{Value, json};

use super::wire::{MAJOR, MINOR, Version};

/// The most data that one message may carry where the peer does not say, and what we say, in bytes.
pub(crate) const MAX_TRANSFER: usize = 1 << 20;
/// How many file descriptors we take with one message: as many as clients send that do not care.
pub(crate) const MAX_FDS: usize = 64;
/// How many we say that we take: QEMU (10.1 to 11.1) refuses a server that says more.
const SAID_FDS: usize = 16;
/// How many mappings for DMA there may be where the peer does not say, and what we say.
pub(crate) const MAX_DMA_MAPS: u32 = 65535;

/// What a peer can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// How many file descriptors it takes with one message.
    pub(crate) fds: usize,
    /// How many bytes of data it takes in one message.
    pub(crate) transfer: usize,
    /// How many mappings for DMA it takes.
    pub(crate) dma_maps: u32,
    /// The smallest page that can be mapped for DMA, in bytes.
    pub(crate) page_size: u64,
}

impl Capabilities {
    /// Ours, as the body of a `VERSION` message.
    pub(crate) fn ours() -> Vec<u8> {
        let capabilities = json!({"capabilities": {
            "max_msg_fds": SAID_FDS,
            "max_data_xfer_size": MAX_TRANSFER,
            "max_dma_maps": MAX_DMA_MAPS,
            "pgsizes": 4096,
        }});
        let mut body = Version { major: MAJOR, minor: MINOR }.encode().to_vec();
        body.extend(capabilities.to_string().into_bytes());
        body.push(0);
        body
    }

    /// Reads a peer's `VERSION`. What is missing has the protocol's default; what is unknown does not
    /// matter.
    ///
    /// # Errors
    /// What of it makes no sense.
    pub(crate) fn read(body: &[u8]) -> Result<Self, String> {
        let (version, data) =
            Version::decode(body).ok_or_else(|| "it sent no version".to_owned())?;
        if version.major != MAJOR {
            return Err(format!(
                "it speaks version {}.{} of the protocol, we speak {MAJOR}.{MINOR}",
                version.major, version.minor
            ));
        }
        let text = data.strip_suffix(&[0]).unwrap_or(data);
        let data = match text {
            [] => Value::Null,
            _ => serde_json::from_slice::<Value>(text)
                .map_err(|error| format!("its capabilities are no JSON: {error}"))?,
        };
        let capabilities = &data["capabilities"];
        let number = |name: &str, default: u64| match &capabilities[name] {
            Value::Null => Ok(default),
            value => value.as_u64().ok_or_else(|| format!("its {name} is {value}")),
        };
        let transfer = number("max_data_xfer_size", MAX_TRANSFER as u64)?;
        if transfer < 8 {
            return Err(format!("its max_data_xfer_size is {transfer}: not even a register"));
        }
        let pages = number("pgsizes", 4096)?;
        if pages == 0 {
            return Err("its pgsizes is 0".to_owned());
        }
        Ok(Self {
            fds: number("max_msg_fds", 1)?.min(MAX_FDS as u64) as usize,
            transfer: transfer.min(MAX_TRANSFER as u64) as usize,
            dma_maps: number("max_dma_maps", MAX_DMA_MAPS.into())?.min(u32::MAX.into()) as u32,
            page_size: 1 << pages.trailing_zeros(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(major: u16, json: &str) -> Result<Capabilities, String> {
        let mut body = Version { major, minor: 0 }.encode().to_vec();
        body.extend(json.as_bytes());
        Capabilities::read(&body)
    }

    #[test]
    fn what_we_say_is_what_we_understand() {
        let ours = Capabilities::read(&Capabilities::ours()).unwrap();
        assert_eq!((ours.fds, ours.transfer, ours.page_size), (SAID_FDS, MAX_TRANSFER, 4096));
    }

    #[test]
    fn missing_capabilities_have_defaults_and_unknown_ones_do_not_matter() {
        let default = Capabilities { fds: 1, transfer: 1 << 20, dma_maps: 65535, page_size: 4096 };
        for json in ["", "\0", "{}", "{\"capabilities\":{\"cheese\":[1]}}\0", "[]", "7"] {
            assert_eq!(read(0, json), Ok(default), "{json}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        let reason = |major, json: &str| read(major, json).unwrap_err();
        assert!(reason(1, "{}").contains("version 1.0"));
        assert!(reason(0, "{").contains("no JSON"));
        assert!(reason(0, "{}\0\0").contains("no JSON"));
        let capability = |text: &str| reason(0, &format!("{{\"capabilities\":{{{text}}}}}"));
        assert!(capability("\"max_msg_fds\":-1").contains("max_msg_fds is -1"));
        assert!(capability("\"max_data_xfer_size\":\"all\"").contains("max_data_xfer_size"));
        assert!(capability("\"max_data_xfer_size\":4").contains("not even"));
        assert!(capability("\"pgsizes\":0").contains("pgsizes"));
        assert!(Capabilities::read(&[0; 3]).is_err());
    }
}
