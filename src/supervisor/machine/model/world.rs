//! The workers, operators and the clock around the machine, and what must hold of each step.

use std::hash::{Hash, Hasher};

use super::Flaw;
use crate::supervisor::machine::*;

const SECOND: Duration = Duration::from_secs(1);

/// How much may happen that nothing makes happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    /// Upgrades and restarts that are asked for.
    pub(super) orders: usize,
    /// Workers that end by themselves, ready or not.
    pub(super) deaths: usize,
    /// New builds that say that they will not serve, and workers that cannot be spawned.
    pub(super) failures: usize,
    pub(super) scales: usize,
    pub(super) stops: usize,
}

/// What the machine does not know of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Life {
    Starting {
        is_new: bool,
    },
    Serves,
    /// Has said that it will not serve.
    Refuses,
    /// Was told to stop.
    Drains,
    Dies,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Child {
    slot: usize,
    life: Life,
}

impl Child {
    fn was_told(&self) -> bool {
        matches!(self.life, Life::Drains | Life::Dies)
    }
}

/// What is asked of the machine, of which it promises other things each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum How {
    Together,
    OneByOne,
    NeverTwo,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    // What happens by itself.
    BecomesReady(WorkerId),
    Ends(WorkerId),
    TimeIsUp(Deadline),
    // What comes from outside.
    Ask(How),
    Dies(WorkerId),
    Refuses(WorkerId),
    IsNotSpawned(WorkerId),
    Scale(usize),
    Stop,
    StopNow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deadline {
    /// To be ready, to have drained, or to have died.
    Worker(WorkerId),
    Trial,
    /// For the next worker of a slot in which they crash.
    Restart(usize),
}

/// What the last step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum CameTo {
    Nothing,
    Failure { in_trial: bool },
    Refusal,
    Cut,
    TheEnd,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) machine: Machine,
    /// It stands still, and what is due is put there.
    now: Instant,
    pub(super) children: BTreeMap<WorkerId, Child>,
    pub(super) budget: Budget,
    flaw: Option<Flaw>,
    /// Of the upgrade under way.
    how: Option<How>,
    trial_is_over: bool,
    /// The last upgrade was one in which two never run side by side, and so is its way back.
    never_two: bool,
    pub(super) stopped: bool,
    pub(super) broken_rule: Option<&'static str>,
    pub(super) came_to: CameTo,
}

/// What tells two worlds apart: workers by the order in which they were started, and no times.
#[derive(PartialEq, Eq, Hash)]
struct View {
    workers: Vec<(u64, usize, u8, Option<Child>)>,
    crashes: Vec<(usize, bool, bool)>,
    doing: (u8, Option<(How, Range<usize>)>),
    generation: u64,
    wanted: usize,
    overlap: bool,
    how: Option<How>,
    never_two: bool,
    stopped: bool,
    trial_is_over: bool,
    budget: Budget,
    came_to: CameTo,
    broken_rule: Option<&'static str>,
}

fn order(how: How) -> Order {
    Order {
        ready_timeout: 5 * SECOND,
        trial: SECOND,
        drain_timeout: 7 * SECOND,
        step: if how == How::OneByOne { 1 } else { usize::MAX },
        overlap: how != How::NeverTwo,
    }
}

impl World {
    pub(super) fn new(workers: usize, overlap: bool, budget: Budget, flaw: Option<Flaw>) -> Self {
        let (ready_timeout, drain_timeout) = (5 * SECOND, 7 * SECOND);
        let policy = Policy { workers, ready_timeout, drain_timeout, max_draining: 2, overlap };
        let mut world = Self {
            machine: Machine::new(policy),
            now: Instant::now(),
            children: BTreeMap::new(),
            budget,
            flaw,
            how: Some(How::Together),
            trial_is_over: false,
            never_two: !overlap,
            stopped: false,
            broken_rule: None,
            came_to: CameTo::Nothing,
        };
        world.tell(Event::Start(Order { overlap, trial: Duration::ZERO, ..order(How::Together) }));
        world
    }

