//! Points at which a test makes this process fail: killed, stopped, its channel cut, a frame damaged, out of fds.
//!
//! Only with the feature `fault-points`, which is for the tests of this crate. Without it these functions are empty, and
//! nothing of them is in the program.

#[cfg(feature = "fault-points")]
mod armed;

#[cfg(feature = "fault-points")]
pub(crate) use armed::{reached, sends};

/// A step of an upgrade has been reached, with this channel to the other side.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub(crate) fn reached(_step: &str, _channel: Option<&crate::channel::Channel>) {}

/// A frame is about to be sent; it may be another that goes.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub(crate) fn sends(_frame: &str, bytes: Vec<u8>, _stream: &std::os::unix::net::UnixStream) -> Vec<u8> {
    bytes
}
