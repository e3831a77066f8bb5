//! One upgrade as the old process sees it: the new process, the channel to it, who asked, and how it is told.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;

use crate::channel::Channel;
use crate::control::messages::{ResultEvent, UpgradeRequest, Wait};
use crate::control::server::ClientId;
use crate::control::state_of;
use crate::protocol::{Claims, OfferedListener};
use crate::upgrade::stderr::StderrTail;
use crate::upgrade::{Failure, Origin};
use crate::{reap, sys};

/// More threads of a new process are not looked at.
const THREADS_MAX: usize = 1024;

/// Who asked for an upgrade, and is told how it went.
pub(super) enum Requester {
    /// A signal, or a new process that pulls.
    Nobody,
    Client(ClientId, Wait),
    Application(Sender<ResultEvent>),
}

impl Requester {
    pub(super) fn client(&self) -> Option<ClientId> {
        match self {
            Self::Client(id, _) => Some(*id),
            Self::Nobody | Self::Application(_) => None,
        }
    }

    /// Whoever is not told otherwise hears when the trial is over.
    pub(super) fn waits_for(&self, wait: Wait) -> bool {
        match self {
            Self::Nobody => false,
            Self::Client(_, wanted) => *wanted == wait,
            Self::Application(_) => wait == Wait::Healthy,
        }
    }
}

pub(super) struct Attempt {
    pub(super) request: UpgradeRequest,
    pub(super) origin: Origin,
    pub(super) requester: Requester,
    pub(super) begun: Instant,
    pub(super) channel: Option<Channel>,
    pub(super) process: Option<Process>,
    /// As this process sees it.
    pub(super) pid: Option<i32>,
    pub(super) stderr: Option<StderrTail>,
    pub(super) offered: Vec<OfferedListener>,
    pub(super) claims: Claims,
    pub(super) adopted: bool,
    /// Why it says that it is still starting.
    pub(super) starting: Option<String>,
    /// When that was last passed on, and whether it has said something else since.
    pub(super) starting_told: Option<Instant>,
    pub(super) starting_untold: bool,
    /// Listeners on which the new application waits, once it has answered the commit.
    pub(super) accepting: Option<Vec<String>>,
    pub(super) committed: Option<Instant>,
    /// What went wrong; completes "the new build …".
    pub(super) cause: Option<String>,
}

impl Attempt {
    pub(super) fn new(request: UpgradeRequest, origin: Origin, requester: Requester) -> Self {
        Self {
            request,
            origin,
            requester,
            begun: Instant::now(),
            channel: None,
            process: None,
            pid: None,
            stderr: None,
            offered: vec![],
            claims: Claims::default(),
            adopted: false,
            starting: None,
            starting_told: None,
            starting_untold: false,
            accepting: None,
            committed: None,
            cause: None,
        }
    }

    pub(super) fn pid(&self) -> Option<i32> {
        self.pid
    }

    pub(super) fn elapsed_ms(&self) -> f64 {
        milliseconds_since(self.begun)
    }
}

