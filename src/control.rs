//! The control socket: where `upgrade`, `status` and `stop` ask.
//!
//! [`messages`] is what crosses it, `server` the side of the process that serves, [`Client`] the side that asks, and
//! `find` how the asking side finds the socket that a process really listens on.

mod client;
mod directory;
mod find;
pub(crate) mod messages;
pub(crate) mod server;

pub use client::{Answer, Client};
pub use find::{Service, Target, services};
pub use messages::{
    AcceptedEvent, BuildIdentity, ConnectionCounts, LastUpgrade, ListenerStatus, Outcome, ResultEvent, StageEvent,
    StageName, State, Status, UpgradeRequest, Wait,
};

/// The longest request line.
pub(crate) const REQUEST_BYTES_MAX: usize = 256 << 10;
/// The longest line of an answer: a status with thousands of listeners.
pub(crate) const ANSWER_BYTES_MAX: usize = 8 << 20;
