//! The first exchange of two peers: version and capabilities.

use serde_json::{Value, json};

use super::wire::{MAJOR, MINOR, Version};

/// The most bytes of data in one message: the default of the protocol, and ours.
pub(crate) const MAX_TRANSFER: usize = 1 << 20;
/// How many file descriptors we take with one message: as many as clients send that ignore our limit.
pub(crate) const MAX_FDS: usize = 64;
/// How many we say that we take: QEMU (10.1 to 11.1) rejects a server that says more.
const SAID_FDS: usize = 16;
/// How many mappings for DMA there may be: the default of the protocol, and ours.
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
    /// Whether it takes `REGION_WRITE_MULTI`.
    pub(crate) write_multiple: bool,
    /// Whether commands of the server can have a socket of their own.
    pub(crate) twin_socket: bool,
    /// Which of the descriptors that come with the server's `VERSION` that socket is.
    pub(crate) twin_fd: Option<usize>,
}

impl Capabilities {
    /// What a client proposes: our limits, and what it uses if the server has it.
    pub(crate) fn proposal() -> Vec<u8> {
        let mut capabilities = limits();
        capabilities["twin_socket"] = json!({"supported": true});
        capabilities["write_multiple"] = true.into();
        encode(MINOR, &capabilities)
    }

    /// A server's reply to this client: our limits, and what the client has if this server uses it. With
    /// `twin_socket`, the first descriptor that comes with the reply is the socket for the server's commands.
    #[cfg(feature = "emulated")]
    pub(crate) fn reply(&self, minor: u16, twin_socket: bool) -> Vec<u8> {
        let mut capabilities = limits();
        if self.write_multiple {
            capabilities["write_multiple"] = true.into();
        }
        if twin_socket {
            capabilities["twin_socket"] = json!({"supported": true, "fd_index": 0});
        }
        encode(minor.min(MINOR), &capabilities)
    }

    /// Reads a peer's `VERSION`. A capability that is missing has the protocol's default. One that is not known
    /// is ignored.
    ///
    /// # Errors
    /// What of it is malformed.
    pub(crate) fn read(body: &[u8]) -> Result<Self, String> {
        let (version, data) =
            Version::decode(body).ok_or_else(|| "it sent no version".to_owned())?;
        if version.major != MAJOR {
            return Err(format!(
                "it speaks version {}.{} of the protocol, we speak {MAJOR}.{MINOR}",
                version.major, version.minor
            ));
        }
        let data = match data {
            [] | [0] => json!({}),
            [text @ .., 0] => serde_json::from_slice::<Value>(text)
                .map_err(|error| format!("its capabilities are not JSON: {error}"))?,
            _ => return Err("its capabilities do not end with a NUL".to_owned()),
        };
        // One that is absent has the default.
        let object = |value: &Value, name: &str| match value {
            Value::Object(_) => Ok(()),
            _ => Err(format!("its {name} is not an object")),
        };
        object(&data, "version data")?;
        let capabilities = &data["capabilities"];
        if data.get("capabilities").is_some() {
            object(capabilities, "capabilities field")?;
        }
        let number_of = |name: &str, value: &Value, default: u64| match value {
            Value::Null => Ok(default),
            value => value.as_u64().ok_or_else(|| format!("its {name} is {value}")),
        };
        let number = |name: &str, default: u64| number_of(name, &capabilities[name], default);
        let flag = |name: &str, value: &Value| match value {
            Value::Null => Ok(false),
            value => value.as_bool().ok_or_else(|| format!("its {name} is {value}")),
        };
        let twin = &capabilities["twin_socket"];
        if !twin.is_null() {
            object(twin, "twin_socket")?;
        }
        let twin_fd = number_of("twin_socket.fd_index", &twin["fd_index"], u64::MAX)?;
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
            write_multiple: flag("write_multiple", &capabilities["write_multiple"])?,
            twin_socket: flag("twin_socket", &twin["supported"])?,
            twin_fd: usize::try_from(twin_fd).ok().filter(|&index| index < MAX_FDS),
        })
    }
}

