//! How a request can end.

use std::fmt;
use std::io::{self, ErrorKind};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    Ok,
    /// Nobody took the connection.
    Refused,
    /// The connection was reset, or the server stopped reading.
    Reset,
    /// The end of the connection came before the end of the answer; or a reset, if the connection had served
    /// before and not a byte of this answer came.
    Cut,
    TimedOut,
    /// An answer, but not the one that was due.
    Wrong,
    /// This client could not do its part, for lack of ports or file descriptors. Not the server's failure, but
    /// a run that has many of them proves little.
    Client,
    /// Sent before the server's announcement of the close had arrived. The client may send it again.
    Announced,
}

impl Outcome {
    pub const ALL: [Outcome; 8] = [
        Outcome::Ok,
        Outcome::Refused,
        Outcome::Reset,
        Outcome::Cut,
        Outcome::TimedOut,
        Outcome::Wrong,
        Outcome::Client,
        Outcome::Announced,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Refused => "refused",
            Outcome::Reset => "reset",
            Outcome::Cut => "cut",
            Outcome::TimedOut => "timed_out",
            Outcome::Wrong => "wrong",
            Outcome::Client => "client",
            Outcome::Announced => "announced",
        }
    }

    /// Whether the server lost this request.
    pub fn is_failure(self) -> bool {
        !matches!(self, Outcome::Ok | Outcome::Client | Outcome::Announced)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Why a request was not answered as it should have been.
#[derive(Clone, Debug)]
pub struct Trouble {
    pub outcome: Outcome,
    pub reason: String,
}

impl Trouble {
    pub fn wrong(reason: impl Into<String>) -> Self {
        Self { outcome: Outcome::Wrong, reason: reason.into() }
    }

    pub fn cut(reason: impl Into<String>) -> Self {
        Self { outcome: Outcome::Cut, reason: reason.into() }
    }

    /// An error of `connect()`, or of what comes before it.
    pub fn connecting(error: &io::Error) -> Self {
        let outcome = match error.raw_os_error() {
            Some(libc::EADDRNOTAVAIL | libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EPERM) => {
                Outcome::Client
            }
            Some(libc::ECONNRESET | libc::EPIPE | libc::ECONNABORTED) => Outcome::Reset,
            // With SO_SNDTIMEO a connect that takes too long ends with EINPROGRESS, EALREADY when it was
            // interrupted before, and EAGAIN on a Unix socket.
            Some(libc::ETIMEDOUT | libc::EINPROGRESS | libc::EALREADY | libc::EAGAIN) => Outcome::TimedOut,
            // ECONNREFUSED, ENOENT, and whatever else keeps a connection from being taken.
            _ => Outcome::Refused,
        };
        Self { outcome, reason: format!("connect: {error}") }
    }

    /// An error on a connection that was established.
    pub fn talking(error: &io::Error) -> Self {
        let outcome = match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::TimedOut,
            ErrorKind::UnexpectedEof => Outcome::Cut,
            // ECONNRESET, EPIPE, and whatever else ends a connection the hard way.
            _ => Outcome::Reset,
        };
        Self { outcome, reason: error.to_string() }
    }
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub generation: u64,
    pub pid: u32,
}

impl Answer {
    /// Reads `gen=<generation> pid=<pid>` and returns what follows it.
    pub fn parse(text: &[u8]) -> Option<(Answer, &[u8])> {
        let (generation, rest) = number(text.strip_prefix(b"gen=")?)?;
        let (pid, rest) = number(rest.strip_prefix(b" pid=")?)?;
        Some((Answer { generation, pid: u32::try_from(pid).ok()? }, rest))
    }
}

fn number(text: &[u8]) -> Option<(u64, &[u8])> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = std::str::from_utf8(&text[..digits]).ok()?.parse().ok()?;
    Some((number, &text[digits..]))
}

/// The first bytes of what was sent or came, readable on one line.
pub fn excerpt(bytes: &[u8]) -> String {
    const SHOWN: usize = 200;
    let mut text = String::from("`");
    text.push_str(&bytes[..bytes.len().min(SHOWN)].escape_ascii().to_string());
    text.push_str(if bytes.len() > SHOWN { "…`" } else { "`" });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_strictly() {
        let one = Answer { generation: 3, pid: 71 };
        assert_eq!(Answer::parse(b"gen=3 pid=71"), Some((one, &b""[..])));
        assert_eq!(Answer::parse(b"gen=3 pid=71 hello"), Some((one, &b" hello"[..])));
        for bad in ["", "gen=", "gen= pid=1", "gen=3 pid=", "gen=3  pid=1", "gen=-1 pid=1", "gen=3 pid=99999999999"] {
            assert_eq!(Answer::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn lack_of_ports_is_the_clients_own_failure() {
        let outcome = |errno| Trouble::connecting(&io::Error::from_raw_os_error(errno)).outcome;
        assert_eq!(outcome(libc::EADDRNOTAVAIL), Outcome::Client);
        assert_eq!(outcome(libc::EMFILE), Outcome::Client);
        assert_eq!(outcome(libc::ECONNREFUSED), Outcome::Refused);
        assert_eq!(outcome(libc::ENOENT), Outcome::Refused);
        assert_eq!(outcome(libc::ECONNRESET), Outcome::Reset);
        assert_eq!(outcome(libc::EAGAIN), Outcome::TimedOut);
        assert!(!Outcome::Client.is_failure());
    }
}
