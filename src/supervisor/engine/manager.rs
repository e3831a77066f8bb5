//! What the service manager is told. The main process never changes; only the stages of an upgrade are news.

use std::time::Instant;

use super::Supervisor;

impl Supervisor {
    fn service(&self) -> String {
        let generation = self.machine.generation();
        match self.draining_workers().len() {
            0 => format!("generation {generation} serves"),
            1 => format!("generation {generation} serves, 1 older process drains"),
            count => format!("generation {generation} serves, {count} older processes drain"),
        }
    }

    /// A generation has been committed, or is kept after an upgrade that failed.
    pub(super) fn tell_manager_of_service(&mut self, failure: Option<&str>) {
        let Some(notifier) = &self.notifier else { return };
        let failed = failure.map(|what| format!("; the last upgrade failed: {what}")).unwrap_or_default();
        notifier.ready(&format!("{}{failed}", self.service()));
        if self.timers.watchdog.is_none() {
            self.ping_watchdog();
        }
    }

    pub(super) fn tell_manager_of_upgrade(&self) {
        if let Some(notifier) = &self.notifier {
            notifier.reloading(&format!("upgrading to generation {}", self.machine.generation() + 1));
        }
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
        if let Some(notifier) = self.notifier.as_ref().filter(|_| std::env::var_os("FDSTORE").is_some()) {
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
