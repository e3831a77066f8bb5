//! Whoever asks at the control socket: requests in, stages and results out.

use std::time::{Duration, Instant, SystemTime};

use nix::poll::PollFlags;
use nix::unistd::Pid;

use super::{ALIVE_INTERVAL, Supervisor};
use crate::control::messages::{
    AcceptedEvent, Event as Said, LastUpgrade, Outcome, Request, ResultEvent, StageEvent, StageName, UpgradeRequest,
    Wait,
};
use crate::control::server::{Asked, ClientId};
use crate::engine::milliseconds_since;
use crate::fault;
use crate::protocol::Claims;
use crate::shared::unix_ms;
use crate::supervisor::conversation::Terms;
use crate::supervisor::machine::{Event, Phase, Refusal, WorkerId};

/// Who asked for an upgrade, and is told how it went.
#[derive(Clone, Copy)]
pub(super) enum Requester {
    /// A signal.
    Nobody,
    Client(ClientId, Wait),
}

impl Requester {
    pub(super) fn client(self) -> Option<ClientId> {
        match self {
            Self::Nobody => None,
            Self::Client(id, _) => Some(id),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Upgrade,
    /// The old workers end before the new ones are started, with what they have open.
    Restart,
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Restart { "restart" } else { "upgrade" })
    }
}

/// The upgrade under way, or restart.
pub(super) struct Attempt {
    pub(super) requester: Requester,
    pub(super) begun: Instant,
    pub(super) generation: u64,
    pub(super) verb: Verb,
    /// How long after its last `bind` or `listen` a new worker is taken for ready.
    pub(super) ready_delay: Option<Duration>,
    /// What the new workers are offered.
    pub(super) terms: Option<Terms>,
    /// Connections that were closed before they had ended.
    pub(super) cut: usize,
    /// Why a worker could not be started, or will not serve.
    pub(super) cause: Option<String>,
}

pub(super) fn stage(stage: StageName, begun: Instant) -> StageEvent {
    StageEvent::new(stage, milliseconds_since(begun))
}

impl Supervisor {
    pub(super) fn on_client(&mut self, id: ClientId, events: PollFlags) {
        if events.contains(PollFlags::POLLOUT) {
            self.server.flush(id);
        }
        if !events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        let Some(Asked { client, request }) = self.server.read(id) else { return };
        match request {
            Request::Status => {
                let status = self.status();
                self.server.finish(client, &Said::Status(Box::new(status)));
            }
            Request::Upgrade(request) => {
                let wait = request.wait.unwrap_or_default();
                self.begin(Verb::Upgrade, &request, Requester::Client(client, wait));
            }
            Request::Restart(request) => {
                self.begin(Verb::Restart, &request, Requester::Client(client, Wait::Healthy));
            }
            Request::Stop { drain_timeout_ms } => {
                self.accept(client);
                self.stop_clients.push((client, Instant::now()));
                self.count_from_now();
                self.schedule_alive();
                let timeout = drain_timeout_ms.map(Duration::from_millis);
                // Asking again is not what a second signal is: nothing is cut before its time.
                if timeout.is_some() || self.machine.phase() != Phase::Draining {
                    self.tell(Event::Stop(timeout));
                }
            }
            Request::UpgradeSelf(request) => self.replace_self(client, &request),
            Request::Scale { workers } => self.scale(client, workers),
            Request::TakeOver => {
                let message = "a supervisor hands nothing over: `handover upgrade` replaces the program that it runs";
                self.finish_with(client, ResultEvent::new(Outcome::BadRequest, message));
            }
        }
    }

    pub(super) fn accept(&mut self, client: ClientId) {
        let (pid, generation) = (std::process::id().cast_signed(), self.machine.generation());
        self.server.send(client, &Said::Accepted(AcceptedEvent { pid, generation, supervises: true }));
    }

    pub(super) fn finish_with(&mut self, client: ClientId, result: ResultEvent) {
        self.server.finish(client, &Said::Result(result));
    }

