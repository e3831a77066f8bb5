//! The engine's part in being the old process: what the `Upgrade` machine wants done, one leaf each.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::unistd::Pid;

use super::attempt::{Attempt, Process, Report, Requester};
use super::{CUT_GRACE, Command, Engine, after};
use crate::channel::{Broken, Channel, Received, SHARES_MAX};
use crate::control::messages::{Outcome, ResultEvent, UpgradeRequest, Wait};
use crate::fault;
use crate::listeners::Entry;
use crate::protocol::{AdoptedListener, Kind, Message, OfferedListener, VERSIONS};
use crate::shared::{Drained, Shared};
use crate::sys;
use crate::upgrade::{Action, Event, Failure, Origin, Progress, Stage, Timer};

/// How long the answer to commit may take, where the trial is over sooner.
const ACCEPTING_PATIENCE: Duration = Duration::from_millis(500);

/// How long a new process may take to die, or to shut its gate where it cannot be killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// How long after commit a new application may leave clients waiting that it has never waited for, however short the
/// trial; and how often that is looked at beyond the trial.
const NOT_ACCEPTING_AFTER: Duration = Duration::from_secs(1);
const NOT_ACCEPTING_INTERVAL: Duration = Duration::from_millis(10);
/// The same for one that does not get a processor.
const STARVED_MAX: Duration = Duration::from_secs(5);

impl Engine {
    /// A trigger has come.
    pub(super) fn begin(
        &mut self,
        request: UpgradeRequest,
        origin: Origin,
        requester: Requester,
        pulled: Option<(UnixStream, Pid)>,
    ) {
        if let Some(refusal) = self.refusal() {
            log::warn!("upgrade refused: {}", refusal.message);
            if let (Requester::Nobody, Origin::Push) = (&requester, origin) {
                self.tell_manager_of_refusal(&refusal.message);
            }
            return self.answer(requester, refusal);
        }
        if request.ready_delay().is_some() {
            let message = "--ready-delay is for a program under `handover exec`: this one says itself when it is ready";
            return self.answer(requester, ResultEvent::new(Outcome::BadRequest, message));
        }
        if let Some(refusal) = self.refuse_restart().filter(|_| origin == Origin::Restart) {
            return self.answer(requester, refusal);
        }
        requester.client().into_iter().for_each(|client| self.accept(client));
        let mut attempt = Attempt::new(request, origin, requester);
        if let Some((stream, pid)) = pulled {
            log::info!("process {pid} asks for the handover");
            attempt.pid = Some(pid.as_raw());
            attempt.process = sys::pidfd_of_peer(stream.as_fd(), pid).ok().map(|pidfd| Process::other(pid, pidfd));
            attempt.channel = Channel::new(stream).ok();
        }
        self.attempt = Some(attempt);
        self.tell_manager_of_upgrade();
        self.schedule_alive();
        self.tell_old_side(Event::Trigger(origin));
    }

