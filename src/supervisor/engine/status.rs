//! What a supervisor answers when it is asked how things are.

use nix::unistd::Pid;

use super::{MAX_DRAINING, Supervisor};
use crate::control::{ConnectionCounts, Limits, State, Status, WorkerStatus};
use crate::protocol::DrainingGeneration;
use crate::shared::unix_ms;
use crate::supervisor::machine::{self, Phase, Stage, WorkerId};
use crate::supervisor::worker::Worker;

impl Supervisor {
    /// Each worker that lives, as the machine sees it and as it is.
    fn both(&self) -> impl Iterator<Item = (&machine::Worker, &Worker)> {
        self.machine.workers().filter_map(|(id, seen)| Some((seen, self.workers.get(&id)?)))
    }

    pub(super) fn draining_workers(&self) -> Vec<(WorkerId, Pid)> {
        let drains = |worker: &machine::Worker| matches!(worker.stage, Stage::Stopping { .. } | Stage::Killed { .. });
        let draining = self.machine.workers().filter(|(_, worker)| drains(worker));
        draining.filter_map(|(id, _)| Some((id, self.workers.get(&id)?.pid))).collect()
    }

    pub(super) fn status(&mut self) -> Status {
        let pids: Vec<Pid> = self.both().map(|(_, worker)| worker.pid).collect();
        let open = self.counted.open(pids, &self.sockets.addresses());
        let mut workers: Vec<WorkerStatus> =
            self.both().zip(&open).map(|((seen, worker), open)| self.worker_status(seen, worker, *open)).collect();
        workers.extend(self.awaited());
        let draining = workers.iter().filter(|worker| worker.state == State::Draining);
        let draining =
            draining.filter_map(|worker| Some(DrainingGeneration { pid: worker.pid?, generation: worker.generation }));
        let build = self.committed.as_ref().or(self.new.as_ref()).map(|build| build.identity.clone());
        Status {
            pid: std::process::id().cast_signed(),
            generation: self.machine.generation().max(1),
            state: match self.machine.phase() {
                Phase::Starting => State::Starting,
                Phase::Serving => State::Serving,
                Phase::Upgrading | Phase::Trial => State::Upgrading,
                Phase::Draining => State::Draining,
                Phase::Ended => State::Drained,
            },
            since_unix_ms: unix_ms(self.since),
            version: None,
            program: self.recipe.program_path(),
            directory: self.recipe.directory(),
            build: build.unwrap_or_default(),
            previous: self.previous.clone(),
            listeners: self.sockets.status(),
            connections: ConnectionCounts { open: open.iter().sum(), accepted: 0 },
            draining: draining.collect(),
            last_upgrade: self.last_upgrade.clone(),
            limits: Some(self.limits()),
            handover: env!("CARGO_PKG_VERSION").to_owned(),
            name: self.options.name.clone(),
            workers,
        }
    }

    fn worker_status(&self, seen: &machine::Worker, worker: &Worker, connections: usize) -> WorkerStatus {
        let is_current = seen.generation == self.machine.generation();
        WorkerStatus {
            pid: Some(worker.pid.as_raw()),
            worker: seen.slot,
            generation: seen.generation,
            state: match seen.stage {
                Stage::Starting { .. } => State::Starting,
                Stage::Ready => State::Serving,
                Stage::Stopping { .. } | Stage::Killed { .. } => State::Draining,
            },
            since_unix_ms: unix_ms(worker.since),
            connections,
            crashes: if is_current { self.machine.crashes(seen.slot) } else { 0 },
            said: worker.status.clone(),
        }
    }

    /// Places whose worker has ended by itself, until the next is started.
    fn awaited(&self) -> impl Iterator<Item = WorkerStatus> {
        let generation = self.machine.generation();
        let is_there = |slot: &usize| self.machine.workers().any(|(_, worker)| worker.slot == *slot);
        (0..self.machine.wanted()).filter(move |slot| !is_there(slot)).map(move |slot| WorkerStatus {
            pid: None,
            worker: slot,
            generation,
            state: State::Starting,
            since_unix_ms: unix_ms(std::time::SystemTime::now()),
            connections: 0,
            crashes: self.machine.crashes(slot),
            said: None,
        })
    }

    fn limits(&self) -> Limits {
        let milliseconds = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Limits {
            ready_timeout_ms: milliseconds(self.options.ready_timeout),
            trial_ms: milliseconds(self.options.trial),
            drain_timeout_ms: milliseconds(self.options.drain_timeout),
            max_draining: MAX_DRAINING,
        }
    }
}