/// What we take.
fn limits() -> Value {
    json!({
        "max_msg_fds": SAID_FDS,
        "max_data_xfer_size": MAX_TRANSFER,
        "max_dma_maps": MAX_DMA_MAPS,
        "pgsizes": 4096,
    })
}

/// The body of a `VERSION` message.
fn encode(minor: u16, capabilities: &Value) -> Vec<u8> {
    let mut body = Version { major: MAJOR, minor }.encode().to_vec();
    body.extend(json!({"capabilities": capabilities}).to_string().into_bytes());
    body.push(0);
    body
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
        let ours = Capabilities::read(&Capabilities::proposal()).unwrap();
        assert_eq!((ours.fds, ours.transfer, ours.page_size), (SAID_FDS, MAX_TRANSFER, 4096));
    }

    #[test]
    fn missing_capabilities_have_defaults_and_unknown_ones_do_not_matter() {
        let default = Capabilities {
            fds: 1,
            transfer: 1 << 20,
            dma_maps: 65535,
            page_size: 4096,
            write_multiple: false,
            twin_socket: false,
            twin_fd: None,
        };
        for json in ["", "\0", "{}\0", "{\"capabilities\":{\"cheese\":[1]}}\0"] {
            assert_eq!(read(0, json), Ok(default), "{json}");
        }
    }

    #[test]
    fn optional_capabilities_are_read() {
        let read = |text: &str| read(0, &format!("{{\"capabilities\":{{{text}}}}}\0")).unwrap();
        assert!(read("\"write_multiple\":true").write_multiple);
        assert!(!read("\"write_multiple\":false").write_multiple);
        assert!(read("\"twin_socket\":{\"supported\":true}").twin_socket);
        assert!(!read("\"twin_socket\":{\"fd_index\":0}").twin_socket);
        assert_eq!(read("\"twin_socket\":{\"fd_index\":2}").twin_fd, Some(2));
        assert_eq!(read("\"twin_socket\":{}").twin_fd, None);
    }

    #[test]
    fn a_client_proposes_what_it_understands() {
        let proposal = Capabilities::read(&Capabilities::proposal()).unwrap();
        assert!(proposal.twin_socket && proposal.write_multiple && proposal.twin_fd.is_none());
    }

    #[test]
    fn what_is_malformed_is_named() {
        let reason = |major, json: &str| read(major, json).unwrap_err();
        assert!(reason(1, "{}\0").contains("version 1.0"));
        assert!(reason(0, "{\0").contains("not JSON"));
        assert!(reason(0, "{}\0\0").contains("not JSON"));
        assert!(reason(0, "{}").contains("a NUL"));
        for data in ["[]", "7", "null"] {
            assert!(reason(0, &format!("{data}\0")).contains("version data is not an object"));
            let data = format!("{{\"capabilities\":{data}}}\0");
            assert!(reason(0, &data).contains("capabilities field is not an object"));
        }
        let capability = |text: &str| reason(0, &format!("{{\"capabilities\":{{{text}}}}}\0"));
        assert!(capability("\"max_msg_fds\":-1").contains("max_msg_fds is -1"));
        assert!(capability("\"max_data_xfer_size\":\"all\"").contains("max_data_xfer_size"));
        assert!(capability("\"max_data_xfer_size\":4").contains("not even"));
        assert!(capability("\"pgsizes\":0").contains("pgsizes"));
        assert!(capability("\"write_multiple\":1").contains("write_multiple is 1"));
        assert!(capability("\"twin_socket\":true").contains("twin_socket is not an object"));
        assert!(capability("\"twin_socket\":{\"fd_index\":-1}").contains("fd_index is -1"));
        assert!(capability("\"twin_socket\":{\"supported\":0}").contains("twin_socket is 0"));
        assert!(Capabilities::read(&[0; 3]).is_err());
    }
}
