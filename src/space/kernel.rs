//! The version of the running kernel.

use std::fmt;
use std::sync::OnceLock;

/// A kernel's major and minor version, the beginning of `uname -r`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelVersion {
    /// The 6 of 6.12.
    pub major: u32,
    /// The 12 of 6.12.
    pub minor: u32,
}

impl KernelVersion {
    /// Version `major.minor`.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// The version of the kernel that this process runs on.
    ///
    /// A release string that does not begin with two numbers counts as 0.0, older than every kernel, so
    /// that every version-dependent hazard applies.
    pub fn running() -> Self {
        static RUNNING: OnceLock<KernelVersion> = OnceLock::new();
        *RUNNING.get_or_init(|| {
            nix::sys::utsname::uname()
                .ok()
                .and_then(|name| Self::parse(name.release().to_str()?))
                .unwrap_or(Self::new(0, 0))
        })
    }

    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        Some(Self::new(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_parsed_and_malformed_ones_are_not() {
        assert_eq!(KernelVersion::parse("5.10.0-33-amd64"), Some(KernelVersion::new(5, 10)));
        assert_eq!(KernelVersion::parse("7.3.4+deb14-amd64"), Some(KernelVersion::new(7, 3)));
        assert_eq!(KernelVersion::parse("6.1-rc3"), Some(KernelVersion::new(6, 1)));
        assert_eq!(KernelVersion::parse("next"), None);
        assert_eq!(KernelVersion::parse(""), None);
        assert!(KernelVersion::new(5, 10) < KernelVersion::new(6, 1));
    }
}
