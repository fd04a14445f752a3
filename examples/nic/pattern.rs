//! What the server at the other end of an emulated card's wire has: bytes that are as good as random.

use std::io::{self, Read};

/// The name of its host.
pub const HOST: &str = "server.test";

/// So many bytes, the same ones each time.
pub struct Pattern {
    left: u64,
    state: u64,
    /// How many bytes of the state were read.
    used: usize,
}

impl Pattern {
    pub fn new(len: u64) -> Self {
        Self { left: len, state: 0x9e37_79b9_7f4a_7c15, used: 8 }
    }
}

impl Read for Pattern {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        let mut rest = &mut bytes[..len];
        while !rest.is_empty() {
            if self.used == 8 {
                // xorshift64 (Marsaglia 2003).
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.used = 0;
            }
            let unread = &self.state.to_le_bytes()[self.used..];
            let count = unread.len().min(rest.len());
            rest[..count].copy_from_slice(&unread[..count]);
            self.used += count;
            rest = &mut rest[count..];
        }
        self.left -= len as u64;
        Ok(len)
    }
}

/// The number of bytes that a name such as `16MiB` says.
pub fn size(name: &str) -> Option<u64> {
    let (digits, shift) = match name {
        _ if name.ends_with("KiB") => (&name[..name.len() - 3], 10),
        _ if name.ends_with("MiB") => (&name[..name.len() - 3], 20),
        _ => (name, 0),
    };
    let number: u64 = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))?;
    number.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_do_not_depend_on_how_they_are_read() {
        let mut whole = Vec::new();
        Pattern::new(1003).read_to_end(&mut whole).unwrap();
        assert_eq!(whole.len(), 1003);
        for size in [1, 7, 8, 9, 15, 64, 999] {
            let (mut pattern, mut pieces, mut piece) =
                (Pattern::new(1003), Vec::new(), vec![0; size]);
            loop {
                match pattern.read(&mut piece).unwrap() {
                    0 => break,
                    len => pieces.extend_from_slice(&piece[..len]),
                }
            }
            assert!(pieces == whole, "{size}");
        }
    }

    #[test]
    fn a_name_says_a_size() {
        assert_eq!(size("16MiB"), Some(16 << 20));
        assert_eq!(size("3KiB"), Some(3 << 10));
        assert_eq!(size("17"), Some(17));
        for name in ["", "MiB", "+1", "1GiB", "99999999999999MiB", "x"] {
            assert_eq!(size(name), None, "{name}");
        }
    }
}
