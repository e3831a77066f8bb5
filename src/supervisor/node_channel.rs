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

    /// The messages that have come whole. Node's own (`{"cmd":"NODE_…"}`) are among them.
    pub(super) fn read(&mut self) -> Vec<Value> {
        let mut buffer = [0; 4096];
        while let Some(stream) = &mut self.stream {
            match stream.read(&mut buffer) {
                Ok(0) => self.stream = None,
                Ok(count) => self.incoming.extend_from_slice(buffer.get(..count).unwrap_or_default()),
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
