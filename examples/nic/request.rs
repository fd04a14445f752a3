//! The server's side of HTTP/1.1 (RFC 9112): what clients ask for.

use httparse::{EMPTY_HEADER, Status as Parsed};

/// The most bytes of a request; there is no content in one that is answered.
pub const MAX_REQUEST: usize = 8 << 10;
const MAX_FIELDS: usize = 64;

/// A status code with its words (RFC 9110 §15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16, pub &'static str);

pub const OK: Status = Status(200, "OK");
pub const BAD_REQUEST: Status = Status(400, "Bad Request");
pub const FORBIDDEN: Status = Status(403, "Forbidden");
pub const NOT_FOUND: Status = Status(404, "Not Found");
pub const NOT_ALLOWED: Status = Status(405, "Method Not Allowed");
pub const TOO_LARGE: Status = Status(431, "Request Header Fields Too Large");
pub const BROKEN: Status = Status(500, "Internal Server Error");

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names between slashes, none of which is empty, `.` or `..`.
    pub path: Vec<String>,
    /// Whether the content is left out (HEAD).
    pub head_only: bool,
}

/// Reads a request; `None` if it is not complete.
///
/// # Errors
/// What the client is told.
pub fn parse(bytes: &[u8]) -> Result<Option<Request>, Status> {
    let mut fields = [EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(Parsed::Complete(_)) => {}
        Ok(Parsed::Partial) if bytes.len() < MAX_REQUEST => return Ok(None),
        Ok(Parsed::Partial) | Err(httparse::Error::TooManyHeaders) => return Err(TOO_LARGE),
        Err(_) => return Err(BAD_REQUEST),
    }
    let head_only = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(NOT_ALLOWED),
    };
    let path = path(request.path.unwrap_or_default())?;
    Ok(Some(Request { path, head_only }))
}

/// The names of a path, decoded (RFC 3986 §2.1), without its query.
fn path(target: &str) -> Result<Vec<String>, Status> {
    // The form with a host, for proxies, which every server takes (RFC 9112 §3.2.2).
    let target = match target.split_once("://") {
        Some((_, rest)) if !target.starts_with('/') => rest.find('/').map_or("/", |at| &rest[at..]),
        _ => target,
    };
    let Some(path) = target.strip_prefix('/') else { return Err(BAD_REQUEST) };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let mut names = Vec::new();
    for part in path.split('/') {
        // Decoded after it was taken apart: a slash or dots that were encoded are seen.
        let name = decode(part).ok_or(BAD_REQUEST)?;
        match &name[..] {
            "" | "." => {}
            ".." => return Err(FORBIDDEN),
            _ if name.contains(['/', '\0']) => return Err(BAD_REQUEST),
            _ => names.push(name),
        }
    }
    Ok(names)
}

fn decode(part: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = part.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            bytes.push((digit()? * 16 + digit()?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// A path of a URL for these names.
pub fn encode<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    let mut path = String::new();
    for name in names {
        path.push('/');
        for byte in name.bytes() {
            // RFC 3986 §2.3: unreserved.
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                path.push(byte.into());
            } else {
                path.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(target: &str) -> Result<Vec<String>, Status> {
        let text = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
        parse(text.as_bytes()).map(|request| request.unwrap().path)
    }

    #[test]
    fn a_request_is_read_once_it_is_complete() {
        let text = b"HEAD /a/b%20c?d HTTP/1.1\r\nHost: a\r\n\r\n";
        for len in 0..text.len() {
            assert_eq!(parse(&text[..len]), Ok(None), "{len}");
        }
        let path = vec!["a".to_owned(), "b c".to_owned()];
        assert_eq!(parse(text), Ok(Some(Request { path, head_only: true })));
    }

    #[test]
    fn no_path_leads_out() {
        for target in ["/..", "/a/../../b", "/%2e%2e/b", "/.%2E", "/a/..?b", "http://h/../b"] {
            assert_eq!(asked(target), Err(FORBIDDEN), "{target}");
        }
        for target in ["/..%2fb", "/%00", "/%", "/%4", "/%zz", "/%ff", "*", "a"] {
            assert_eq!(asked(target), Err(BAD_REQUEST), "{target}");
        }
        assert_eq!(asked("//./a//b/"), Ok(vec!["a".to_owned(), "b".to_owned()]));
        assert_eq!(asked("/...//"), Ok(vec!["...".to_owned()]));
        assert_eq!(asked("http://host/a"), Ok(vec!["a".to_owned()]));
    }

    #[test]
    fn what_is_not_served_has_a_status() {
        for (text, status) in [
            ("POST / HTTP/1.1\r\n\r\n".to_owned(), NOT_ALLOWED),
            ("\x16\x03\x01 / HTTP/1.1\r\n\r\n".to_owned(), BAD_REQUEST),
            ("GET / HTTP/9\r\n\r\n".to_owned(), BAD_REQUEST),
            (format!("GET /{}", "a".repeat(MAX_REQUEST)), TOO_LARGE),
            (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(99)), TOO_LARGE),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(status), "{text:?}");
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let names = ["a b", "ü?#%", "..c"];
        assert_eq!(asked(&encode(names)), Ok(names.map(str::to_owned).to_vec()));
    }
}
