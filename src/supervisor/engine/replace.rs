//! The supervisor replaces itself: the same process executes its new build, and everything that it has stays.
//!
//! First the new build is rehearsed: a child runs it, with the same state and the same fds, and it says whether it could go
//! on from there. Until it has said so, and if it cannot be executed after all, this build goes on.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Supervisor;
use super::answers::stage;
use super::resume::{self, Answer};
use crate::config::Config;
use crate::control::UpgradeRequest;
use crate::control::messages::{Event as Said, Outcome, ResultEvent, StageEvent, StageName};
use crate::control::server::ClientId;
use crate::engine::milliseconds_since;
use crate::error::Error;
use crate::fault;
use crate::saved::moment;
use crate::supervisor::machine::Phase;
use crate::supervisor::output::{Output, Stream};
use crate::supervisor::trampoline;
use crate::sys::End;
use crate::upgrade::spawn::{Plan, Started, c_string};

/// How long a new build may take to say that it can.
const REHEARSAL_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 4096;

/// Under way, for one who waits for it.
pub(super) struct Replacement {
    pub(super) client: ClientId,
    begun: Instant,
    /// As this process will have been started then.
    own: Started,
    plan: Plan,
    identity: Option<Identity>,
    pub(super) child: Pid,
    answer: PipeReader,
    answered: Vec<u8>,
    pub(super) stderr: Output,
    pub(super) deadline: Instant,
    /// How the rehearsal ended.
    exit: Option<End>,
}

type Identity = (u64, u64, i64, i64);

/// What the next build has to tell when it goes on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Replaced {
    client: ClientId,
    #[serde(with = "moment")]
    begun: Instant,
}

impl Replacement {
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.answer.as_fd()].into_iter().filter(|_| self.exit.is_none())
    }

    /// With everything that it has started, unless it is reaped: then its number may be another's.
    fn kill(&self) {
        if self.exit.is_none() {
            let _ = killpg(self.child, Signal::SIGKILL);
            let _ = kill(self.child, Signal::SIGKILL);
        }
    }

    fn replaced(&self) -> Replaced {
        Replaced { client: self.client, begun: self.begun }
    }
}

impl Supervisor {
    pub(super) fn replace_self(&mut self, client: ClientId, request: &UpgradeRequest) {
        let refusal = self.machine.refusal().map(|refusal| self.words_for_refusal(refusal));
        let server =
            self.taken_over.as_ref().map(|server| format!("process {}, which is taken over, still drains", server.pid));
        let busy = refusal.or(server);
        let busy = busy.or_else(|| self.is_busy().then(|| "another request is being worked on".to_owned()));
        if let Some(message) = busy {
            return self.finish_with(client, ResultEvent::new(Outcome::Busy, message));
        }
        self.accept(client);
        self.schedule_alive();
        let begun = Instant::now();
        self.sockets.kept.settle();
        match self.rehearse(client, begun, request) {
            Ok(replacement) => {
                let spawned = stage(StageName::Spawned, begun);
                let spawned = StageEvent { pid: Some(replacement.child.as_raw()), ..spawned };
                self.server.send(client, &Said::Stage(spawned));
                self.replacement = Some(replacement);
            }
            Err(error) => self.not_replaced(client, begun, Outcome::Failed, error.to_string(), vec![]),
        }
    }

    /// Somebody waits for something that does not cross.
    fn is_busy(&self) -> bool {
        let asked = self.attempt.is_some() || self.scaling.is_some() || self.replacement.is_some();
        asked || !self.reports.is_empty() || !self.stop_clients.is_empty()
    }

