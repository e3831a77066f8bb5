//! Real processes, upgraded: each way in which it can go wrong, and that nothing is lost or left over.
//!
//! The server is `tests/fixture`, the client that counts is `tests/oracle`. Every test has a directory of its own, in
//! which the control sockets of its processes are too; whatever process has that directory in its environment belongs
//! to the test, and is killed by its pid when the test ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../oracle/mod.rs"]
mod oracle;

mod wait;
mod home;
mod command;
mod client;
mod server;
mod rights;

mod new_build;
mod wire;
mod trial;
mod old_process;
mod control;
mod old_wire;
mod limits;
mod hostile;
mod resources;
mod pid_file;
mod binary;
mod previous;
mod the_command;
mod check;
mod groups;
mod install;
mod terminal;
mod listeners;
mod datagrams;
mod drain;
mod signals;
mod inheritance;
mod state;
mod pull;
mod restart;
mod activation;
mod namespaces;
mod load;
mod compat;
mod exec;
#[cfg(feature = "fault-points")]
mod faults;
