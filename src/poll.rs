//! Waiting for one fd with a deadline.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The time left in the form that `poll` takes, rounded up so that a deadline has passed when `poll` returns.
pub(crate) fn timeout(left: Option<Duration>) -> PollTimeout {
    match left {
        None => PollTimeout::NONE,
        Some(left) => {
            let milliseconds = left.as_micros().div_ceil(1000);
            PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
        }
    }
}

/// Waits until one of `fds` has an event, or until the deadline. The fds keep what was found.
pub(crate) fn wait_any(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match poll(fds, timeout(left)) {
            Ok(0) if left.is_none_or(|left| !left.is_zero()) => {}
            Ok(count) => return Ok(usize::try_from(count).unwrap_or_default()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether `fd` had an event before the deadline.
pub(crate) fn wait(fd: BorrowedFd<'_>, events: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
    Ok(wait_any(&mut [PollFd::new(fd, events)], deadline)? > 0)
}
