//! The state machine of `handover exec`: the one place that decides which worker is started, told to stop, or killed.
//!
//! A plain value without I/O and without a clock: [`Machine::on_event`] takes what happened and when, and answers with
//! what is to be done. The engine does it; tests drive the same value.
//!
//! A *slot* is one of the N places that `--workers N` makes; in each, a worker of the generation that was committed last
//! is kept running. An upgrade *rolls* over the slots in steps: starts new workers, sees them ready and through their
//! trial, and only then tells the old ones to stop. Until the last step is through, the new build can be given up.

mod rolling;
mod slots;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::saved::moment;

pub(crate) type WorkerId = u64;

pub(crate) const WORKERS_MAX: usize = 1024;
/// A worker that cannot even be killed (a dead disk) is not waited for longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever has served for so long and then dies is no part of a crash loop.
const STEADY_AFTER: Duration = Duration::from_secs(10);
/// What a worker may ask for at a time.
const MORE_TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How the workers of a service are to be run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Policy {
    pub(crate) workers: usize,
    pub(crate) ready_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) max_draining: usize,
    /// Old and new may run side by side.
    pub(crate) overlap: bool,
}

/// How one upgrade or restart is to be done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub(crate) ready_timeout: Duration,
    pub(crate) trial: Duration,
    pub(crate) drain_timeout: Duration,
    /// How many slots are taken at a time.
    pub(crate) step: usize,
    pub(crate) overlap: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Start(Order),
    Upgrade(Order),
    Ready(WorkerId),
    /// It says that it needs more time: its own begins anew.
    StillStarting(WorkerId),
    /// It says that it needs so much, from now on.
    NeedsTime(WorkerId, Duration),
    /// It says that it will not serve, or nothing that can be understood.
    Refused(WorkerId),
    NotSpawned(WorkerId),
    Exited(WorkerId),
    /// Drain all; also changes the time that a drain under way may take.
    Stop(Option<Duration>),
    /// What is left is killed.
    StopNow,
    Scale(usize),
    /// Some deadline has passed.
    Tick,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Build {
    /// What an upgrade asks for.
    New,
    /// The one that was committed last.
    Committed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    NotSpawned,
    Exited,
    Silent,
    Refused,
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    UnderWay,
    Stopping,
    TooManyDraining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Answers what has just been asked for.
    Refuse(Refusal),
    Spawn {
        worker: WorkerId,
        slot: usize,
        generation: u64,
        build: Build,
    },
    Stop(WorkerId),
    Kill(WorkerId),
    /// Told to stop though it was not ready. If it does not serve by then, there is no reason to wait for its end.
    Dismiss(WorkerId),
    /// Killed at the drain deadline: what it still had open is cut.
    Cut(WorkerId),
    /// It does not even die; it is forgotten.
    Abandon(WorkerId),
    /// No worker is left where the new ones are to be started.
    Cleared,
    /// The new workers of this step are ready; their trial begins.
    LetAccept,
    /// Every new worker is ready.
    AllReady,
    Commit,
    /// The new build is given up, because of this worker if it was one.
    Fail {
        failure: Failure,
        worker: Option<WorkerId>,
        in_trial: bool,
    },
    /// A worker ended by itself; so many times in a row, and when the next is started.
    Crashed {
        slot: usize,
        times: u32,
        delay: Duration,
    },
    /// All are told to stop.
    Drain,
    Finish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Stage {
    Starting {
        #[serde(with = "moment")]
        deadline: Instant,
    },
    Ready,
    /// Told to stop; none: it may take for ever.
    Stopping {
        #[serde(with = "moment::option")]
        deadline: Option<Instant>,
    },
    Killed {
        #[serde(with = "moment")]
        deadline: Instant,
        crashed: bool,
    },
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) generation: u64,
    pub(crate) slot: usize,
    pub(crate) stage: Stage,
    #[serde(with = "moment")]
    since: Instant,
}

impl Worker {
    pub(crate) fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. })
    }

    fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. } | Stage::Ready)
    }

    /// Its end is a crash, after which the next one is started, and not before.
    fn is_to_be_followed(&self) -> bool {
        self.is_up() || matches!(self.stage, Stage::Killed { crashed: true, .. })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Serving,
    Upgrading,
    Trial,
    Draining,
    Ended,
}