/// With three decimals: microseconds are what can be told apart.
pub(crate) fn milliseconds_since(begun: Instant) -> f64 {
    (begun.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

/// Another process of this service.
pub(super) struct Process {
    pub(super) pid: Pid,
    pidfd: Arc<OwnedFd>,
    /// We spawned it, so we reap it.
    is_child: bool,
    exit: Option<String>,
}

/// How a child ended that was not ours to reap.
pub(super) const REAPED_BY_OTHERS: &str = "ended (how is unknown: this program reaps or ignores its children)";

impl Process {
    /// One that was just spawned; ESRCH where it is gone and somebody has reaped it. One that cannot be watched is
    /// killed: without us it would start afresh.
    pub(super) fn child(pid: Pid) -> io::Result<Self> {
        let pidfd = sys::pidfd_open(pid).inspect_err(|_| {
            // A child that nobody has reaped keeps its pid.
            if kill(pid, Signal::SIGKILL).is_ok() {
                reap::aside(move || {
                    let _ = waitpid(pid, None);
                });
            }
        })?;
        Ok(Self { pid, pidfd: Arc::new(pidfd), is_child: true, exit: None })
    }

    pub(super) fn other(pid: Pid, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd: Arc::new(pidfd), is_child: false, exit: None }
    }

    /// How it ended, once it has; a child is then being reaped.
    pub(super) fn exit(&mut self) -> Option<String> {
        if self.exit.is_none() {
            self.exit = self.look();
        }
        self.exit.clone()
    }

    fn look(&self) -> Option<String> {
        if !self.is_child {
            let ended = crate::poll::wait(self.pidfd.as_fd(), PollFlags::POLLIN, Some(Instant::now()));
            return ended.is_ok_and(|ended| ended).then(|| "ended".to_owned());
        }
        match sys::ended_child(sys::Child::Pidfd(self.pidfd.as_fd())) {
            Ok(ended) => ended.map(|(_, end)| end.to_string()).inspect(|_| self.reap()),
            // Somebody in this process reaps every child, or SIGCHLD is ignored.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => Some(REAPED_BY_OTHERS.to_owned()),
            Err(_) => None,
        }
    }

    fn reap(&self) {
        let pidfd = Arc::clone(&self.pidfd);
        reap::aside(move || {
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
        });
    }

    /// Stopped, by SIGSTOP or a terminal. Only a child is looked at: another pid may mean somebody else here.
    pub(super) fn stands_still(&self) -> bool {
        self.is_child && stands_still(self.pid)
    }

    /// Whether a thread of it could run and is not let. What it has not come to do yet is no fault of its own then.
    pub(super) fn waits_for_a_processor(&self) -> bool {
        self.is_child && waits_for_a_processor(self.pid)
    }

    pub(super) fn kill(&self) {
        // ESRCH: it is gone already. EPERM: it pulled, as another user.
        let _ = sys::pidfd_send_signal(self.pidfd.as_fd(), Signal::SIGKILL);
    }

    /// Kills it and waits until every thread of it is gone, which is soon. False: it lives.
    pub(super) fn kill_and_wait(&self, longest: Duration) -> bool {
        let may = sys::pidfd_send_signal(self.pidfd.as_fd(), Signal::SIGKILL);
        let denied = may.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
        self.wait_for_end(if denied { Duration::ZERO } else { longest })
    }

    pub(super) fn wait_for_end(&self, longest: Duration) -> bool {
        let deadline = Some(Instant::now() + longest);
        crate::poll::wait(self.pidfd.as_fd(), PollFlags::POLLIN, deadline).unwrap_or(false)
    }
}

/// Whether a process is stopped, by SIGSTOP or a terminal.
pub(crate) fn stands_still(pid: Pid) -> bool {
    state_of(pid.as_raw()) == Some('T')
}

fn waits_for_a_processor(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(THREADS_MAX);
    let numbers = threads.filter_map(|thread| thread.file_name().to_str()?.parse().ok());
    numbers.filter_map(state_of).any(|state| state == 'R')
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// The end of a failed upgrade, held back until the new process and its stderr have ended.
pub(super) struct Report {
    pub(super) result: ResultEvent,
    pub(super) failure: Failure,
    pub(super) requester: Requester,
    pub(super) process: Option<Process>,
    pub(super) stderr: Option<StderrTail>,
    pub(super) deadline: Instant,
}

impl Report {
    /// A grandchild may hold the pipe open, and a dying process may take its time.
    pub(super) const PATIENCE: Duration = Duration::from_millis(500);

    pub(super) fn is_complete(&mut self) -> bool {
        let ended = self.process.as_mut().is_none_or(|process| process.exit().is_some());
        ended && self.stderr.as_ref().is_none_or(StderrTail::ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn shell(script: &str) -> (Child, Pid) {
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        (child, pid)
    }

    fn until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn one_that_could_run_is_told_from_one_that_waits() {
        let ((mut busy, busy_pid), (mut idle, idle_pid)) = (shell("while :; do :; done"), shell("read line"));
        until(|| state_of(idle_pid.as_raw()) == Some('S') && !waits_for_a_processor(idle_pid));
        until(|| waits_for_a_processor(busy_pid));
        for child in [&mut busy, &mut idle] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!waits_for_a_processor(busy_pid));
    }
}