    fn view(&self) -> View {
        let worker = |(id, worker): (WorkerId, &Worker)| {
            let stage = match worker.stage {
                Stage::Starting { .. } => 0,
                Stage::Ready => 1,
                Stage::Stopping { .. } => 2,
                Stage::Killed { crashed, .. } => 3 + u8::from(crashed),
            };
            (worker.generation, worker.slot, stage, self.children.get(&id).copied())
        };
        let doing = match &self.machine.doing {
            Doing::Nothing => (0, None),
            Doing::Stopping => (1, None),
            Doing::Ended => (2, None),
            Doing::Rolling(roll) => {
                let step = match roll.step {
                    Step::Clearing => 3,
                    Step::Starting => 4,
                    Step::Trial { .. } => 5,
                    Step::Retiring => 6,
                };
                (step, self.how.map(|how| (how, roll.slots.clone())))
            }
        };
        // From the second on they differ in the delay alone.
        let crashes = self.machine.crashes.iter();
        let crashes = crashes.map(|(slot, crashes)| (*slot, crashes.times > 1, crashes.restart_at.is_some()));
        View {
            workers: self.machine.workers().map(worker).collect(),
            crashes: crashes.collect(),
            doing,
            generation: self.machine.generation,
            wanted: self.machine.wanted(),
            overlap: self.machine.overlap,
            how: self.how,
            never_two: self.never_two,
            stopped: self.stopped,
            trial_is_over: self.trial_is_over,
            budget: self.budget,
            came_to: self.came_to,
            broken_rule: self.broken_rule,
        }
    }

    fn breaks(&mut self, rule: &'static str) {
        self.broken_rule.get_or_insert(rule);
    }

    pub(super) fn internal(&self) -> Vec<Act> {
        let mut acts = vec![];
        for (id, child) in &self.children {
            acts.push(match child.life {
                Life::Starting { .. } => Act::BecomesReady(*id),
                Life::Serves => continue,
                Life::Refuses | Life::Drains | Life::Dies => Act::Ends(*id),
            });
        }
        let timed = self.machine.workers().filter(|(_, worker)| worker.stage != Stage::Ready);
        acts.extend(timed.map(|(id, _)| Act::TimeIsUp(Deadline::Worker(id))));
        if self.machine.phase() == Phase::Trial {
            acts.push(Act::TimeIsUp(Deadline::Trial));
        }
        let awaited = self.machine.crashes.iter().filter(|(_, crashes)| crashes.restart_at.is_some());
        acts.extend(awaited.map(|(slot, _)| Act::TimeIsUp(Deadline::Restart(*slot))));
        acts
    }

    pub(super) fn external(&self) -> Vec<Act> {
        let (mut acts, budget) = (vec![], &self.budget);
        if self.machine.phase() == Phase::Ended {
            return acts;
        }
        for (id, child) in &self.children {
            if budget.deaths > 0 && !child.was_told() {
                acts.push(Act::Dies(*id));
            }
            if let (Life::Starting { is_new }, 1..) = (child.life, budget.failures) {
                acts.push(Act::IsNotSpawned(*id));
                acts.extend(is_new.then_some(Act::Refuses(*id)));
            }
        }
        if budget.orders > 0 && self.machine.generation > 0 {
            acts.extend([How::Together, How::OneByOne, How::NeverTwo].map(Act::Ask));
        }
        if budget.scales > 0 && self.machine.generation > 0 {
            acts.extend([1, 3].map(Act::Scale));
        }
        if budget.stops > 0 {
            acts.extend([Act::Stop, Act::StopNow]);
        }
        acts
    }

