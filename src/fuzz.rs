//! What `scripts/fuzz.sh` throws bytes at: everything that reads what another process, a user or the kernel has written.
//!
//! Each function takes any bytes at all. It must return, whatever they are, and it asserts what must hold for all of them.
//! Here are those of the library; those of the command are in `src/cli/fuzz.rs`. What a campaign has found worth keeping is in
//! `tests/data/fuzz`, a directory for each target, and ordinary tests go through all of it.

#[cfg(test)]
mod replay;

/// A target: its name, and what is called.
pub type Target = (&'static str, fn(&[u8]));

/// By their names.
pub const TARGETS: &[Target] = &[
    ("answers", crate::control::fuzz::answers),
    #[cfg(feature = "cli")]
    ("conversation", crate::supervisor::fuzz::conversation),
    ("environment", crate::inherit::fuzz),
    #[cfg(feature = "cli")]
    ("epoll-sets", crate::supervisor::fuzz::seen),
    ("frames", crate::protocol::fuzz),
    #[cfg(feature = "cli")]
    ("node-messages", crate::supervisor::fuzz::node_messages),
    #[cfg(feature = "cli")]
    ("notifications", crate::supervisor::fuzz::notifications),
    ("offers", crate::channel::fuzz_offer),
    ("requests", crate::control::fuzz::requests),
    #[cfg(feature = "cli")]
    ("saved-state", crate::supervisor::fuzz::saved_state),
    ("sock-diag", crate::sock_diag::fuzz),
    #[cfg(feature = "cli")]
    ("socket-addresses", crate::supervisor::fuzz::socket_addresses),
    ("stderr", crate::upgrade::stderr::fuzz),
    ("streams", crate::channel::fuzz_stream),
    ("unix-sockets", crate::control::fuzz::unix_sockets),
];

/// The first byte says in how many pieces the rest comes.
pub(crate) fn in_pieces(bytes: &[u8]) -> (std::slice::Chunks<'_, u8>, &[u8]) {
    // Each costs a few system calls.
    const PIECES_MAX: usize = 32;
    let (first, rest) = bytes.split_first().unwrap_or((&0, &[]));
    let pieces = usize::from(*first) % PIECES_MAX + 1;
    (rest.chunks(rest.len().div_ceil(pieces).max(1)), rest)
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_found_does_no_harm_any_more() {
        super::replay::replay(super::TARGETS);
    }
}
