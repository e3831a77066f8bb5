//! The engine's part in what the service manager is told about this process.

use std::os::fd::AsFd;
use std::time::Instant;

use super::attempt::Attempt;
use super::{Engine, LONGEST};
use crate::inherit;
use crate::systemd::STORE_TIMEOUT;
use crate::upgrade::{Origin, Stage};

impl Engine {
    /// This process is the one that serves, and the main one.
    pub(super) fn tell_manager_of_ownership(&mut self) {
        let Some(notifier) = &self.notifier else { return };
        notifier.ready(&self.serving_status());
        self.keep_listeners_in_store();
        self.ping_watchdog();
    }

    /// Not by the new process of an upgrade, which is not the main one.
    pub(super) fn tell_manager_of_start(&self, reason: &str) {
        let alone = self.inherit.stage() == inherit::Stage::Starting { old_process: false };
        if let Some(notifier) = self.notifier.as_ref().filter(|_| alone) {
            let generation = self.shared.generation;
            let time = self.shared.config.ready_timeout.min(LONGEST);
            notifier.still_starting(time, &format!("generation {generation} starts: {reason}"));
        }
    }

    fn serving_status(&self) -> String {
        let generation = self.shared.generation;
        match self.older.len() {
            0 => format!("generation {generation} serves"),
            older => format!("generation {generation} serves, {older} older drain"),
        }
    }

    /// An older generation has gone.
    pub(super) fn tell_manager_of_older(&self) {
        if let (Some(notifier), true, Stage::Serving) = (&self.notifier, self.inherit.owns(), self.upgrade.stage()) {
            notifier.status(&self.serving_status());
        }
    }

    pub(super) fn tell_manager_of_upgrade(&self) {
        if let Some(notifier) = &self.notifier {
            let next = self.shared.generation + 1;
            notifier.reloading(&match self.is_restarting() {
                true => format!("restarting as generation {next}"),
                false => format!("upgrading to generation {next}"),
            });
        }
    }

    pub(super) fn tell_manager_of_failure(&self, origin: Origin, what: &str) {
        if let Some(notifier) = &self.notifier {
            notifier.ready(&format!("{}; the last {} failed: {what}", self.serving_status(), origin.noun()));
        }
    }

    /// After a signal, which may be systemd's own (`Type=notify-reload`): it waits to hear that the upgrade has begun, and
    /// then that it is over.
    pub(super) fn tell_manager_of_refusal(&self, what: &str) {
        if self.upgrade.in_flight() {
            self.tell_manager_of_upgrade();
        } else if self.upgrade.stage() == Stage::Serving && self.inherit.owns() {
            self.tell_manager_of_upgrade();
            self.tell_manager_of_failure(Origin::Push, what);
        }
    }

    /// While this process is still the main one, and before the new one says anything itself. One that pulled was started
    /// by another unit.
    pub(super) fn tell_manager_of_successor(&mut self) {
        let pid = self.attempt.as_ref().filter(|attempt| attempt.origin != Origin::Pull).and_then(Attempt::pid);
        if let (Some(notifier), Some(pid)) = (&self.notifier, pid) {
            let generation = self.shared.generation;
            match self.is_restarting() {
                // It says itself when it serves.
                true => notifier.hand_over_to(pid, &[], &format!("generation {} starts", generation + 1)),
                false => {
                    let status = format!("generation {} serves, generation {generation} drains", generation + 1);
                    notifier.hand_over_to(pid, &["READY=1"], &status);
                }
            }
            // Nothing that this process says is believed from now on.
            self.notifier = None;
        }
    }

    pub(super) fn tell_manager_of_drain(&self) {
        // A new build that is refused ends, and the service goes on.
        let ends = !self.drain.upgraded && self.inherit.stage() != inherit::Stage::Refused;
        if let Some(notifier) = self.notifier.as_ref().filter(|_| ends) {
            notifier.stopping(&format!("draining {} connections", self.shared.connections.open()));
        }
    }

    fn keep_listeners_in_store(&self) {
        let told = std::env::var_os("FDSTORE").is_some();
        let Some(notifier) = self.notifier.as_ref().filter(|_| self.shared.config.fd_store.unwrap_or(told)) else {
            return;
        };
        let deadline = Instant::now() + STORE_TIMEOUT;
        let listeners = self.shared.listeners();
        listeners.closed_names().iter().for_each(|name| notifier.remove_from_store(name, deadline));
        // Those of a `.socket` unit are the service manager's in any case.
        for entry in listeners.entries().filter(|entry| !entry.activated) {
            if let Some(fd) = entry.socket.fd() {
                notifier.store(&entry.name, fd.as_fd(), deadline);
            }
        }
    }

    pub(super) fn ping_watchdog(&mut self) {
        let Some(notifier) = self.notifier.as_ref().filter(|_| self.shared.config.watchdog) else { return };
        if let Some(interval) = notifier.watchdog() {
            notifier.watchdog_ping();
            self.timers.watchdog = Some(Instant::now() + interval);
        }
    }
}
