//! How a service wants to be upgraded.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::control::{Limits, Target};
use crate::listeners::Unclaimed;

/// How a process takes part in upgrades. The defaults suit most servers.
///
/// ```
/// use std::time::Duration;
/// use handover::Config;
///
/// let config = Config::default()
///     .version(env!("CARGO_PKG_VERSION"))
///     .ready_timeout(Duration::from_secs(120))
///     .drain_timeout(Duration::from_secs(600));
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct Config {
    pub(crate) ready_timeout: Duration,
    pub(crate) trial: Duration,
    pub(crate) linger: Duration,
    pub(crate) notice: Duration,
    /// Zero: for ever.
    pub(crate) drain_timeout: Duration,
    pub(crate) max_draining: usize,
    pub(crate) unclaimed: Unclaimed,
    pub(crate) version: Option<String>,
    pub(crate) program: Option<PathBuf>,
    pub(crate) arguments: Option<Vec<OsString>>,
    pub(crate) environment: Vec<(OsString, Option<OsString>)>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) capture_stderr: bool,
    pub(crate) control: ControlSocket,
    pub(crate) take_over_from: Option<Target>,
    pub(crate) signals: Signals,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) fd_store: Option<bool>,
    pub(crate) watchdog: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ControlSocket {
    Default,
    In(PathBuf),
    Off,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ready_timeout: Duration::from_secs(30),
            trial: Duration::from_secs(1),
            linger: Duration::from_secs(5),
            notice: Duration::ZERO,
            drain_timeout: Duration::from_secs(60),
            max_draining: 4,
            unclaimed: Unclaimed::default(),
            version: None,
            program: None,
            arguments: None,
            environment: vec![],
            directory: None,
            capture_stderr: true,
            control: ControlSocket::Default,
            take_over_from: None,
            signals: Signals::default(),
            pid_file: None,
            fd_store: None,
            watchdog: false,
        }
    }
}

impl Config {
    pub(crate) fn limits(&self) -> Limits {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Limits {
            ready_timeout_ms: milliseconds(self.ready_timeout),
            trial_ms: milliseconds(self.trial),
            drain_timeout_ms: milliseconds(self.drain_timeout),
            max_draining: self.max_draining,
        }
    }

    /// How long a new process may be silent before it is ready: 30 s by default. Each
    /// [`still_starting`](crate::Handover::still_starting) starts it anew. After it the new process is killed.
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// How long after commit the death of the new process makes the old one accept again: 1 s by default.
    pub fn trial(mut self, time: Duration) -> Self {
        self.trial = time;
        self
    }

    /// How long, once drained, a kept connection may be silent before it is closed: 5 s by default, a day at most, and up
    /// to as much again, so that not all clients come back at once. For the HTTP servers of this crate and for
    /// [`Handover::wait_for_request`](crate::Handover::wait_for_request).
    pub fn linger(mut self, time: Duration) -> Self {
        self.linger = time;
        self
    }

    /// For how long a process that is told to stop serves on and is not [ready](crate::Handover::is_ready), before it
    /// closes its listeners: not at all, by default. Longer than a load balancer takes to notice. A second stop, by signal
    /// or by the application, ends it. An upgrade or a restart needs no notice, and gives none.
    pub fn notice(mut self, time: Duration) -> Self {
        self.notice = time;
        self
    }

    /// How long open connections may take to finish: 60 s by default, zero for ever. What is left then is closed and
    /// counted.
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// How many older generations may be draining when an upgrade is asked for: 4 by default.
    pub fn max_draining(mut self, generations: usize) -> Self {
        self.max_draining = generations;
        self
    }

    /// What to do with listeners that this build does not ask for before it is ready: close them, by default.
    pub fn unclaimed(mut self, policy: Unclaimed) -> Self {
        self.unclaimed = policy;
        self
    }

