//! A restart: this process runs when the old one has ended, and not before. Until then the listeners are in its hands,
//! and clients wait in their queues.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::Signal;

use crate::channel::{Broken, Channel, Received, poll_fd};
use crate::engine::SignalPipe;
use crate::fault;
use crate::protocol::{Message, OfferedRestart};
use crate::shared::monotonic_us;
use crate::sys;

/// How long a process that was killed may take to be gone.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// What the new process of a restart goes on with.
pub(crate) struct Restart {
    /// Whoever asked for it, and is told the rest.
    pub(crate) asker: Option<OwnedFd>,
    /// When it was asked for.
    pub(crate) begun: Instant,
    pub(crate) ready_timeout: Duration,
    /// As it sees itself.
    pub(crate) old_pid: i32,
    /// It did not end in time.
    pub(crate) killed: bool,
    kill_after: Duration,
}

impl Restart {
    /// Refused where the end of the old process could not be seen.
    pub(super) fn new(
        offer: &OfferedRestart,
        ready_timeout_ms: u64,
        asker: Option<OwnedFd>,
        old_pid: i32,
        old: &io::Result<OwnedFd>,
    ) -> Result<Self, String> {
        match old {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                return Err(format!("the end of the old process cannot be waited for: {error}"));
            }
            _ => {}
        }
        let (now, elapsed) = (Instant::now(), Duration::from_micros(monotonic_us().saturating_sub(offer.asked_us)));
        let begun = now.checked_sub(elapsed).unwrap_or(now);
        let ready_timeout = Duration::from_millis(ready_timeout_ms);
        let kill_after = Duration::from_millis(offer.kill_after_ms);
        Ok(Self { asker, begun, ready_timeout, old_pid, killed: false, kill_after })
    }

    /// Returns when the old process is gone, with everything that it held. Its pidfd says so; the end of the channel does
    /// not, because a dying process closes one fd after the other, and one that lives may close what it likes.
    pub(super) fn wait_for_the_end(
        &mut self,
        old: &io::Result<OwnedFd>,
        mut channel: Option<Channel>,
        mut signals: Option<&mut SignalPipe>,
    ) -> Result<(), String> {
        // It was gone when this process looked; any other error has been refused.
        let Ok(old) = old else { return Ok(()) };
        log::info!("waits for the end of process {}", self.old_pid);
        fault::reached("new: waits", channel.as_ref());
        let mut deadline = Instant::now() + self.kill_after;
        loop {
            let mut fds = vec![PollFd::new(old.as_fd(), PollFlags::POLLIN)];
            fds.extend(signals.as_deref().map(|signals| poll_fd(signals, PollFlags::POLLIN)));
            fds.extend(channel.as_ref().map(|channel| poll_fd(channel, channel.interest())));
            let events = crate::poll::wait_any(&mut fds, Some(deadline));
            let events = events.map_err(|error| format!("the end of the old process cannot be waited for: {error}"))?;
            if fds.first().is_some_and(|old| old.any().unwrap_or(true)) {
                fault::reached("new: alone", channel.as_ref());
                return Ok(());
            }
            if signals.as_deref_mut().is_some_and(|signals| signals.take().stops > 0) {
                return Err("it was told to stop".to_owned());
            }
            if events == 0 {
                self.kill(old)?;
                deadline = Instant::now() + DEATH_TIMEOUT;
            }
            if let Some(true) = channel.as_mut().map(has_ended).transpose()? {
                channel = None;
            }
        }
    }

    fn kill(&mut self, old: &OwnedFd) -> Result<(), String> {
        let pid = self.old_pid;
        if std::mem::replace(&mut self.killed, true) {
            return Err(format!("process {pid} was killed, and is not gone {DEATH_TIMEOUT:?} later"));
        }
        log::warn!("process {pid} has not ended within {:?}: it is killed", self.kill_after);
        match sys::pidfd_send_signal(old.as_fd(), Signal::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                Err(format!("process {pid} does not end, and cannot be killed: {error}"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether the channel has; the old process may also call the restart off.
fn has_ended(channel: &mut Channel) -> Result<bool, String> {
    // What is left to send, if anything.
    let _ = channel.flush();
    match channel.receive() {
        Ok(Received::Nothing) => Ok(false),
        Ok(Received::End) | Err(Broken::Io(_)) => Ok(true),
        Ok(Received::Message(Message::Aborted { reason })) => Err(reason),
        Ok(Received::Message(other)) => Err(format!("the old process sent `{}` out of turn", other.name())),
        Err(broken) => Err(format!("the old process {broken}")),
    }
}

/// Puts the real stderr in place: nobody reads the pipe any more when the old process has ended.
pub(super) fn take_stderr(stderr: Option<OwnedFd>) {
    if let Some(Err(error)) = stderr.map(|stderr| sys::replace_stderr(stderr.as_fd())) {
        log::warn!("stderr stays a pipe to the old process: {error}");
    }
}
