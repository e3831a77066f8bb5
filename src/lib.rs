//! Replace a running server with its new build without dropping a connection.
#![warn(missing_docs)]
// In the order of an upgrade.
mod config;
mod handover;
mod shared;
mod engine;
mod upgrade;
mod inherit;
mod state;
mod channel;
mod protocol;
mod listeners;
mod gate;
mod net;
mod connections;
#[cfg(feature = "tokio")]
pub mod tokio;
#[cfg(feature = "hyper")]
pub mod hyper;
#[cfg(feature = "axum")]
pub mod axum;
pub mod control;
mod watch;
mod poll;
mod error;
mod sys;

pub use config::{Config, Signals};
pub use connections::{Connection, Guard};
pub use error::{Error, ErrorKind};
pub use handover::{Draining, Handover};
pub use listeners::{Source, TcpOptions, Unclaimed, UnixOptions};
pub use net::{TcpListener, UdpSocket, UnixDatagram, UnixListener};
pub use protocol::{Claims, DrainingGeneration, Kind};
pub use shared::Drained;
pub use state::HandedState;
