//! The engine's part in becoming the new process: the channel to the old one, and what the `Inherit` machine wants
//! done.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant, SystemTime};

use nix::poll::PollFlags;
use nix::unistd::Pid;

use super::Engine;
use super::attempt::Process;
use crate::channel::{Broken, Channel, Received};
use crate::control::messages::{LastUpgrade, Outcome};
use crate::fault;
use crate::inherit::{Action, Event, Stage};
use crate::listeners::Unclaimed;
use crate::pid_file::PidFile;
use crate::protocol::{DrainingGeneration, Message};
use crate::shared::{Ownership, unix_ms};
use crate::sys;

/// The old process.
pub(super) struct Upstream {
    pub(super) channel: Channel,
    /// What fd 2 is to be after commit.
    stderr: Option<OwnedFd>,
    /// Until it is sent.
    adopted: Option<Message>,
    /// See [`Handed`](crate::inherit::receive::Handed).
    pulled_from: Option<OwnedFd>,
    begun: Instant,
    told_accepting: usize,
}

impl Upstream {
    pub(super) fn new(
        channel: Channel,
        adopted: Option<Message>,
        stderr: Option<OwnedFd>,
        pulled_from: Option<OwnedFd>,
    ) -> Self {
        Self { channel, stderr, adopted, pulled_from, begun: Instant::now(), told_accepting: 0 }
    }

    /// A process that dies closes its channel before it is gone, and with very many connections that takes it a while. One that
    /// lives has opened its gate again meanwhile, so nobody waits for this.
    fn old_process_lives(&self) -> bool {
        const DEATH_TIMEOUT: Duration = Duration::from_secs(10);
        let is_gone = |old: &OwnedFd| {
            crate::poll::wait(old.as_fd(), PollFlags::POLLIN, Some(Instant::now() + DEATH_TIMEOUT)).unwrap_or(true)
        };
        self.pulled_from.as_ref().is_some_and(|old| !is_gone(old))
    }
}

/// Pidfds of the older generations, to know when they are gone.
pub(super) fn watch_older(older: Vec<DrainingGeneration>) -> Vec<(DrainingGeneration, Process)> {
    let watch = |one: DrainingGeneration| {
        let pid = Pid::from_raw(one.pid);
        let pidfd = sys::pidfd_open(pid).ok()?;
        Some((one, Process::other(pid, pidfd)))
    };
    older.into_iter().filter_map(watch).collect()
}

impl Engine {
    /// Here and not where the offer was received, because meanwhile the application starts up.
    pub(super) fn answer_offer(&mut self) {
        if let Some(adopted) = self.upstream.as_mut().and_then(|upstream| upstream.adopted.take()) {
            self.send_upstream(adopted);
            self.new_comes_to("new: adopted");
        }
    }

    pub(super) fn on_app_ready(&mut self) {
        if self.shared.config.unclaimed == Unclaimed::Fail {
            let unclaimed = self.shared.listeners().claims().unclaimed;
            if !unclaimed.is_empty() {
                let reason = format!("it has no use for the listeners {}", unclaimed.join(", "));
                return self.tell_new_side_with(Event::AppGaveUp, reason);
            }
        }
        if let Err(error) = self.pid_file.as_ref().map_or(Ok(()), PidFile::prepare) {
            return self.tell_new_side_with(Event::AppGaveUp, error.to_string());
        }
        self.tell_new_side(Event::AppReady);
    }

    fn tell_new_side(&mut self, event: Event) {
        self.tell_new_side_with(event, String::new());
    }

    /// `reason` is for those events that have one.
    pub(super) fn tell_new_side_with(&mut self, event: Event, reason: String) {
        for action in self.inherit.on_event(event) {
            match action {
                Action::SendReady => {
                    let claims = self.shared.listeners().claims();
                    self.send_upstream(Message::Ready(claims));
                    self.new_comes_to("new: ready");
                }
                Action::SendStarting => self.send_upstream(Message::Starting { reason: reason.clone() }),
                Action::SendGaveUp => self.send_upstream(Message::GaveUp { reason: reason.clone() }),
                Action::SendStopping => self.send_upstream(Message::Stopping),
                Action::OpenGate => self.open_as_new(),
                Action::ShutGate => self.shared.gate.shut(),
                Action::Refuse => {
                    // The old process says it, too, where the upgrade was asked for.
                    let level = if event == Event::Aborted { log::Level::Info } else { log::Level::Error };
                    log::log!(level, "generation {} will not serve: {reason}", self.shared.generation);
                    self.refuse(&reason);
                }
                Action::Own => {
                    log::info!("generation {} owns the listeners", self.shared.generation);
                    self.settle_listeners();
                    self.tell_manager_of_ownership();
                }
            }
        }
    }

    fn refuse(&mut self, reason: &str) {
        self.fail_restart(&format!("gave up: {reason}"));
        if let Some(pid_file) = &self.pid_file {
            pid_file.discard();
        }
        self.shared.listeners().forget_inherited();
        // Before the application hears of it and exits. Its threads may hold handles, so that the last one is never
        // dropped.
        self.shared.listeners().unlink_paths(false);
        self.remove_control_socket();
        let serves = self.shared.phase.read(|phase| phase.ownership == Ownership::Owner);
        self.shared.phase.update(|phase| phase.ownership = Ownership::Refused(reason.to_owned()));
        if serves {
            // In the trial the application no longer waits to be told whether it may serve: it waits for the drain.
            self.tell_old_side(crate::upgrade::Event::Stop);
        }
    }