    /// Does one thing, and says what came of it where that is not a matter of waiting.
    pub(super) fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            // `begin` asks before it triggers, so that an upgrade under way is not forgotten.
            Action::Refuse(_) => {}
            Action::Spawn => {
                self.old_comes_to("old: asked");
                let spawned = self.spawn();
                self.old_comes_to("old: spawned");
                return Some(spawned.map_or_else(|(failure, cause)| self.failed(failure, cause), |()| Event::Spawned));
            }
            Action::Offer => {
                if let Err(cause) = self.offer() {
                    return Some(self.failed(Failure::ChannelBroken, cause));
                }
                self.old_comes_to("old: offered");
            }
            Action::ShutGate => {
                self.shared.gate.shut();
                return Some(Event::GateShut);
            }
            Action::OpenGate => {
                self.shared.gate.open();
                self.take_back_pid_file();
            }
            Action::Commit => {
                if let Some(attempt) = &mut self.attempt {
                    attempt.committed = Some(Instant::now());
                }
                if let Err(cause) = self.send(Message::Commit) {
                    return Some(self.failed(Failure::ChannelBroken, cause));
                }
                self.old_comes_to("old: committed");
            }
            Action::Settle => self.settle(),
            Action::Release => self.drain.upgraded = true,
            Action::Abort(failure) => self.abort(failure),
            Action::Kill(failure) => self.kill(failure),
            Action::Arm(timer) => *self.timers.place(timer) = self.duration(timer).map(after),
            Action::Disarm(timer) => *self.timers.place(timer) = None,
            Action::Announce(progress) => self.announce(progress),
            Action::ReportFailed(failure) => self.report(Outcome::Failed, failure),
            Action::ReportRolledBack(failure) => self.report(Outcome::RolledBack, failure),
            Action::ReportLost(failure) => self.report_lost(failure),
            Action::Drain => self.begin_drain(),
            Action::Cut => self.cut(),
            Action::Finish => self.finish(),
        }
        None
    }

    fn duration(&self, timer: Timer) -> Option<Duration> {
        let (request, config) = (self.attempt.as_ref().map(|attempt| &attempt.request), &self.shared.config);
        let asked = |of: fn(&UpgradeRequest) -> Option<Duration>| request.and_then(of);
        match timer {
            Timer::Ready => Some(asked(UpgradeRequest::ready_timeout).unwrap_or(config.ready_timeout)),
            Timer::Trial => Some(asked(UpgradeRequest::trial).unwrap_or(config.trial)),
            Timer::Drain if self.is_restarting() && self.drain.timeout.is_none() => {
                Some(request.map(UpgradeRequest::drain_before_restart).unwrap_or_default())
            }
            Timer::Drain => {
                let of_upgrade = if self.drain.upgraded { asked(UpgradeRequest::drain_timeout) } else { None };
                let timeout = self.drain.timeout.or(of_upgrade).unwrap_or(config.drain_timeout);
                (!timeout.is_zero()).then_some(timeout)
            }
        }
    }

    fn failed(&mut self, failure: Failure, cause: String) -> Event {
        if let Some(attempt) = &mut self.attempt {
            attempt.cause = Some(cause);
        }
        Event::Failed(failure)
    }

    fn send(&mut self, message: Message) -> Result<(), String> {
        match self.attempt.as_mut().and_then(|attempt| attempt.channel.as_mut()) {
            Some(channel) => channel.send(&message, vec![]).map_err(|broken| broken.to_string()),
            None => Err("cannot be talked to".to_owned()),
        }
    }

    pub(super) fn read_channel(&mut self) {
        while let Some(channel) = self.attempt.as_mut().and_then(|attempt| attempt.channel.as_mut()) {
            if let Err(error) = channel.flush() {
                // What it said before it went is still to be read.
                log::debug!("the new process cannot be talked to: {error}");
            }
            let event = match channel.receive() {
                Ok(Received::Nothing) => return,
                Ok(Received::Message(message)) => Some(self.on_message(message)),
                Ok(Received::End) => self.channel_ended("closed the channel".to_owned()),
                Err(broken @ (Broken::Malformed(_) | Broken::Versions(_))) => {
                    Some(self.failed(Failure::ChannelBroken, broken.to_string()))
                }
                Err(broken @ Broken::Io(_)) => self.channel_ended(broken.to_string()),
            };
            let Some(event) = event else { return };
            self.tell_old_side(event);
        }
    }

    /// Reads all that the new process has said by now, and not only the share of one turn: what is decided next is decided by
    /// its last word. Bounded, because it may never stop talking.
    pub(super) fn hear_out(&mut self) {
        for _ in 0..SHARES_MAX {
            self.read_channel();
            let channel = self.attempt.as_ref().and_then(|attempt| attempt.channel.as_ref());
            if !channel.is_some_and(Channel::has_more) {
                return;
            }
        }
    }

    /// Mostly because it died; how it died says more than that its channel did. None: it lives, and needs the channel no more.
    fn channel_ended(&mut self, cause: String) -> Option<Event> {
        let process = self.attempt.as_mut().and_then(|attempt| attempt.process.as_mut());
        let exit = process.and_then(|process| {
            process.wait_for_end(Duration::from_millis(200));
            process.exit()
        });
        if let Some(exit) = exit {
            return Some(self.failed(Failure::Exited, exit));
        }
        let is_waited_for = matches!(self.upgrade.stage(), Stage::Draining | Stage::Drained) && self.is_restarting();
        if let Some(attempt) = self.attempt.as_mut().filter(|_| is_waited_for) {
            log::warn!("the new process {cause}, and waits for the end of this one all the same");
            attempt.channel = None;
            return None;
        }
        Some(self.failed(Failure::ChannelBroken, cause))
    }

    pub(super) fn on_new_process_end(&mut self) {
        // What it said last is in the channel: that it gave up, and why.
        self.hear_out();
        let process = self.attempt.as_mut().and_then(|attempt| attempt.process.as_mut());
        if let Some(exit) = process.and_then(Process::exit) {
            let event = self.failed(Failure::Exited, exit);
            self.tell_old_side(event);
        }
    }

    fn on_message(&mut self, message: Message) -> Event {
        let Some(attempt) = &mut self.attempt else { return Event::Failed(Failure::ChannelBroken) };
        use crate::upgrade::Stage as S;
        match (self.upgrade.stage(), message) {
            (S::Starting, Message::Adopted { restart: false, .. }) if attempt.origin == Origin::Restart => {
                let cause =
                    "has a library that knows nothing of restarts: use `handover upgrade`, or stop and start it";
                self.failed(Failure::ChannelBroken, cause.to_owned())
            }
            (S::Starting, Message::Adopted { protocol, mut listeners, .. }) => {
                if !is_what_was_offered(&mut listeners, &mut attempt.offered) {
                    let (got, offered) = (listeners.len(), attempt.offered.len());
                    let cause = match got == offered {
                        true => "adopted other sockets than those that were offered".to_owned(),
                        false => format!("adopted {got} listeners, not the {offered} that were offered"),
                    };
                    return self.failed(Failure::ChannelBroken, cause);
                }
                if !(VERSIONS.min..=VERSIONS.max).contains(&protocol) {
                    let cause = format!("chose version {protocol} of the protocol, which was not offered");
                    return self.failed(Failure::ChannelBroken, cause);
                }
                attempt.adopted = true;
                self.old_comes_to("old: adopted");
                Event::Adopted
            }
            (S::Starting, Message::Refused { reason, .. }) => {
                self.failed(Failure::Refused, format!("refused the handover: {reason}"))
            }
            (S::Adopted, Message::Starting { reason }) => {
                attempt.starting = Some(reason);
                Event::StillStarting
            }
            (S::Adopted, Message::Ready(claims)) => {
                attempt.claims = claims;
                self.old_comes_to("old: ready");
                Event::Ready
            }
            (S::Adopted | S::Trial, Message::GaveUp { reason }) => {
                self.failed(Failure::GaveUp, format!("gave up: {reason}"))
            }
            (S::Trial, Message::Stopping) => Event::NewIsStopping,
            (S::Trial, Message::Accepting { listeners }) => {
                attempt.accepting = Some(listeners);
                // Nothing follows from it before the end of the trial.
                Event::StillStarting
            }
            (_, other) => self.failed(Failure::ChannelBroken, format!("sent `{}` out of turn", other.name())),
        }
    }

    /// At the end of the trial the new process must have said that it accepts, and no connection may wait where its
    /// application has never waited for any; and it must not stand still, because nobody would take over from it.
    pub(super) fn end_trial(&mut self) {
        // The last look: from here on nobody takes over from it.
        self.on_new_process_end();
        if self.upgrade.stage() != Stage::Trial {
            return;
        }
        let cause = self.why_it_does_not_serve();
        match cause {
            // On a busy machine clients wait that long for a good build too.
            Some(_) if self.may_still_come_to_accept() => {
                self.timers.trial = Some(Instant::now() + NOT_ACCEPTING_INTERVAL);
            }
            Some(cause) => {
                let event = self.failed(Failure::NotAccepting, cause);
                self.tell_old_side(event);
            }
            None => self.tell_old_side(Event::TimedOut(Timer::Trial)),
        }
    }

    fn may_still_come_to_accept(&self) -> bool {
        let Some(attempt) = &self.attempt else { return false };
        let is_starved = || attempt.process.as_ref().is_some_and(Process::waits_for_a_processor);
        attempt
            .committed
            .map(|committed| committed.elapsed())
            .is_some_and(|since| since < NOT_ACCEPTING_AFTER || since < STARVED_MAX && is_starved())
    }

    fn why_it_does_not_serve(&mut self) -> Option<String> {
        let process = self.attempt.as_ref().and_then(|attempt| attempt.process.as_ref());
        if process.is_some_and(Process::stands_still) {
            return Some("became ready and stands still (SIGSTOP, or a terminal)".to_owned());
        }
        // A trial may be shorter than the way of a frame.
        let answered = |this: &Self| this.attempt.as_ref().is_none_or(|attempt| attempt.accepting.is_some());
        let patience = Instant::now() + ACCEPTING_PATIENCE;
        while !answered(self) {
            let channel = self.attempt.as_ref().and_then(|attempt| attempt.channel.as_ref());
            let heard = channel.is_some_and(|channel| {
                crate::poll::wait(channel.as_fd(), PollFlags::POLLIN, Some(patience)).unwrap_or(false)
            });
            if !heard {
                return Some("became ready and did not answer the commit".to_owned());
            }
            self.read_channel();
        }
        let attempt = self.attempt.as_ref()?;
        let accepting = attempt.accepting.as_ref()?;
        // There may be thousands.
        let [kept, accepting] = [&attempt.claims.kept, accepting].map(|names| names.iter().collect::<HashSet<_>>());
        let listeners = self.shared.listeners();
        let stuck = listeners.entries().find(|entry| {
            kept.contains(&entry.name)
                && !accepting.contains(&entry.name)
                && entry.socket.was_waited_on()
                && has_something_waiting(entry)
        });
        stuck.map(|entry| format!("became ready and never accepted on listener `{}`, where clients wait", entry.name))
    }

    fn settle(&mut self) {
        self.drain.upgraded = true;
        self.tell_manager_of_successor();
        if let Err(cause) = self.send(Message::Settled) {
            log::debug!("the new process {cause}");
        }
        let Some(attempt) = &mut self.attempt else { return };
        attempt.channel = None;
        self.successors.extend(attempt.process.take());
        self.old_comes_to("old: settled");
    }

    fn old_comes_to(&self, step: &str) {
        fault::reached(step, self.attempt.as_ref().and_then(|attempt| attempt.channel.as_ref()));
    }

    /// The new process may have put its own in place.
    fn take_back_pid_file(&self) {
        let Some(pid_file) = &self.pid_file else { return };
        match pid_file.prepare() {
            Ok(()) => pid_file.put_in_place(),
            Err(error) => log::error!("{error}"),
        }
    }

    /// Before commit: the new process is told, and killed if it is ours. One that pulled keeps its life; it knows that
    /// it must not accept.
    fn abort(&mut self, failure: Failure) {
        let reason = self.words_for(failure);
        let reason = format!("the upgrade is off: the new build {reason}");
        // It may be gone, or not reading.
        let _ = self.send(Message::Aborted { reason });
        let Some(attempt) = &mut self.attempt else { return };
        attempt.channel = None;
        // One that refuses or gives up ends by itself, with its last words; it is killed if it has not by the time of
        // the report.
        let ends_by_itself = matches!(failure, Failure::Refused | Failure::GaveUp);
        if let (Origin::Push | Origin::Restart, Some(process), false) =
            (attempt.origin, &attempt.process, ends_by_itself)
        {
            process.kill();
        }
    }

    /// After commit: it may be accepting, so it must be gone before we accept. One that we may not kill, because it
    /// pulled as another user or from where its pid is not seen, is told, and closes the channel when its gate is shut:
    /// without a word it would take the end of the channel for our death, and accept for good.
    fn kill(&mut self, failure: Failure) {
        let process = self.attempt.as_ref().and_then(|attempt| attempt.process.as_ref());
        if !process.is_some_and(|process| process.kill_and_wait(KILL_TIMEOUT)) {
            log::warn!("the new process does not die: it is told that the upgrade is off");
            let reason = format!("the upgrade is rolled back: the new build {}", self.words_for(failure));
            let _ = self.send(Message::Aborted { reason });
            let deadline = Some(Instant::now() + KILL_TIMEOUT);
            if let Some(channel) = self.attempt.as_ref().and_then(|attempt| attempt.channel.as_ref()) {
                let _ = crate::poll::wait(channel.as_fd(), PollFlags::empty(), deadline);
            }
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.channel = None;
        }
    }

    /// Completes "the new build …".
    pub(super) fn words_for(&self, failure: Failure) -> String {
        let attempt = self.attempt.as_ref();
        let cause = attempt.and_then(|attempt| attempt.cause.clone());
        match failure {
            Failure::Silent => {
                let timeout = self.duration(Timer::Ready).unwrap_or_default();
                let starting = attempt.and_then(|attempt| attempt.starting.as_ref());
                let last = starting.map(|reason| format!(" (it last said: {reason})")).unwrap_or_default();
                match attempt.is_some_and(|attempt| attempt.adopted) {
                    true => format!("was not ready within {timeout:?}{last}"),
                    false => format!("was not ready within {timeout:?}, and has not even called `Handover::start`"),
                }
            }
            Failure::Stopped => "was not ready when this process was told to stop".to_owned(),
            Failure::Exited => format!("{} before it was ready", cause.unwrap_or_else(|| "ended".to_owned())),
            _ => cause.unwrap_or_else(|| "failed".to_owned()),
        }
    }

    /// Ends the attempt; its requester hears when the new process has ended and its last words are in.
    fn report(&mut self, outcome: Outcome, failure: Failure) {
        let mut cause = self.words_for(failure);
        if outcome == Outcome::RolledBack && failure == Failure::Exited {
            cause = cause.replace(" before it was ready", " within the trial");
        }
        let Some(attempt) = self.attempt.take() else { return };
        let (pid, generation) = (std::process::id(), self.shared.generation);
        // What `Plan` says is a whole sentence of its own.
        let what = match failure {
            Failure::NotSpawned => cause,
            _ => format!("the new build {cause}"),
        };
        let serves = match failure {
            Failure::Stopped => format!("process {pid} is draining"),
            _ if outcome == Outcome::RolledBack => format!("process {pid} (generation {generation}) accepts again"),
            _ => format!("process {pid} (generation {generation}) serves on"),
        };
        let verdict = match attempt.origin {
            Origin::Restart => "not restarted",
            _ if outcome == Outcome::RolledBack => "rolled back",
            _ => "not upgraded",
        };
        let outcome = if failure == Failure::Stopped { Outcome::Ended } else { outcome };
        let result = ResultEvent {
            at_ms: Some(attempt.elapsed_ms()),
            pid: Some(pid.cast_signed()),
            generation: Some(generation),
            failure: Some(what.clone()),
            ..ResultEvent::new(outcome, format!("{verdict}: {what}; {serves}"))
        };
        self.tell_manager_of_failure(attempt.origin, &what);
        let deadline = Instant::now() + Report::PATIENCE;
        // One that pulled is not ours to wait for; only what it leaves is of interest.
        let process = match attempt.origin {
            Origin::Push | Origin::Restart => attempt.process,
            Origin::Pull => {
                self.successors.extend(attempt.process);
                None
            }
        };
        let (requester, stderr) = (attempt.requester, attempt.stderr);
        self.reports.push(Report { result, failure, requester, process, stderr, deadline });
    }

    fn begin_drain(&mut self) {
        self.unlink_paths();
        self.shared.gate.close();
        let deadline = self.duration(Timer::Drain).map(after);
        let upgraded = self.drain.upgraded;
        log::info!("draining {} connections", self.shared.connections.open());
        self.tell_manager_of_drain();
        self.shared.connections.watch_for_idle();
        self.shared.begin_drain(upgraded, deadline);
        run_drain_hooks(&self.shared);
        self.old_comes_to("old: draining");
    }

    /// A stop that names a time means it, also when this process drains already.
    pub(super) fn change_drain_timeout(&mut self, timeout: Duration) {
        self.drain.timeout = Some(timeout);
        self.perform(Action::Arm(Timer::Drain));
        let deadline = self.timers.drain;
        self.shared.phase.update(|phase| phase.change_drain_deadline(deadline));
    }

    fn cut(&mut self) {
        if self.drain.cut.is_none() {
            let cut = self.shared.connections.cut();
            log::warn!("{cut} connections were still open at the drain deadline and are closed");
            self.drain.cut = Some(cut);
            self.drain.cut_at = Some(Instant::now());
            self.timers.cut_grace = Some(Instant::now() + CUT_GRACE);
            self.shared.phase.update(|phase| phase.deadline_passed());
        }
    }

    /// No connection is left and every hook has returned; after a cut neither is waited for, but hooks in a restart.
    pub(super) fn check_idle(&mut self) {
        let draining = self.upgrade.stage() == crate::upgrade::Stage::Draining;
        // Whoever asked for an upgrade that the stop has ended is told before the process is gone.
        let told = self.reports.is_empty();
        let cut_long_ago = self.drain.cut_at.is_some_and(|cut_at| cut_at.elapsed() >= CUT_GRACE);
        let hooks_over = self.drain.hooks_done || (self.drain.cut.is_some() && !self.is_restarting());
        let nothing_runs = hooks_over && (cut_long_ago || self.shared.connections.open() == 0);
        if draining && told && nothing_runs {
            self.timers.cut_grace = None;
            self.tell_old_side(Event::Idle);
        }
    }

    /// Everything is told before the application may exit.
    fn finish(&mut self) {
        let (upgraded, cut) = (self.drain.upgraded, self.drain.cut.unwrap_or(0));
        log::info!("drained");
        self.give_way(cut);
        self.remove_pid_file();
        self.answer_drained(cut);
        self.remove_control_socket();
        self.old_comes_to("old: drained");
        self.shared.phase.update(|phase| phase.drained = Some(Drained { upgraded, cut }));
    }

    pub(super) fn announce(&mut self, progress: Progress) {
        self.announce_stage(progress);
        if progress == Progress::Committed {
            self.answer_if_waiting(Wait::Ready);
        }
        if progress == Progress::Healthy {
            self.answer_if_waiting(Wait::Healthy);
        }
    }
}

