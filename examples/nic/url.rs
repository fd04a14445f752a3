//! URLs of files on HTTP servers.

use http::Uri;
use vfio_remap::{Error, ErrorKind, Result};

/// Where a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    pub host: String,
    pub port: u16,
    /// The path and the query, from the first slash on.
    pub path: String,
}

impl Url {
    /// Reads `http://HOST[:PORT][/PATH]`.
    ///
    /// # Errors
    /// `InvalidInput` if it is no URL, `Unsupported` if it is one for which this tool has no protocol.
    pub fn parse(text: &str) -> Result<Self> {
        let refused = |kind, reason: &str, advice: &'static str| {
            Error::new(kind, "get", format!("{text:?}"))
                .with_reason(reason.to_owned())
                .with_advice(advice)
        };
        let invalid = |reason: &str| {
            let advice = "pass a URL such as http://10.0.2.2:8000/file";
            refused(ErrorKind::InvalidInput, reason, advice)
        };
        let uri: Uri = text.parse().map_err(|error| invalid(&format!("it is no URL: {error}")))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                let advice = "use http:// if the server offers it";
                return Err(refused(ErrorKind::Unsupported, "there is no TLS here", advice));
            }
            Some(_) => return Err(invalid("its protocol is not HTTP")),
            None => return Err(invalid("it does not begin with http://")),
        }
        let host = uri.host().unwrap_or_default();
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if host.is_empty() || authority.contains('@') {
            return Err(invalid("it has no host, or a password"));
        }
        if host.starts_with('[') {
            let advice = "pass the host's IPv4 address";
            return Err(refused(ErrorKind::Unsupported, "there is no IPv6 here", advice));
        }
        // What follows the host is a port, or nothing.
        let port = match authority[host.len()..].strip_prefix(':') {
            None => 80,
            Some(_) => match uri.port_u16() {
                Some(port) if port > 0 => port,
                _ => return Err(invalid("its port is not one of 1 to 65535")),
            },
        };
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let path = if path.starts_with('/') { path } else { format!("/{path}") };
        Ok(Self { host: host.to_owned(), port, path })
    }

    /// The value of the header field `Host` (RFC 9110 §7.2).
    pub fn authority(&self) -> String {
        if self.port == 80 { self.host.clone() } else { format!("{}:{}", self.host, self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart() {
        for (text, host, port, path) in [
            ("http://10.0.2.2", "10.0.2.2", 80, "/"),
            ("http://server.test:8000/a/b?c=d", "server.test", 8000, "/a/b?c=d"),
            ("HTTP://server.test/a%20b", "server.test", 80, "/a%20b"),
            ("http://server.test?c", "server.test", 80, "/?c"),
        ] {
            let url = Url::parse(text).unwrap();
            assert_eq!((&url.host[..], url.port, &url.path[..]), (host, port, path), "{text}");
        }
        assert_eq!(Url::parse("http://a:8000").unwrap().authority(), "a:8000");
        assert_eq!(Url::parse("http://a:80").unwrap().authority(), "a");
    }

    #[test]
    fn what_is_no_url_is_refused_with_the_reason() {
        use ErrorKind::{InvalidInput, Unsupported};
        for (text, kind, says) in [
            ("", InvalidInput, "it is no URL"),
            ("no url", InvalidInput, "it is no URL"),
            ("server.test", InvalidInput, "http://"),
            ("/file", InvalidInput, "http://"),
            ("ftp://server.test/", InvalidInput, "not HTTP"),
            ("https://server.test/", Unsupported, "no TLS"),
            ("http://", InvalidInput, "it is no URL"),
            ("http://me:secret@server.test/", InvalidInput, "a password"),
            ("http://server.test:99999/", InvalidInput, "port"),
            ("http://server.test:0/", InvalidInput, "port"),
            ("http://server.test:/", InvalidInput, "port"),
            ("http://[::1]/", Unsupported, "no IPv6"),
            ("http://a\r\nX: y/", InvalidInput, "it is no URL"),
        ] {
            let error = Url::parse(text).unwrap_err();
            assert_eq!(error.kind(), kind, "{text}: {error}");
            assert!(error.to_string().contains(says), "{text}: {error}");
        }
    }
}
