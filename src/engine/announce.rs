//! Telling whoever asked: stages, results, status.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};

use nix::unistd::Pid;

use super::advice::advice;
use super::attempt::{Process, Requester, milliseconds_since};
use super::{ALIVE_INTERVAL, DRAIN_COUNT_INTERVAL, Engine, server_finish};
use crate::control::messages::{
    ConnectionCounts, Event as Said, LastUpgrade, ListenerStatus, Outcome, ResultEvent, StageEvent, StageName, State,
    Status, Wait,
};
use crate::inherit;
use crate::listeners::Entry;
use crate::protocol::Kind;
use crate::shared::unix_ms;
use crate::sock_diag::unix_accept_backlog;
use crate::sys;
use crate::upgrade::{Progress, Stage};

/// How often a reason why it is still starting is passed on; the last one is in any case, with `ALIVE_INTERVAL`.
const STARTING_INTERVAL: Duration = Duration::from_millis(100);

impl Engine {
    pub(super) fn announce_stage(&mut self, progress: Progress) {
        let stage = match progress {
            Progress::Spawned => StageName::Spawned,
            Progress::Adopted => StageName::Adopted,
            Progress::Starting => StageName::Starting,
            Progress::Ready => StageName::Ready,
            Progress::Committed => StageName::Committed,
            Progress::Healthy => StageName::Healthy,
            Progress::Draining => return self.announce_drain(),
        };
        let Some(attempt) = &mut self.attempt else { return };
        if stage == StageName::Starting {
            attempt.starting_untold = attempt.starting_told.is_some_and(|told| told.elapsed() < STARTING_INTERVAL);
            if attempt.starting_untold {
                return;
            }
            attempt.starting_told = Some(Instant::now());
        }
        let mut event = StageEvent::new(stage, attempt.elapsed_ms());
        match stage {
            StageName::Spawned => event.pid = attempt.pid,
            StageName::Starting => event.reason.clone_from(&attempt.starting),
            StageName::Ready => event.claims = Some(attempt.claims.clone()),
            _ => {}
        }
        log::info!("{}: {stage} after {:.1} ms", attempt.origin.noun(), event.at_ms);
        if let (Requester::Client(id, _), Some(server)) = (&attempt.requester, &mut self.server) {
            server.send(*id, &Said::Stage(event));
        }
    }

    fn announce_drain(&mut self) {
        self.drain.last_count = None;
        self.announce_drain_count();
    }

    /// A client has joined that has not heard the count yet.
    pub(super) fn announce_drain_to_stop_clients(&mut self) {
        self.drain.last_count = None;
        self.announce_drain_count();
        self.schedule_alive();
    }

    /// The count of open connections, to those who wait for the drain, when it has changed.
    pub(super) fn announce_drain_count(&mut self) {
        if self.upgrade.stage() != Stage::Draining {
            return;
        }
        self.timers.drain_count = Some(Instant::now() + DRAIN_COUNT_INTERVAL);
        let connections = self.shared.connections.open();
        if self.drain.last_count == Some(connections) {
            return;
        }
        self.drain.last_count = Some(connections);
        let waiting = self.waiting_for_drain();
        let Some(server) = &mut self.server else { return };
        for (id, begun) in waiting {
            let event = StageEvent {
                connections: Some(connections),
                ..StageEvent::new(StageName::Draining, milliseconds_since(begun))
            };
            server.send(id, &Said::Stage(event));
        }
    }

    fn waiting_for_drain(&self) -> Vec<(u64, Instant)> {
        let of_upgrade = self.attempt.as_ref().and_then(|attempt| match attempt.requester {
            Requester::Client(id, Wait::Drained) => Some((id, attempt.begun)),
            _ => None,
        });
        self.stop_clients.iter().copied().chain(of_upgrade).collect()
    }

    pub(super) fn schedule_alive(&mut self) {
        self.timers.alive = Some(Instant::now() + ALIVE_INTERVAL);
    }

