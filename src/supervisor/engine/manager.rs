//! What the service manager is told. The main process never changes; only the stages of an upgrade are news.

use std::time::Instant;

use super::Supervisor;
use super::answers::Verb;
use crate::supervisor::machine::Phase;

impl Supervisor {
    fn service(&self) -> String {
        let generation = self.machine.generation();
        let drains = match self.draining_workers().len() {
            0 => String::new(),
            1 => ", 1 older process drains".to_owned(),
            count => format!(", {count} older processes drain"),
        };
        let failed = self.last_failure.as_ref().map(|what| format!("; the last upgrade failed: {what}"));
        format!("generation {generation} serves{drains}{}", failed.unwrap_or_default())
    }

    /// A generation has been committed, or is kept after an upgrade that failed.
    pub(super) fn tell_manager_of_service(&mut self) {
        let Some(notifier) = &self.notifier else { return };
        notifier.ready(&self.service());
        if self.timers.watchdog.is_none() {
            self.ping_watchdog();
        }
    }

    /// A process that drained has ended.
    pub(super) fn tell_manager_of_older(&self) {
        if let (Some(notifier), Phase::Serving) = (&self.notifier, self.machine.phase()) {
            notifier.status(&self.service());
        }
    }

    pub(super) fn tell_manager_of_upgrade(&self) {
        let (Some(notifier), Some(attempt)) = (&self.notifier, &self.attempt) else { return };
        let how = if attempt.verb == Verb::Restart { "restarting as" } else { "upgrading to" };
        notifier.reloading(&format!("{how} generation {}", attempt.generation));
    }

    pub(super) fn tell_manager_of_crashes(&self) {
        let most = (0..self.machine.wanted()).map(|slot| self.machine.crashes(slot)).max().unwrap_or(0);
        if let Some(notifier) = &self.notifier {
            notifier
                .status(&format!("generation {} ended by itself, {most} times in a row", self.machine.generation()));
        }
    }

    pub(super) fn tell_manager_of_drain(&self) {
        if let Some(notifier) = &self.notifier {
            notifier.stopping("draining");
        }
    }

    pub(super) fn keep_listeners_in_store(&self) {
        let wanted = self.options.fd_store || std::env::var_os("FDSTORE").is_some();
        if let Some(notifier) = self.notifier.as_ref().filter(|_| wanted) {
            self.sockets.keep_in_store(notifier);
        }
    }

    pub(super) fn ping_watchdog(&mut self) {
        let Some(notifier) = &self.notifier else { return };
        if let Some(interval) = notifier.watchdog() {
            notifier.watchdog_ping();
            self.timers.watchdog = Some(Instant::now() + interval);
        }
    }
}
