//! The client's side of HTTP/1.1 (RFC 9112): what a server answers, however it is cut into pieces.

#[cfg(test)]
mod tests;

use httparse::{EMPTY_HEADER, Header, Status};
use vfio_remap::{Error, ErrorKind, Result};

/// The most bytes of a header section, and of a line between chunks.
const MAX_HEAD: usize = 16 << 10;
const MAX_LINE: usize = 4 << 10;
const MAX_FIELDS: usize = 100;

/// What a response says before its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    pub reason: String,
    /// How many bytes the content has, if that is known.
    pub length: Option<u64>,
    pub location: Option<String>,
}

/// Reads a response.
#[derive(Debug)]
pub struct Response {
    state: State,
    /// A header section or a line that is not complete.
    partial: Vec<u8>,
    head: Option<Head>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    /// So many bytes of content are left.
    Length(u64),
    /// The content ends with the connection.
    UntilClosed,
    ChunkSize,
    Chunk(u64),
    /// The end of the line after a chunk.
    ChunkEnd,
    Trailer,
    Done,
}

impl Response {
    pub fn new() -> Self {
        Self { state: State::Head, partial: Vec::new(), head: None }
    }

    /// What the response says before its content, once it has come.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Reads bytes of the connection, and passes those of the content on.
    ///
    /// # Errors
    /// `Malformed` if they are no response; the errors of `content`.
    pub fn read(
        &mut self,
        mut bytes: &[u8],
        content: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        while !bytes.is_empty() {
            match self.state {
                State::Length(left) | State::Chunk(left) => {
                    let len = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    content(&bytes[..len])?;
                    bytes = &bytes[len..];
                    self.state = match (self.state, left - len as u64) {
                        (State::Length(_), 0) => State::Done,
                        (State::Length(_), left) => State::Length(left),
                        (_, 0) => State::ChunkEnd,
                        (_, left) => State::Chunk(left),
                    };
                }
                State::UntilClosed => {
                    content(bytes)?;
                    return Ok(());
                }
                // What comes after the response is none of it.
                State::Done => return Ok(()),
                State::Head | State::ChunkSize | State::ChunkEnd | State::Trailer => {
                    let byte = bytes[0];
                    bytes = &bytes[1..];
                    self.partial.push(byte);
                    if byte == b'\n' {
                        self.line()?;
                    }
                    let most = if self.state == State::Head { MAX_HEAD } else { MAX_LINE };
                    if self.partial.len() >= most {
                        return Err(malformed(format!("a part of it has more than {most} bytes")));
                    }
                }
            }
        }
        Ok(())
    }

    /// The server has closed the connection.
    ///
    /// # Errors
    /// `Malformed` if the response is not complete.
    pub fn end(&mut self) -> Result<()> {
        match self.state {
            State::Done | State::UntilClosed => {
                self.state = State::Done;
                Ok(())
            }
            State::Length(left) => Err(malformed(format!("{left} bytes are missing at its end"))),
            _ => Err(malformed("the server has closed the connection too early".to_owned())),
        }
    }

    /// The last line of `partial` is complete.
    fn line(&mut self) -> Result<()> {
        match self.state {
            State::Head => return self.section(),
            State::ChunkSize => {
                let size = match httparse::parse_chunk_size(&self.partial) {
                    Ok(Status::Complete((_, size))) => size,
                    _ => return Err(malformed("it has a chunk without a size".to_owned())),
                };
                self.state = if size == 0 { State::Trailer } else { State::Chunk(size) };
            }
            State::ChunkEnd => {
                if !is_empty(&self.partial) {
                    return Err(malformed("a chunk is longer than it says".to_owned()));
                }
                self.state = State::ChunkSize;
            }
            _ => {
                if is_empty(&self.partial) {
                    self.state = State::Done;
                }
            }
        }
        self.partial.clear();
        Ok(())
    }

    /// Reads the header section, if it is complete.
    fn section(&mut self) -> Result<()> {
        let mut fields = [EMPTY_HEADER; MAX_FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        match response.parse(&self.partial) {
            Ok(Status::Partial) => return Ok(()),
            Ok(Status::Complete(_)) => {}
            Err(error) => return Err(malformed(format!("it is no HTTP response: {error}"))),
        }
        let status = response.code.unwrap_or_default();
        let fields = &*response.headers;
        let chunked = is_chunked(fields)?;
        let length = if chunked { None } else { length(fields)? };
        let location = field(fields, "location").map(text);
        let head = Head {
            status,
            reason: response.reason.unwrap_or_default().to_owned(),
            length,
            location,
        };
        self.partial.clear();
        self.state = match status {
            // Interim responses: another one follows (RFC 9110 §15.2). There was no wish to upgrade.
            100 | 102..=199 => return Ok(()),
            101 => return Err(malformed("the server changes to another protocol".to_owned())),
            204 | 304 => State::Done,
            _ if chunked => State::ChunkSize,
            _ => match length {
                Some(0) => State::Done,
                Some(length) => State::Length(length),
                None => State::UntilClosed,
            },
        };
        self.head = Some(head);
        Ok(())
    }
}

fn is_empty(line: &[u8]) -> bool {
    matches!(line, b"\r\n" | b"\n")
}

fn field<'f>(fields: &'f [Header<'_>], name: &str) -> Option<&'f [u8]> {
    fields.iter().find(|field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
}

fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim().to_owned()
}

/// Whether the content comes in chunks, the only transfer coding that was not declined (RFC 9112 §6.1).
fn is_chunked(fields: &[Header<'_>]) -> Result<bool> {
    match field(fields, "transfer-encoding").map(text) {
        None => Ok(false),
        Some(coding) if coding.eq_ignore_ascii_case("chunked") => Ok(true),
        Some(coding) => Err(malformed(format!("its transfer coding {coding:?} was not asked for"))),
    }
}

/// The length of the content; all fields that say so must agree (RFC 9112 §6.3).
fn length(fields: &[Header<'_>]) -> Result<Option<u64>> {
    let mut length = None;
    let values = fields.iter().filter(|field| field.name.eq_ignore_ascii_case("content-length"));
    for value in values {
        let text = text(value.value);
        let number = Some(&text).filter(|text| text.bytes().all(|digit| digit.is_ascii_digit()));
        let number = number.and_then(|text| text.parse::<u64>().ok());
        match (number, length) {
            (Some(number), None) => length = Some(number),
            (Some(number), Some(other)) if number == other => {}
            _ => {
                return Err(malformed(format!("its length {text:?} is none, or not the only one")));
            }
        }
    }
    Ok(length)
}

fn malformed(reason: String) -> Error {
    Error::new(ErrorKind::Malformed, "read", "the server's response").with_reason(reason)
}