#[derive(Clone, Debug, Default)]
enum Doing {
    #[default]
    Nothing,
    Rolling(Roll),
    Stopping,
    Ended,
}

#[derive(Clone, Debug)]
struct Roll {
    order: Order,
    generation: u64,
    /// Those of the step under way.
    slots: Range<usize>,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The old workers of the slots go first.
    Clearing,
    Starting,
    Trial {
        until: Instant,
    },
    /// The old workers of the slots go before the next step begins.
    Retiring,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Crashes {
    times: u32,
    #[serde(with = "moment::option")]
    restart_at: Option<Instant>,
}

/// It is written down for the next build of a supervisor only while it does nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    policy: Policy,
    /// As the upgrade under way wants it, or the one that has failed.
    overlap: bool,
    #[serde(skip)]
    doing: Doing,
    workers: BTreeMap<WorkerId, Worker>,
    next_id: WorkerId,
    /// Committed last; 0 before the first.
    generation: u64,
    crashes: BTreeMap<usize, Crashes>,
    #[serde(skip)]
    actions: Vec<Action>,
}

impl Machine {
    pub(crate) fn new(policy: Policy) -> Self {
        Self {
            policy,
            overlap: policy.overlap,
            doing: Doing::Nothing,
            workers: BTreeMap::new(),
            next_id: 0,
            generation: 0,
            crashes: BTreeMap::new(),
            actions: vec![],
        }
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn wanted(&self) -> usize {
        self.policy.workers
    }

    pub(crate) fn phase(&self) -> Phase {
        match &self.doing {
            Doing::Nothing if self.generation == 0 => Phase::Starting,
            Doing::Nothing => Phase::Serving,
            Doing::Rolling(_) if self.generation == 0 => Phase::Starting,
            Doing::Rolling(Roll { step: Step::Trial { .. }, .. }) => Phase::Trial,
            Doing::Rolling(_) => Phase::Upgrading,
            Doing::Stopping => Phase::Draining,
            Doing::Ended => Phase::Ended,
        }
    }

    pub(crate) fn worker(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(&id)
    }

    pub(crate) fn workers(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.workers.iter().map(|(id, worker)| (*id, worker))
    }

    /// How many times in a row the worker of a slot has ended by itself.
    pub(crate) fn crashes(&self, slot: usize) -> u32 {
        self.crashes.get(&slot).map_or(0, |crashes| crashes.times)
    }

    /// When the next [`Event::Tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let of_workers = self.workers.values().filter_map(|worker| match worker.stage {
            Stage::Starting { deadline } | Stage::Killed { deadline, .. } => Some(deadline),
            Stage::Stopping { deadline } => deadline,
            Stage::Ready => None,
        });
        let of_roll = match &self.doing {
            Doing::Rolling(Roll { step: Step::Trial { until }, .. }) => Some(*until),
            _ => None,
        };
        let restarts = self.crashes.values().filter_map(|crashes| crashes.restart_at);
        of_workers.chain(of_roll).chain(restarts).min()
    }

    pub(crate) fn on_event(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Start(order) if self.generation == 0 && !self.is_rolling() => self.roll(order, now),
            Event::Start(_) => {}
            Event::Upgrade(order) => match self.refusal_of(&order) {
                Some(refusal) => self.actions.push(Action::Refuse(refusal)),
                None => self.roll(order, now),
            },
            Event::Ready(id) => self.ready(id, now),
            Event::StillStarting(id) => self.still_starting(id, now),
            Event::NeedsTime(id, time) => self.needs_time(id, time, now),
            Event::Refused(id) => self.refused(id, now),
            Event::NotSpawned(id) => self.gone(id, Failure::NotSpawned, now),
            Event::Exited(id) => self.gone(id, Failure::Exited, now),
            Event::Stop(timeout) => self.stop(timeout, now),
            Event::StopNow => self.stop_now(now),
            Event::Scale(workers) => match self.refusal() {
                Some(refusal) => self.actions.push(Action::Refuse(refusal)),
                None => self.scale(workers, now),
            },
            Event::Tick => self.tick(now),
        }
        std::mem::take(&mut self.actions)
    }

    fn is_rolling(&self) -> bool {
        matches!(self.doing, Doing::Rolling(_))
    }

    /// Of the next upgrade. What a failed one has left serving keeps its number for itself.
    pub(crate) fn next_generation(&self) -> u64 {
        let serving = self.workers.values().filter(|worker| worker.is_up()).map(|worker| worker.generation);
        serving.max().unwrap_or_default().max(self.generation) + 1
    }

    /// Whether a worker is part of the upgrade under way.
    pub(crate) fn is_new(&self, worker: &Worker) -> bool {
        matches!(&self.doing, Doing::Rolling(roll) if roll.generation == worker.generation)
    }

    /// Why no upgrade can begin now. One without overlap ends what drains before it starts anything. Where the build that was
    /// committed last does not come up any more, only another upgrade can put it right.
    pub(crate) fn refusal_of(&self, order: &Order) -> Option<Refusal> {
        let too_many = order.overlap && self.draining() >= self.policy.max_draining;
        let is_stuck = |worker: &Worker| self.crashes(worker.slot) > 0;
        self.refusal_but_for(is_stuck).or(too_many.then_some(Refusal::TooManyDraining))
    }

    /// How many older generations drain, or how many workers in one slot: builds that have failed leave some as well.
    fn draining(&self) -> usize {
        let older: BTreeSet<u64> =
            self.workers.values().map(|worker| worker.generation).filter(|one| *one < self.generation).collect();
        let mut in_slots = BTreeMap::new();
        for worker in self.workers.values().filter(|worker| !worker.is_up()) {
            *in_slots.entry(worker.slot).or_default() += 1;
        }
        older.len().max(in_slots.into_values().max().unwrap_or_default())
    }

    /// Why nothing can be changed now.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal_but_for(|_| false)
    }

    /// As if those were not there that a failed upgrade has left serving.
    fn refusal_but_for(&self, which: impl Fn(&Worker) -> bool) -> Option<Refusal> {
        let left = |worker: &&Worker| worker.is_up() && worker.generation > self.generation;
        let rolls_back = self.workers.values().filter(left).any(|worker| !which(worker));
        match self.doing {
            Doing::Rolling(_) => Some(Refusal::UnderWay),
            Doing::Nothing if rolls_back => Some(Refusal::UnderWay),
            Doing::Stopping | Doing::Ended => Some(Refusal::Stopping),
            Doing::Nothing => None,
        }
    }

    fn tell_to_stop(&mut self, timeout: Duration, now: Instant, which: impl Fn(&Worker) -> bool) {
        let deadline = after(timeout, now);
        for (id, worker) in &mut self.workers {
            if worker.is_up() && which(worker) {
                worker.stage = Stage::Stopping { deadline };
                self.actions.push(Action::Stop(*id));
            }
        }
    }

    fn stop(&mut self, timeout: Option<Duration>, now: Instant) {
        let began = !matches!(self.doing, Doing::Stopping | Doing::Ended);
        if self.is_rolling() {
            self.give_up(Failure::Stopped, None, now);
        }
        if began {
            self.doing = Doing::Stopping;
            self.crashes.clear();
            self.actions.push(Action::Drain);
        }
        self.tell_to_stop(timeout.unwrap_or(self.policy.drain_timeout), now, |_| true);
        if let Some(timeout) = timeout {
            let new = after(timeout, now);
            for worker in self.workers.values_mut() {
                if let Stage::Stopping { deadline } = &mut worker.stage {
                    *deadline = new;
                }
            }
        }
        self.finish_if_all_are_gone();
    }

    fn stop_now(&mut self, now: Instant) {
        self.stop(None, now);
        for (id, worker) in &mut self.workers {
            if let Stage::Stopping { .. } = worker.stage {
                worker.stage = Stage::Killed { deadline: now + KILL_TIMEOUT, crashed: false };
                self.actions.push(Action::Cut(*id));
            }
        }
    }

    fn scale(&mut self, workers: usize, now: Instant) {
        self.policy.workers = workers.max(1);
        let wanted = self.policy.workers;
        self.crashes.retain(|slot, _| *slot < wanted);
        self.tell_to_stop(self.policy.drain_timeout, now, |worker| worker.slot >= wanted);
        self.refill(now);
    }

    fn finish_if_all_are_gone(&mut self) {
        if matches!(self.doing, Doing::Stopping) && self.workers.is_empty() {
            self.doing = Doing::Ended;
            self.actions.push(Action::Finish);
        }
    }
}

/// Zero is for ever.
fn after(timeout: Duration, now: Instant) -> Option<Instant> {
    (!timeout.is_zero()).then(|| now + timeout)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
