//! Responses, however they are cut into pieces.

use super::*;

/// The content of a response that comes in pieces of `size` bytes, and whether it is complete.
fn read(bytes: &[u8], size: usize) -> Result<(Vec<u8>, Response)> {
    let mut response = Response::new();
    let mut content = Vec::new();
    for piece in bytes.chunks(size) {
        response.read(piece, &mut |bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })?;
    }
    Ok((content, response))
}

/// However it is cut.
fn content(bytes: &[u8]) -> Vec<u8> {
    let (whole, response) = read(bytes, bytes.len()).unwrap();
    assert!(response.is_done(), "{response:?}");
    for size in 1..bytes.len() {
        let (pieces, response) = read(bytes, size).unwrap();
        assert!(response.is_done() && pieces == whole, "pieces of {size} bytes");
    }
    whole
}

#[test]
fn content_with_a_length_is_read_and_nothing_after_it() {
    let got = content(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\n");
    assert_eq!(got, b"hello");
    assert_eq!(content(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"), b"");
    assert_eq!(content(b"HTTP/1.1 204 None\r\n\r\n"), b"");
    let (_, response) = read(b"HTTP/1.1 302 Found\r\nLocation: /b\r\n\r\n", 7).unwrap();
    let head = response.head().unwrap();
    assert_eq!((head.status, head.location.as_deref()), (302, Some("/b")));
}

#[test]
fn chunks_are_put_together() {
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let body = "5\r\nhello\r\nA;name=value\r\n, world 12\r\n0\r\nTrailer: x\r\n\r\n";
    assert_eq!(content(format!("{head}{body}").as_bytes()), b"hello, world 12");
    // An interim response first.
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n";
    assert_eq!(content(format!("{interim}{head}{body}").as_bytes()), b"hello, world 12");
}

#[test]
fn content_without_a_length_ends_with_the_connection() {
    let (got, mut response) = read(b"HTTP/1.0 200 OK\r\n\r\nhello", 3).unwrap();
    assert!(!response.is_done());
    response.end().unwrap();
    assert!(response.is_done());
    assert_eq!(got, b"hello");
}

#[test]
fn a_response_that_is_cut_off_is_an_error() {
    for (bytes, says) in [
        ("", "too early"),
        ("HTTP/1.1 200 OK\r\nContent-Le", "too early"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell", "1 bytes are missing"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "too early"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", "too early"),
    ] {
        let (_, mut response) = read(bytes.as_bytes(), 4).unwrap();
        let error = response.end().unwrap_err();
        assert!(error.to_string().contains(says), "{bytes:?}: {error}");
    }
}

#[test]
fn what_is_no_response_is_an_error() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (bytes, says) in [
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "no HTTP response"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_owned(), "\"-1\""),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n".to_owned(), "999"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n".to_owned(), "\"6\""),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n".to_owned(), "gzip"),
        ("HTTP/1.1 101 Switching\r\n\r\n".to_owned(), "another protocol"),
        (format!("{chunked}xyz\r\n"), "without a size"),
        (format!("{chunked}fffffffffffffffff\r\n"), "without a size"),
        (format!("{chunked}2\r\nhello\r\n"), "longer than it says"),
        (format!("{chunked}{}", "0".repeat(MAX_LINE)), "more than 4096"),
        (format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(MAX_HEAD)), "more than 16384"),
        (format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: y\r\n".repeat(MAX_FIELDS + 1)), "too many"),
    ] {
        let error = read(bytes.as_bytes(), 1000).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
        assert!(error.to_string().contains(says), "{bytes:?}: {error}");
    }
}
