//! The filter of a worker: its calls of `bind` and `listen` wait until they are answered here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags};
use sendfd::SendWithFd;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::fault;
use crate::saved::fd;
use crate::sys::{self, Notification};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Interception {
    stage: Stage,
    /// Calls that can be answered only when another worker has gone on.
    pub(super) waiting: Vec<Notification>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Stage {
    /// The trampoline sends the filter's fd there.
    Awaited(#[serde(with = "fd")] UnixStream),
    Installed(#[serde(with = "fd")] OwnedFd),
    /// Nobody is left who could call.
    Ended,
}

impl Interception {
    /// And where the trampoline sends the filter's fd.
    pub(super) fn begin() -> io::Result<(Self, UnixStream)> {
        let (ours, of_trampoline) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((Self { stage: Stage::Awaited(ours), waiting: vec![] }, of_trampoline))
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Awaited(socket) => Some(socket.as_fd()),
            Stage::Installed(filter) => Some(filter.as_fd()),
            Stage::Ended => None,
        }
    }

    pub(super) fn poll_fd(&self) -> Option<PollFd<'_>> {
        Some(PollFd::new(self.fd()?, PollFlags::POLLIN))
    }

    /// Where calls are answered.
    pub(super) fn filter(&self) -> Option<BorrowedFd<'_>> {
        match &self.stage {
            Stage::Installed(filter) => Some(filter.as_fd()),
            _ => None,
        }
    }

    /// The next call. Only after `poll` has said what there is.
    pub(super) fn next(&mut self, events: PollFlags) -> Option<Notification> {
        if let Stage::Awaited(socket) = &self.stage {
            match sys::receive_fds(socket.as_fd()).map(|mut received| received.fds.pop()) {
                Ok(Some(filter)) => self.stage = Stage::Installed(filter),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It has said why on stderr.
                Ok(None) | Err(_) => self.stage = Stage::Ended,
            }
            return None;
        }
        if !events.contains(PollFlags::POLLIN) {
            self.stage = Stage::Ended;
            return None;
        }
        let received = Notification::receive(self.filter()?);
        received.unwrap_or_else(|error| {
            log::error!("calls of the program cannot be received any more: {error}");
            self.stage = Stage::Ended;
            None
        })
    }
}

/// In the trampoline: from now on its calls, and those of the program that it becomes, are answered by the supervisor.
pub(super) fn install(supervisor: &UnixStream) -> Result<(), Error> {
    let tried = "intercept the sockets of the program";
    let filter = sys::install_filter().map_err(|error| {
        let cause = match error.raw_os_error() {
            Some(libc::EBUSY) => "another supervisor or sandbox decides on its system calls already".to_owned(),
            _ => error.to_string(),
        };
        let error = Error::new(crate::error::ErrorKind::Failed, tried, cause);
        error.mend("name the address with --listen, and let the program take LISTEN_FDS")
    })?;
    fault::reached("worker: intercepted", None);
    let number = std::os::fd::AsRawFd::as_raw_fd(&filter);
    supervisor.send_with_fd(b"F", &[number]).map_err(|error| Error::io(tried, error))?;
    Ok(())
}

/// Whether this can be done here; else what is missing.
pub(super) fn check() -> Result<(), Error> {
    let missing = |what: &str, error: io::Error| {
        let error = Error::io(format!("intercept the sockets of a program: {what}"), error);
        error.mend("name the address with --listen, and let the program take LISTEN_FDS")
    };
    sys::notification_is_available()
        .map_err(|error| missing("no user notification by seccomp (Linux 5.0, or it is forbidden here)", error))?;
    let itself = sys::pidfd_open(nix::unistd::Pid::this()).map_err(|error| missing("no pidfds (Linux 5.3)", error))?;
    // Any fd that is surely open.
    let number = std::os::fd::AsRawFd::as_raw_fd(&itself);
    let copied = sys::pidfd_getfd(itself.as_fd(), number);
    copied.map_err(|error| missing("no pidfd_getfd (Linux 5.6; a container may need CAP_SYS_PTRACE)", error))?;
    Ok(())
}
