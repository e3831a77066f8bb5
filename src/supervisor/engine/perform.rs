//! What the machine wants done, one leaf each.

use std::time::{Duration, Instant};

use super::Supervisor;
use crate::engine::stands_still;
use crate::error::Error;
use crate::fault;
use crate::supervisor::connections;
use crate::supervisor::machine::{Action, Build as Which, Event, Phase, Refusal, Stage, WorkerId};
use crate::supervisor::worker::{Place, Worker};

/// From then on the crashes of a worker are called a loop.
const CRASH_LOOP_AFTER: u32 = 5;

/// How long a new worker that was not ready may take to end by itself.
const DISMISS_GRACE: Duration = Duration::from_millis(500);

impl Supervisor {
    /// Does one thing, and says what came of it where that is not a matter of waiting.
    pub(super) fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Refuse(refusal) => self.refuse(refusal),
            Action::Spawn { worker, slot, generation, build } => return self.spawn(worker, slot, generation, build),
            Action::Stop(id) => {
                if let Some(worker) = self.workers.get_mut(&id) {
                    worker.next_look = None;
                    worker.tell_to_stop(&self.options);
                }
                fault::reached("exec: told to stop", None);
            }
            Action::Kill(id) => self.kill(id),
            Action::Dismiss(id) => self.dismiss(id),
            Action::Cut(id) => self.cut(id),
            Action::Abandon(id) => {
                if let Some(mut worker) = self.workers.remove(&id) {
                    self.leave_to_kernel(id, worker.interception.take());
                    log::error!("process {} was killed and does not end: it is waited for no longer", worker.pid);
                }
            }
            Action::LetAccept => {
                self.comes_to("exec: ready");
                self.let_accept();
                self.comes_to("exec: accepting");
            }
            Action::Cleared => self.announce_cleared(),
            Action::AllReady => self.all_are_ready(),
            Action::Commit => self.commit(),
            Action::Fail { failure, worker, in_trial } => self.fail(failure, worker, in_trial),
            Action::Crashed { slot, times, delay } => {
                let of = if self.machine.wanted() > 1 { format!("worker {slot}") } else { "the program".to_owned() };
                let next = if delay.is_zero() { "at once".to_owned() } else { format!("in {delay:?}") };
                match times {
                    CRASH_LOOP_AFTER.. => {
                        log::error!("{of} has ended {times} times in a row: it is started again {next}")
                    }
                    _ => log::warn!("{of} has ended by itself: it is started again {next}"),
                }
                self.tell_manager_of_crashes();
            }
            Action::Drain => self.begin_drain(),
            Action::Finish => self.finish(),
        }
        None
    }

    fn spawn(&mut self, id: WorkerId, slot: usize, generation: u64, which: Which) -> Option<Event> {
        let build = match which {
            Which::New => self.new.as_ref(),
            Which::Committed => self.committed.as_ref(),
        };
        let build = build?;
        if which == Which::Committed && build.was_replaced() {
            let path = build.plan.program.display();
            log::warn!("{path} is not the file any more that was committed; it is started all the same");
        }
        let terms = self.terms(which);
        match Worker::start(&Place { build, generation, slot, terms }, &self.options, &self.sockets) {
            Ok(worker) => {
                log::info!("generation {generation}: process {} is started", worker.pid);
                self.workers.insert(id, worker);
                self.announce_spawned(id);
                self.comes_to("exec: spawned");
                None
            }
            Err(error) => {
                self.last_exit = Some((slot, format!("cannot be started: {}", error.cause())));
                self.note_failure(error);
                Some(Event::NotSpawned(id))
            }
        }
    }

    fn kill(&mut self, id: WorkerId) {
        let stage = self.machine.worker(id).map(|worker| worker.stage);
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if let Some(Stage::Killed { crashed: true, .. }) = stage {
            let why = worker.why_not_ready(self.options.ready);
            log::warn!("process {} was not ready in time: {why}: it is killed", worker.pid);
            worker.not_ready = Some(why);
        }
        worker.kill();
    }

    fn note_failure(&mut self, error: Error) {
        log::warn!("{error}");
        match &mut self.attempt {
            Some(attempt) => attempt.cause = Some(error.to_string()),
            None => self.not_started = Some(error).filter(|_| self.committed.is_none()),
        }
    }

    /// A program that was given the sockets may accept before it says that it is ready, and what it has accepted is to be
    /// finished. One that does not listen to its signal and serves nobody is killed after a moment.
    fn dismiss(&mut self, id: WorkerId) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.next_look = None;
            worker.tell_to_stop(&self.options);
            worker.dismissed = Some(Instant::now() + DISMISS_GRACE);
        }
    }

    /// Kills those that were dismissed and serve nobody.
    pub(super) fn look_at_dismissed(&mut self, now: Instant) {
        let (listeners, addresses) = (self.sockets.watched(), self.sockets.addresses());
        for worker in self.workers.values_mut() {
            if worker.dismissed.take_if(|until| *until <= now).is_some() {
                let serves = worker.waits_on_any(&listeners) || connections::open(&[worker.pid], &addresses) != [0];
                if !serves {
                    worker.kill();
                    // Until it is reaped.
                    worker.dismissed = Some(now + DISMISS_GRACE);
                }
            }
        }
    }

    /// A new worker that was stopped serves nobody, and in a moment there is no way back.
    pub(super) fn look_at_those_that_stand_still(&mut self) {
        let in_trial = self.machine.phase() == Phase::Trial;
        let new = self.machine.workers().filter(|(_, worker)| in_trial && self.machine.is_new(worker));
        let ids: Vec<WorkerId> = new.map(|(id, _)| id).collect();
        for id in ids {
            let Some(worker) = self.workers.get_mut(&id).filter(|worker| stands_still(worker.pid)) else { continue };
            // It would not hear a stop signal.
            worker.kill();
            if let Some(attempt) = &mut self.attempt {
                attempt.cause = Some("became ready and stands still (SIGSTOP, or a terminal)".to_owned());
            }
            self.tell(Event::Refused(id));
        }
    }

    fn cut(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let open = connections::open(&[worker.pid], &self.sockets.addresses()).first().copied().unwrap_or(0);
        log::warn!("process {} was told to stop and has not ended: it is killed, with {open} connections", worker.pid);
        worker.kill();
        worker.open = 0;
        self.count_cut(id, open);
    }

    fn commit(&mut self) {
        let first = self.committed.is_none();
        self.settle();
        self.comes_to("exec: settled");
        if let Some(mut build) = self.new.take() {
            build.pin();
            self.recipe = build.recipe.clone();
            self.previous = self.committed.replace(build).map(|old| old.identity);
        }
        if first {
            if let Some(pid_file) = &self.pid_file {
                pid_file.put_in_place();
            }
        }
        self.sockets.forget_modes();
        let claims = self.take_stock();
        self.tell_server_to_stop();
        self.keep_listeners_in_store();
        log::info!("generation {} serves", self.machine.generation());
        self.last_failure = None;
        self.tell_manager_of_service();
        self.announce_commit(claims);
    }

    fn begin_drain(&mut self) {
        self.tell_manager_of_drain();
        // What upgrades and restarts have cut was told by them, and this is the end of another thing.
        self.cut = 0;
        self.sockets.close();
        self.timers.drain_count = Some(Instant::now());
    }

    fn finish(&mut self) {
        self.answer_stopped();
    }

    fn refuse(&mut self, refusal: Refusal) {
        // Whoever asks is told before the machine is: see `begin`.
        log::debug!("refused: {refusal:?}");
    }
}