/// In any order, but a new process has little reason to choose another one.
fn is_what_was_offered(adopted: &mut [AdoptedListener], offered: &mut [OfferedListener]) -> bool {
    let same = |adopted: &[AdoptedListener], offered: &[OfferedListener]| {
        let mut pairs = adopted.iter().zip(offered);
        adopted.len() == offered.len()
            && pairs.all(|(adopted, offered)| adopted.name == offered.name && adopted.cookie == offered.cookie)
    };
    same(adopted, offered) || {
        adopted.sort_by(|a, b| a.name.cmp(&b.name));
        offered.sort_by(|a, b| a.name.cmp(&b.name));
        same(adopted, offered)
    }
}

fn has_something_waiting(entry: &Entry) -> bool {
    let Some(fd) = entry.socket.fd() else { return false };
    match entry.kind {
        Kind::Tcp => sys::accept_backlog(fd.as_fd()).is_ok_and(|waiting| waiting > 0),
        _ => crate::poll::wait(fd.as_fd(), PollFlags::POLLIN, Some(Instant::now())).unwrap_or(false),
    }
}

/// On a thread of their own: the application's code may take until the drain deadline.
fn run_drain_hooks(shared: &Arc<Shared>) {
    let hooks = shared.take_drain_hooks();
    if hooks.is_empty() {
        return shared.command(Command::DrainHooksDone);
    }
    let for_thread = shared.clone();
    let run = move || {
        for hook in hooks {
            if catch_unwind(AssertUnwindSafe(hook)).is_err() {
                log::error!("a drain hook panicked");
            }
        }
        for_thread.command(Command::DrainHooksDone);
    };
    if let Err(error) = std::thread::Builder::new().name("handover-drain".into()).spawn(run) {
        log::error!("drain hooks are not run, for want of a thread: {error}");
        shared.command(Command::DrainHooksDone);
    }
}
