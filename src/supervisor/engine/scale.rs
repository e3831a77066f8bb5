//! More workers, or fewer, of the build that serves.

use std::time::Instant;

use super::Supervisor;
use crate::control::messages::{Outcome, ResultEvent};
use crate::control::server::ClientId;
use crate::engine::milliseconds_since;
use crate::supervisor::machine::{Event, Refusal, Stage, WORKERS_MAX};

/// Under way, for one who waits for it.
pub(super) struct Scaling {
    pub(super) client: ClientId,
    begun: Instant,
    before: usize,
}

impl Supervisor {
    pub(super) fn scale(&mut self, client: ClientId, workers: usize) {
        let refusal = self.machine.refusal();
        if !(1..=WORKERS_MAX).contains(&workers) {
            let message = format!("a service has from 1 to {WORKERS_MAX} workers");
            return self.finish_with(client, ResultEvent::new(Outcome::BadRequest, message));
        }
        if let Some(refusal) =
            refusal.or((self.scaling.is_some() || self.replacement.is_some()).then_some(Refusal::UnderWay))
        {
            let message = self.words_for_refusal(refusal);
            return self.finish_with(client, ResultEvent::new(Outcome::Busy, message));
        }
        self.accept(client);
        self.schedule_alive();
        self.scaling = Some(Scaling { client, begun: Instant::now(), before: self.machine.wanted() });
        self.tell(Event::Scale(workers));
    }

    /// Answers when as many workers serve as were asked for. If a new one does not come up all is as it was.
    pub(super) fn look_at_scaling(&mut self) {
        let Some(scaling) = &self.scaling else { return };
        let (before, wanted) = (scaling.before, self.machine.wanted());
        let crashed = self.last_exit.as_ref().filter(|(slot, _)| (before..wanted).contains(slot));
        let crashed = crashed.filter(|(slot, _)| self.machine.crashes(*slot) > 0);
        let all_serve = self.machine.workers().all(|(_, worker)| worker.stage == Stage::Ready);
        let result = match crashed {
            Some((slot, how)) => {
                let what = format!("worker {slot} {how}");
                let message = format!("not scaled: {what}; {before} serve on");
                ResultEvent { failure: Some(what), ..ResultEvent::new(Outcome::Failed, message) }
            }
            None if all_serve && self.machine.workers().count() == wanted => {
                ResultEvent::new(Outcome::Scaled, format!("scaled from {before} to {wanted} workers"))
            }
            None => return,
        };
        let result = ResultEvent { at_ms: Some(milliseconds_since(scaling.begun)), ..result };
        let client = scaling.client;
        self.scaling = None;
        if result.result == Outcome::Failed {
            log::error!("{}", result.message);
            self.tell(Event::Scale(before));
        }
        self.finish_with(client, result);
    }
}
