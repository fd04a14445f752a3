//! The kernel log, as this program finds it.

/// The lines that hold a text.
pub fn lines_with(text: &str) -> Vec<String> {
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0u8; 8 << 20];
    // SAFETY: the buffer is as long as is said.
    let len =
        unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), buffer.len() as libc::c_int) };
    let log = String::from_utf8_lossy(&buffer[..usize::try_from(len).unwrap()]).into_owned();
    log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
}
