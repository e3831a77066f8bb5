//! The engine's part in a restart. As the old process: let go, end, and tell if the new one is lost. As the new process:
//! go on telling whoever asked, until this process serves.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::attempt::milliseconds_since;
use super::{Engine, after, server_finish};
use crate::control::messages::{Event as Said, Outcome, ResultEvent, StageEvent, StageName};
use crate::control::server::{ClientId, Server};
use crate::inherit::restart::Restart;
use crate::protocol::{Claims, OfferedRestart};
use crate::shared::monotonic_us;
use crate::upgrade::{Failure, Origin, Stage};

/// A restart as its new process sees it, until that serves.
pub(super) struct Restarted {
    asker: Option<ClientId>,
    begun: Instant,
    ready_timeout: Duration,
    old_pid: i32,
    killed: bool,
    /// Why it says that it is still starting.
    starting: Option<String>,
}

/// The old process.
impl Engine {
    /// Whether this process is to end so that a new one can run.
    pub(super) fn is_restarting(&self) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| attempt.origin == Origin::Restart)
    }

    /// What the offer says of a restart, and the connection of whoever asked, which goes with it.
    pub(super) fn offered_restart(&self) -> Option<(OfferedRestart, Option<OwnedFd>)> {
        let attempt = self.attempt.as_ref().filter(|attempt| attempt.origin == Origin::Restart)?;
        let asker = attempt.requester.client().and_then(|id| self.server.as_ref()?.share(id));
        let time = attempt.request.drain_before_restart() + attempt.request.kill_after();
        let elapsed = u64::try_from(attempt.begun.elapsed().as_micros()).unwrap_or_default();
        let offered = OfferedRestart {
            kill_after_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            asked_us: monotonic_us().saturating_sub(elapsed),
            asker: asker.is_some(),
        };
        Some((offered, asker))
    }

    /// Why this process cannot be restarted now.
    pub(super) fn refuse_restart(&self) -> Option<ResultEvent> {
        if std::process::id() == 1 {
            let message = "not restarted: this is process 1 of its container, and when it ends the kernel kills the new \
                           one as well; it serves on (restart the container)";
            return Some(ResultEvent::new(Outcome::Failed, message));
        }
        // They would run beside the new process.
        let pids: Vec<String> = self.older.iter().map(|(older, _)| older.pid.to_string()).collect();
        let first = pids.first()?;
        let message = format!(
            "older generations still drain (pid {}), and a restart is for one process at a time: wait, or \
             `handover stop --pid {first} --drain-timeout 1s`",
            pids.join(", ")
        );
        Some(ResultEvent::new(Outcome::Busy, message))
    }

    /// Connections are cut in a restart because that was asked for, and not for want of patience: the application's hooks
    /// have more time than these.
    pub(super) fn more_time_for_hooks(&self) -> Option<Duration> {
        let attempt = self.attempt.as_ref().filter(|attempt| attempt.origin == Origin::Restart)?;
        let left = (attempt.request.kill_after() / 2).saturating_sub(self.drain.cut_at?.elapsed());
        (!self.drain.hooks_done && !left.is_zero()).then_some(left)
    }

    /// Drained: now the new process is the main one.
    pub(super) fn give_way(&mut self, cut: usize) {
        if self.is_restarting() {
            self.tell_manager_of_successor();
            self.tell_asker(|at_ms| StageEvent { cut: Some(cut), ..StageEvent::new(StageName::Drained, at_ms) });
        }
    }

    fn tell_asker(&mut self, stage: impl FnOnce(f64) -> StageEvent) {
        let Some(attempt) = &self.attempt else { return };
        if let (Some(id), Some(server)) = (attempt.requester.client(), &mut self.server) {
            server.send(id, &Said::Stage(stage(attempt.elapsed_ms())));
        }
    }

    /// The listeners went with the new process. This one is the last now, and cleans up as such.
    pub(super) fn report_lost(&mut self, failure: Failure) {
        let cause = self.words_for(failure);
        let Some(mut attempt) = self.attempt.take() else { return };
        attempt.channel = None;
        if let Some(process) = attempt.process.take() {
            // One that has only broken the channel must not serve when nobody expects it.
            process.kill();
            self.successors.push(process);
        }
        self.drain.upgraded = false;
        self.unlink_paths();
        if self.upgrade.stage() == Stage::Drained {
            self.remove_pid_file();
        }
        let pid = std::process::id();
        let message =
            format!("not restarted: the new build {cause}, and process {pid} drains: nothing serves when that is over");
        log::error!("{message}");
        let mend = Some("start the service again".to_owned());
        let result = ResultEvent { failure: Some(cause), mend, ..ResultEvent::new(Outcome::Ended, message) };
        self.answer(attempt.requester, result);
    }
}

