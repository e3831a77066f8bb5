//! `handover exec`: keeps one pid, holds the listeners, and replaces the program below it.
#![allow(dead_code)]

mod connections;
mod family;
mod listen;
mod machine;
mod seen;
mod sockets;

pub use listen::Listen;
