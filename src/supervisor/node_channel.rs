//! Node's own channel to a parent process: NODE_CHANNEL_FD, a line of JSON for each message. It is what
//! `process.send('ready')` and `process.on('message', …)` use, and with them every program that was written for pm2.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::saved;

/// Longer messages are passed over.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// One program that writes without end must not keep the others waiting.
const BYTES_AT_ONCE: usize = 64 << 10;

#[derive(Serialize, Deserialize)]
pub(super) struct NodeChannel {
    /// None when the program has closed it.
    #[serde(with = "saved::fd::option")]
    stream: Option<UnixStream>,
    incoming: Vec<u8>,
}

impl NodeChannel {
    /// This side, and the one for the program.
    pub(super) fn pair() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { stream: Some(ours), incoming: Vec::new() }, theirs))
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.stream.as_ref().map(AsFd::as_fd)
    }

    /// The messages that have come whole, or as many as there are in one read's worth. Node's own (`{"cmd":"NODE_…"}`) are
    /// among them.
    pub(super) fn read(&mut self) -> Vec<Value> {
        let mut buffer = [0; 4096];
        let mut taken = 0;
        while let Some(stream) = self.stream.as_mut().filter(|_| taken < BYTES_AT_ONCE) {
            match stream.read(&mut buffer) {
                Ok(0) => self.stream = None,
                Ok(count) => {
                    taken += count;
                    self.incoming.extend_from_slice(buffer.get(..count).unwrap_or_default());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.stream = None,
            }
            if self.incoming.len() > MESSAGE_BYTES_MAX && !self.incoming.contains(&b'\n') {
                self.incoming.clear();
            }
        }
        let Some(end) = self.incoming.iter().rposition(|byte| *byte == b'\n') else { return vec![] };
        let whole: Vec<u8> = self.incoming.drain(..=end).collect();
        whole.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    /// A string, as `process.send('…')` sends it.
    pub(super) fn send(&mut self, text: &str) -> io::Result<()> {
        let gone = || io::Error::new(ErrorKind::BrokenPipe, "the program has closed the channel");
        let stream = self.stream.as_mut().ok_or_else(gone)?;
        let line = format!("{}\n", Value::from(text));
        match stream.write(line.as_bytes())? {
            written if written == line.len() => Ok(()),
            _ => Err(io::Error::new(ErrorKind::WouldBlock, "the program does not read its messages")),
        }
    }
}

/// The messages are the lines that are JSON, in whatever pieces they come.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let (pieces, whole) = crate::fuzz::in_pieces(bytes);
    let Ok((mut ours, mut theirs)) = NodeChannel::pair() else { return };
    let mut messages = vec![];
    for piece in pieces {
        let _ = theirs.write_all(piece);
        messages.extend(ours.read());
    }
    let lines = whole.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"));
    let wanted: Vec<Value> = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
    assert_eq!(messages, wanted);
    drop(theirs);
    ours.read();
    assert!(ours.fd().is_none());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines_of_json() {
        let (mut ours, mut theirs) = NodeChannel::pair().unwrap();
        theirs.write_all(b"{\"cmd\":\"NODE_HANDLE_ACK\"}\n\"rea").unwrap();
        assert_eq!(ours.read().len(), 1);
        theirs.write_all(b"dy\"\nnonsense\n").unwrap();
        assert_eq!(ours.read(), [Value::from("ready")]);
        ours.send("shut\"down").unwrap();
        let mut buffer = [0; 64];
        let count = theirs.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"\"shut\\\"down\"\n");
        theirs.write_all(&vec![b'x'; 100_000]).unwrap();
        assert!(ours.read().is_empty() && ours.incoming.len() <= MESSAGE_BYTES_MAX + 4096);
        drop(theirs);
        assert!(ours.read().is_empty() && ours.fd().is_none());
        assert!(ours.send("x").is_err());
    }

    /// The supervisor has others to listen to.
    #[test]
    fn a_program_that_never_stops_talking_is_heard_in_parts() {
        let (mut ours, mut theirs) = NodeChannel::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut written = 0;
        while let Ok(count) = theirs.write("1\n".repeat(2048).as_bytes()) {
            written += count / 2;
        }
        let first = ours.read().len();
        assert!(first < written, "{first} of {written} at once");
        let rest: usize = (0..written).map(|_| ours.read().len()).sum();
        assert_eq!(first + rest, written);
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_program_writes_is_read(text in proptest::collection::vec(proptest::num::u8::ANY, 0..2000)) {
            let (mut ours, mut theirs) = NodeChannel::pair().unwrap();
            theirs.write_all(&text).unwrap();
            ours.read();
            theirs.write_all(b"\n\"ready\"\n").unwrap();
            assert_eq!(ours.read().last(), Some(&Value::from("ready")));
        }
    }
}