    pub(super) fn begin(&mut self, verb: Verb, request: &UpgradeRequest, requester: Requester) {
        if request.ready_delay().is_some() && !self.options.may_be_delayed() {
            let message = "--ready-delay proves nothing here: what the program binds is not intercepted, or --ready goes by \
                           what it says";
            let refused = ResultEvent::new(Outcome::BadRequest, message);
            return requester.client().into_iter().for_each(|client| self.finish_with(client, refused.clone()));
        }
        let order = self.order(verb, request);
        // The program may be waiting for the end of a server beside which it must not run.
        let starts = (self.machine.phase() == Phase::Starting).then_some(Refusal::UnderWay);
        let refusal = self.machine.refusal_of(&order).or(starts).map(|refusal| self.words_for_refusal(refusal));
        let replaces = self.replacement.as_ref().map(|_| "this supervisor is just being replaced".to_owned());
        if let Some(message) = refusal.or(replaces) {
            let busy = ResultEvent::new(Outcome::Busy, message);
            log::warn!("{verb} refused: {}", busy.message);
            return requester.client().into_iter().for_each(|client| self.finish_with(client, busy.clone()));
        }
        requester.client().into_iter().for_each(|client| self.accept(client));
        self.await_what_is_held();
        self.sockets.remember_modes();
        let (begun, generation) = (Instant::now(), self.machine.next_generation());
        let terms = self.terms_of(&order, generation);
        let ready_delay = request.ready_delay();
        self.attempt = Some(Attempt { requester, begun, verb, generation, ready_delay, terms, cut: 0, cause: None });
        self.comes_to("exec: asked");
        self.tell_manager_of_upgrade();
        match self.recipe.build(request, self.previous.as_ref()) {
            Ok(build) => {
                self.new = Some(build);
                self.schedule_alive();
                self.tell(Event::Upgrade(order));
            }
            Err(error) => self.report(Outcome::Failed, error.to_string(), None),
        }
    }

    /// Of an upgrade, and not of the first start.
    pub(super) fn comes_to(&self, step: &str) {
        if self.attempt.is_some() {
            fault::reached(step, None);
        }
    }

    pub(super) fn words_for_refusal(&self, refusal: Refusal) -> String {
        let pid = std::process::id();
        match refusal {
            Refusal::UnderWay if self.machine.phase() == Phase::Starting => {
                format!("process {pid} is still starting up")
            }
            Refusal::UnderWay if self.machine.phase() == Phase::Serving => {
                "the last upgrade is being rolled back".to_owned()
            }
            Refusal::UnderWay => "another upgrade is under way".to_owned(),
            Refusal::Stopping => format!("process {pid} was told to stop and is draining"),
            Refusal::TooManyDraining => {
                let pids: Vec<String> = self.draining_workers().iter().map(|(_, pid)| pid.to_string()).collect();
                format!("too many older generations still drain (pid {}): wait, or end one of them", pids.join(", "))
            }
        }
    }

    pub(super) fn say_to_requester(&mut self, event: StageEvent) {
        let Some(attempt) = &self.attempt else { return };
        log::info!("{}: {} after {:.1} ms", attempt.verb, event.stage, event.at_ms);
        if let Some(client) = attempt.requester.client() {
            self.server.send(client, &Said::Stage(event));
        }
    }

    /// Of a worker of the upgrade under way, and of no other.
    fn begun_of(&self, worker: WorkerId) -> Option<(Instant, i32)> {
        let (attempt, seen) = (self.attempt.as_ref()?, self.machine.worker(worker)?);
        let pid = self.workers.get(&worker)?.pid.as_raw();
        (attempt.generation == seen.generation).then_some((attempt.begun, pid))
    }

    pub(super) fn announce_spawned(&mut self, worker: WorkerId) {
        if let Some((begun, pid)) = self.begun_of(worker) {
            self.say_to_requester(StageEvent { pid: Some(pid), ..stage(StageName::Spawned, begun) });
        }
    }

