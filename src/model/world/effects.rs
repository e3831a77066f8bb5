//! What each step does to the world, and what each action of the machines does: the part of the engine.

use super::*;

impl World {
    pub(in crate::model) fn take(&mut self, step: Step) {
        match step {
            Step::Hear { old } => self.hear(old),
            Step::HearNew { new } => self.hear_new(new),
            Step::TimedOut { at, timer } => {
                *self.processes[at].timer(timer) = false;
                self.tell_old_side(at, upgrade::Event::TimedOut(timer));
            }
            Step::TrialFoundBad { at } => {
                self.processes[at].trial_timer = false;
                self.tell_old_side(at, upgrade::Event::Failed(Failure::NotAccepting));
            }
            Step::Idle { at } => self.tell_old_side(at, upgrade::Event::Idle),
            Step::AppReady { at } => {
                self.processes[at].app_is_ready = true;
                self.tell_new_side(at, inherit::Event::AppReady);
            }
            Step::Leave { at } => self.die(at),
            Step::OldIsGone { new } => {
                self.close(new, true);
                let process = &mut self.processes[new];
                (process.life, process.inherit) = (Life::Running, Inherit::new(false));
                self.seen.restarted = true;
            }
            Step::Trigger { at, maker, spawns, restart } => self.trigger(at, maker, spawns, restart),
            Step::Kill { at } => {
                self.budget.deaths -= 1;
                self.loses(at);
                // With `adopted` on its way the old process lets go, and there is no way back.
                self.ended |= self.processes[at].life == Life::Waiting;
                self.die(at);
            }
            Step::Stop { at } => {
                self.budget.stops -= 1;
                // Stopping a process that still drains, or a new build before commit, does not end the service.
                let (inherits, serves) = (self.processes[at].inherit.stage(), self.processes[at].could_serve());
                self.ended |= serves && matches!(inherits, inherit::Stage::Owner | inherit::Stage::Trial);
                self.loses(at);
                self.tell_new_side(at, inherit::Event::Stop);
                self.tell_old_side(at, upgrade::Event::Stop);
            }
            Step::AppGivesUp { at } => {
                self.budget.misbehaviours -= 1;
                self.loses(at);
                self.tell_new_side(at, inherit::Event::AppGaveUp);
            }
            Step::Hang { at } => {
                self.budget.misbehaviours -= 1;
                self.loses(at);
                self.processes[at].life = Life::Hanging;
            }
            Step::AppProlongs { at } => {
                self.budget.prolongations -= 1;
                self.tell_new_side(at, inherit::Event::AppStillStarting);
            }
            Step::Garbage { at } => {
                self.budget.misbehaviours -= 1;
                self.channels[at - 1].up.push_back(Message::Garbage);
            }
            Step::RefuseOffer { at } => {
                self.budget.misbehaviours -= 1;
                self.channels[at - 1].up.push_back(Message::Refused);
                self.processes[at].life = Life::Leaving;
            }
        }
    }

    /// `at` is taken away: does anyone remain that could serve?
    fn loses(&mut self, at: usize) {
        let others = self.processes.iter().enumerate().filter(|(other, _)| *other != at);
        if self.processes[at].could_serve() && !others.into_iter().any(|(_, process)| process.could_serve()) {
            self.ended = true;
        }
    }

    fn die(&mut self, at: usize) {
        // All that are gone are alike: fewer states.
        self.processes[at] = Process::new(Inherit::new(false), Life::Gone, Maker::Other);
        for new in 1..self.processes.len() {
            if self.channels[new - 1].old == at {
                self.close(new, false);
                // Nobody is left to kill it, and it holds up nobody.
                if self.processes[new].life == Life::Hanging {
                    self.die(new);
                }
            }
        }
        if at > 0 {
            self.close(at, true);
        }
    }

    /// Closes one end of the channel to `new`; what nobody will read is gone.
    fn close(&mut self, new: usize, new_end: bool) {
        let channel = &mut self.channels[new - 1];
        if new_end {
            channel.new_end = false;
            channel.down.clear();
        } else {
            channel.old_end = false;
            channel.up.clear();
        }
    }

    fn trigger(&mut self, at: usize, maker: Maker, spawns: bool, restart: bool) {
        let origin = match maker {
            Maker::Old if restart => Origin::Restart,
            Maker::Old => Origin::Push,
            _ => Origin::Pull,
        };
        if self.processes[at].upgrade.stage() != Stage::Serving {
            self.budget.refused -= 1;
            let before = self.processes[at].upgrade.clone();
            let actions = self.processes[at].upgrade.on_event(upgrade::Event::Trigger(origin));
            self.seen.refused = true;
            if !matches!(actions[..], [Action::Refuse(_)]) || self.processes[at].upgrade != before {
                self.broken_rule = Some("a second trigger is refused and changes nothing");
            }
            return;
        }
        let new = self.processes.len();
        let process = &mut self.processes[at];
        (process.adopted, process.ready, process.answered_commit) = (false, false, false);
        if spawns {
            process.attempt = Some(new);
            let process = Process::new(Inherit::new(true), Life::Receiving, maker);
            self.processes.push(Process { restarts: restart, ..process });
            let (down, up) = (VecDeque::new(), VecDeque::new());
            self.channels.push(Channel { old: at, down, up, old_end: true, new_end: true });
        }
        self.tell_old_side(at, upgrade::Event::Trigger(origin));
    }