    /// So that whoever waits can tell a long start from a stopped process.
    pub(super) fn say_alive(&mut self) {
        let mut waiting: Vec<u64> = self.stop_clients.iter().map(|(id, _)| *id).collect();
        waiting.extend(self.attempt.as_ref().and_then(|attempt| attempt.requester.client()));
        waiting.extend(self.asker_of_restart());
        let Some(server) = &mut self.server else { return };
        waiting.retain(|id| server.is_connected(*id));
        if waiting.is_empty() {
            return;
        }
        for id in waiting {
            server.send(id, &Said::Alive);
        }
        self.schedule_alive();
        if self.upgrade.stage() == Stage::Adopted && self.attempt.as_ref().is_some_and(|one| one.starting_untold) {
            self.announce_stage(Progress::Starting);
        }
    }

    pub(super) fn answer(&mut self, requester: Requester, result: ResultEvent) {
        match requester {
            Requester::Nobody => {}
            Requester::Client(id, _) => server_finish(&mut self.server, id, &result),
            // Whoever asked may have stopped waiting.
            Requester::Application(reply) => drop(reply.send(result)),
        }
    }

    pub(super) fn answer_if_waiting(&mut self, wait: Wait) {
        let Some(attempt) = &mut self.attempt else { return };
        if attempt.requester.waits_for(wait) {
            let requester = std::mem::replace(&mut attempt.requester, Requester::Nobody);
            let result = self.upgraded();
            self.answer(requester, result);
        }
    }

    fn upgraded(&self) -> ResultEvent {
        let generation = self.shared.generation + 1;
        let Some(attempt) = &self.attempt else { return ResultEvent::new(Outcome::Upgraded, "upgraded") };
        let pid = attempt.pid.unwrap_or_default();
        ResultEvent {
            at_ms: Some(attempt.elapsed_ms()),
            pid: Some(pid),
            generation: Some(generation),
            ..ResultEvent::new(Outcome::Upgraded, format!("upgraded to generation {generation} (pid {pid})"))
        }
    }

    pub(super) fn answer_drained(&mut self, cut: usize) {
        let closed = |result: ResultEvent| match cut {
            0 => result,
            _ => ResultEvent {
                result: Outcome::Cut,
                message: match cut {
                    1 => format!("{}; 1 connection was closed at the drain deadline", result.message),
                    _ => format!("{}; {cut} connections were closed at the drain deadline", result.message),
                },
                cut: Some(cut),
                ..result
            },
        };
        // The new process of a restart answers for itself.
        if !self.is_restarting() {
            let for_upgrade = closed(self.upgraded());
            self.answer_if_waiting_with(for_upgrade);
        }
        for (id, begun) in std::mem::take(&mut self.stop_clients) {
            let message = match self.drain.upgraded {
                true => format!("process {} drained", std::process::id()),
                false => format!("process {} stopped", std::process::id()),
            };
            let result =
                ResultEvent { at_ms: Some(milliseconds_since(begun)), ..ResultEvent::new(Outcome::Stopped, message) };
            server_finish(&mut self.server, id, &closed(result));
        }
    }

    fn answer_if_waiting_with(&mut self, result: ResultEvent) {
        let Some(attempt) = &mut self.attempt else { return };
        if attempt.requester.waits_for(Wait::Drained) {
            let requester = std::mem::replace(&mut attempt.requester, Requester::Nobody);
            self.answer(requester, result);
        }
    }

    /// Sends the ends of failed upgrades whose last words are in.
    pub(super) fn send_reports(&mut self) {
        let now = Instant::now();
        let (due, waiting) = std::mem::take(&mut self.reports)
            .into_iter()
            .map(|mut report| (report.is_complete() || report.deadline <= now, report))
            .partition::<Vec<_>, _>(|(due, _)| *due);
        self.reports = waiting.into_iter().map(|(_, report)| report).collect();
        for (_, mut report) in due {
            let mut result = report.result;
            result.exit = report.process.as_mut().and_then(Process::exit);
            match (&result.exit, &report.process) {
                (None, Some(process)) => process.kill(),
                (Some(_), Some(process)) => self.clean_up_after(process.pid),
                (_, None) => {}
            }
            result.stderr = report.stderr.map(|tail| tail.lines()).unwrap_or_default();
            let (cause, silent) = (result.failure.as_deref().unwrap_or_default(), result.stderr.is_empty());
            result.mend = advice(report.failure, cause, result.exit.as_deref(), silent).map(str::to_owned);
            log::error!("{}", result.message);
            let at_unix_ms = unix_ms(SystemTime::now());
            let (outcome, message) = (result.result, result.message.clone());
            self.last_upgrade = Some(LastUpgrade { result: outcome, message, at_unix_ms });
            // Reaped when the kernel is done with it.
            self.successors.extend(report.process.filter(|_| result.exit.is_none()));
            self.answer(report.requester, result);
        }
    }