    pub(super) fn say_of(&mut self, worker: WorkerId, event: impl FnOnce(Instant, i32) -> StageEvent) {
        if let Some((begun, pid)) = self.begun_of(worker) {
            self.say_to_requester(event(begun, pid));
        }
    }

    pub(super) fn announce_ready(&mut self, worker: WorkerId, proof: String) {
        if let Some((begun, pid)) = self.begun_of(worker) {
            let event = stage(StageName::Ready, begun);
            self.say_to_requester(StageEvent { pid: Some(pid), reason: Some(proof), ..event });
        }
    }

    pub(super) fn all_are_ready(&mut self) {
        if let Some(Attempt { requester: Requester::Client(client, Wait::Ready), .. }) = self.attempt {
            let result = self.done();
            self.finish_with(client, result);
        }
    }

    /// All that is left of the upgrade is that the old ones drain.
    pub(super) fn announce_commit(&mut self, claims: Option<Claims>) {
        let Some(Attempt { verb, begun, .. }) = self.attempt else { return };
        if verb == Verb::Upgrade {
            self.say_to_requester(stage(StageName::Healthy, begun));
            self.say_to_requester(StageEvent { claims, ..stage(StageName::Committed, begun) });
        }
        let result = self.done();
        let Some(attempt) = self.attempt.take() else { return };
        self.remember(&result);
        match attempt.requester {
            Requester::Client(client, Wait::Healthy) => self.finish_with(client, result),
            Requester::Client(client, Wait::Drained) => self.wait_for_drain(&attempt, client, result),
            Requester::Client(_, Wait::Ready) | Requester::Nobody => {}
        }
    }

    fn done(&self) -> ResultEvent {
        let Some(attempt) = &self.attempt else { return ResultEvent::new(Outcome::Upgraded, "upgraded") };
        let generation = attempt.generation;
        let new = self.machine.workers().filter(|(_, worker)| worker.generation == generation);
        let pids: Vec<Pid> = new.filter_map(|(id, _)| self.workers.get(&id)).map(|worker| worker.pid).collect();
        let who = match pids.as_slice() {
            [pid] => format!("pid {pid}"),
            pids => format!("{} workers", pids.len()),
        };
        let (outcome, how) = match attempt.verb {
            Verb::Upgrade => (Outcome::Upgraded, "upgraded to"),
            Verb::Restart => (Outcome::Restarted, "restarted as"),
        };
        ResultEvent {
            at_ms: Some(milliseconds_since(attempt.begun)),
            pid: Some(std::process::id().cast_signed()),
            generation: Some(generation),
            ..ResultEvent::new(outcome, format!("{how} generation {generation} ({who})"))
        }
    }

    pub(super) fn remember(&mut self, result: &ResultEvent) {
        let (outcome, message) = (result.result, result.message.clone());
        self.last_upgrade = Some(LastUpgrade { result: outcome, message, at_unix_ms: unix_ms(SystemTime::now()) });
    }

    pub(super) fn schedule_alive(&mut self) {
        self.timers.alive = Some(Instant::now() + ALIVE_INTERVAL);
    }

    /// So that whoever waits can tell a long start from a stopped process.
    pub(super) fn say_alive(&mut self) {
        let of_upgrade = self.attempt.as_ref().and_then(|attempt| attempt.requester.client());
        let of_drains = self.drains.iter().map(|drain| drain.client);
        let of_stop = self.stop_clients.iter().map(|(client, _)| *client);
        let of_scaling = self.scaling.as_ref().map(|scaling| scaling.client);
        let of_replacement = self.replacement.as_ref().map(|replacement| replacement.client);
        let asked = of_upgrade.into_iter().chain(of_scaling).chain(of_replacement);
        let mut waiting: Vec<ClientId> = asked.chain(of_drains).chain(of_stop).collect();
        waiting.retain(|client| self.server.is_connected(*client));
        for client in &waiting {
            self.server.send(*client, &Said::Alive);
        }
        if !waiting.is_empty() {
            self.schedule_alive();
        }
    }
}
