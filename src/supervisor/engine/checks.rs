//! From the start of a worker to the proof that it can serve.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::Supervisor;
use crate::supervisor::machine::{Event, WorkerId};
use crate::supervisor::options::Ready;
use crate::sys::End;

/// Between two runs of --ready-cmd.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

impl Supervisor {
    /// Whoever is not known to be able to serve is looked at.
    pub(super) fn look_at_workers(&mut self) {
        let starting = self.machine.workers().filter(|(_, worker)| worker.is_starting()).map(|(id, _)| id);
        let starting: Vec<WorkerId> = starting.collect();
        if starting.is_empty() {
            return;
        }
        for id in &starting {
            if let Some(time) = self.workers.get_mut(id).and_then(|worker| worker.more_time.take()) {
                self.tell(Event::NeedsTime(*id, time));
            }
        }
        let now = Instant::now();
        let is_due =
            |id: &WorkerId| self.workers.get(id).is_some_and(|worker| worker.next_look.is_some_and(|next| next <= now));
        let listeners = if starting.iter().any(is_due) { self.sockets.settled() } else { vec![] };
        // Where nothing can be seen the command decides alone; so it does where it is asked for beside an interception,
        // because the new build may not want all that the old one has.
        let unseen = self.sockets.is_empty() || self.options.intercepts();
        let is_left_to_command = unseen && self.options.ready == Ready::Any && self.options.ready_command.is_some();
        let delay = self.attempt.as_ref().and_then(|attempt| attempt.ready_delay).or(self.options.ready_delay);
        for id in starting {
            let Some(worker) = self.workers.get_mut(&id) else { continue };
            worker.look(self.options.ready, delay, &listeners, now);
            if is_left_to_command {
                worker.proof = Some("was started".to_owned());
            }
            match (&worker.proof, &self.options.ready_command) {
                (None, _) => {}
                (Some(_), None) => self.is_ready(id),
                (Some(_), Some(command)) => {
                    let command = command.clone();
                    self.check(id, &command, now);
                }
            }
        }
    }

    fn is_ready(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        worker.next_look = None;
        let proof = worker.proof.clone().unwrap_or_default();
        self.announce_ready(id, proof);
        self.tell(Event::Ready(id));
    }

    /// Runs the command, unless it runs already or has just failed.
    fn check(&mut self, id: WorkerId, command: &str, now: Instant) {
        let generation = self.machine.worker(id).map(|worker| worker.generation);
        let is_new = generation.is_some_and(|generation| generation > self.machine.generation());
        let build = if is_new { &self.new } else { &self.committed };
        let (Some(worker), Some(build)) = (self.workers.get_mut(&id), build) else { return };
        if worker.check.is_some() || worker.next_look.is_some_and(|next| next > now) {
            return;
        }
        let variable = |name: &str, value: String| (OsString::from(name), OsString::from(value));
        let environment = [
            variable("HANDOVER_PID", worker.pid.to_string()),
            variable("HANDOVER_WORKER", worker.slot.to_string()),
            variable("HANDOVER_GENERATION", generation.unwrap_or_default().to_string()),
        ];
        let arguments = ["sh", "-c", command].map(OsString::from);
        match build.plan.run(Path::new("/bin/sh"), &arguments, &environment, vec![]) {
            Ok(pid) => (worker.check, worker.next_look) = (Some(pid), None),
            Err(error) => {
                log::warn!("cannot run --ready-cmd: {error}");
                worker.next_look = Some(now + CHECK_INTERVAL);
            }
        }
    }

    /// A child that is no worker has ended. False: it was no run of the command.
    pub(super) fn check_ended(&mut self, pid: Pid, end: End) -> bool {
        let Some((id, worker)) = self.workers.iter_mut().find(|(_, worker)| worker.check == Some(pid)) else {
            return false;
        };
        let id = *id;
        worker.check = None;
        let waits = self.machine.worker(id).is_some_and(|worker| worker.is_starting());
        match waits.then_some(end) {
            Some(End::Exited { status: 0 }) => self.is_ready(id),
            Some(_) => worker.next_look = Some(Instant::now() + CHECK_INTERVAL),
            None => {}
        }
        true
    }
}