/// The new process.
impl Engine {
    /// The old process has ended.
    pub(super) fn continue_restart(&mut self, restart: Restart) {
        let Restart { asker, begun, ready_timeout, old_pid, killed, .. } = restart;
        // Also where nobody can ask this process anything.
        let asker = asker.and_then(|asker| self.server.get_or_insert_with(Server::for_adopted).adopt(asker));
        self.clean_up_after(Pid::from_raw(old_pid));
        self.restarted = Some(Restarted { asker, begun, ready_timeout, old_pid, killed, starting: None });
        let reason = killed.then(|| format!("process {old_pid} was killed: it did not exit"));
        self.tell_waiting(|at_ms| StageEvent { reason, ..StageEvent::new(StageName::Gone, at_ms) });
        self.timers.restarted = Some(after(ready_timeout));
        self.schedule_alive();
        // This process is the main one already, and its application may take longer to start than the watchdog waits.
        self.ping_watchdog();
    }

    pub(super) fn asker_of_restart(&self) -> Option<ClientId> {
        self.restarted.as_ref().and_then(|restarted| restarted.asker)
    }

    fn tell_waiting(&mut self, stage: impl FnOnce(f64) -> StageEvent) {
        let Some(restarted) = &self.restarted else { return };
        let event = stage(milliseconds_since(restarted.begun));
        log::info!("restart: {} after {:.1} ms", event.stage, event.at_ms);
        if let (Some(id), Some(server)) = (restarted.asker, &mut self.server) {
            server.send(id, &Said::Stage(event));
        }
    }

    pub(super) fn restart_is_still_starting(&mut self, reason: &str) {
        if let Some(restarted) = &mut self.restarted {
            restarted.starting = Some(reason.to_owned());
            self.timers.restarted = Some(after(restarted.ready_timeout));
            self.tell_waiting(|at_ms| StageEvent {
                reason: Some(reason.to_owned()),
                ..StageEvent::new(StageName::Starting, at_ms)
            });
        }
    }

    /// This process serves: what there is to say of a restart, if it was one.
    pub(super) fn finish_restart(&mut self, claims: Claims) -> Option<String> {
        self.tell_waiting(|at_ms| StageEvent { claims: Some(claims), ..StageEvent::new(StageName::Ready, at_ms) });
        let old_pid = self.restarted.as_ref()?.old_pid;
        let killed = self.restarted.as_ref()?.killed;
        let (generation, pid) = (self.shared.generation, std::process::id());
        let mut message = format!("restarted as generation {generation} (pid {pid})");
        if killed {
            message = format!("{message}; process {old_pid} did not exit and was killed");
        }
        self.end_restart(Outcome::Restarted, message.clone());
        Some(message)
    }

    /// Nothing serves.
    pub(super) fn fail_restart(&mut self, cause: &str) {
        if let Some(restarted) = &self.restarted {
            let message = format!(
                "nothing serves: process {} has ended, and the new process {} {cause}",
                restarted.old_pid,
                std::process::id()
            );
            self.end_restart(Outcome::Ended, message);
        }
    }

    /// It may be ready yet: until then clients wait.
    pub(super) fn restart_takes_too_long(&mut self) {
        let Some(restarted) = &self.restarted else { return };
        let last = restarted.starting.as_ref().map(|reason| format!(" (it last said: {reason})")).unwrap_or_default();
        let cause = format!(
            "is not ready within {:?}{last}; it holds the listeners, and clients wait in their queues",
            restarted.ready_timeout
        );
        self.fail_restart(&cause);
    }

    fn end_restart(&mut self, outcome: Outcome, message: String) {
        let Some(restarted) = self.restarted.take() else { return };
        self.timers.restarted = None;
        let Some(asker) = restarted.asker else { return };
        let serves = outcome == Outcome::Restarted;
        let result = ResultEvent {
            at_ms: Some(milliseconds_since(restarted.begun)),
            pid: serves.then(|| std::process::id().cast_signed()),
            generation: serves.then_some(self.shared.generation),
            ..ResultEvent::new(outcome, message)
        };
        server_finish(&mut self.server, asker, &result);
    }
}
