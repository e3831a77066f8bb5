//! Asking for a restart: two processes answer, one after the other, on one connection.

use std::os::fd::AsFd;

use nix::sys::signal::Signal;

use super::{Answer, Client, SILENCE_MAX};
use crate::control::find::state_of;
use crate::control::messages::{Outcome, Request, ResultEvent, StageName, UpgradeRequest};
use crate::error::{Error, ErrorKind};
use crate::sys;

impl Client {
    /// Ends the process, and starts its new build when it is gone; clients wait in the queues of the listeners, which the
    /// new process holds from before that on. Returns when the new process is ready.
    ///
    /// Every end that either process reports is an `Ok`: look at [`ResultEvent::result`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NothingServes`] if the new process ended before it was ready, without a word;
    /// [`ErrorKind::Failed`] if nobody answers any more.
    pub fn restart(
        mut self,
        request: &UpgradeRequest,
        mut on_answer: impl FnMut(&Answer),
    ) -> Result<ResultEvent, Error> {
        self.say(&Request::Restart(request.clone()))?;
        let (mut new_pid, mut adopted, mut cut) = (None, false, 0);
        // The old process may be silent until the new one ends it.
        self.patience_once_adopted = Some(SILENCE_MAX + request.drain_before_restart() + request.kill_after());
        let mut note = |answer: &Answer| {
            if let Answer::Stage(stage) = answer {
                new_pid = stage.pid.or(new_pid);
                adopted |= stage.stage == StageName::Adopted;
                cut = stage.cut.unwrap_or(cut);
            }
            on_answer(answer);
        };
        match self.follow(&mut note)? {
            Some(result) if result.result == Outcome::Restarted && cut > 0 => Ok(with_cut(result, cut, request)),
            Some(result) => Ok(result),
            None if !adopted => {
                self.must_have_died()?;
                self.after_its_death("restart", new_pid, false)
            }
            None => {
                let new = new_pid.unwrap_or_default();
                let cause = format!(
                    "nothing serves: process {} has ended, and so has the new process {new}, before it was ready",
                    self.pid
                );
                let error = Error::new(ErrorKind::NothingServes, format!("restart {}", self.target), cause);
                Err(error.mend("what it wrote to stderr is in the log of the service; then start the service again"))
            }
        }
    }

    /// Lets a process go on that was stopped (SIGSTOP), so that it can answer. `false` if it was not.
    ///
    /// # Errors
    ///
    /// That of `pidfd_send_signal(2)`.
    pub fn resume(&self) -> Result<bool, Error> {
        let (Some('T'), Some(process)) = (state_of(self.pid()), &self.process) else { return Ok(false) };
        let resumed = sys::pidfd_send_signal(process.as_fd(), Signal::SIGCONT);
        resumed.map(|()| true).map_err(|error| Error::io(format!("let process {} go on", self.pid), error))
    }
}

/// In a restart the old process cuts, and the new one tells how it ended.
fn with_cut(result: ResultEvent, cut: usize, request: &UpgradeRequest) -> ResultEvent {
    let connections = match cut {
        1 => "1 connection was closed".to_owned(),
        _ => format!("{cut} connections were closed"),
    };
    // Without a time to drain that is what was asked for.
    let (outcome, when) = match request.drain_before_restart().is_zero() {
        true => (result.result, ""),
        false => (Outcome::Cut, " at the drain deadline"),
    };
    let message = format!("{}; {connections}{when}", result.message);
    ResultEvent { result: outcome, message, cut: Some(cut), ..result }
}
