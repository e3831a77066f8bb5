//! Requests and answers, one line of JSON each. `docs/protocol.md`, section 6, is the specification.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::protocol::BuildIdentity;
use crate::protocol::{Claims, DrainingGeneration, Kind, lossy};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub(crate) enum Request {
    Status,
    Upgrade(UpgradeRequest),
    Restart(UpgradeRequest),
    /// Of a supervisor: its own build, not that of its program.
    UpgradeSelf(UpgradeRequest),
    Stop {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        drain_timeout_ms: Option<u64>,
    },
    TakeOver,
    /// Of a supervisor: so many workers from now on.
    Scale {
        workers: usize,
    },
}

/// What the application of an old process has for its own clean-up, once its connections are closed.
const KILL_AFTER: Duration = Duration::from_secs(10);

/// How long an asker wants to be told about an upgrade.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Wait {
    /// Until the new process accepts. It may still be rolled back.
    Ready,
    /// Until the trial is over.
    #[default]
    Healthy,
    /// Until the old process has no connection left.
    Drained,
}

/// What may differ in one upgrade, or restart, from what the process was configured with. `default()` changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpgradeRequest {
    /// The program to start, absolute or relative to the working directory of the running process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<PathBuf>,
    /// Start the build that served before this one, if it is still where it was; not together with `exe`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub previous: bool,
    /// Its arguments, without argv\[0\].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// Variables set beside those of the running process.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<PathBuf>,
    /// When the last answer comes; of a restart when the new process is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait: Option<Wait>,
    /// How long the new process may be silent before it is ready, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_timeout_ms: Option<u64>,
    /// Of `handover exec`: how long after its last `bind` or `listen` the new process is taken for ready, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_delay_ms: Option<u64>,
    /// How long after commit the death of the new process makes the old one accept again, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial_ms: Option<u64>,
    /// How long open connections may take to finish, in milliseconds; 0 for ever. In a restart they are closed at once
    /// unless this is given and above 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_timeout_ms: Option<u64>,
    /// How long after that the old process of a restart may take to exit before it is killed, in milliseconds: 10,000 if
    /// it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kill_after_ms: Option<u64>,
}

impl UpgradeRequest {
    pub(crate) fn ready_timeout(&self) -> Option<Duration> {
        self.ready_timeout_ms.map(Duration::from_millis)
    }

    pub(crate) fn ready_delay(&self) -> Option<Duration> {
        self.ready_delay_ms.map(Duration::from_millis)
    }

    pub(crate) fn trial(&self) -> Option<Duration> {
        self.trial_ms.map(Duration::from_millis)
    }

    pub(crate) fn drain_timeout(&self) -> Option<Duration> {
        self.drain_timeout_ms.map(Duration::from_millis)
    }

    /// What a restart gives open connections to finish.
    pub(crate) fn drain_before_restart(&self) -> Duration {
        self.drain_timeout().unwrap_or_default()
    }

    pub(crate) fn kill_after(&self) -> Duration {
        self.kill_after_ms.map_or(KILL_AFTER, Duration::from_millis)
    }

    pub(crate) fn arguments(&self) -> Option<Vec<OsString>> {
        self.args.as_ref().map(|arguments| arguments.iter().map(OsString::from).collect())
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    Accepted(AcceptedEvent),
    Stage(StageEvent),
    Alive,
    Result(ResultEvent),
    Status(Box<Status>),
}

/// Who answers a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AcceptedEvent {
    /// The process, in its own pid namespace.
    pub pid: i32,
    /// Its generation.
    pub generation: u64,
    /// It runs the program below it, and stays when that is replaced.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub supervises: bool,
}

/// The stages that an asker is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum StageName {
    /// The new process runs.
    Spawned,
    /// It holds the listeners.
    Adopted,
    /// It says that it needs more time.
    Starting,
    /// It can serve.
    Ready,
    /// The old process accepts no more, the new one may.
    Committed,
    /// The trial is over.
    Healthy,
    /// Open connections are being finished.
    Draining,
    /// Of a restart: no connection of the old process is open any more.
    Drained,
    /// Of a restart: the old process has ended.
    Gone,
}

impl std::fmt::Display for StageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Spawned => "spawned",
            Self::Adopted => "adopted",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Committed => "committed",
            Self::Healthy => "healthy",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Gone => "gone",
        })
    }
}

