//! The end of an upgrade that failed, and the words for it.

use std::time::{Duration, Instant};

use super::Supervisor;
use super::answers::{Requester, Verb};
use crate::control::messages::{Outcome, ResultEvent};
use crate::engine::advice::advice_for_exit;
use crate::engine::milliseconds_since;
use crate::error::{Error, ErrorKind};
use crate::supervisor::machine::{Failure, Stage, WorkerId};

/// How long a process that was given up may take to be gone before the failure is told all the same.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

/// The end of a failed upgrade, held back until the new processes are gone.
pub(super) struct Report {
    result: ResultEvent,
    requester: Requester,
    pub(super) deadline: Instant,
}

impl Supervisor {
    /// The new build is given up.
    pub(super) fn fail(&mut self, failure: Failure, worker: Option<WorkerId>, in_trial: bool) {
        self.new = None;
        self.close_unwanted();
        let process = worker.and_then(|id| self.workers.get_mut(&id));
        let exit = process.as_ref().and_then(|process| process.exit.clone());
        let why = process.as_ref().map(|process| process.why_not_ready(self.options.ready)).unwrap_or_default();
        let stderr = process.map(|process| process.stderr.last_lines()).unwrap_or_default();
        let words = match failure {
            Failure::NotSpawned => String::new(),
            Failure::Exited => {
                let when = if in_trial { "within the trial" } else { "before it was ready" };
                format!("{} {when}", exit.as_deref().unwrap_or("ended"))
            }
            Failure::Refused => self.attempt.as_ref().and_then(|attempt| attempt.cause.clone()).unwrap_or_default(),
            Failure::Silent => format!("was not ready in time: {why}"),
            Failure::Stopped => "was not ready when this process was told to stop".to_owned(),
        };
        let mend = match (failure, exit.as_deref()) {
            (Failure::Silent, _) if self.options.may_be_delayed() => Some(
                "--ready-timeout gives it longer; if the new build is not to listen there any more, or cannot be seen to \
                 wait (io_uring), --ready-delay or --ready-cmd proves it",
            ),
            (Failure::Silent, _) => Some("--ready-timeout gives it longer"),
            (Failure::Exited, Some("exited with status 0")) => {
                Some("let it stay in the foreground; one that forks itself away cannot be supervised")
            }
            (Failure::Exited, Some(exit)) => advice_for_exit(exit, stderr.is_empty()),
            _ => None,
        };
        let Some(attempt) = &self.attempt else {
            if matches!(failure, Failure::Exited | Failure::Silent) {
                let program = self.recipe.program_path();
                let error =
                    Error::new(ErrorKind::Failed, format!("start `{}`", program.display()), format!("it {words}"));
                self.not_started = Some(mend.into_iter().fold(error, Error::mend));
            }
            return;
        };
        let slot = worker.and_then(|id| self.machine_slot(id)).filter(|_| self.machine.wanted() > 1);
        let subject = slot.map_or("the new build".to_owned(), |slot| format!("worker {slot} of the new build"));
        let what = match failure {
            Failure::NotSpawned => attempt.cause.clone().unwrap_or_default(),
            _ => format!("{subject} {words}"),
        };
        self.abort_conversations(&what);
        let outcome = match failure {
            Failure::Stopped => Outcome::Ended,
            _ if in_trial => Outcome::RolledBack,
            _ => Outcome::Failed,
        };
        self.report(
            outcome,
            what,
            Some(ResultEvent { exit, stderr, mend: mend.map(str::to_owned), ..ResultEvent::new(outcome, "") }),
        );
    }

    /// A build that failed has made sockets non-blocking, and the one before may wait in `accept`. Not before all of it is gone: one
    /// that polls must not block when another takes the connection.
    pub(super) fn restore_modes(&mut self) {
        let is_left = || self.machine.workers().any(|(_, worker)| worker.generation > self.machine.generation());
        if self.sockets.has_modes() && self.attempt.is_none() && !is_left() {
            self.sockets.restore_modes();
        }
    }

    fn machine_slot(&self, id: WorkerId) -> Option<usize> {
        self.workers.get(&id).map(|worker| worker.slot)
    }

    /// Ends the attempt. Its requester hears when nothing is left of the new build.
    pub(super) fn report(&mut self, outcome: Outcome, what: String, details: Option<ResultEvent>) {
        let Some(attempt) = self.attempt.take() else { return };
        self.sockets.kept.await_nothing_new();
        let (pid, generation) = (std::process::id(), self.machine.generation());
        let verdict = match (outcome, attempt.verb) {
            (Outcome::RolledBack, _) => "rolled back",
            (_, Verb::Upgrade) => "not upgraded",
            (_, Verb::Restart) => "not restarted",
        };
        let is_served =
            self.machine.workers().any(|(_, worker)| worker.generation == generation && worker.stage == Stage::Ready);
        let serves = match outcome {
            Outcome::Ended => format!("process {pid} is draining"),
            _ if is_served => format!("generation {generation} serves on"),
            _ => format!("generation {generation} is started again"),
        };
        let result = ResultEvent {
            message: format!("{verdict}: {what}; {serves}"),
            at_ms: Some(milliseconds_since(attempt.begun)),
            pid: Some(pid.cast_signed()),
            generation: Some(generation),
            failure: Some(what.clone()),
            ..details.unwrap_or_else(|| ResultEvent::new(outcome, ""))
        };
        log::error!("{}", result.message);
        self.remember(&result);
        if outcome != Outcome::Ended {
            self.last_failure = Some(what);
            self.tell_manager_of_service();
        }
        let deadline = Instant::now() + REPORT_PATIENCE;
        self.reports.push(Report { result, requester: attempt.requester, deadline });
    }

    /// Sends the ends of failed upgrades of which no process is left.
    pub(super) fn send_reports(&mut self) {
        if self.reports.is_empty() {
            return;
        }
        // One that serves clients is not waited for.
        let left = self.workers.values().any(|worker| worker.dismissed.is_some());
        let now = Instant::now();
        for report in std::mem::take(&mut self.reports) {
            match report.requester.client() {
                _ if left && report.deadline > now => self.reports.push(report),
                Some(client) => self.finish_with(client, report.result),
                None => {}
            }
        }
    }
}