    /// Starts the new build in a child.
    fn rehearse(&self, client: ClientId, begun: Instant, request: &UpgradeRequest) -> Result<Replacement, Error> {
        let plan = Plan::new(&self.own, &Config::default(), request, None)?;
        let failed = |error: io::Error| Error::io(format!("start `{}`", plan.program.display()), error);
        let (answer, answer_of_child) = io::pipe().map_err(failed)?;
        fcntl(&answer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|error| failed(error.into()))?;
        let (stderr, stderr_of_child) = Output::pipe(Stream::Stderr, None).map_err(failed)?;
        let memfd = self.save(Replaced { client, begun }).map_err(failed)?;
        let child = self.with_passed_fds(&memfd, |fds| {
            let same = fds.iter().map(|fd| (*fd, fd.as_raw_fd()));
            let streams = [(answer_of_child.as_fd(), 1), (stderr_of_child.as_fd(), 2)];
            // In a group of its own, so that nothing of a build that is no supervisor stays and holds the listeners.
            let arguments = trampoline::arguments(None, None, &plan.program, &resume::rehearsal(&memfd));
            plan.run(Path::new(trampoline::PROGRAM), &arguments, &[], same.chain(streams).collect())
        })?;
        Ok(Replacement {
            client,
            begun,
            own: self.own.changed_by(request),
            identity: identity_of(&plan),
            plan,
            child,
            answer,
            answered: vec![],
            stderr,
            deadline: begun + request.ready_timeout().unwrap_or(REHEARSAL_TIMEOUT),
            exit: None,
        })
    }

    pub(super) fn read_rehearsal(&mut self) {
        let Some(replacement) = &mut self.replacement else { return };
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = replacement.answer.read(&mut buffer) {
            if replacement.answered.len() < ANSWER_BYTES_MAX {
                replacement.answered.extend_from_slice(buffer.get(..count).unwrap_or_default());
            }
        }
    }

    /// A child has ended, and is not reaped yet.
    pub(super) fn kill_what_is_left_of_rehearsal(&self, pid: Pid) {
        self.replacement.iter().filter(|replacement| replacement.child == pid).for_each(Replacement::kill);
    }

    /// A child that is no worker has ended. False: it was no rehearsal.
    pub(super) fn rehearsal_ended(&mut self, pid: Pid, end: End) -> bool {
        let Some(replacement) = self.replacement.as_mut().filter(|replacement| replacement.child == pid) else {
            return false;
        };
        replacement.exit = Some(end);
        replacement.stderr.pass_on();
        self.read_rehearsal();
        true
    }

    /// Goes on with the replacement as far as that can be done now.
    pub(super) fn look_at_replacement(&mut self) {
        let Some(replacement) = &mut self.replacement else { return };
        let verdict = match replacement.exit {
            // Perhaps it has drained already.
            _ if matches!(self.machine.phase(), Phase::Draining | Phase::Ended) => {
                Err((Outcome::Ended, "this process was told to stop meanwhile".to_owned()))
            }
            None if replacement.deadline <= Instant::now() => {
                let allowed = replacement.deadline.duration_since(replacement.begun);
                Err((
                    Outcome::Failed,
                    format!("the new build has not said within {allowed:?} whether it can take over"),
                ))
            }
            None => return,
            Some(end) => verdict(end, &replacement.answered).map_err(|cause| (Outcome::Failed, cause)),
        };
        if let Err((outcome, cause)) = verdict.and_then(|()| self.become_next().map_err(|it| (Outcome::Failed, it))) {
            self.give_up_replacement(outcome, cause);
        }
    }

    fn give_up_replacement(&mut self, outcome: Outcome, cause: String) {
        let Some(mut replacement) = self.replacement.take() else { return };
        replacement.kill();
        replacement.stderr.pass_on();
        self.not_replaced(replacement.client, replacement.begun, outcome, cause, replacement.stderr.last_lines());
    }

    fn not_replaced(&mut self, client: ClientId, begun: Instant, outcome: Outcome, cause: String, stderr: Vec<String>) {
        let message = format!("the supervisor is not replaced: {cause}; process {} goes on", std::process::id());
        log::error!("{message}");
        let result = ResultEvent {
            at_ms: Some(milliseconds_since(begun)),
            failure: Some(cause),
            stderr,
            ..ResultEvent::new(outcome, message)
        };
        self.finish_with(client, result);
    }