    pub(super) fn take(&mut self, act: Act) {
        self.came_to = CameTo::Nothing;
        let before = self.serving_slots();
        let gone = |world: &mut Self, id| {
            let child = world.children.remove(&id);
            child.map(|child| child.slot)
        };
        // Where one has ended by itself somebody may be missing.
        let mut died = None;
        match act {
            Act::BecomesReady(id) => {
                self.child(id).life = Life::Serves;
                self.tell(Event::Ready(id));
            }
            Act::Ends(id) => {
                died = gone(self, id);
                if self.flaw != Some(Flaw::TellsOfNoDeath) {
                    self.tell(Event::Exited(id));
                }
            }
            Act::TimeIsUp(deadline) => self.time_is_up(deadline),
            Act::Ask(how) => self.ask(how),
            Act::Dies(id) => {
                self.budget.deaths -= 1;
                died = gone(self, id);
                self.tell(Event::Exited(id));
            }
            Act::Refuses(id) => {
                self.budget.failures -= 1;
                self.child(id).life = Life::Refuses;
                self.tell(Event::Refused(id));
            }
            Act::IsNotSpawned(id) => {
                self.budget.failures -= 1;
                gone(self, id);
                self.tell(Event::NotSpawned(id));
            }
            Act::Scale(workers) => {
                self.budget.scales -= 1;
                self.tell(Event::Scale(workers));
            }
            Act::Stop | Act::StopNow => {
                self.budget.stops -= 1;
                self.stopped = true;
                self.tell(if act == Act::Stop { Event::Stop(None) } else { Event::StopNow });
            }
        }
        let after = self.serving_slots();
        let wanted = self.machine.wanted();
        let is_missing = |slot: &&usize| **slot < wanted && Some(**slot) != died && !after.contains(slot);
        if !self.stopped
            && !self.never_two
            && self.machine.generation > 0
            && before.iter().any(|slot| is_missing(&slot))
        {
            self.breaks("nobody is told to stop before another one serves in his place");
        }
    }

    fn time_is_up(&mut self, deadline: Deadline) {
        let now = self.now;
        match deadline {
            Deadline::Worker(id) => match &mut self.machine.workers.get_mut(&id).unwrap().stage {
                Stage::Starting { deadline } | Stage::Killed { deadline, .. } => *deadline = now,
                Stage::Stopping { deadline } => *deadline = Some(now),
                Stage::Ready => {}
            },
            Deadline::Trial => {
                self.trial_is_over = true;
                if let Doing::Rolling(Roll { step: Step::Trial { until }, .. }) = &mut self.machine.doing {
                    *until = now;
                }
            }
            Deadline::Restart(slot) => self.machine.crashes.get_mut(&slot).unwrap().restart_at = Some(now),
        }
        self.tell(Event::Tick);
    }

    fn ask(&mut self, how: How) {
        self.budget.orders -= 1;
        let order = order(how);
        if let Some(refusal) = self.machine.refusal_of(&order) {
            self.came_to = CameTo::Refusal;
            if self.is_at_rest() && refusal != Refusal::TooManyDraining && !self.stopped {
                self.breaks("a service at rest can be upgraded");
            }
            let before = format!("{:?}", self.machine);
            let actions = self.machine.on_event(Event::Upgrade(order), self.now);
            if actions != [Action::Refuse(refusal)] || before != format!("{:?}", self.machine) {
                self.breaks("what is refused changes nothing");
            }
            return;
        }
        self.how = Some(how);
        self.never_two = how == How::NeverTwo;
        let overlap = order.overlap || self.flaw == Some(Flaw::RunsTwoInARestart);
        self.tell(Event::Upgrade(Order { overlap, ..order }));
    }

    /// Every worker that is wanted serves, and nothing is under way.
    pub(super) fn is_at_rest(&self) -> bool {
        let committed = |(_, worker): (WorkerId, &Worker)| worker.generation == self.machine.generation;
        self.how.is_none() && self.machine.workers().all(committed) && self.is_filled()
    }

    fn is_filled(&self) -> bool {
        (0..self.machine.wanted()).all(|slot| {
            let mut here = self.children.values().filter(|child| child.slot == slot);
            here.next().is_some_and(|child| child.life == Life::Serves) && here.next().is_none()
        })
    }

    fn child(&mut self, id: WorkerId) -> &mut Child {
        self.children.get_mut(&id).unwrap()
    }

    /// Where somebody serves who was not told to stop.
    fn serving_slots(&self) -> Vec<usize> {
        let serving = |child: &&Child| child.life == Life::Serves;
        let mut slots: Vec<usize> = self.children.values().filter(serving).map(|child| child.slot).collect();
        slots.dedup();
        slots
    }

