//! One worker in its slot: started, ready, gone, and started again.

use std::time::{Duration, Instant};

use super::{
    Action, BACKOFF_FIRST, BACKOFF_MAX, Build, Crashes, Doing, Failure, KILL_TIMEOUT, MORE_TIME_MAX, Machine,
    STEADY_AFTER, Stage, Step, Worker, WorkerId,
};

impl Machine {
    /// Starts a worker of the committed generation wherever one is missing that is not waited for.
    pub(super) fn refill(&mut self, now: Instant) {
        for slot in 0..self.policy.workers {
            let mut here = self.workers.values().filter(|worker| worker.slot == slot);
            let taken = match self.overlap {
                true => here.any(|worker| worker.generation == self.generation && worker.is_to_be_followed()),
                false => here.next().is_some(),
            };
            let awaited = self.crashes.get(&slot).is_some_and(|crashes| crashes.restart_at.is_some());
            if !taken && !awaited && self.keeps(slot) {
                self.spawn(slot, self.generation, Build::Committed, now + self.policy.ready_timeout, now);
            }
        }
    }

    /// Whether the committed generation has a worker in this slot.
    fn keeps(&self, slot: usize) -> bool {
        slot < self.policy.workers
            && match &self.doing {
                Doing::Nothing => self.generation > 0,
                Doing::Rolling(roll) if roll.order.overlap && roll.step != Step::Retiring => slot >= roll.slots.start,
                Doing::Rolling(roll) => slot >= roll.slots.end,
                Doing::Stopping | Doing::Ended => false,
            }
    }

    pub(super) fn spawn(&mut self, slot: usize, generation: u64, build: Build, deadline: Instant, now: Instant) {
        let id = self.next_id;
        self.next_id += 1;
        self.workers.insert(id, Worker { generation, slot, stage: Stage::Starting { deadline }, since: now });
        self.actions.push(Action::Spawn { worker: id, slot, generation, build });
    }

    pub(super) fn ready(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        if matches!(worker.stage, Stage::Starting { .. }) {
            (worker.stage, worker.since) = (Stage::Ready, now);
            self.look_at_step(now);
            self.relieve(id, now);
        }
    }

    /// Its time begins anew.
    pub(super) fn still_starting(&mut self, id: WorkerId, now: Instant) {
        let Doing::Rolling(roll) = &self.doing else { return };
        let timeout = roll.order.ready_timeout;
        let worker = self.workers.get_mut(&id).filter(|worker| worker.generation == roll.generation);
        if let Some(Stage::Starting { deadline }) = worker.map(|worker| &mut worker.stage) {
            *deadline = now + timeout;
        }
    }

    /// Of any build: one that is started again after a crash starts no faster.
    pub(super) fn needs_time(&mut self, id: WorkerId, time: Duration, now: Instant) {
        if let Some(Stage::Starting { deadline }) = self.workers.get_mut(&id).map(|worker| &mut worker.stage) {
            *deadline = (now + time.min(MORE_TIME_MAX)).max(*deadline);
        }
    }

    pub(super) fn refused(&mut self, id: WorkerId, now: Instant) {
        if self.workers.get(&id).is_some_and(|worker| worker.is_up() && self.is_new(worker)) {
            self.give_up(Failure::Refused, Some(id), now);
        }
    }

    pub(super) fn gone(&mut self, id: WorkerId, failure: Failure, now: Instant) {
        let Some(worker) = self.workers.remove(&id) else { return };
        match worker.stage {
            Stage::Starting { .. } | Stage::Ready if self.is_new(&worker) => self.give_up(failure, Some(id), now),
            Stage::Starting { .. } | Stage::Ready | Stage::Killed { crashed: true, .. } => self.crashed(&worker, now),
            Stage::Stopping { .. } | Stage::Killed { .. } => {}
        }
        match self.doing {
            Doing::Nothing if !self.overlap => self.refill(now),
            _ => self.look_at_step(now),
        }
        self.finish_if_all_are_gone();
    }

    fn crashed(&mut self, worker: &Worker, now: Instant) {
        if worker.generation != self.generation || !self.keeps(worker.slot) {
            return;
        }
        let was_steady = worker.stage == Stage::Ready && now.duration_since(worker.since) >= STEADY_AFTER;
        let times = if was_steady { 1 } else { self.crashes(worker.slot).saturating_add(1) };
        // At once, the first time: it may have been an accident, and clients wait.
        let delay = match times {
            1 => Duration::ZERO,
            _ => BACKOFF_FIRST.saturating_mul(1 << (times - 2).min(16)).min(BACKOFF_MAX),
        };
        self.actions.push(Action::Crashed { slot: worker.slot, times, delay });
        let restart_at = (!delay.is_zero()).then_some(now + delay);
        self.crashes.insert(worker.slot, Crashes { times, restart_at });
        self.refill(now);
    }

    pub(super) fn tick(&mut self, now: Instant) {
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        for id in ids {
            self.tick_worker(id, now);
        }
        let mut due = false;
        for crashes in self.crashes.values_mut() {
            due |= crashes.restart_at.take_if(|at| *at <= now).is_some();
        }
        if due {
            self.refill(now);
        }
        self.end_trial_if_over(now);
    }

    fn tick_worker(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        let killed = |crashed| Stage::Killed { deadline: now + KILL_TIMEOUT, crashed };
        match worker.stage {
            Stage::Starting { deadline } if deadline <= now => {
                if matches!(&self.doing, Doing::Rolling(roll) if roll.generation == worker.generation) {
                    self.give_up(Failure::Silent, Some(id), now);
                } else {
                    worker.stage = killed(true);
                    self.actions.push(Action::Kill(id));
                }
            }
            Stage::Stopping { deadline: Some(deadline) } if deadline <= now => {
                worker.stage = killed(false);
                self.actions.push(Action::Cut(id));
            }
            Stage::Killed { deadline, .. } if deadline <= now => {
                self.actions.push(Action::Abandon(id));
                self.gone(id, Failure::Exited, now);
            }
            _ => {}
        }
    }
}