/// A stage that has been reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StageEvent {
    /// Which.
    pub stage: StageName,
    /// Milliseconds since the request came in.
    pub at_ms: f64,
    /// The new process (`spawned`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Why it takes longer (`starting`); how the old process had to be ended (`gone`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What became of the listeners (`ready`; of `handover exec` `committed`).
    #[serde(flatten)]
    pub claims: Option<Claims>,
    /// Connections still open (`draining`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// Connections that were closed before they had ended (`drained`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<usize>,
}

impl StageEvent {
    pub(crate) fn new(stage: StageName, at_ms: f64) -> Self {
        Self { stage, at_ms, pid: None, reason: None, claims: None, connections: None, cut: None }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Outcome {
    /// The new process serves.
    Upgraded,
    /// Drained after a stop.
    Stopped,
    /// The old process has ended, and the new one serves.
    Restarted,
    /// A supervisor runs as many workers as it was told.
    Scaled,
    /// As one of those above, but connections were still open at the drain deadline and were closed.
    Cut,
    /// Not upgraded; the old process serves on.
    Failed,
    /// The new process failed in the trial; the old one accepts again.
    RolledBack,
    /// Nothing serves, or will soon: the process was told to stop meanwhile and drains; or the new process of a restart
    /// does not become ready.
    Ended,
    /// Another upgrade is under way, too many generations drain, or the process itself is draining.
    Busy,
    /// The peer's uid may not ask.
    NotPermitted,
    /// The request cannot be understood.
    BadRequest,
}

/// The last answer to an `upgrade` or a `stop`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ResultEvent {
    /// How it ended.
    pub result: Outcome,
    /// A sentence for people.
    pub message: String,
    /// Milliseconds since the request came in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_ms: Option<f64>,
    /// The process that serves now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Its generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// What can be done about it, where that can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
    /// How the new process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<String>,
    /// The last lines that the new process wrote to stderr.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stderr: Vec<String>,
    /// Connections that were closed before they had ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<usize>,
}

impl ResultEvent {
    pub(crate) fn new(result: Outcome, message: impl Into<String>) -> Self {
        Self {
            result,
            message: message.into(),
            at_ms: None,
            pid: None,
            generation: None,
            failure: None,
            mend: None,
            exit: None,
            stderr: vec![],
            cut: None,
        }
    }
}

/// What a process of a service is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum State {
    /// Not ready yet; does not accept.
    Starting,
    /// Accepts.
    Serving,
    /// Accepts, and a new process is starting up.
    Upgrading,
    /// Has committed an upgrade and would accept again if the new process died.
    Trial,
    /// Finishes open connections.
    Draining,
    /// Has nothing left to do but to exit.
    Drained,
    /// Was meant to become the new generation and will not.
    Refused,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Upgrading => "upgrading",
            Self::Trial => "trial",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Refused => "refused",
        })
    }
}

/// A process of a service and what it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// The process, in its own pid namespace.
    pub pid: i32,
    /// Its generation, from 1.
    pub generation: u64,
    /// What it is doing.
    pub state: State,
    /// When it started, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// What the application calls its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The program that an upgrade would start.
    #[serde(serialize_with = "lossy")]
    pub program: PathBuf,
    /// The working directory in which it would be started.
    #[serde(default, serialize_with = "lossy", skip_serializing_if = "is_empty")]
    pub directory: PathBuf,
    /// The build that runs.
    pub build: BuildIdentity,
    /// The build that served before this one: what `handover upgrade --previous` starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<BuildIdentity>,
    /// In the order of their names.
    pub listeners: Vec<ListenerStatus>,
    /// Accepted connections.
    pub connections: ConnectionCounts,
    /// Older generations that are finishing their connections.
    pub draining: Vec<DrainingGeneration>,
    /// The last upgrade that this process was part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_upgrade: Option<LastUpgrade>,
    /// What an upgrade is bounded by, where it does not say otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// The version of this library.
    pub handover: String,
    /// What `--name` finds it by; of a supervisor only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The processes that a supervisor runs. Empty for a server, which is one process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<WorkerStatus>,
}

