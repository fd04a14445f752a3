//! Inputs to start from, for the Ethernet driver on a card: frames come and go, alone and for a stack.

/// A frame that comes: the step, the descriptor and the number of words, the flags, the length, and the bytes.
fn comes(descriptor: u8, flags: u32, bytes: &[u8; 60]) -> Vec<u8> {
    let mut step = vec![2, 15 << 3 | descriptor];
    step.extend(flags.to_le_bytes());
    step.extend([0, 0]);
    step.extend(bytes);
    step
}

/// Who has 10.0.0.1?
fn arp() -> [u8; 60] {
    let mut bytes = [0; 60];
    bytes[..6].fill(0xff);
    bytes[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 8, 6]);
    bytes[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    bytes[22..32].copy_from_slice(&[2, 0, 0, 0, 0, 2, 10, 0, 0, 2]);
    bytes[38..42].copy_from_slice(&[10, 0, 0, 1]);
    bytes
}

/// TCP from 10.0.0.2 to port 80 of 10.0.0.1, with these flags (RFC 9293 §3.1) and sequence number. The card says that
/// its checksum is right.
fn tcp(flags: u8, sequence: u8) -> [u8; 60] {
    let mut bytes = [0; 60];
    bytes[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    bytes[14..26].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0x66, 0xce]);
    bytes[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
    bytes[34..42].copy_from_slice(&[4, 0xd2, 0, 80, 0, 0, 0, sequence]);
    bytes[46..50].copy_from_slice(&[0x50, flags, 0x10, 0]);
    bytes
}

/// Inputs for both cards.
pub fn of_ethernet_driver() -> Vec<(String, Vec<u8>)> {
    const CHECKED: u32 = 1 << 5;
    let receive = || vec![8, 8];
    let frames = [
        receive(),
        comes(0, 0, &arp()),
        receive(),
        // Two go, of which one has its checksums made, and are sent.
        vec![9, 2, 1, 60, 0, 3, 60, 0],
        [&[1, 1][..], &(1u64 << 32).to_le_bytes()].concat(),
        vec![11, 12, 13],
        // A packet of two buffers, and a longer one than there are.
        vec![9, 2, 0x80, 60, 0, 0, 60, 0, 9, 1, 5, 0, 8, 100, 0],
        // All that was given is claimed to have come, and the card is reset.
        [&[1, 0][..], &(60u64 << 32 | 3).to_le_bytes()].concat(),
        receive(),
        vec![14],
    ];
    // Any other step lets the stack work.
    let work = || vec![8];
    let stack = [
        work(),
        comes(0, 0, &arp()),
        work(),
        comes(1, CHECKED, &tcp(2, 0)),
        work(),
        comes(2, CHECKED, &tcp(0x10, 1)),
        work(),
    ];
    let of_both = |name: &str, choice: u8, steps: &[Vec<u8>]| {
        [0, 1].map(|card| {
            (format!("{name}-{card}"), [&[choice | card], &steps.concat()[..]].concat())
        })
    };
    [of_both("frames", 0, &frames), of_both("stack", 6, &stack)].into_iter().flatten().collect()
}
