//! Replace a running server with its new build without dropping a connection.
//!
//! A running server starts its new build, passes it the listening sockets themselves (SCM_RIGHTS), and goes on accepting
//! until the new build says that it is ready. Then it accepts no more, finishes the connections that it has, and exits.
//! The sockets are never closed, so nobody is refused; connections that arrive in between wait in the queue of the
//! socket, which belongs to no process. If the new build fails before it is ready, or dies in the first second after,
//! the old one serves on.
//!
//! ```no_run
//! use handover::{Config, Handover};
//! # fn serve(_: handover::Connection<std::net::TcpStream>) {}
//!
//! fn main() -> Result<(), handover::Error> {
//!     let handover = Handover::start(Config::default())?; // inherits, or starts generation 1
//!     let http = handover.tcp("http", "0.0.0.0:8080")?; // handed over by name, or bound
//!     std::thread::spawn(move || {
//!         for connection in http.incoming() {
//!             std::thread::spawn(move || serve(connection));
//!         }
//!     });
//!     handover.ready()?; // returns when this process owns the listeners
//!     handover.wait(); // upgraded or told to stop, and every connection has ended
//!     Ok(())
//! }
//! ```
//!
//! An upgrade is asked for by `handover upgrade --pid N` (or [`control::Client`]), by SIGUSR2, or by the program itself
//! with [`Handover::upgrade`].
//!
//! # The stages
//!
//! ```text
//!  old process                                     new process
//!  serving ── trigger ──▶ spawn ────────────────▶ `Handover::start`
//!              offer: names + sockets ──────────▶ checks them
//!              ◀─────────────────────── adopted   holds the listeners, accepts nothing
//!              …the application starts up…        `tcp("http", …)`
//!              ◀───────────────────────── ready   `ready()`
//!  gate shut ─ commit ──────────────────────────▶ accepts
//!  trial   (new process dies ⇒ accepts again)
//!  drain ── connections end or drain_timeout ──▶ `wait()` returns
//! ```
//!
//! # What holds
//!
//! * Whichever process is killed at whatever instant, another one accepts, or will without help. Only connections that
//!   the killed one had already accepted are lost.
//! * At most one of the two accepts at a time, whatever the program does before [`ready`](Handover::ready).
//! * Until commit a failure of any kind ends with the new process killed, and the old one serving as if nothing had
//!   happened.
//! * Both generations hold the very same socket: `SO_COOKIE` does not change.
//!
//! # Features
//!
//! | feature | gives |
//! |---|---|
//! | `cli` (default) | the `handover` command; a library user turns it off with `default-features = false` |
//! | `tokio` | listeners for tokio: `handover::tokio` |
//! | `hyper` | HTTP/1 and HTTP/2 drained without loss: `handover::hyper` |
//! | `axum` | one call in place of `axum::serve`: `handover::axum` |
//!
//! Linux 5.4 or later.

#![deny(unsafe_code)]
// Nothing that the outside does may end the process.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::unreachable)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// In the order of an upgrade.
mod config;
mod handover;
mod shared;
mod engine;
mod upgrade;
mod inherit;
#[cfg(test)]
mod garbled;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(test)]
mod model;
mod state;
#[cfg(feature = "cli")]
mod saved;
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
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod supervisor;
mod sock_diag;
mod systemd;
mod pid_file;
mod watch;
mod poll;
mod reap;
mod both;
mod text;
mod fault;
mod error;
#[allow(unsafe_code)]
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
pub use upgrade::preflight::check as check_program;