/// A process that a supervisor runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// The process, in the pid namespace of the supervisor; none while the next is awaited, after one that ended by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Its place among the workers of its generation, from 0.
    pub worker: usize,
    /// Its generation.
    pub generation: u64,
    /// `starting`, `serving` or `draining`.
    pub state: State,
    /// When it was started, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// Connections that it has open, counted from outside.
    pub connections: usize,
    /// How many times in a row the worker in this place has ended by itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub crashes: u32,
    /// What it said last about itself (`STATUS=`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub said: Option<String>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What a process is configured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Limits {
    /// How long a new process may be silent before it is ready, in milliseconds.
    pub ready_timeout_ms: u64,
    /// How long after commit its death makes the old one accept again, in milliseconds.
    pub trial_ms: u64,
    /// How long open connections may take to finish, in milliseconds; 0 for ever.
    pub drain_timeout_ms: u64,
    /// How many older generations may drain when an upgrade is asked for.
    pub max_draining: usize,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// A listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ListenerStatus {
    /// By which it is handed over.
    pub name: String,
    /// What sort of socket.
    pub kind: Kind,
    /// Where it is bound.
    pub address: String,
    /// `SO_COOKIE`: the same in every generation.
    pub cookie: u64,
    /// How it came to this process: `handed-over`, `activated` or `bound`.
    pub source: String,
    /// Connections that wait to be accepted, or bytes of the next datagram; absent where the kernel does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// Whether the application has ever waited for connections here.
    pub waited_on: bool,
}

/// How many connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ConnectionCounts {
    /// Open now.
    pub open: usize,
    /// Accepted since the process began.
    pub accepted: u64,
}

/// The last upgrade that a process was part of, as the old or the new side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LastUpgrade {
    /// How it ended.
    pub result: Outcome,
    /// A sentence for people.
    pub message: String,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::garbled::garbled;

    #[test]
    fn requests_read_as_the_page_says() {
        let read = |text: &str| serde_json::from_str::<Request>(text);
        assert!(matches!(read(r#"{"request":"status","later":1}"#), Ok(Request::Status)));
        assert!(matches!(read(r#"{"request":"take-over"}"#), Ok(Request::TakeOver)));
        let Ok(Request::Upgrade(upgrade)) = read(r#"{"request":"upgrade","wait":"drained","trial_ms":5,"x":[]}"#)
        else {
            panic!()
        };
        assert_eq!((upgrade.wait, upgrade.trial()), (Some(Wait::Drained), Some(Duration::from_millis(5))));
        assert!(read(r#"{"request":"reboot"}"#).is_err());
        assert!(read(r#"{"request":"upgrade","args":"no list"}"#).is_err());
    }

    #[test]
    fn answers_are_written_as_the_page_says() {
        let event = Event::Stage(StageEvent {
            claims: Some(Claims { kept: vec!["http".into()], ..Claims::default() }),
            ..StageEvent::new(StageName::Ready, 0.5)
        });
        let text = serde_json::to_string(&event).unwrap();
        let wanted = r#"{"event":"stage","stage":"ready","at_ms":0.5,"kept":["http"],"added":[],"unclaimed":[]}"#;
        assert_eq!(text, wanted);
        let result = serde_json::to_string(&Event::Result(ResultEvent::new(Outcome::RolledBack, "m"))).unwrap();
        assert_eq!(result, r#"{"event":"result","result":"rolled-back","message":"m"}"#);
    }

    proptest::proptest! {
        #[test]
        fn garbled_requests_do_no_harm(line in garbled(requests())) {
            if let Ok(request) = serde_json::from_slice::<Request>(&line) {
                let again = serde_json::to_vec(&request).unwrap();
                assert!(serde_json::from_slice::<Request>(&again).is_ok());
            }
        }
    }

    fn requests() -> Vec<Vec<u8>> {
        let upgrade = r#"{"request":"upgrade","exe":"/srv/app","args":["a"],"env":{"A":"b"},"cwd":"/","trial_ms":5}"#;
        let stop = r#"{"request":"stop","drain_timeout_ms":250}"#;
        let others = [r#"{"request":"scale","workers":4}"#, r#"{"request":"take-over"}"#, r#"{"request":"status"}"#];
        [upgrade, stop].into_iter().chain(others).map(|text| text.as_bytes().to_vec()).collect()
    }
}
