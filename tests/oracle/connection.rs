//! One connection: what is sent on it, and its bytes as they come, bounded and remembered for the report.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use super::outcome::{Outcome, Trouble, excerpt};
use super::target::Target;
use super::wire::{Look, Wire};

/// How long a server that is to close may take, also on a busy machine. After that the client closes.
const CLOSE_WAIT: Duration = Duration::from_secs(10);
const CHUNK: usize = 16 * 1024;
const REMEMBERED: usize = 256;

#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    /// Before the call of `connect()`.
    pub opened: Instant,
    /// Requests answered so far.
    pub answered: u64,
    unread: Vec<u8>,
    /// Bytes sent before the present request.
    sent_before: u64,
    /// The first bytes that came since the present request was sent, and how many there were.
    seen: Vec<u8>,
    seen_bytes: u64,
}

/// How the server let go of a connection after its last answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Closed,
    /// The answer had been read whole, but on a slower network a reset may overtake it.
    Reset,
    LeftOpen,
}

impl Connection {
    pub fn open(target: &Target, deadline: Instant) -> Result<Self, Trouble> {
        let opened = Instant::now();
        Ok(Self::new(Wire::connect(target, deadline)?, opened))
    }

    pub fn new(wire: Wire, opened: Instant) -> Self {
        Self { wire, opened, answered: 0, unread: vec![], sent_before: 0, seen: vec![], seen_bytes: 0 }
    }

    /// Sees whether the server let go of the connection between two requests, or spoke unasked.
    pub fn look(&self) -> Look {
        if self.unread.is_empty() { self.wire.look() } else { Look::Unread }
    }

    pub fn send(&mut self, request: &[u8], deadline: Instant) -> Result<(), Trouble> {
        self.wire.set_deadline(deadline);
        self.sent_before = self.wire.sent();
        self.seen.clear();
        self.seen_bytes = 0;
        self.wire.write_all(request).map_err(|error| Trouble::talking(&error))
    }

    /// Whether not a byte of the present request left this client.
    pub fn unsent(&self) -> bool {
        self.wire.sent() == self.sent_before
    }

    /// Whether not a byte came since the present request was sent.
    pub fn heard_nothing(&self) -> bool {
        self.seen_bytes == 0
    }

    /// What came of the answer, for the report.
    pub fn came(&self, reason: &str) -> String {
        match self.seen_bytes {
            0 => format!("{reason}; no byte of an answer"),
            bytes => format!("{reason}; {bytes} bytes: {}", excerpt(&self.seen)),
        }
    }

    fn fill(&mut self) -> Result<(), Trouble> {
        let mut chunk = [0; CHUNK];
        match self.wire.read(&mut chunk) {
            Ok(0) => Err(Trouble::cut("end of the connection before the end of the answer")),
            Ok(count) => {
                let room = REMEMBERED.saturating_sub(self.seen.len()).min(count);
                self.seen.extend_from_slice(&chunk[..room]);
                self.seen_bytes += count as u64;
                self.unread.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            Err(error) => Err(Trouble::talking(&error)),
        }
    }

    /// Reads to the next line feed, which the line includes.
    pub fn line(&mut self, most: usize) -> Result<Vec<u8>, Trouble> {
        let mut searched = 0;
        loop {
            let end = self.unread[searched..].iter().position(|&byte| byte == b'\n');
            let length = end.map_or(self.unread.len(), |end| searched + end + 1);
            if length > most {
                return Err(Trouble::wrong(format!("no end of line within {most} bytes")));
            }
            if end.is_some() {
                return Ok(self.unread.drain(..length).collect());
            }
            searched = length;
            self.fill()?;
        }
    }

    pub fn bytes(&mut self, count: usize) -> Result<Vec<u8>, Trouble> {
        while self.unread.len() < count {
            self.fill()?;
        }
        Ok(self.unread.drain(..count).collect())
    }

    /// An answer ends the exchange: nothing may follow it.
    pub fn nothing_follows(&self) -> Result<(), Trouble> {
        if self.unread.is_empty() {
            return Ok(());
        }
        Err(Trouble::wrong(format!("bytes after the answer: {}", excerpt(&self.unread))))
    }

    pub fn end_sending(&self) {
        self.wire.end_sending();
    }

    /// Waits for the server to close. That it closes first also leaves TIME_WAIT on its side, and this one does
    /// not run out of ports.
    pub fn see_closed(mut self) -> Result<Ending, Trouble> {
        self.nothing_follows()?;
        self.wire.set_deadline(Instant::now() + CLOSE_WAIT);
        let mut chunk = [0; REMEMBERED];
        match self.wire.read(&mut chunk) {
            Ok(0) => Ok(Ending::Closed),
            Ok(count) => Err(Trouble::wrong(format!("bytes after the answer: {}", excerpt(&chunk[..count])))),
            Err(error) if error.kind() == ErrorKind::TimedOut => Ok(Ending::LeftOpen),
            Err(_) => Ok(Ending::Reset),
        }
    }

    /// What to say of a server that spoke before it was asked.
    pub fn spoke_unasked(&mut self) -> Trouble {
        self.seen.clear();
        self.seen_bytes = 0;
        self.wire.set_deadline(Instant::now() + CLOSE_WAIT);
        if self.unread.is_empty() {
            let _ = self.fill();
        }
        Trouble {
            outcome: Outcome::Wrong,
            reason: format!("unasked, before the request was sent: {}", excerpt(&self.unread)),
        }
    }
}
