//! What lies around the machines, and what can happen next.

mod effects;

use std::collections::VecDeque;

use super::{Flaw, Origin};
use crate::inherit::{self, Inherit};
use crate::upgrade::{self, Action, Failure, Stage, Timer, Upgrade};

/// How much may happen that nothing makes happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Budget {
    /// Processes at most, the first among them.
    pub(super) generations: usize,
    /// Processes that are killed from outside.
    pub(super) deaths: usize,
    /// SIGTERM to any process.
    pub(super) stops: usize,
    /// Triggers while an upgrade is under way.
    pub(super) refused: usize,
    /// A new build that gives up, breaks the protocol, or refuses the offer.
    pub(super) misbehaviours: usize,
    /// Times that a new build says that it is still starting.
    pub(super) prolongations: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    Offer,
    Commit,
    Settled,
    Aborted,
    Adopted,
    Refused,
    Starting,
    Ready,
    GaveUp,
    Stopping,
    Accepting,
    Garbage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Gate {
    Shut,
    Open,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    /// Waits for the offer; no machine of it runs yet.
    Receiving,
    /// Of a restart: has adopted, and runs when the old process is gone.
    Waiting,
    Running,
    /// Stands still before it has served, for good.
    Hanging,
    /// Told that it will not serve: it is about to exit.
    Leaving,
    Gone,
}

/// Who started a process, and so whether the old one may kill it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Maker {
    /// The old process: it kills it when the upgrade fails.
    Old,
    /// Somebody else, as the same user: it is killed only where it may be accepting.
    Other,
    /// Somebody else, as another user.
    Stranger,
}

/// From an old process to the new one, which is the next in number. What was sent is read before the end is seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Channel {
    old: usize,
    down: VecDeque<Message>,
    up: VecDeque<Message>,
    old_end: bool,
    new_end: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    inherit: Inherit,
    upgrade: Upgrade,
    life: Life,
    gate: Gate,
    ready_timer: bool,
    trial_timer: bool,
    drain_timer: bool,
    /// The new process of the upgrade under way.
    attempt: Option<usize>,
    adopted: bool,
    ready: bool,
    answered_commit: bool,
    /// What is left to do once a new process that may not be killed has closed its channel.
    deferred: VecDeque<Action>,
    maker: Maker,
    /// It was started for a restart.
    restarts: bool,
    app_is_ready: bool,
    /// Its upgrade is off, whether it knows or not.
    is_given_up: bool,
}

/// What a run came by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    pub(super) rolled_back: bool,
    pub(super) failed: bool,
    pub(super) refused: bool,
    pub(super) taken_over: bool,
    pub(super) restarted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    // What happens by itself.
    Hear { old: usize },
    HearNew { new: usize },
    TimedOut { at: usize, timer: Timer },
    TrialFoundBad { at: usize },
    Idle { at: usize },
    AppReady { at: usize },
    Leave { at: usize },
    OldIsGone { new: usize },
    // What comes from outside.
    Trigger { at: usize, maker: Maker, spawns: bool, restart: bool },
    Kill { at: usize },
    Stop { at: usize },
    AppGivesUp { at: usize },
    Hang { at: usize },
    AppProlongs { at: usize },
    Garbage { at: usize },
    RefuseOffer { at: usize },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    processes: Vec<Process>,
    /// The channel to process n + 1 is the n-th.
    channels: Vec<Channel>,
    budget: Budget,
    flaw: Option<Flaw>,
    /// By an operator, or because what died or gave up was the last that could serve.
    ended: bool,
    pub(super) broken_rule: Option<&'static str>,
    pub(super) seen: Seen,
}

impl Process {
    fn new(inherit: Inherit, life: Life, maker: Maker) -> Self {
        Self {
            inherit,
            upgrade: Upgrade::new(),
            life,
            gate: Gate::Shut,
            ready_timer: false,
            trial_timer: false,
            drain_timer: false,
            attempt: None,
            adopted: false,
            ready: false,
            answered_commit: false,
            deferred: VecDeque::new(),
            maker,
            restarts: false,
            app_is_ready: false,
            is_given_up: false,
        }
    }

    fn is_alive(&self) -> bool {
        self.life != Life::Gone
    }

    fn runs(&self) -> bool {
        self.life == Life::Running && self.deferred.is_empty()
    }

    fn accepts(&self) -> bool {
        self.is_alive() && self.gate == Gate::Open
    }

    /// Holds the listeners, and will serve if nobody else does.
    fn could_serve(&self) -> bool {
        if self.life == Life::Waiting {
            return !self.is_given_up;
        }
        let drains = matches!(self.upgrade.stage(), Stage::Draining | Stage::Drained);
        self.life == Life::Running && !drains && !self.is_given_up
    }

    pub(super) fn has_settled_as_owner(&self) -> bool {
        self.accepts() && self.inherit.owns() && self.upgrade.stage() == Stage::Serving
    }

    fn timer(&mut self, timer: Timer) -> &mut bool {
        match timer {
            Timer::Ready => &mut self.ready_timer,
            Timer::Trial => &mut self.trial_timer,
            Timer::Drain => &mut self.drain_timer,
        }
    }
}