    /// What `handover status` calls this build.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// The program that an upgrade starts. By default the path that this process was started with, resolved again
    /// each time: a name without a slash is looked for in `PATH`, a symbolic link is followed to where it points then.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// The arguments of the new process, without argv\[0\]. By default those of this process.
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments = Some(arguments.into_iter().map(Into::into).collect());
        self
    }

    /// A variable that the new process has beside those that this process has at that time.
    pub fn environment(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), Some(value.into())));
        self
    }

    /// A variable of this process that the new one does not get.
    pub fn without_environment(mut self, name: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), None));
        self
    }

    /// The working directory of the new process. By default the one in which this process was started, by the path
    /// that it was started with.
    pub fn directory(mut self, path: impl Into<PathBuf>) -> Self {
        self.directory = Some(path.into());
        self
    }

    /// Whether a new process writes its stderr through the old one until commit, so that the last lines can be shown
    /// when the upgrade fails: yes by default. Until commit stderr is then a pipe, even on a terminal.
    pub fn capture_stderr(mut self, capture: bool) -> Self {
        self.capture_stderr = capture;
        self
    }

    /// The directory of the control socket. By default the first of `$HANDOVER_DIR`, `$RUNTIME_DIRECTORY/handover`,
    /// `/run/handover` for root, `$XDG_RUNTIME_DIR/handover`, `/tmp/handover-UID`. It is made if it is missing, and must
    /// belong to this user and be writable to nobody else.
    pub fn control_directory(mut self, path: impl Into<PathBuf>) -> Self {
        self.control = ControlSocket::In(path.into());
        self
    }

    /// No control socket: upgrades only by signal or by [`Handover::upgrade`](crate::Handover::upgrade).
    pub fn without_control_socket(mut self) -> Self {
        self.control = ControlSocket::Off;
        self
    }

    /// Takes the listeners of a running process that did not start this one: a second unit, a new container that
    /// shares the control directory. Without effect in a process that was spawned for an upgrade.
    pub fn take_over_from(mut self, target: Target) -> Self {
        self.take_over_from = Some(target);
        self
    }

    /// A file that names the serving process, from when it accepts until the service stops. It is replaced by renaming,
    /// so whoever reads it finds one pid or the other.
    pub fn pid_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.pid_file = Some(path.into());
        self
    }

    /// Whether the listeners are put into systemd's fd store (`FileDescriptorStoreMax=` in the unit), so that a restart
    /// after a crash finds them with their queues. By default they are if systemd says that there is a store, which it
    /// does since version 254 (`$FDSTORE`).
    pub fn fd_store(mut self, store: bool) -> Self {
        self.fd_store = Some(store);
        self
    }

    /// Whether the library answers systemd's watchdog (`WatchdogSec=`) for the application, from its own thread: no by
    /// default, because that shows that the process lives and not that it serves.
    pub fn watchdog(mut self, answer: bool) -> Self {
        self.watchdog = answer;
        self
    }

    /// Which signals mean what.
    pub fn signals(mut self, signals: Signals) -> Self {
        self.signals = signals;
        self
    }
}

/// Which signals mean what to a process. By default SIGUSR2 and SIGHUP upgrade; SIGTERM, SIGINT and SIGQUIT drain, and
/// a second one of them closes what is left at once.
///
/// SIGHUP, SIGINT and SIGQUIT are left alone where they are ignored when the process starts: so do `nohup`, and shells for
/// what they run in the background. A signal means one thing: what is said last.
///
/// ```
/// use handover::Signals;
///
/// let hup_is_mine = Signals::default().without(Signals::HANGUP);
/// let all_are_mine = Signals::none();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct Signals {
    pub(crate) upgrade: Vec<i32>,
    pub(crate) stop: Vec<i32>,
}

impl Default for Signals {
    fn default() -> Self {
        Self { upgrade: vec![libc::SIGUSR2, libc::SIGHUP], stop: vec![libc::SIGTERM, libc::SIGINT, libc::SIGQUIT] }
    }
}

impl Signals {
    /// SIGHUP.
    pub const HANGUP: i32 = libc::SIGHUP;

    /// No handler is installed: all signals are the application's.
    pub fn none() -> Self {
        Self { upgrade: vec![], stop: vec![] }
    }

    /// This signal upgrades.
    pub fn upgrade_on(self, signal: i32) -> Self {
        let mut this = self.without(signal);
        this.upgrade.push(signal);
        this
    }

    /// This signal drains.
    pub fn stop_on(self, signal: i32) -> Self {
        let mut this = self.without(signal);
        this.stop.push(signal);
        this
    }

    /// This signal is the application's.
    pub fn without(mut self, signal: i32) -> Self {
        self.upgrade.retain(|one| *one != signal);
        self.stop.retain(|one| *one != signal);
        self
    }
}
