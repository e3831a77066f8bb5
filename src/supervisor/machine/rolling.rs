//! An upgrade, from its first step to commit or to giving up.

use std::time::Instant;

use super::{Action, Build, Doing, Failure, KILL_TIMEOUT, Machine, Order, Roll, Stage, Step, Worker, WorkerId, after};

impl Machine {
    pub(super) fn roll(&mut self, order: Order, now: Instant) {
        let generation = self.next_generation();
        self.overlap = order.overlap;
        self.doing = Doing::Rolling(Roll { order, generation, slots: 0..0, step: Step::Starting });
        self.next_step(now);
    }

    /// Takes the next slots, or commits when there are none left.
    fn next_step(&mut self, now: Instant) {
        let Doing::Rolling(roll) = &mut self.doing else { return };
        if roll.slots.end >= self.policy.workers {
            return self.commit(now);
        }
        let end = roll.slots.end.saturating_add(roll.order.step.max(1)).min(self.policy.workers);
        roll.slots = roll.slots.end..end;
        if roll.order.overlap || self.generation == 0 {
            return self.start_step(now);
        }
        roll.step = Step::Clearing;
        self.retire_step(now);
        self.look_at_step(now);
    }

    fn start_step(&mut self, now: Instant) {
        let Doing::Rolling(roll) = &mut self.doing else { return };
        roll.step = Step::Starting;
        let (slots, generation, timeout) = (roll.slots.clone(), roll.generation, roll.order.ready_timeout);
        for slot in slots {
            self.spawn(slot, generation, Build::New, now + timeout, now);
        }
    }

    /// The old workers of the slots of this step are told to stop, and none is started there again.
    fn retire_step(&mut self, now: Instant) {
        let Doing::Rolling(roll) = &self.doing else { return };
        let (slots, generation, timeout) = (roll.slots.clone(), roll.generation, roll.order.drain_timeout);
        self.crashes.retain(|slot, _| !slots.contains(slot));
        let limit = after(timeout, now).filter(|_| !roll.order.overlap);
        self.tell_to_stop(timeout, now, |worker| worker.generation < generation && slots.contains(&worker.slot));
        // Those that drain already are waited for as well, and no longer than the others.
        for worker in self.workers.values_mut().filter(|worker| slots.contains(&worker.slot)) {
            if let (Stage::Stopping { deadline }, Some(limit)) = (&mut worker.stage, limit) {
                *deadline = Some(deadline.map_or(limit, |earlier| earlier.min(limit)));
            }
        }
    }

    /// Whether the step has come to its next part.
    pub(super) fn look_at_step(&mut self, now: Instant) {
        let Doing::Rolling(roll) = &mut self.doing else { return };
        let in_step = |worker: &&Worker| roll.slots.contains(&worker.slot);
        let all_are_gone = !self.workers.values().any(|worker| in_step(&worker));
        let old_are_gone = !self.workers.values().filter(in_step).any(|worker| worker.generation < roll.generation);
        let new = self.workers.values().filter(in_step).filter(|worker| worker.generation == roll.generation);
        let ready = new.filter(|worker| worker.stage == Stage::Ready).count() == roll.slots.len();
        match roll.step {
            Step::Clearing if all_are_gone => {
                self.actions.push(Action::Cleared);
                self.start_step(now);
            }
            Step::Retiring if old_are_gone => self.next_step(now),
            Step::Starting if ready => {
                roll.step = Step::Trial { until: now + roll.order.trial };
                self.actions.push(Action::LetAccept);
                if roll.slots.end >= self.policy.workers {
                    self.actions.push(Action::AllReady);
                }
                self.end_trial_if_over(now);
            }
            _ => {}
        }
    }

    pub(super) fn end_trial_if_over(&mut self, now: Instant) {
        let Doing::Rolling(roll) = &mut self.doing else { return };
        let over = matches!(roll.step, Step::Trial { until } if until <= now);
        if !over {
            return;
        }
        if roll.slots.end >= self.policy.workers {
            return self.commit(now);
        }
        roll.step = Step::Retiring;
        self.retire_step(now);
        self.look_at_step(now);
    }

    fn commit(&mut self, now: Instant) {
        let Doing::Rolling(roll) = std::mem::replace(&mut self.doing, Doing::Nothing) else { return };
        self.generation = roll.generation;
        self.overlap = self.policy.overlap;
        self.crashes.clear();
        self.actions.push(Action::Commit);
        self.tell_to_stop(roll.order.drain_timeout, now, |worker| worker.generation < roll.generation);
    }

    /// The one end of every failure: the new workers go, and the old ones are as they were. A new one that serves already
    /// finishes what it has accepted; where the old one of its slot is not there any more, it serves until that is back. So does
    /// what an upgrade before has left.
    pub(super) fn give_up(&mut self, failure: Failure, worker: Option<WorkerId>, now: Instant) {
        let Doing::Rolling(roll) = std::mem::replace(&mut self.doing, Doing::Nothing) else { return };
        let committed = |worker: &&Worker| worker.generation == self.generation && worker.stage == Stage::Ready;
        let served: Vec<usize> = self.workers.values().filter(committed).map(|worker| worker.slot).collect();
        for (id, new) in self.workers.iter_mut().filter(|(_, worker)| worker.generation > self.generation) {
            match new.stage {
                Stage::Ready if self.generation > 0 => {
                    if served.contains(&new.slot) || !self.overlap {
                        new.stage = Stage::Stopping { deadline: after(roll.order.drain_timeout, now) };
                        self.actions.push(Action::Stop(*id));
                    }
                }
                Stage::Starting { .. } if self.generation > 0 => {
                    new.stage = Stage::Stopping { deadline: after(roll.order.drain_timeout, now) };
                    self.actions.push(Action::Dismiss(*id));
                }
                Stage::Starting { .. } | Stage::Ready => {
                    new.stage = Stage::Killed { deadline: now + KILL_TIMEOUT, crashed: false };
                    self.actions.push(Action::Kill(*id));
                }
                // Perhaps of an attempt before.
                Stage::Stopping { .. } | Stage::Killed { .. } => {}
            }
        }
        let in_trial = matches!(roll.step, Step::Trial { .. });
        self.actions.push(Action::Fail { failure, worker, in_trial });
        if self.generation == 0 {
            self.doing = Doing::Stopping;
            self.finish_if_all_are_gone();
        } else {
            self.refill(now);
        }
    }

    /// Ends what a failed upgrade has left serving in the slot of a worker of the committed build, now that this is ready.
    pub(super) fn relieve(&mut self, id: WorkerId, now: Instant) {
        let Some(worker) = self.workers.get(&id).copied() else { return };
        if matches!(self.doing, Doing::Nothing) && worker.generation == self.generation {
            let newer = |other: &Worker| other.slot == worker.slot && other.generation > worker.generation;
            self.tell_to_stop(self.policy.drain_timeout, now, newer);
        }
    }
}
