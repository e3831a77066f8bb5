//! The new process of an upgrade: how it is started, and what it is offered.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use super::attempt::{Process, REAPED_BY_OTHERS};
use crate::channel::Channel;
use crate::error::{Error, ErrorKind};
use crate::fault;
use crate::protocol::{Message, Offer, OfferedState, VERSIONS};
use crate::upgrade::Failure;
use crate::upgrade::spawn::Plan;
use crate::upgrade::stderr::StderrTail;

impl Engine {
    pub(super) fn spawn(&mut self) -> Result<(), (Failure, String)> {
        let shared = &self.shared;
        let not_spawned = |cause: String| (Failure::NotSpawned, cause);
        let Some(attempt) = &mut self.attempt else { return Err(not_spawned("was never asked for".to_owned())) };
        let plan = Plan::new(&shared.started, &shared.config, &attempt.request, shared.previous.as_ref());
        let plan = plan.map_err(|error| not_spawned(error.to_string()))?;
        fault::reached("old: looked at", None);
        let io = |error: io::Error| not_spawned(format!("cannot be spawned: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(io)?;
        let (pipe, stderr) = match shared.config.capture_stderr {
            true => io::pipe().map(|(reader, writer)| (Some(reader), Some(writer))).map_err(io)?,
            false => (None, None),
        };
        let channel = Channel::new(ours).map_err(io)?;
        let pid = plan.spawn(&theirs, stderr.as_ref().map(AsFd::as_fd));
        let pid = pid.map_err(|error| not_spawned(error.to_string()))?;
        log::info!("spawned {} as process {pid}", plan.program.display());
        attempt.pid = Some(pid.as_raw());
        // Where fds are few, these are what the next one needs.
        drop((theirs, stderr));
        let watched = Process::child(pid).map(|process| attempt.process = Some(process));
        attempt.channel = Some(channel);
        if let Some(pipe) = pipe {
            let shared = shared.clone();
            attempt.stderr = Some(StderrTail::follow(pipe, move || shared.wake_engine()).map_err(io)?);
        }
        watched.map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => (Failure::Exited, REAPED_BY_OTHERS.to_owned()),
            _ => io(error),
        })?;
        if plan.was_replaced(pid) {
            let tried = format!("start the new build `{}`", plan.program.display());
            let error = Error::new(ErrorKind::NotUpgraded, tried, "another was put there when it had been looked at");
            return Err(not_spawned(error.mend("ask again").to_string()));
        }
        Ok(())
    }

    /// The listeners as they are now, and the application's state.
    pub(super) fn offer(&mut self) -> Result<(), String> {
        let restart = self.offered_restart();
        // A restart is a fresh start.
        let state = if restart.is_none() { self.shared.take_state_of_application()? } else { None };
        let shared = &self.shared;
        let Some(attempt) = &mut self.attempt else { return Ok(()) };
        let Some(channel) = &mut attempt.channel else { return Err("cannot be talked to".to_owned()) };
        let held = shared.listeners();
        let (mut listeners, mut fds) = (Vec::with_capacity(held.entries().len()), vec![]);
        for entry in held.entries() {
            let Some(fd) = entry.socket.fd() else { continue };
            listeners.push(entry.offered());
            fds.push(fd);
        }
        drop(held);
        let mut offered_state = None;
        if let Some(state) = state {
            offered_state = Some(OfferedState { version: state.version, length: state.bytes.len() as u64 });
            fds.push(Arc::new(state.to_memfd().map_err(|error| format!("cannot get the state: {error}"))?));
        }
        let stderr = attempt.stderr.is_some();
        if stderr {
            let ours = io::stderr().as_fd().try_clone_to_owned();
            fds.push(Arc::new(ours.map_err(|error| format!("cannot get our stderr: {error}"))?));
        }
        let (restart, asker) = restart.unzip();
        fds.extend(asker.flatten().map(Arc::new));
        let (ready_timeout, trial) = (shared.config.ready_timeout, shared.config.trial);
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let offer = Offer {
            protocol: VERSIONS,
            generation: shared.generation + 1,
            pid: std::process::id().cast_signed(),
            listeners,
            state: offered_state,
            stderr,
            draining: self.older.iter().map(|(older, _)| older.clone()).collect(),
            ready_timeout_ms: milliseconds(attempt.request.ready_timeout().unwrap_or(ready_timeout)),
            trial_ms: milliseconds(attempt.request.trial().unwrap_or(trial)),
            build: Some(shared.build_identity()).filter(|build| is_unicode(&build.path)),
            program: Some(shared.started.lasting_program()).filter(|path| attempt.request.previous && is_unicode(path)),
            restart,
        };
        let message = Message::Offer(offer.into());
        channel.send(&message, fds).map_err(|broken| broken.to_string())?;
        if let Message::Offer(offer) = message {
            attempt.offered = offer.listeners;
        }
        Ok(())
    }
}

/// JSON can carry no other paths.
fn is_unicode(path: &Path) -> bool {
    path.to_str().is_some()
}