    fn open_as_new(&mut self) {
        self.take_stderr();
        // Before anything that takes time: clients wait.
        self.shared.gate.open();
        if let Some(pid_file) = &self.pid_file {
            pid_file.put_in_place();
        }
        let claims = self.shared.listeners().claims();
        if let Some(upstream) = &self.upstream {
            let took = upstream.begun.elapsed().as_secs_f64() * 1e3;
            let generation = self.shared.generation;
            log::info!("generation {generation} accepts, {took:.1} ms after the handover");
            let message = format!("upgraded to generation {generation} (pid {})", std::process::id());
            self.remember(Outcome::Upgraded, message);
            self.send_accepting();
        }
        if let Some(message) = self.finish_restart(claims) {
            self.remember(Outcome::Restarted, message);
        }
        self.shared.phase.update(|phase| phase.ownership = Ownership::Owner);
    }

    /// Not at commit: an old process that accepts again must find its sockets and their paths as they were.
    fn settle_listeners(&self) {
        let mut listeners = self.shared.listeners();
        listeners.apply_pending();
        listeners.settle_unclaimed(self.shared.config.unclaimed, &self.shared.gate);
    }

    fn remember(&mut self, result: Outcome, message: String) {
        self.last_upgrade = Some(LastUpgrade { result, message, at_unix_ms: unix_ms(SystemTime::now()) });
    }

    /// Until now fd 2 was a pipe to the old process.
    fn take_stderr(&mut self) {
        if let Some(stderr) = self.upstream.as_mut().and_then(|upstream| upstream.stderr.take()) {
            if let Err(error) = sys::replace_stderr(stderr.as_fd()) {
                log::warn!("stderr stays a pipe to the old process: {error}");
            }
        }
    }

    /// Tells the old process on which listeners the application waits, if there are more than it knows.
    pub(super) fn send_accepting(&mut self) {
        let waited_on = self.shared.listeners().waited_on();
        let Some(upstream) = &mut self.upstream else { return };
        // The first is due in any case.
        if upstream.told_accepting != waited_on.len() + 1 {
            upstream.told_accepting = waited_on.len() + 1;
            self.send_upstream(Message::Accepting { listeners: waited_on });
            self.new_comes_to("new: accepting");
        }
    }

    fn send_upstream(&mut self, message: Message) {
        let Some(upstream) = &mut self.upstream else { return };
        if let Err(broken) = upstream.channel.send(&message, vec![]) {
            // Its end is read in its turn, and decides.
            log::debug!("the old process {broken}");
        }
    }

    fn new_comes_to(&self, step: &str) {
        fault::reached(step, self.upstream.as_ref().map(|upstream| &upstream.channel));
    }

    /// Whoever sends it lives, and must not be taken for dead. But who says `settled`, however badly, does not serve any more.
    fn on_nonsense(&self) -> Event {
        let settles = self.upstream.as_ref().is_some_and(|upstream| upstream.channel.has_begun(&Message::Settled));
        if settles && self.inherit.stage() == Stage::Trial { Event::Settled } else { Event::Aborted }
    }

    pub(super) fn read_upstream(&mut self) {
        while let Some(upstream) = &mut self.upstream {
            // What is left to send, if anything.
            let _ = upstream.channel.flush();
            let (event, reason, over) = match upstream.channel.receive() {
                Ok(Received::Nothing) => return,
                Ok(Received::Message(Message::Commit)) => (Event::Commit, String::new(), false),
                Ok(Received::Message(Message::Settled)) => (Event::Settled, String::new(), true),
                Ok(Received::Message(Message::Aborted { reason })) => (Event::Aborted, reason, true),
                Ok(Received::End) | Err(Broken::Io(_)) if upstream.old_process_lives() => {
                    (Event::Aborted, "the old process has closed the channel, and lives".to_owned(), true)
                }
                Ok(Received::End) | Err(Broken::Io(_)) => (Event::ChannelEnded, String::new(), true),
                Ok(Received::Message(other)) => {
                    (self.on_nonsense(), format!("the old process sent `{}` out of turn", other.name()), true)
                }
                Err(broken @ (Broken::Malformed(_) | Broken::Versions(_))) => {
                    (self.on_nonsense(), format!("the old process {broken}"), true)
                }
            };
            match event {
                Event::Commit => self.new_comes_to("new: commit"),
                Event::Settled => self.new_comes_to("new: settled"),
                _ => {}
            }
            if event == Event::ChannelEnded && self.inherit.stage() != Stage::Owner {
                // Nobody reads that pipe any more.
                self.take_stderr();
                log::warn!(
                    "the old process died in the middle of the upgrade: generation {} takes over",
                    self.shared.generation
                );
            }
            self.tell_new_side_with(event, reason);
            if over {
                self.upstream = None;
            }
        }
    }
}