    fn tell(&mut self, event: Event) {
        let mut actions = self.machine.on_event(event, self.now);
        if self.flaw == Some(Flaw::EndsTheTrialEarly) && self.machine.phase() == Phase::Trial {
            actions.extend(self.machine.on_event(Event::Tick, self.now + SECOND));
        }
        let is_asked = matches!(event, Event::Upgrade(_) | Event::Scale(_));
        for action in actions {
            if self.came_to == CameTo::TheEnd {
                self.breaks("nothing is done when all has ended");
            }
            self.perform(action, is_asked);
        }
    }

    fn perform(&mut self, action: Action, is_asked: bool) {
        match action {
            Action::Refuse(_) => {
                self.came_to = CameTo::Refusal;
                if !is_asked {
                    self.breaks("only what was asked for is refused");
                }
            }
            Action::Spawn { worker, slot, build, .. } => self.spawn(worker, slot, build),
            Action::Stop(id) | Action::Dismiss(id) => match self.children.get_mut(&id) {
                Some(child) if !child.was_told() => child.life = Life::Drains,
                _ => self.breaks("who is told to stop lives, and was not told before"),
            },
            Action::Kill(id) | Action::Cut(id) => {
                if matches!(action, Action::Cut(_)) {
                    self.came_to = CameTo::Cut;
                }
                match self.children.get_mut(&id) {
                    Some(child) if self.flaw == Some(Flaw::KillsNobody) => child.life = Life::Serves,
                    Some(child) if child.life != Life::Dies => child.life = Life::Dies,
                    _ => self.breaks("who is killed lives, and was not killed before"),
                }
            }
            Action::Abandon(id) => {
                if self.children.remove(&id).is_none_or(|child| child.life != Life::Dies) {
                    self.breaks("who is abandoned was killed");
                }
            }
            Action::Cleared => {
                if self.how != Some(How::NeverTwo) && !self.never_two {
                    self.breaks("the old ones go first only where two may not run");
                }
            }
            Action::LetAccept => self.trial_is_over = false,
            Action::AllReady => {}
            Action::Commit => self.commit(),
            Action::Fail { in_trial, .. } => {
                self.came_to = CameTo::Failure { in_trial };
                self.end_order();
            }
            Action::Crashed { times, .. } => {
                if times == 0 {
                    self.breaks("a crash is counted");
                }
            }
            Action::Drain => {
                if !self.stopped {
                    self.breaks("nothing ends that nobody has ended");
                }
            }
            Action::Finish => {
                self.came_to = CameTo::TheEnd;
                if !self.children.is_empty() {
                    self.breaks("nobody is left behind");
                }
            }
        }
    }

    fn spawn(&mut self, worker: WorkerId, slot: usize, build: Build) {
        let is_new = build == Build::New;
        if self.never_two && self.children.values().any(|child| child.slot == slot) {
            self.breaks("two never run side by side where that may not be");
        }
        let generation = self.machine.worker(worker).map(|worker| worker.generation);
        let is_rival = |(id, other): (WorkerId, &Worker)| {
            id != worker && other.slot == slot && Some(other.generation) == generation && other.is_to_be_followed()
        };
        if self.machine.workers().any(is_rival) {
            self.breaks("the next of a slot is started when the one before has ended, or was told to stop");
        }
        if slot >= self.machine.wanted() {
            self.breaks("no more run than are wanted");
        }
        let child = Child { slot, life: Life::Starting { is_new } };
        if self.children.insert(worker, child).is_some() {
            self.breaks("every worker has a name of its own");
        }
        if self.flaw == Some(Flaw::TakesStartedForReady) && is_new {
            self.tell(Event::Ready(worker));
        }
    }

    fn commit(&mut self) {
        let generation = self.machine.generation;
        for slot in 0..self.machine.wanted() {
            let serves = self.machine.workers().any(|(id, worker)| {
                let child = self.children.get(&id).is_some_and(|child| child.life == Life::Serves);
                worker.slot == slot && worker.generation == generation && worker.stage == Stage::Ready && child
            });
            if !serves {
                self.breaks("a build is committed when all of its workers serve");
            }
        }
        if generation > 1 && !self.trial_is_over {
            self.breaks("a build is committed after its trial");
        }
        self.end_order();
    }

    fn end_order(&mut self) {
        if self.how.take().is_none() {
            self.breaks("an upgrade has one end");
        }
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.view() == other.view()
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.view().hash(state);
    }
}
