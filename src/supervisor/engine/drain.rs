//! Workers that finish what they have: how many connections are still open, and how many were closed too early.

use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Supervisor;
use super::answers::{Attempt, Verb, stage};
use crate::control::messages::{Event as Said, Outcome, ResultEvent, StageEvent, StageName};
use crate::control::server::ClientId;
use crate::engine::milliseconds_since;
use crate::saved::moment;
use crate::supervisor::machine::{Stage, WorkerId};
use crate::supervisor::{connections, family};

const COUNT_INTERVAL: Duration = Duration::from_millis(100);

/// The older generations after an upgrade, for one who waits for their end.
#[derive(Serialize, Deserialize)]
pub(super) struct Drain {
    pub(super) client: ClientId,
    #[serde(with = "moment")]
    begun: Instant,
    /// The one that serves; older ones are waited for.
    generation: u64,
    cut: usize,
    result: ResultEvent,
}

impl Supervisor {
    /// Some are about to be told to stop.
    pub(super) fn announce_stops(&mut self) {
        match self.attempt {
            Some(Attempt { verb: Verb::Restart, .. }) => {
                self.last_count = None;
                self.announce_drain_count();
            }
            _ => drop(self.count_connections()),
        }
    }

    /// The old workers of a restart are gone.
    pub(super) fn announce_cleared(&mut self) {
        if let Some(Attempt { verb: Verb::Restart, begun, cut, .. }) = self.attempt {
            self.say_to_requester(StageEvent { cut: Some(cut), ..stage(StageName::Drained, begun) });
            self.say_to_requester(stage(StageName::Gone, begun));
        }
    }

    pub(super) fn wait_for_drain(&mut self, attempt: &Attempt, client: ClientId, result: ResultEvent) {
        let (begun, generation) = (attempt.begun, attempt.generation);
        self.drains.push(Drain { client, begun, generation, cut: 0, result });
        self.count_from_now();
    }

    /// Somebody wants to know.
    pub(super) fn count_from_now(&mut self) {
        self.last_count = None;
        self.timers.drain_count = Some(Instant::now());
    }

    /// Connections of a worker that were closed before they had ended.
    pub(super) fn count_cut(&mut self, id: WorkerId, open: usize) {
        let Some(generation) = self.machine.worker(id).map(|worker| worker.generation) else { return };
        self.cut += open;
        self.attempt.iter_mut().for_each(|attempt| attempt.cut += open);
        self.drains.iter_mut().filter(|drain| drain.generation > generation).for_each(|drain| drain.cut += open);
    }

    /// Those of all that were told to stop.
    fn count_connections(&mut self) -> usize {
        let (ids, pids): (Vec<WorkerId>, Vec<Pid>) = self.draining_workers().into_iter().unzip();
        let threads: Vec<Pid> = pids.into_iter().map(family::living_thread).collect();
        let open = connections::open(&threads, &self.sockets.addresses());
        for ((id, thread), open) in ids.iter().zip(&threads).zip(&open) {
            // What one had that is killed was counted then, though it may take a while to end.
            let is_told = self.machine.worker(*id).is_some_and(|worker| matches!(worker.stage, Stage::Stopping { .. }));
            // One that is just ending has none any more, and that says nothing of how it came to that.
            let worker = self.workers.get_mut(id).filter(|_| is_told && family::has_fds(*thread));
            worker.into_iter().for_each(|worker| worker.open = *open);
        }
        open.iter().sum()
    }

    /// To those who wait for a drain, when the count has changed.
    pub(super) fn announce_drain_count(&mut self) {
        let of_restart = self.attempt.as_ref().filter(|attempt| attempt.verb == Verb::Restart);
        let of_restart = of_restart.and_then(|attempt| Some((attempt.requester.client()?, attempt.begun)));
        let of_drains = self.drains.iter().map(|drain| (drain.client, drain.begun));
        let waiting: Vec<(ClientId, Instant)> =
            of_drains.chain(of_restart).chain(self.stop_clients.iter().copied()).collect();
        if waiting.is_empty() || self.draining_workers().is_empty() {
            return;
        }
        let begun = Instant::now();
        let open = self.count_connections();
        // Where there are a great many sockets it takes its time, and must not take all of it.
        self.timers.drain_count = Some(Instant::now() + COUNT_INTERVAL.max(10 * begun.elapsed()));
        if self.last_count == Some(open) {
            return;
        }
        self.last_count = Some(open);
        for (client, begun) in waiting {
            let event = StageEvent { connections: Some(open), ..stage(StageName::Draining, begun) };
            self.server.send(client, &Said::Stage(event));
        }
    }

    /// Answers those who wait for older generations that are gone.
    pub(super) fn end_drains(&mut self) {
        let oldest = self.machine.workers().map(|(_, worker)| worker.generation).min().unwrap_or(u64::MAX);
        let (over, left): (Vec<Drain>, Vec<Drain>) =
            std::mem::take(&mut self.drains).into_iter().partition(|drain| drain.generation <= oldest);
        self.drains = left;
        for drain in over {
            let result = ResultEvent { at_ms: Some(milliseconds_since(drain.begun)), ..drain.result };
            self.finish_with(drain.client, with_cut(result, drain.cut));
        }
    }

    pub(super) fn answer_stopped(&mut self) {
        log::info!("stopped");
        for (client, begun) in std::mem::take(&mut self.stop_clients) {
            let message = format!("process {} stopped", std::process::id());
            let result = ResultEvent::new(Outcome::Stopped, message);
            let result = ResultEvent { at_ms: Some(milliseconds_since(begun)), ..result };
            self.finish_with(client, with_cut(result, self.cut));
        }
        self.end_drains();
    }
}

fn with_cut(result: ResultEvent, cut: usize) -> ResultEvent {
    let connections = match cut {
        0 => return result,
        1 => "1 connection was closed before it had ended".to_owned(),
        _ => format!("{cut} connections were closed before they had ended"),
    };
    let message = format!("{}; {connections}", result.message);
    ResultEvent { result: Outcome::Cut, message, cut: Some(cut), ..result }
}
