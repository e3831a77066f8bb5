//! The old side of an upgrade: the one place that branches on its stage.
//!
//! A plain value without I/O: [`Upgrade::on_event`] takes what happened and answers with what is to be done. The
//! [engine](crate::engine) does it; tests and model checkers drive the same value.
//!
//! ```text
//!  Serving ─ trigger ▶ Starting ─ adopted ▶ Adopted ─ ready ▶ Committing ─ gate shut ▶ Trial ─ over ▶ Draining ▶ Drained
//!     ▲                    │                   │                  │                      │
//!     └──── failure ───────┴───────────────────┴── gate opened ───┴──── rolled back ─────┘
//! ```
//!
//! A restart ends this process before the new one runs, so it goes from `Starting` by way of the shut gate to `Draining`
//! as soon as the new process has adopted the listeners; what comes then is the new process's own affair.

pub(crate) mod preflight;
pub(crate) mod spawn;
pub(crate) mod stderr;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// Accepts; no upgrade is under way.
    Serving,
    /// The new process is spawned (or has asked, in a pull) and has the offer.
    Starting,
    /// The new process holds the listeners; its application starts up.
    Adopted,
    /// It is ready; our gate is being shut.
    Committing,
    /// It accepts; should it die, we accept again.
    Trial,
    /// No way back: open connections are finished.
    Draining,
    /// Nothing is left to do but to exit.
    Drained,
}

/// How the new process comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Origin {
    /// We spawn it.
    Push,
    /// Somebody else started it, and it asked for the handover.
    Pull,
    /// We spawn it, and it waits for our end before it runs.
    Restart,
}

impl Origin {
    /// What people call what it begins.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Push | Self::Pull => "upgrade",
            Self::Restart => "restart",
        }
    }
}