    /// No zombie stays, and generations that are gone are forgotten.
    pub(super) fn reap(&mut self) {
        let mut gone = Vec::new();
        let mut lives = |process: &mut Process| {
            let exit = process.exit();
            gone.extend(exit.is_some().then_some(process.pid));
            exit.is_none()
        };
        self.successors.retain_mut(&mut lives);
        let older = self.older.len();
        self.older.retain_mut(|(_, process)| lives(process));
        let fewer = self.older.len() < older;
        gone.into_iter().for_each(|pid| self.clean_up_after(pid));
        if fewer {
            self.tell_manager_of_older();
        }
    }

    /// A process that was killed could not do it itself.
    pub(super) fn clean_up_after(&self, pid: Pid) {
        if let Some(server) = &self.server {
            server.remove_stale(pid);
        }
        if let Some(pid_file) = &self.pid_file {
            pid_file.discard_of(pid.as_raw().unsigned_abs());
        }
    }

    pub(super) fn status(&self) -> Status {
        let shared = &self.shared;
        let state = match (self.inherit.stage(), self.upgrade.stage()) {
            (_, Stage::Draining) => State::Draining,
            (_, Stage::Drained) => State::Drained,
            (inherit::Stage::Refused, _) => State::Refused,
            (inherit::Stage::Starting { .. } | inherit::Stage::Ready, _) => State::Starting,
            (_, Stage::Trial) => State::Trial,
            (_, Stage::Serving) => State::Serving,
            _ => State::Upgrading,
        };
        let connections = ConnectionCounts { open: shared.connections.open(), accepted: shared.connections.accepted() };
        let mut listeners: Vec<ListenerStatus> = shared.listeners().entries().map(listener_status).collect();
        listeners.sort_by(|a, b| a.name.cmp(&b.name));
        Status {
            pid: std::process::id().cast_signed(),
            generation: shared.generation,
            state,
            since_unix_ms: unix_ms(shared.since),
            version: shared.config.version.clone(),
            program: shared.started.program_path(&shared.config),
            directory: shared.started.directory(&shared.config, None),
            build: shared.build_identity(),
            previous: shared.previous.clone(),
            listeners,
            connections,
            draining: self.older.iter().map(|(older, _)| older.clone()).collect(),
            last_upgrade: self.last_upgrade.clone(),
            limits: Some(shared.config.limits()),
            handover: env!("CARGO_PKG_VERSION").to_owned(),
            name: None,
            workers: vec![],
        }
    }
}

pub(crate) fn listener_status(entry: &Entry) -> ListenerStatus {
    ListenerStatus {
        name: entry.name.clone(),
        kind: entry.kind,
        address: entry.address.to_string(),
        cookie: entry.cookie,
        source: entry.source.to_string(),
        queue: entry.socket.fd().and_then(|fd| queue_of(entry.kind, fd.as_fd())),
        waited_on: entry.socket.was_waited_on(),
    }
}

/// Connections that wait to be accepted, or bytes of the next datagram, where the kernel says so.
pub(crate) fn queue_of(kind: Kind, socket: BorrowedFd<'_>) -> Option<u32> {
    match kind {
        Kind::Tcp => sys::accept_backlog(socket).ok(),
        Kind::Udp | Kind::UnixDatagram => sys::unread_bytes(socket).ok(),
        Kind::Unix => unix_accept_backlog(socket).ok(),
    }
}