impl World {
    pub(super) fn new(budget: Budget, flaw: Option<Flaw>) -> Self {
        let first = Process::new(Inherit::new(false), Life::Running, Maker::Other);
        let (processes, channels) = (vec![first], vec![]);
        Self { processes, channels, budget, flaw, ended: false, broken_rule: None, seen: Seen::default() }
    }

    pub(super) fn accepting(&self) -> impl Iterator<Item = usize> {
        (0..self.processes.len()).filter(|at| self.processes[*at].accepts())
    }

    pub(super) fn alive(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|process| process.is_alive())
    }

    pub(super) fn generations(&self) -> usize {
        self.processes.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.generations() == self.budget.generations
    }

    pub(super) fn service_was_ended(&self) -> bool {
        self.ended
    }

    /// Nothing more happens by itself.
    pub(super) fn is_quiet(&self) -> bool {
        self.internal_steps().is_empty()
    }

    pub(super) fn internal_steps(&self) -> Vec<Step> {
        let mut steps = vec![];
        for (new, channel) in self.channels.iter().enumerate().map(|(at, channel)| (at + 1, channel)) {
            let (old, process) = (channel.old, &self.processes[channel.old]);
            let listens = process.life == Life::Running && process.attempt == Some(new) && channel.old_end;
            let news = !channel.up.is_empty() || !channel.new_end;
            // While it waits for one that cannot be killed it reads nothing.
            if listens && (if process.deferred.is_empty() { news } else { !channel.new_end }) {
                steps.push(Step::Hear { old });
            }
            let listens = match self.processes[new].life {
                Life::Receiving | Life::Running => channel.new_end,
                // Its end means nothing: the process must be gone.
                Life::Waiting => channel.new_end && !channel.down.is_empty(),
                _ => false,
            };
            if listens && self.processes[new].deferred.is_empty() && (!channel.down.is_empty() || !channel.old_end) {
                steps.push(Step::HearNew { new });
            }
        }
        for (at, process) in self.processes.iter().enumerate() {
            if process.life == Life::Leaving {
                steps.push(Step::Leave { at });
            }
            if process.life == Life::Waiting && self.processes[self.channels[at - 1].old].life == Life::Gone {
                steps.push(Step::OldIsGone { new: at });
            }
            if !process.runs() {
                continue;
            }
            for (armed, timer) in [(process.ready_timer, Timer::Ready), (process.drain_timer, Timer::Drain)] {
                if armed {
                    steps.push(Step::TimedOut { at, timer });
                }
            }
            // The last look at the new process is the end of the trial: what it said, and whether it lives.
            let heard_all = |new: usize| self.channels[new - 1].up.is_empty() && self.channels[new - 1].new_end;
            if process.trial_timer && process.attempt.is_none_or(heard_all) {
                steps.push(Step::TrialFoundBad { at });
                if process.answered_commit {
                    steps.push(Step::TimedOut { at, timer: Timer::Trial });
                }
            }
            if process.upgrade.stage() == Stage::Draining {
                steps.push(Step::Idle { at });
            }
            if !process.app_is_ready && matches!(process.inherit.stage(), inherit::Stage::Starting { .. }) {
                steps.push(Step::AppReady { at });
            }
        }
        steps
    }

    pub(super) fn external_steps(&self) -> Vec<Step> {
        let (mut steps, budget) = (vec![], &self.budget);
        for (at, process) in self.processes.iter().enumerate() {
            if process.is_alive() && budget.deaths > 0 {
                steps.push(Step::Kill { at });
            }
            if process.life == Life::Receiving && budget.misbehaviours > 0 {
                steps.push(Step::RefuseOffer { at });
            }
            // One that stands still is beyond help if nobody can kill it, and will.
            let waits = matches!(process.life, Life::Receiving | Life::Running) && !process.inherit.owns();
            let watched = at > 0 && self.channels[at - 1].old_end && process.maker == Maker::Old;
            if waits && watched && process.gate == Gate::Shut && budget.misbehaviours > 0 {
                steps.push(Step::Hang { at });
            }
            if !process.runs() {
                continue;
            }
            if budget.stops > 0 {
                steps.push(Step::Stop { at });
            }
            if process.upgrade.stage() == Stage::Serving && process.inherit.owns() {
                if !self.is_full() {
                    let ways = [(Maker::Old, true), (Maker::Old, false), (Maker::Other, true), (Maker::Stranger, true)];
                    steps.extend(ways.map(|(maker, spawns)| Step::Trigger { at, maker, spawns, restart: false }));
                    steps.push(Step::Trigger { at, maker: Maker::Old, spawns: true, restart: true });
                }
            } else if budget.refused > 0 && process.inherit.owns() {
                steps.push(Step::Trigger { at, maker: Maker::Old, spawns: true, restart: false });
            }
            let starts = matches!(process.inherit.stage(), inherit::Stage::Starting { .. }) && !process.app_is_ready;
            if starts && budget.misbehaviours > 0 {
                steps.push(Step::AppGivesUp { at });
            }
            if starts && budget.prolongations > 0 {
                steps.push(Step::AppProlongs { at });
            }
            if at > 0 && self.channels[at - 1].new_end && budget.misbehaviours > 0 {
                steps.push(Step::Garbage { at });
            }
        }
        steps
    }
}