    fn hear(&mut self, old: usize) {
        let Some(new) = self.processes[old].attempt else { return };
        if let Some(action) = self.processes[old].deferred.pop_front() {
            // The new process has closed the channel: what had to wait for it is done.
            let rest = std::mem::take(&mut self.processes[old].deferred);
            self.drop_channel(old);
            return self.do_each(old, [action].into_iter().chain(rest).collect());
        }
        use upgrade::Event as E;
        let stage = self.processes[old].upgrade.stage();
        let event = match (stage, self.channels[new - 1].up.pop_front()) {
            (Stage::Starting, Some(Message::Adopted)) => {
                self.processes[old].adopted = true;
                if self.flaw == Some(Flaw::CommitsWithoutReady) {
                    self.tell_old_side(old, E::Adopted);
                    return self.tell_old_side(old, E::Ready);
                }
                E::Adopted
            }
            (Stage::Starting, Some(Message::Refused)) => E::Failed(Failure::Refused),
            (Stage::Adopted, Some(Message::Starting)) => E::StillStarting,
            (Stage::Adopted, Some(Message::Ready)) => {
                self.processes[old].ready = true;
                E::Ready
            }
            (Stage::Adopted | Stage::Trial, Some(Message::GaveUp)) => E::Failed(Failure::GaveUp),
            (Stage::Trial, Some(Message::Stopping)) => E::NewIsStopping,
            (Stage::Trial, Some(Message::Accepting)) => {
                self.processes[old].answered_commit = true;
                E::StillStarting
            }
            (_, Some(_)) => E::Failed(Failure::ChannelBroken),
            (_, None) => E::Failed(Failure::Exited),
        };
        self.tell_old_side(old, event);
    }

    fn hear_new(&mut self, new: usize) {
        use inherit::Event as E;
        let message = self.channels[new - 1].down.pop_front();
        let receiving = self.processes[new].life == Life::Receiving;
        match message {
            Some(Message::Offer) if receiving => {
                let waits = self.processes[new].restarts;
                self.processes[new].life = if waits { Life::Waiting } else { Life::Running };
                self.send_up(new, Message::Adopted);
            }
            // `Handover::start` fails, and the program ends.
            _ if receiving => self.processes[new].life = Life::Leaving,
            Some(_) if self.processes[new].life == Life::Waiting => self.processes[new].life = Life::Leaving,
            Some(Message::Commit) => self.tell_new_side(new, E::Commit),
            Some(Message::Settled) => self.over(new, E::Settled),
            Some(_) => self.over(new, E::Aborted),
            None if self.flaw == Some(Flaw::TakesAnEndForAnAbort) => self.over(new, E::Aborted),
            None => {
                let owns = self.processes[new].inherit.owns();
                self.over(new, E::ChannelEnded);
                self.seen.taken_over |= !owns && self.processes[new].inherit.owns();
            }
        }
    }

    /// The last that the old process has to say.
    fn over(&mut self, new: usize, event: inherit::Event) {
        self.tell_new_side(new, event);
        self.close(new, true);
    }

    fn tell_new_side(&mut self, at: usize, event: inherit::Event) {
        use inherit::Action as A;
        for action in self.processes[at].inherit.on_event(event) {
            match action {
                A::SendStarting => self.send_up(at, Message::Starting),
                A::SendReady => {
                    self.send_up(at, Message::Ready);
                    if self.flaw == Some(Flaw::AcceptsWhenReady) {
                        self.open(at);
                    }
                }
                A::SendGaveUp => self.send_up(at, Message::GaveUp),
                A::SendStopping => self.send_up(at, Message::Stopping),
                A::OpenGate => {
                    self.open(at);
                    self.send_up(at, Message::Accepting);
                }
                A::ShutGate => self.shut(at),
                A::Refuse => {
                    if self.processes[at].accepts() {
                        self.broken_rule = Some("a process that is refused does not accept");
                    }
                    self.processes[at].life = Life::Leaving;
                }
                A::Own => {}
            }
        }
    }

    fn tell_old_side(&mut self, at: usize, event: upgrade::Event) {
        // The program of a process that was refused is about to end, whatever its machine says.
        if self.processes[at].life == Life::Running {
            let actions = self.processes[at].upgrade.on_event(event);
            self.do_each(at, actions.into());
        }
    }

    fn do_each(&mut self, at: usize, mut actions: VecDeque<Action>) {
        if self.flaw == Some(Flaw::CommitBeforeTheGateIsShut) && actions.contains(&Action::ShutGate) {
            let message = Message::Commit;
            self.send_down(at, message);
        }
        let kill = actions.iter().position(|action| matches!(action, Action::Kill(_)));
        if let (Some(kill), Some(Flaw::OpensAgainBeforeTheNewProcessIsDead)) = (kill, self.flaw) {
            actions.swap(kill, kill + 1);
        }
        while let Some(action) = actions.pop_front() {
            if self.perform(at, action) {
                self.processes[at].deferred = actions;
                return;
            }
        }
    }

