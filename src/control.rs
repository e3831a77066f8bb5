//! The control socket: where `upgrade`, `status` and `stop` ask.
//!
//! [`Client`] asks one process; [`Target`] says which, and [`services`] finds all of them. What crosses the socket is
//! specified in `docs/protocol.md`.

mod client;
pub(crate) mod directory;
mod find;
pub(crate) mod messages;
pub(crate) mod server;

pub use client::{Answer, Client};
pub(crate) use find::state_of;
pub use find::{Service, Target, services};
#[cfg(feature = "cli")]
pub(crate) use find::{service_of, unix_sockets};
pub use messages::{
    AcceptedEvent, BuildIdentity, ConnectionCounts, LastUpgrade, Limits, ListenerStatus, Outcome, ResultEvent,
    StageEvent, StageName, State, Status, UpgradeRequest, Wait, WorkerStatus,
};

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz {
    pub(crate) use super::client::fuzz as answers;
    pub(crate) use super::find::fuzz as unix_sockets;
    pub(crate) use super::server::fuzz as requests;
}

/// The longest request line.
pub(crate) const REQUEST_BYTES_MAX: usize = 256 << 10;
/// The longest line of an answer: a status with thousands of listeners.
pub(crate) const ANSWER_BYTES_MAX: usize = 8 << 20;
