//! How a program is to be supervised.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::listen::Listen;
use crate::saved::path;

/// What `handover exec` is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// The program, by a path or a name in PATH.
    pub program: OsString,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where to listen for it. What is bound is not bound again.
    #[serde(skip)]
    pub listen: Vec<Listen>,
    /// Whether the sockets that the program binds by itself are kept for its next generation.
    #[serde(default)]
    pub intercept: Intercept,
    /// A running server whose sockets the program is given, and which is told to stop when the program serves.
    #[serde(skip)]
    pub take_over: Option<i32>,
    /// Whether the sockets are non-blocking when the program gets them.
    pub non_blocking: bool,
    /// How many processes of it to run.
    pub workers: usize,
    /// What proves that one can serve.
    pub ready: Ready,
    /// A shell command that must succeed as well.
    pub ready_command: Option<String>,
    /// How long after its last `bind` or `listen` one is taken for ready.
    #[serde(default)]
    pub ready_delay: Option<Duration>,
    /// How long one may take until it is ready.
    pub ready_timeout: Duration,
    /// How long new workers must live beside the old ones before these are told to stop.
    pub trial: Duration,
    /// How an old one is told to stop.
    pub stop_signal: StopSignal,
    /// What SIGHUP means. SIGUSR1 is passed on in any case.
    #[serde(default)]
    pub hangup: Hangup,
    /// The message on Node's channel that tells it instead.
    pub stop_message: Option<String>,
    /// How long it may take; zero for ever.
    pub drain_timeout: Duration,
    /// Whether old and new processes may run at the same time.
    pub overlap: bool,
    /// How many are replaced at a time, if not all.
    pub surge: Option<usize>,
    /// Whether each line that a worker writes begins with its generation and number.
    pub log_prefix: bool,
    /// The user that the program runs as.
    pub user: Option<String>,
    /// What `--name` finds this service by.
    pub name: Option<String>,
    /// Whether the listeners are put into systemd's fd store; they are in any case if systemd says that there is one.
    pub fd_store: bool,
    /// A file for the pid of the supervisor.
    #[serde(with = "path::option")]
    pub pid_file: Option<PathBuf>,
}

/// What proves that a worker can serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ready {
    /// Whichever of the others comes first.
    #[default]
    Any,
    /// It is seen to wait for connections on every listener.
    Waits,
    /// It says READY=1 on NOTIFY_SOCKET.
    Notify,
    /// It sends `ready` on Node's channel.
    Message,
}

/// Whether the sockets that a program binds by itself are kept for its next generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Intercept {
    /// They are its own affair.
    #[default]
    Off,
    /// If that can be done here, or if nothing else proves that the program is ready.
    IfPossible,
    /// In any case.
    On,
}

/// What SIGHUP means to a supervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hangup {
    /// As SIGUSR2: replace the program.
    #[default]
    Upgrade,
    /// It is passed on to the program.
    Pass,
    /// Nothing.
    Ignore,
}

/// A signal by name or number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct StopSignal(pub(super) Signal);

impl Default for StopSignal {
    fn default() -> Self {
        Self(Signal::SIGTERM)
    }
}

impl FromStr for StopSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse::<i32>().ok().and_then(|number| Signal::try_from(number).ok());
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
        let signal = number.or_else(|| name.parse().ok());
        signal.map(Self).ok_or_else(|| format!("`{text}` is no signal: write TERM, QUIT, INT, USR1 or a number"))
    }
}

impl From<StopSignal> for String {
    fn from(signal: StopSignal) -> Self {
        signal.to_string()
    }
}

impl TryFrom<String> for StopSignal {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::fmt::Display for StopSignal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.as_str())
    }
}

impl Options {
    /// Whether the program gets Node's channel: only if it is asked for, because it keeps a program alive that listens
    /// to it.
    pub(super) fn wants_node_channel(&self) -> bool {
        self.ready == Ready::Message || self.stop_message.is_some()
    }

    pub(super) fn intercepts(&self) -> bool {
        self.intercept != Intercept::Off
    }

    /// Whether a while after its last `bind` or `listen` is proof enough, where that is asked for.
    pub(super) fn may_be_delayed(&self) -> bool {
        self.intercepts() && self.may_be_seen()
    }

    /// Whether seeing a worker wait for connections is proof enough.
    pub(super) fn may_be_seen(&self) -> bool {
        matches!(self.ready, Ready::Any | Ready::Waits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        let read = |text: &str| text.parse::<StopSignal>().map(|signal| signal.to_string());
        for text in ["SIGQUIT", "quit", "QUIT", "3"] {
            assert_eq!(read(text).as_deref(), Ok("SIGQUIT"));
        }
        assert!(read("99").is_err() && read("SIGNONE").is_err());
    }
}