    /// True: the rest has to wait until the new process has closed the channel.
    fn perform(&mut self, at: usize, action: Action) -> bool {
        match action {
            Action::Refuse(_) => self.broken_rule = Some("what is refused was asked in vain"),
            Action::Spawn if self.processes[at].attempt.is_some() => self.tell_old_side(at, upgrade::Event::Spawned),
            Action::Spawn => self.tell_old_side(at, upgrade::Event::Failed(Failure::NotSpawned)),
            Action::Offer => self.send_down(at, Message::Offer),
            Action::ShutGate => {
                if self.flaw != Some(Flaw::CommitBeforeTheGateIsShut) {
                    self.shut(at);
                }
                self.tell_old_side(at, upgrade::Event::GateShut);
            }
            Action::OpenGate => self.open(at),
            Action::Commit => self.commit(at),
            Action::Settle => {
                self.send_down(at, Message::Settled);
                self.drop_channel(at);
            }
            Action::Release => {
                if self.processes[at].accepts() || !self.processes[at].adopted {
                    self.broken_rule = Some("the listeners are let go when they are adopted and the gate is shut");
                }
            }
            Action::ReportLost(_) => {
                if let Some(new) = self.processes[at].attempt {
                    self.die(new);
                }
                self.drop_channel(at);
            }
            Action::Abort(failure) => self.abort(at, failure),
            Action::Kill(_) => return self.kill(at),
            Action::Arm(Timer::Ready) if self.flaw == Some(Flaw::ForgetsTheReadyTimer) => {}
            Action::Arm(timer) => *self.processes[at].timer(timer) = true,
            Action::Disarm(timer) => *self.processes[at].timer(timer) = false,
            Action::ReportFailed(_) => self.seen.failed = true,
            Action::ReportRolledBack(_) => {
                self.seen.rolled_back = true;
                self.as_it_was(at);
            }
            Action::Announce(_) | Action::Cut => {}
            Action::Drain => self.processes[at].gate = Gate::Closed,
            Action::Finish => self.die(at),
        }
        if matches!(action, Action::ReportFailed(failure) if failure != Failure::Stopped) {
            self.as_it_was(at);
        }
        false
    }

    fn commit(&mut self, at: usize) {
        let process = &self.processes[at];
        if !process.adopted || !process.ready {
            self.broken_rule = Some("nothing is committed without adopted and ready");
        }
        if process.accepts() && self.flaw != Some(Flaw::CommitBeforeTheGateIsShut) {
            self.broken_rule = Some("the gate is shut before commit");
        }
        self.send_down(at, Message::Commit);
        if self.flaw == Some(Flaw::DrainsWithoutATrial) {
            self.processes[at].gate = Gate::Closed;
        }
    }

    fn abort(&mut self, at: usize, failure: Failure) {
        let new = self.processes[at].attempt;
        self.send_down(at, Message::Aborted);
        self.drop_channel(at);
        let ends_by_itself = matches!(failure, Failure::Refused | Failure::GaveUp);
        if let Some(new) = new.filter(|new| !ends_by_itself && self.processes[*new].maker == Maker::Old) {
            self.die(new);
        }
    }

    fn kill(&mut self, at: usize) -> bool {
        let Some(new) = self.processes[at].attempt else { return false };
        if self.processes[new].maker == Maker::Stranger {
            self.send_down(at, Message::Aborted);
            return true;
        }
        self.die(new);
        self.drop_channel(at);
        false
    }

    /// Invariant 3: after a failure the old process is what it was.
    fn as_it_was(&mut self, at: usize) {
        let process = &self.processes[at];
        let timers = process.ready_timer || process.trial_timer;
        if !process.accepts() || timers || process.upgrade != Upgrade::new() || process.attempt.is_some() {
            self.broken_rule = Some("after a failed upgrade the old process is what it was");
        }
    }

    fn drop_channel(&mut self, at: usize) {
        if let Some(new) = self.processes[at].attempt.take() {
            self.close(new, false);
        }
    }

    fn send_down(&mut self, at: usize, message: Message) {
        let listens = |new: &usize| self.channels[new - 1].new_end;
        if let Some(new) = self.processes[at].attempt.filter(listens) {
            self.processes[new].is_given_up |= message == Message::Aborted;
            self.channels[new - 1].down.push_back(message);
        }
    }

    fn send_up(&mut self, at: usize, message: Message) {
        if at > 0 && self.channels[at - 1].new_end && self.channels[at - 1].old_end {
            self.channels[at - 1].up.push_back(message);
        }
    }

    fn open(&mut self, at: usize) {
        if self.processes[at].gate != Gate::Closed {
            self.processes[at].gate = Gate::Open;
        }
    }

    fn shut(&mut self, at: usize) {
        if self.processes[at].gate != Gate::Closed {
            self.processes[at].gate = Gate::Shut;
        }
    }
}