    /// Returns only if that has failed, or is to be tried again.
    fn become_next(&mut self) -> Result<(), String> {
        // A signal that came before this is handled by this build, and one that comes later by the next.
        let _ = SigSet::all().thread_block();
        let result = match self.has_caught_signal() {
            true => Ok(()),
            false => self.execute_next(),
        };
        let _ = self.own.signal_mask.thread_set_mask();
        result
    }

    fn execute_next(&mut self) -> Result<(), String> {
        self.sockets.kept.settle();
        let Some(replacement) = &mut self.replacement else { return Ok(()) };
        if identity_of(&replacement.plan) != replacement.identity {
            return Err("the new build was replaced by another one meanwhile".to_owned());
        }
        let (plan, replaced) = (&replacement.plan, replacement.replaced());
        let program = c_string(plan.program.as_os_str());
        let arguments = plan.argv.iter().map(|argument| c_string(argument)).collect::<io::Result<Vec<_>>>();
        let failed = |error: io::Error| format!("it cannot be executed: {error}");
        let (program, arguments) = (program.map_err(failed)?, arguments.map_err(failed)?);
        log::info!("process {} goes on as {}", std::process::id(), plan.program.display());
        std::mem::swap(&mut self.own, &mut replacement.own);
        fault::reached("exec: rehearsed", None);
        let saved = self.save(replaced);
        let error = saved.and_then(|memfd| {
            let environment = environment(&memfd)?;
            self.with_passed_fds(&memfd, |fds| {
                fds.iter().try_for_each(|fd| set_cloexec(*fd, false))?;
                let error = nix::unistd::execve(&program, &arguments, &environment);
                fds.iter().try_for_each(|fd| set_cloexec(*fd, true))?;
                error.map(|never| match never {}).map_err(io::Error::from)
            })
        });
        if let Some(replacement) = &mut self.replacement {
            std::mem::swap(&mut self.own, &mut replacement.own);
        }
        error.map_err(failed)
    }

    /// The next build is this one.
    pub(super) fn tell_of_replacement(&mut self, replaced: &Replaced) {
        let (pid, version, program) = (std::process::id(), env!("CARGO_PKG_VERSION"), env::current_exe());
        let of = program.map(|program| format!(" of {}", program.display())).unwrap_or_default();
        let message = format!("process {pid} goes on as handover {version}{of}, with all that it ran");
        log::info!("{message}");
        let result = ResultEvent {
            at_ms: Some(milliseconds_since(replaced.begun)),
            pid: Some(pid.cast_signed()),
            generation: Some(self.machine.generation()),
            ..ResultEvent::new(Outcome::Upgraded, message)
        };
        self.finish_with(replaced.client, result);
    }
}

/// What the rehearsal has come to.
fn verdict(end: End, answered: &[u8]) -> Result<(), String> {
    let answer = serde_json::from_slice::<Answer>(answered);
    match (end, answer) {
        (End::Exited { status: 0 }, Ok(Answer { takes_over: true, .. })) => Ok(()),
        (_, Ok(Answer { handover, reason, .. })) => {
            Err(format!("the new build, handover {handover}, refuses: {reason}"))
        }
        (End::Exited { status: 0 }, Err(_)) => Err("the new build did not say that it can take over".to_owned()),
        (end, Err(_)) => Err(format!("the new build {end}")),
    }
}

fn identity_of(plan: &Plan) -> Option<Identity> {
    let file = fs::metadata(&plan.program).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}

fn environment(memfd: &OwnedFd) -> io::Result<Vec<std::ffi::CString>> {
    let others = env::vars_os().filter(|(name, _)| name != resume::STATE_VARIABLE);
    let others = others.map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='));
    let all = others.map(OsString::from_vec).chain([resume::variable(memfd)]);
    all.map(|variable| c_string(&variable)).collect()
}

fn set_cloexec(fd: BorrowedFd<'_>, is_set: bool) -> io::Result<()> {
    let flags = if is_set { FdFlag::FD_CLOEXEC } else { FdFlag::empty() };
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(())
}