/// Why an upgrade ends without the new process serving. The words for it are the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Failure {
    NotSpawned,
    Exited,
    ChannelBroken,
    Refused,
    GaveUp,
    Silent,
    /// We were told to stop before commit.
    Stopped,
    /// It took the listeners, and lets connections wait in the queue.
    NotAccepting,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Timer {
    Ready,
    Trial,
    Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    Trigger(Origin),
    Spawned,
    Adopted,
    StillStarting,
    Ready,
    /// The gate is shut and no call of accept is under way.
    GateShut,
    /// The new process was told to stop, after commit.
    NewIsStopping,
    /// The new process exited, broke the channel, refused or gave up.
    Failed(Failure),
    TimedOut(Timer),
    /// SIGTERM, `handover stop` or the application.
    Stop,
    /// No connection is open and every drain hook has returned.
    Idle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Progress {
    Spawned,
    Adopted,
    Starting,
    Ready,
    Committed,
    Healthy,
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    UpgradeUnderWay,
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Answers the trigger that has just come.
    Refuse(Refusal),
    Spawn,
    Offer,
    ShutGate,
    OpenGate,
    Commit,
    Settle,
    /// The new process of a restart has the listeners: the service goes on without us.
    Release,
    /// Tells the new process that the upgrade is off; kills and reaps it if it is ours.
    Abort(Failure),
    /// Kills the new process, whoever started it: it may be accepting.
    Kill(Failure),
    Arm(Timer),
    Disarm(Timer),
    Announce(Progress),
    /// The upgrade failed before commit.
    ReportFailed(Failure),
    /// The upgrade failed in the trial.
    ReportRolledBack(Failure),
    /// The new process of a restart is gone, and there is no way back.
    ReportLost(Failure),
    /// Tells the application; closes the listeners.
    Drain,
    /// Closes the connections that are left.
    Cut,
    /// The application may exit.
    Finish,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Upgrade {
    stage: Stage,
    /// So that the next time is the second.
    told_to_stop: bool,
    /// The new process waits for our end.
    restart: bool,
}

impl Upgrade {
    pub(crate) fn new() -> Self {
        Self { stage: Stage::Serving, told_to_stop: false, restart: false }
    }

    pub(crate) fn stage(&self) -> Stage {
        self.stage
    }

    /// An upgrade is under way and can still fail.
    pub(crate) fn in_flight(&self) -> bool {
        matches!(self.stage, Stage::Starting | Stage::Adopted | Stage::Committing | Stage::Trial)
    }

    pub(crate) fn on_event(&mut self, event: Event) -> Vec<Action> {
        use Action as A;
        use Event as E;
        use Stage as S;
        let (next, actions) = match (self.stage, event) {
            (S::Serving, E::Trigger(origin)) => {
                self.restart = origin == Origin::Restart;
                match origin {
                    Origin::Push | Origin::Restart => (S::Starting, vec![A::Spawn]),
                    Origin::Pull => (S::Starting, vec![A::Offer, A::Arm(Timer::Ready)]),
                }
            }
            (S::Draining | S::Drained, E::Trigger(_)) => (self.stage, vec![A::Refuse(Refusal::Draining)]),
            (_, E::Trigger(_)) => (self.stage, vec![A::Refuse(Refusal::UpgradeUnderWay)]),

            (S::Starting, E::Spawned) => {
                (S::Starting, vec![A::Announce(Progress::Spawned), A::Offer, A::Arm(Timer::Ready)])
            }
            (S::Starting, E::Adopted) if self.restart => {
                (S::Committing, vec![A::Announce(Progress::Adopted), A::Disarm(Timer::Ready), A::ShutGate])
            }
            (S::Committing, E::GateShut) if self.restart => (S::Draining, [&[A::Release], &drain()[..]].concat()),
            (S::Starting, E::Adopted) => (S::Adopted, vec![A::Announce(Progress::Adopted)]),
            (S::Adopted, E::StillStarting) => (S::Adopted, vec![A::Announce(Progress::Starting), A::Arm(Timer::Ready)]),
            (S::Adopted, E::Ready) => {
                (S::Committing, vec![A::Announce(Progress::Ready), A::Disarm(Timer::Ready), A::ShutGate])
            }
            (S::Committing, E::GateShut) => {
                (S::Trial, vec![A::Commit, A::Arm(Timer::Trial), A::Announce(Progress::Committed)])
            }
            (S::Trial, E::TimedOut(Timer::Trial) | E::NewIsStopping | E::Stop) => {
                let settle = [A::Disarm(Timer::Trial), A::Settle, A::Announce(Progress::Healthy)];
                (S::Draining, [&settle[..], &drain()].concat())
            }

            // The rule of invariant 3: before commit every failure has one end.
            (S::Starting | S::Adopted, E::Failed(failure)) => (S::Serving, give_up(failure)),
            (S::Starting | S::Adopted, E::TimedOut(Timer::Ready)) => (S::Serving, give_up(Failure::Silent)),
            (S::Committing, E::Failed(failure)) => {
                (S::Serving, vec![A::Abort(failure), A::OpenGate, A::ReportFailed(failure)])
            }
            (S::Starting | S::Adopted, E::Stop) => {
                self.restart = false;
                let failed = give_up(Failure::Stopped);
                (S::Draining, [&failed[..], &[A::ShutGate], &drain()].concat())
            }
            (S::Committing, E::Stop) => {
                self.restart = false;
                let failed = [A::Abort(Failure::Stopped), A::ReportFailed(Failure::Stopped)];
                (S::Draining, [&failed[..], &drain()].concat())
            }
            // Killed first: at most one of the two accepts.
            (S::Trial, E::Failed(failure)) => {
                let back = [A::Disarm(Timer::Trial), A::Kill(failure), A::OpenGate, A::ReportRolledBack(failure)];
                (S::Serving, back.to_vec())
            }

            (S::Draining | S::Drained, E::Failed(failure)) if self.restart => {
                self.restart = false;
                (self.stage, vec![A::ReportLost(failure)])
            }
            (S::Serving, E::Stop) => (S::Draining, [&[A::ShutGate], &drain()[..]].concat()),
            // `systemctl stop` tells every process of the unit: one that drains after an upgrade is to finish, too.
            (S::Draining, E::Stop) if !self.told_to_stop => (S::Draining, vec![]),
            (S::Draining, E::Stop | E::TimedOut(Timer::Drain)) => (S::Draining, vec![A::Disarm(Timer::Drain), A::Cut]),
            (S::Draining, E::Idle) => (S::Drained, vec![A::Disarm(Timer::Drain), A::Finish]),

            // What is late: a frame of a new process that is already given up, a timer that fired while it was being
            // disarmed, the end of a new process that has been settled.
            (stage, _) => (stage, vec![]),
        };
        self.stage = next;
        self.restart &= next != Stage::Serving;
        self.told_to_stop |= event == E::Stop;
        actions
    }
}

fn give_up(failure: Failure) -> Vec<Action> {
    vec![Action::Disarm(Timer::Ready), Action::Abort(failure), Action::ReportFailed(failure)]
}

fn drain() -> [Action; 3] {
    [Action::Drain, Action::Arm(Timer::Drain), Action::Announce(Progress::Draining)]
}

#[cfg(test)]
mod tests;
