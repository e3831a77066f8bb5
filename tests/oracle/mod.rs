//! A load client that counts every request by how it ended, and believes nothing.
//!
//! It decides whether a server was replaced without loss, so every doubt counts against the server: only an
//! answer that is complete by its own framing, of the expected shape and followed by nothing is `ok`. What a
//! client must put up with is no failure and is counted apart: a close that was announced, or a close between
//! two requests of a kept connection.
//!
//! ```ignore
//! let running = Load::new(address).new_connections(16).kept(16).slow(2, 15.0).start();
//! running.wait_for_generation(2, Duration::from_secs(10))?;
//! running.wait_for_more(1000, Duration::from_secs(10))?;
//! running.stop().assert_lossless();
//! ```

// Each test and the command use a part of it; none uses all.
#![allow(dead_code, unreachable_pub, unused_imports)]

mod outcome;
mod target;
mod standstill;
mod wire;
mod connection;
mod http;
mod websocket;
mod tally;
mod load;
mod client;
pub mod controls;
#[cfg(test)]
mod tests;

pub use load::{InVain, Load, Running, Stopper};
pub use outcome::{Answer, Outcome};
pub use tally::{Closes, Failure, Kind, Tally};
pub use target::Target;
